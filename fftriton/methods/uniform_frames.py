"""UniformFrames: fewer frames, evenly spaced. The baseline of sampling a video more sparsely."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checks import check_budget
from .base import Method, Prompt, VideoTokens
from .chain import BeforeLayers


@dataclass(frozen=True)
class UniformFrames(BeforeLayers):
    """Keep evenly spaced frames before the first layer, and drop the tokens of all others.

    Round(budget * tokens) tokens are kept: those of the fewest frames that hold so many, the middles of equal parts of
    the prompt's frames, without the last tokens of the last frame where that is more than the budget.

    Args:
        budget: video tokens kept, as a fraction of the prompt's, in (0, 1].

    Raises:
        TypeError, ValueError: a budget out of range.
    """

    budget: float = 0.3

    def __post_init__(self) -> None:
        check_budget("UniformFrames", "budget", self.budget)

    def begin(self, prompt: Prompt) -> Method:
        """The calls of one prefill."""
        return _Frames(self, prompt)


class _Frames(Method):
    def __init__(self, method: UniformFrames, prompt: Prompt) -> None:
        self.method, self.prompt, self.budget = method, prompt, method.budget

    def before_attention(self, layer: int, tokens: VideoTokens) -> VideoTokens | None:
        if layer > 0 or self.budget == 1:
            return None
        frame = self.prompt.frame[tokens.position[0].cpu()]  # [N]
        count = max(1, round(self.budget * tokens.num_video))
        size = torch.bincount(frame[frame >= 0])  # tokens of each frame
        for num_frames in range(1, len(size) + 1):
            chosen = (torch.arange(num_frames) * 2 + 1) * len(size) // (2 * num_frames)
            if int(size[chosen].sum()) >= count:
                break
        scores = torch.isin(frame, chosen).float()  # [N]; ties go to the earlier token
        return tokens.keep_top(scores.to(tokens.hidden.device).expand_as(tokens.position), count)
