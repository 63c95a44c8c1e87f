"""FastVID: the salient tokens of each frame, and anchor tokens of every few frames into which their segment merges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fftriton_kernels import NO_LINK, merge_mean, topk_keep

from ..checks import check_budget, check_count, check_real
from .base import Prompt, Steps, VideoTokens
from .before_layers import BeforeLayers
from .budgets import shared_out
from .clusters import peak_scores
from .frames import FrameRows
from .importances import Importance, check_importance, importance_of
from .nearest import nearest
from .pruners import best_columns, positions_of
from .segments import segment_starts

_NEIGHBOURS = 4  # of a token in its frame, itself among them, whose distances say how dense it is there
_ROUNDING = 1e-9  # of a share that is a whole number but for floating point


@dataclass(frozen=True)
class FastVID(BeforeLayers):
    """Keep the salient tokens of each frame, and a few anchors of each segment into which all of its others merge.

    1. The video is cut into segments where the means of neighbouring frames have a cosine below `segment_threshold`,
       and at the lowest of the other cosines, until there are `min_segments`.
    2. The share `contextual` of the budget is set aside. The rest goes to the most important tokens of each frame, the
       same number of each, which stay as they are.
    3. What was set aside is shared among segments by their tokens, and within a segment among every `stride`-th frame,
       counted back from its last one: there the tokens with the highest peaks of density become anchors. If these
       frames are full, other frames get anchors, too.
    4. In each of these frames, every token of the segment that is not salient joins the most similar anchor x. With the
       mean m of the n tokens that joined it, x becomes w x + (1 - w) m, where w = max(1 / (n + 1), anchor_weight).

    It needs an importance: the published one is the attention in the pooling head of the vision tower, which reaches no
    language model; pass it as a function if you have it. The work is linear in the tokens times the frames with anchors
    in a segment. Ties go to the earlier token.

    Args:
        budget: video tokens to keep, as a fraction of the prompt's, in (0, 1].
        contextual: the share of the budget for anchors, in [0, 1].
        segment_threshold: cosine of the means of neighbouring frames below which a segment ends, in [-1, 1].
        min_segments: the fewest segments of a video, unless it has fewer frames.
        stride: one in so many frames of a segment has anchors, at least 1.
        anchor_weight: the least that an anchor counts in what it becomes, in [0, 1].
        importance: "distinctness", "norm", or a function of a FrameContext that returns [F, P], as for TopKPruner.

    Raises:
        TypeError, ValueError: a parameter out of range. While it runs, what a function returns.

    Source:
        FastVID, arXiv:2503.11187; LunarShen/FastVID, commit a40a109, fastvid_llavaonevision, modeling_qwen2.py.
    """

    budget: float = 0.3
    contextual: float = 0.4
    segment_threshold: float = 0.9
    min_segments: int = 8
    stride: int = 4
    anchor_weight: float = 0.6
    importance: str | Importance = "distinctness"

    def __post_init__(self) -> None:
        check_budget("FastVID", "budget", self.budget)
        check_real("FastVID", "contextual", self.contextual, 0.0, 1.0)
        check_real("FastVID", "segment_threshold", self.segment_threshold, -1.0, 1.0)
        check_count("FastVID", "min_segments", self.min_segments, 1)
        check_count("FastVID", "stride", self.stride, 1)
        check_real("FastVID", "anchor_weight", self.anchor_weight, 0.0, 1.0)
        check_importance("FastVID", self.importance, predictor=False)

    def count(self, frames: int, patches: int) -> int | None:
        return self._num_kept_of(frames * patches)

    def shorten(self, tokens: VideoTokens, prompt: Prompt) -> Steps:
        frames, total = FrameRows.of_prompt(prompt, tokens, empty=False), self.num_kept(tokens)
        contextual = math.floor(self.contextual * total + _ROUNDING)
        even = shared_out(total - contextual, tokens.num_video, torch.ones_like(frames.sizes), frames.sizes)
        importance = importance_of("FastVID", self.importance, tokens, frames)
        salient = best_columns(importance, frames.present, even)
        starts = [segment_starts(one, self.segment_threshold, self.min_segments) for one in frames.contexts(tokens)]
        segment, free = torch.cat(starts).cumsum(0) - 1, frames.present & ~salient
        weight = _anchor_weights(segment, frames.sizes, self.stride)
        counts = shared_out(contextual, tokens.num_video - (total - contextual), weight, free.sum(1))
        anchors = best_columns(peak_scores(tokens, frames, free, _NEIGHBOURS), free, counts)
        stays = frames.spread(salient | anchors, torch.ones_like(tokens.position, dtype=torch.bool))
        rows = positions_of(stays[0], tokens.length - tokens.num_video + total)
        left = tokens.keep(rows[None], total)
        parts = (tokens.hidden, *tokens.additions)
        whole = torch.cat(parts, -1) if tokens.additions else tokens.hidden
        for number, roots in _groups(tokens, frames, free, anchors, segment):
            means = merge_mean(whole, roots, capacity=number)
            row = means.kept[0]
            joined = torch.zeros_like(roots[0]).index_add_(0, roots[0].clamp_min(0), (roots[0] >= 0).long())[row]
            own = (1 / (joined + 1)).clamp_min(self.anchor_weight)[:, None]
            kept, of_parts = torch.searchsorted(rows, row), means.x[0].split(tokens.hidden.shape[-1], -1)
            for part, to, mean in zip(parts, (left.hidden, *left.additions), of_parts, strict=True):
                mixed = own * part[0, row].float() + (1 - own) * mean.float()
                to[0].index_copy_(0, kept, mixed.to(to.dtype))
        return left


def _anchor_weights(segment: Tensor, sizes: Tensor, stride: int) -> Tensor:
    """[F] fp32: a segment's tokens / its frames with anchors, for these frames; 0 for the others.

    segment [F] int64, the number of each frame's segment, ascending. sizes [F] int64, its tokens.
    """
    lengths, of_segment = (
        torch.zeros_like(segment).index_add_(0, segment, one) for one in (torch.ones_like(segment), sizes)
    )
    behind = lengths.cumsum(0)[segment] - 1 - torch.arange(len(segment), device=segment.device)
    return (of_segment / (lengths / stride).ceil().clamp_min(1))[segment].where(behind % stride == 0, 0.0)


def _groups(
    tokens: VideoTokens, frames: FrameRows, free: Tensor, anchors: Tensor, segment: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """For the first frame with anchors of every segment, then the second, and so on: how many anchors these frames
    have, and the anchor that each row joins there, [1, N] int64: -1 for none, its own for these anchors.

    free [F, P] bool: what joins anchors. anchors [F, P] bool. segment [F] int64: the number of each frame's segment.
    """
    frame, has = torch.arange(len(segment), device=segment.device), anchors.any(1)
    before = has.cumsum(0) - has.long()
    place = (before - before[torch.searchsorted(segment, segment)]).where(has, -1)  # among those of its segment
    on_host = list(zip(*torch.stack([place, anchors.sum(1)]).tolist(), strict=True))
    column, _ = topk_keep(anchors.float(), anchors.sum(1), capacity=max(1, *(count for _, count in on_host)))
    rows = frames.rows.gather(1, column.clamp_min(0)).where(column >= 0, -1)  # [F, K]: of the anchors
    for turn in range(max(at for at, _ in on_host) + 1):
        own = place == turn
        aim = torch.full_like(segment, -1).scatter_reduce_(0, segment, frame.where(own, -1), "amax")[segment]
        similarity, row = nearest(tokens, frames, rows[aim.clamp_min(0)].where((aim >= 0)[:, None], -1))
        row = row.where(free & (similarity > NO_LINK), -1)
        row = torch.where(anchors & own[:, None], frames.rows, row)
        number = sum(count for at, count in on_host if at == turn)
        yield number, frames.spread(row, torch.full_like(tokens.position, -1))
