"""UniformFrames: fewer frames, evenly spaced. The baseline of sampling a video more sparsely."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Prompt, VideoTokens
from .before_layers import ScoringMethod


@dataclass(frozen=True)
class UniformFrames(ScoringMethod):
    """Keep evenly spaced frames before the first layer, and drop the tokens of all others.

    Round(budget * tokens) tokens are kept. They come from the smallest number of frames that holds as many: the middles
    of equal parts of the prompt's frames, of which those without a token do not count. If these frames hold more, the
    last tokens of the last one are dropped.

    Args:
        budget: video tokens to keep, as a fraction of the prompt's, in (0, 1].

    Raises:
        TypeError, ValueError: a budget out of range.
    """

    def score(self, tokens: VideoTokens, prompt: Prompt) -> Tensor:
        frame = prompt.frame[tokens.position[0].cpu()]  # [N]
        count = self.num_kept(tokens)
        frame[frame >= 0] = frame[frame >= 0].unique(return_inverse=True)[1]  # those that have tokens
        size = torch.bincount(frame[frame >= 0])  # tokens of each frame
        for num_frames in range(1, len(size) + 1):
            chosen = (torch.arange(num_frames) * 2 + 1) * len(size) // (2 * num_frames)
            if int(size[chosen].sum()) >= count:
                break
        return torch.isin(frame, chosen).float()[None]
