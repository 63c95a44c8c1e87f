"""RandomTokens: any tokens. The baseline that every choice has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checks import check_budget, check_count
from .base import VideoTokens
from .chain import BeforeLayers


@dataclass(frozen=True)
class RandomTokens(BeforeLayers):
    """Keep round(budget * tokens) video tokens before the first layer, drawn at random without replacement.

    The draw depends on the seed and the prompt's length alone: the same for every prompt of that length, on every
    device.

    Args:
        budget: video tokens kept, as a fraction of the prompt's, in (0, 1].
        seed: of the draw, at least 0.

    Raises:
        TypeError, ValueError: a parameter out of range.
    """

    budget: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget("RandomTokens", "budget", self.budget)
        check_count("RandomTokens", "seed", self.seed, 0)

    def before_attention(self, layer: int, tokens: VideoTokens) -> VideoTokens | None:
        if layer > 0 or self.budget == 1:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(tokens.length, generator=generator).to(tokens.hidden.device)
        return tokens.keep_top(scores.expand_as(tokens.position), max(1, round(self.budget * tokens.num_video)))
