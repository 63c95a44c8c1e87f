"""ST-SimDiff: communities of similar tokens lose those that are least typical; what changes suddenly stays."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fftriton_kernels import NO_LINK, connected_components, linked_cosine_similarity, merge_mean

from ..checks import check_budget, check_count, check_real
from .base import Method, MethodState, Prompt, Steps, VideoTokens
from .frames import FrameRows

_ROUNDING = 1e-9  # of token counts that are exact but for floating point
_BLIND = (
    "STSimDiff: the layout of a video does not say how many patches stand in a row of a frame (columns), so tokens are "
    "linked with the next one in their frame and the same one in the frame before, not with the one below"
)


@dataclass(frozen=True)
class STSimDiff(Method):
    """Drop, before the first layer, what is least typical of communities of similar tokens; then prune once.

    1. Tokens are linked with the same patch one frame earlier, and with the patches to the left and above, if their
       cosine is at least `similarity_threshold`. The connected components are the communities.
    2. Of a community of n tokens, ceil((1 - budget) n) are to go, but never all: those with the lowest mean cosine with
       the community. Event tokens, whose cosine with the same patch one frame earlier is below `difference_threshold`,
       stay. The communities with the highest mean cosine within come first, until one would exceed what the budget
       demands.
    3. After the attention of layer 1, or of layer 0 if the budget demands it, the most attended tokens stay: as many as
       the budget, averaged over layers, allows. A layer without attention scores leaves this to the next that has them.

    A budget below the lowest that a prompt allows is met as closely as possible. The work is linear in the tokens. Ties
    go to the earlier token.

    Args:
        budget: video tokens in a layer's attention, averaged over layers, as a fraction of the prompt's, in (0, 1].
        similarity_threshold: cosine from which tokens are linked, in [-1, 1].
        difference_threshold: cosine below which a token is an event, in [-1, 1].
        importance_queries: attention is summed over this many of the last queries (1 as in the authors' code); None for
            all queries.

    Raises:
        TypeError, ValueError: a parameter out of range.

    Source:
        ST-SimDiff, ICLR 2026, arXiv:2605.22158; `SimDiff` in bingjunluo/ST-SimDiff, commit 7284c05, simdiff/new_topk.py
        with strategy 3, as its run_eval.sh has it.
    """

    budget: float = 0.3
    similarity_threshold: float = 0.8
    difference_threshold: float = 0.2
    importance_queries: int | None = 1

    def __post_init__(self) -> None:
        check_budget("STSimDiff", "budget", self.budget)
        check_real("STSimDiff", "similarity_threshold", self.similarity_threshold, -1.0, 1.0)
        check_real("STSimDiff", "difference_threshold", self.difference_threshold, -1.0, 1.0)
        if self.importance_queries is not None:
            check_count("STSimDiff", "importance_queries", self.importance_queries, 1)

    def begin(self, prompt: Prompt) -> MethodState:
        return _STSimDiffState(self, prompt)


class _STSimDiffState(MethodState):
    method: STSimDiff

    def __init__(self, method: STSimDiff, prompt: Prompt) -> None:
        super().__init__(method, prompt)
        self.unspent = method.budget * prompt.num_layers * prompt.num_video_tokens  # tokens x layers
        self.left = prompt.num_video_tokens  # after the first step
        self.pruning_layer = prompt.next_attention(1)

    @property
    def least_budget(self) -> float:
        layers = self.prompt.num_layers
        full = min(self.prompt.next_attention(0) + 1, layers)
        return (self.left * full + layers - full) / (layers * self.prompt.num_video_tokens)

    def wants_attention(self, layer: int) -> bool:
        return layer == self.pruning_layer < self.prompt.num_layers - 1 and self.method.budget < 1

    def before_attention(self, layer: int, tokens: VideoTokens) -> Steps:
        if layer > 0 or self.method.budget == 1:
            return []
        layers, full = self.prompt.num_layers, self.pruning_layer + 1
        wanted = round(self.unspent / layers)
        stays = ~_atypical(self.method, tokens, self.prompt, tokens.num_video - wanted)
        rows = stays.nonzero()[:, 0]
        self.left -= tokens.length - len(rows)
        if self.left <= wanted:
            self.pruning_layer = -1  # done
        elif self.left * full + layers - full > self.unspent + _ROUNDING:
            self.pruning_layer = self.prompt.next_attention(0)
        return tokens.keep(rows[None], self.left)

    def after_attention(self, layer: int, tokens: VideoTokens) -> Steps:
        self.unspent -= tokens.num_video
        if not self.wants_attention(layer):
            return []
        count = round(self.unspent / (self.prompt.num_layers - layer - 1))
        assert tokens.attention is not None  # asked for by wants_attention
        return tokens.keep_top(tokens.attention(self.method.importance_queries), max(1, count))


def _atypical(method: STSimDiff, tokens: VideoTokens, prompt: Prompt, limit: int) -> Tensor:
    """[N] bool: the rows that the first step drops, at most `limit` of them."""
    root, is_event = _communities(method, tokens, prompt)
    row = torch.arange(tokens.length, device=root.device)
    directions = F.normalize(tokens.hidden.float(), dim=-1)
    centre = merge_mean(directions, root[None]).x[0]  # [C, D]: the mean of each community
    community = (root == row).cumsum(0)[root] - 1  # [N]
    sizes = row.new_zeros(len(centre)).index_add_(0, community, torch.ones_like(row))
    typical = (directions[0] * centre[community]).sum(-1)  # the mean cosine with the community
    typical = typical.where(sizes[community] != 2, 1.0)  # two are equally typical, but for rounding
    order = typical.argsort(descending=True, stable=True)
    order = order[community[order].argsort(stable=True)]
    place = torch.empty_like(row).scatter_(0, order, row) - (sizes.cumsum(0) - sizes)[community]
    quota = torch.minimum((sizes.double() * (1 - method.budget) - _ROUNDING).ceil().long(), sizes - 1).clamp_max(limit)
    goes = (place >= (sizes - quota)[community]) & ~is_event
    count = torch.zeros_like(sizes).index_add_(0, community, goes.long())
    within = (sizes * centre.square().sum(-1) - 1) / (sizes - 1).clamp_min(1)  # the mean cosine of its pairs
    turn = within.masked_fill(sizes < 2, -math.inf).argsort(descending=True, stable=True)
    fits = (count[turn].cumsum(0) - count[turn] + quota[turn] <= limit).long().cumprod(0).bool()
    return goes & torch.empty_like(fits).scatter_(0, turn, fits)[community]


def _communities(method: STSimDiff, tokens: VideoTokens, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """[N] int64: the first row of the community of each row; and [N] bool: which rows are events."""
    nowhere, row = torch.full_like(tokens.position, -1), torch.arange(tokens.length, device=tokens.position.device)
    left, above = nowhere, nowhere
    for layout, video in zip(prompt.layouts, FrameRows.of_prompt(prompt, tokens).contexts(tokens), strict=True):
        rows = video.frames.rows
        if layout.columns is None and rows.shape[1] > 1:
            warnings.warn(_BLIND, stacklevel=2)
        columns = layout.columns or rows.shape[1]
        before = F.pad(rows, (1, 0), value=-1)[:, :-1]
        starts = torch.arange(rows.shape[1], device=rows.device) % columns == 0
        left = video.frames.spread(before.masked_fill(starts, -1), left)
        above = video.frames.spread(F.pad(rows, (columns, 0), value=-1)[:, :-columns], above)
    partners = torch.cat([tokens.predecessor, left, above])
    cosine = torch.cat([linked_cosine_similarity(tokens.hidden, partner[None]) for partner in partners])
    linked = partners.where(cosine >= method.similarity_threshold, -1)
    edges = torch.stack([row.expand_as(linked), linked], -1).flatten(0, 1)
    earlier = cosine[0]
    is_event = (earlier > NO_LINK) & (earlier < method.difference_threshold)
    return connected_components(edges, tokens.length), is_event
