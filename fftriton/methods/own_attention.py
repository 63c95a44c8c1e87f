"""Relevance of frames without a second model: what the language model itself attends to in a cheap first pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checks import check_count
from .base import FrameScores, Prompt, VideoTokens
from .frames import FrameRows
from .importances import importance_of
from .pruners import best_rows

_SCALE = 2.0  # KVTP's default temperature
_LEAST_ATTENTION = 1e-20  # of a frame that receives none, whose logarithm must be finite


@dataclass(frozen=True)
class OwnAttention:
    """Scores frames by the attention that the language model's own first layers pay to a few tokens of each.

    Before the first layer, the first layers run once more on the text and the most distinct tokens of each frame. A
    frame's score is twice the logarithm of the attention that its most attended token receives from the last tokens of
    the prompt, which have read the question: at KVTP's default temperature a frame's share is in proportion to that
    attention. No checkpoint is needed, and the cost is that of a short prompt in some of the layers:
    `report.relevance_macs`; the time is part of the prefill.

    Args:
        tokens: of each frame, at least 1.
        layer: index of the layer whose attention counts; None for the middle of the decoder. If it has no attention
            scores (Qwen3.5's linear attention), the next that has them takes its place.
        queries: attention is summed over this many of the last tokens; None for all tokens.

    Raises:
        TypeError, ValueError: a parameter out of range. While it runs, ValueError for a layer that the decoder does not
            have.

    Source:
        The idea is that of DyToK, which takes attention to whole frames.
    """

    tokens: int = 4
    layer: int | None = None
    queries: int | None = 1

    def __post_init__(self) -> None:
        check_count("OwnAttention", "tokens", self.tokens, 1)
        if self.layer is not None:
            check_count("OwnAttention", "layer", self.layer, 0)
        if self.queries is not None:
            check_count("OwnAttention", "queries", self.queries, 1)

    def layer_of(self, num_layers: int) -> int:
        """The index of the layer whose attention counts. Raises a ValueError if the decoder does not have it."""
        if self.layer is None:
            return num_layers // 2
        if self.layer >= num_layers:
            raise ValueError(f"OwnAttention: layer must be below the number of layers, {num_layers}, got {self.layer}")
        return self.layer

    def score(self, tokens: VideoTokens, frames: FrameRows, prompt: Prompt) -> list[FrameScores]:
        """The scores of each video of a sample.

        Args:
            tokens: all tokens of the sample, before the first layer.
            frames: where the tokens of its videos stand.
            prompt: the sample.

        Raises:
            ValueError: there is no such layer, or none with attention, or the first layers cannot be run.
        """
        layer = prompt.next_attention(self.layer_of(prompt.num_layers))
        if layer == prompt.num_layers or tokens.first_layers is None:
            raise ValueError(f"OwnAttention: layer must be one with attention scores or before one, got {self.layer}")
        counts = frames.sizes.clamp_max(self.tokens)
        total = int(counts.sum())
        distinct = importance_of("OwnAttention", "distinctness", tokens, frames)
        rows = best_rows(tokens, frames, distinct, counts, total)
        heard, macs = tokens.first_layers(tokens.keep(rows, total), layer, self.queries)
        spread = torch.zeros(1, tokens.length, device=heard.device).scatter_(1, rows, heard)
        received = frames.take(spread).where(frames.present, 0).amax(1)
        scores = _SCALE * received.clamp_min(_LEAST_ATTENTION).log()
        shapes = frames.shapes or [(len(scores), 0)]
        parts = scores.split([length for length, _ in shapes])
        numbers = frames.numbers or range(len(parts))
        return [
            FrameScores(number, part, macs=macs if index == 0 else 0.0)  # one pass for all videos of the sample
            for index, (number, part) in enumerate(zip(numbers, parts, strict=True))
        ]
