"""TemporalMerge: before the first layer, merge the tokens that changed least from frame to frame."""

from __future__ import annotations

from dataclasses import dataclass

from fftriton_kernels import NO_LINK, linked_cosine_similarity, merge_roots

from ..checks import check_bool, check_budget
from .base import MethodState, Prompt, Steps, VideoTokens
from .before_layers import BeforeLayers, BeforeLayersState

_ANY = -1.5  # a threshold below every cosine and above NO_LINK


@dataclass(frozen=True)
class TemporalMerge(BeforeLayers):
    """Merge the video tokens that are most similar to the same patch one frame earlier, until the budget is met.

    All merges happen at once, before the first layer, however dissimilar the tokens are: this is FrameFusion's merging
    without its threshold. It leaves room for a second method, as in `TemporalMerge(0.13) + FastV(0.1, layer=14,
    importance_queries=4)`, which prunes where attention already knows the question. The first token of each patch
    always stays, so a budget below 1 / frames cannot be met.

    Args:
        budget: video tokens to keep, as a fraction of the prompt's, in (0, 1].
        proportional: whether a row that has merged counts as many times in attention, in every layer that follows and
            in decode, as it stands for tokens: log(size) is added to its scores. Means stay as they are.

    Raises:
        TypeError, ValueError: a parameter out of range.

    Source:
        The merging of FrameFusion, arXiv:2501.01986, section 3.3.
        Proportional attention: ToMe, arXiv:2210.09461, section 3.
    """

    budget: float = 0.3
    proportional: bool = False

    def __post_init__(self) -> None:
        check_budget("TemporalMerge", "budget", self.budget)
        check_bool("TemporalMerge", "proportional", self.proportional)

    def count(self, frames: int, patches: int) -> int | None:
        return None if self.proportional else max(patches, self._num_kept_of(frames * patches))

    def begin(self, prompt: Prompt) -> MethodState:
        return _TemporalMergeState(self, prompt)


class _TemporalMergeState(BeforeLayersState):
    method: TemporalMerge

    def __init__(self, method: TemporalMerge, prompt: Prompt) -> None:
        super().__init__(method, prompt)
        self.num_first = prompt.num_video_tokens  # video tokens without an earlier one of their patch

    @property
    def least_budget(self) -> float:
        return self.num_first / self.prompt.num_video_tokens

    def shorten(self, tokens: VideoTokens) -> Steps:
        similarity = linked_cosine_similarity(tokens.hidden, tokens.predecessor)
        self.num_first -= int((similarity > NO_LINK).sum())
        excess = tokens.num_video - self.method.num_kept(tokens)
        roots = merge_roots(similarity, tokens.predecessor, _ANY, max_merges=excess)
        return tokens.merge_groups(roots, self.method.proportional)
