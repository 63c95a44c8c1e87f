"""What a prefill did to the rows of a batch, recorded so that it can be repeated on other hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fftriton_kernels import gather_rows, merge_mean

from ..methods.base import VideoTokens


def left_padded(parts: Sequence[Tensor]) -> Tensor:
    """[1, n, ...] each -> [B, M, ...], M the longest n; zeros on the left. A single part is not copied."""
    if len(parts) == 1:
        return parts[0]
    return pad_sequence([part[0] for part in parts], batch_first=True, padding_side="left")


@dataclass(frozen=True)
class Selection:
    """What one stage did to the rows of a batch.

    Args:
        rows: where each sample's tokens stood in the hidden states.
        steps: for each sample, functions [1, n, D] -> [1, m, D].
    """

    rows: list[slice | Tensor]
    steps: list[list[Callable[[Tensor], Tensor]]]

    def __call__(self, hidden: Tensor) -> Tensor:
        """[B, N, D] -> [B, M, D]."""
        parts = []
        for number, (rows, steps) in enumerate(zip(self.rows, self.steps, strict=True)):
            part = hidden[number : number + 1, rows]
            for step in steps:
                part = step(part)
            parts.append(part)
        return left_padded(parts)


def step_between(before: VideoTokens, after: VideoTokens) -> Callable[[Tensor], Tensor]:
    """What turned the hidden states of `before` into those of `after`."""
    if after.merge is not None:
        return partial(_mean, after.merge.roots)
    return partial(_keep, torch.searchsorted(before.position[0].contiguous(), after.position[0].contiguous())[None])


def _keep(kept: Tensor, hidden: Tensor) -> Tensor:
    return gather_rows(kept.to(hidden.device), hidden)[0]


def _mean(roots: Tensor, hidden: Tensor) -> Tensor:
    return merge_mean(hidden, roots.to(hidden.device)).x


@dataclass
class Record:
    """What a prefill did to the hidden states.

    Args:
        additions: [B, N, D] each, what is added to the outputs of the first layers.
        selections: by layer and stage.
        arguments: by layer, those that differ from what the decoder gave.
        order: the selections in their order.
    """

    additions: Sequence[Tensor]
    selections: dict[tuple[int, str], Selection] = field(default_factory=dict)
    arguments: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    order: list[Selection] = field(default_factory=list)
    _before_addition: dict[int, int] = field(default_factory=dict)  # by layer, how many selections came before it

    def select(
        self, layer: int, stage: str, selection: Selection, hidden: Tensor, expected: Tensor, who: str
    ) -> Tensor:
        """The rows [B, M, D] that a stage leaves of `hidden` [B, N, D], made by what will be repeated.

        Raises:
            ValueError: these are not the expected ones.
        """
        left = selection(hidden)
        if not torch.equal(left.detach().nan_to_num(), expected.nan_to_num()):
            raise ValueError(
                f"reduce: gradient checkpointing must be off for {who}: {stage} of layer {layer} does more to hidden "
                "states than keep rows and take means, which a second run cannot repeat"
            )
        self.selections[layer, stage] = selection
        self.order.append(selection)
        return left

    def add(self, layer: int, hidden: Tensor) -> Tensor:
        """The output [B, M, D] of one of the first layers, with what is to be added to it.

        Raises:
            ValueError: gradient checkpointing would lose the gradient of what is added.
        """
        if layer >= len(self.additions):
            return hidden
        addition = self.additions[layer]
        if addition.requires_grad and not torch.is_grad_enabled():  # transformers until 5.2x adds it within the layer
            raise ValueError(
                "reduce: gradient checkpointing must use use_reentrant=False here, because the first layers add "
                "features of the vision encoder that need gradients"
            )
        for selection in self.order[: self._before_addition.setdefault(layer, len(self.order))]:
            addition = selection(addition)
        return hidden + addition.to(hidden.device, hidden.dtype)
