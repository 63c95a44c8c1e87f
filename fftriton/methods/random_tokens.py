"""RandomTokens: any tokens. The baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_seed
from .base import Prompt, VideoTokens
from .before_layers import ScoringMethod


@dataclass(frozen=True)
class RandomTokens(ScoringMethod):
    """Keep round(budget * tokens) video tokens before the first layer, drawn at random without replacement.

    The draw depends only on the seed and the length of the prompt: it is the same for every prompt of that length, on
    every device.

    Args:
        budget: video tokens to keep, as a fraction of the prompt's, in (0, 1].
        seed: of the draw, at least 0.

    Raises:
        TypeError, ValueError: a parameter out of range.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("RandomTokens", "seed", self.seed)

    def score(self, tokens: VideoTokens, prompt: Prompt) -> Tensor:
        return torch.rand(1, tokens.length, generator=torch.Generator().manual_seed(self.seed))
