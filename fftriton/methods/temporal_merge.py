"""TemporalMerge: before the first layer, merge the tokens that changed least from frame to frame."""

from __future__ import annotations

from dataclasses import dataclass

from fftriton_kernels import NO_LINK, linked_cosine_similarity, merge_roots

from ..checks import check_budget
from .base import Method, Prompt, VideoTokens
from .chain import BeforeLayers

_ANY = -1.5  # a threshold below every cosine and above NO_LINK


@dataclass(frozen=True)
class TemporalMerge(BeforeLayers):
    """Merge the video tokens that are most like the same patch one frame earlier, until the budget is met.

    All at once, before the first layer, and however unlike they are: this is FrameFusion's merging without its
    threshold. It leaves room for a second method, `TemporalMerge(0.13) + FastV(0.1, layer=14, importance_queries=4)`,
    which prunes where attention already knows the question. A patch's first token always stays, so that the budget
    cannot be met below 1 / frames.

    Args:
        budget: video tokens left, as a fraction of the prompt's, in (0, 1].

    Raises:
        TypeError, ValueError: a budget out of range.

    Source:
        The merging of FrameFusion, arXiv:2501.01986, section 3.3.
    """

    budget: float = 0.3

    def __post_init__(self) -> None:
        check_budget("TemporalMerge", "budget", self.budget)

    def begin(self, prompt: Prompt) -> Method:
        """The calls of one prefill."""
        return _Merging(self.budget, prompt)


class _Merging(Method):
    def __init__(self, budget: float, prompt: Prompt) -> None:
        self.budget, self.num_first = budget, prompt.num_video_tokens  # tokens that have none before them
        self.num_video = prompt.num_video_tokens

    @property
    def least_budget(self) -> float:
        return self.num_first / self.num_video

    def before_attention(self, layer: int, tokens: VideoTokens) -> VideoTokens | None:
        if layer > 0 or self.budget == 1:
            return None
        similarity = linked_cosine_similarity(tokens.hidden, tokens.predecessor)
        self.num_first -= int((similarity > NO_LINK).sum())
        excess = tokens.num_video - max(1, round(self.budget * tokens.num_video))
        return tokens.merge_groups(merge_roots(similarity, tokens.predecessor, _ANY, max_merges=excess))
