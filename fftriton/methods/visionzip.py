"""VisionZip: of each frame the most important tokens, and a few into which all others merge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_bool, check_real
from .base import VideoTokens
from .frame_methods import FrameMethod
from .frames import FrameRows
from .importances import Importance, Keys, check_importance, check_keys, importance_of, keys_of
from .pruners import best_columns, cosines

_ROUNDING = 1e-9  # of a share that is a whole number but for floating point


@dataclass(frozen=True)
class VisionZip(FrameMethod):
    """Keep the most important tokens of each frame, and merge all others into evenly spaced ones of them.

    Every frame keeps the same number of tokens. Of n that stay, ceil(contextual * n) are contextual: they stand at
    even distances among those that are not important, and each of the others merges into the one with the most similar
    key. Nothing is dropped, so every frame keeps at least one token; a budget below is met as closely as possible. It
    needs an importance: the published one is the attention in the model's vision tower, which reaches no language
    model; pass it as a function if you have it. Ties go to the earlier token.

    Args:
        budget: video tokens to keep, as a fraction of the prompt's, in (0, 1].
        importance: "distinctness", "norm", or a function of a FrameContext that returns [F, P], as for TopKPruner; as a
            pruner of KVTP "predictor", too.
        contextual: the share of the contextual tokens, in [0, 1].
        keys: by whose cosines tokens are compared: "tokens", or a function of a FrameContext that returns [F, P, E]; as
            a pruner of KVTP "predictor", too.
        proportional: whether a row that has merged counts as many times in attention, in every layer that follows and
            in decode, as it stands for tokens: log(size) is added to its scores. Means stay as they are.

    Raises:
        TypeError, ValueError: a parameter out of range. While it runs, what a function returns.

    Source:
        VisionZip, arXiv:2412.04467; `CLIPVisionTower_VisionZip` in dvlab-research/VisionZip, commit 3151f6d, which adds
        to a contextual token the mean of what merges into it, so that it doubles in size; here it is the mean of all.
        For frames of videos, `static_compression` in yu-lin-li/DyToK, commit b12d4c6.
        Proportional attention: ToMe, arXiv:2210.09461, section 3.
    """

    min_tokens: ClassVar[int] = 1
    may_drop: ClassVar[bool] = False

    importance: str | Importance = "distinctness"
    contextual: float = 1 / 7
    keys: str | Keys = "tokens"
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_importance("VisionZip", self.importance)
        check_real("VisionZip", "contextual", self.contextual, 0.0, 1.0)
        check_keys("VisionZip", self.keys)
        check_bool("VisionZip", "proportional", self.proportional)

    def count(self, frames: int, patches: int) -> int | None:
        return None if self.proportional else super().count(frames, patches)

    def rate(self, tokens: VideoTokens, frames: FrameRows) -> tuple[Tensor, Tensor]:
        scores = importance_of("VisionZip", self.importance, tokens, frames)
        return scores, scores.new_zeros(len(scores))  # as many of every frame

    def shorten_frames(
        self, tokens: VideoTokens, frames: FrameRows, scores: Tensor, counts: Tensor, total: int
    ) -> VideoTokens:
        keys, present = keys_of("VisionZip", self.keys, tokens, frames), frames.present
        num_contextual = (counts.double() * self.contextual - _ROUNDING).ceil().long().clamp_min(1)
        important = best_columns(scores, present, counts - num_contextual)
        targets = _evenly(present & ~important, num_contextual)
        column, start = [], 0
        for part in frames.parts(tokens.hidden.shape[-1]):
            own = slice(start, start := start + len(part.rows))
            x = part.take(tokens.hidden).float() if keys is None else keys[own]
            everything = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
            similarity = cosines(x, everything).nan_to_num(nan=-1.0).masked_fill(~targets[own][:, None], -math.inf)
            column.append(torch.where((important | targets)[own], everything, similarity.argmax(-1)))
        return tokens.merge_groups(frames.roots(torch.cat(column), tokens.length), self.proportional)


def _evenly(among: Tensor, counts: Tensor) -> Tensor:
    """[F, P] bool: `counts` [F] of these [F, P] bool, the first and then one every so many."""
    place = among.cumsum(1) - 1
    step = (among.sum(1) // counts).clamp_min(1)[:, None]
    return among & (place % step == 0) & (place // step < counts[:, None])
