"""Positions of a video's patches in a sequence, and the previous token of each patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..checks import check_count


@dataclass(frozen=True, eq=False)
class VideoLayout:
    """Positions of one video's patches in the prompt, frame by frame.

    Args:
        positions: [F, P] int64; positions[f, p] is the index in the sequence of patch p of frame f, or -1 for a hole (a
            patch without a token). Positions must ascend when read frame by frame; no stride is assumed.
        sample: row of the batch that contains the video.
        length: number of tokens of the prompt, with its padding, if the layout is for no other; None for any.
        columns: number of patches in each row of a frame, which divides P; None if patches form no grid that is known.

    Raises:
        TypeError: positions is not an int64 tensor.
        ValueError: positions does not have shape [F, P], has only holes, has values below -1, or does not ascend; or
            sample is negative, length is not above the last position, or columns does not divide P.
    """

    positions: Tensor
    sample: int = 0
    length: int | None = None
    columns: int | None = None

    def __post_init__(self) -> None:
        positions = self.positions
        if not isinstance(positions, Tensor) or positions.dtype != torch.int64:
            got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
            raise TypeError(f"VideoLayout: positions must be an int64 tensor, got {got}")
        if positions.ndim != 2 or positions.numel() == 0:
            raise ValueError(f"VideoLayout: positions must have shape [F, P], F, P >= 1, got {list(positions.shape)}")
        check_count("VideoLayout", "sample", self.sample, 0)
        if int(positions.min()) < -1:
            raise ValueError(f"VideoLayout: positions must be indices or -1 for a hole, got {int(positions.min())}")
        tokens = self.tokens
        if tokens.numel() == 0:
            raise ValueError("VideoLayout: positions must contain at least one token, got only holes (-1)")
        steps = tokens.diff()
        if bool((steps <= 0).any()):
            at = int((steps <= 0).nonzero()[0])
            rule = "overlap" if int(steps[at]) == 0 else "descend"
            raise ValueError(
                f"VideoLayout: positions must ascend frame by frame, but {int(tokens[at])} is followed by "
                f"{int(tokens[at + 1])}: they {rule}"
            )
        if self.length is not None:
            check_count("VideoLayout", "length", self.length, int(tokens[-1]) + 1)
        if self.columns is not None:
            check_count("VideoLayout", "columns", self.columns, 1)
            if positions.shape[1] % self.columns:
                raise ValueError(
                    f"VideoLayout: columns must divide the {positions.shape[1]} patches of a frame, got {self.columns}"
                )

    @property
    def tokens(self) -> Tensor:
        """[n] int64: positions without holes, ascending."""
        return self.positions[self.positions >= 0]

    @cached_property
    def span(self) -> tuple[int, int]:
        """The first and the last position."""
        tokens = self.tokens
        return int(tokens[0]), int(tokens[-1])


def check_layouts(layouts: Sequence[VideoLayout], batch: int, length: int) -> None:
    """Raise a ValueError unless the layouts fit a [batch, length] sequence and do not overlap."""
    taken = torch.zeros(batch, length, dtype=torch.bool)
    for layout in layouts:
        if not isinstance(layout, VideoLayout):
            raise TypeError(f"layout: must be a list of VideoLayout, got an item of {type(layout).__name__}")
        check_length(layout, length)
        if layout.sample >= batch:
            raise ValueError(f"layout: sample must be below the batch size {batch}, got {layout.sample}")
        tokens = layout.tokens.cpu()
        if int(tokens[-1]) >= length:
            raise ValueError(f"layout: positions must be below the prompt's length {length}, got {int(tokens[-1])}")
        if bool(taken[layout.sample, tokens].any()):
            where = int(tokens[taken[layout.sample, tokens]][0])
            raise ValueError(f"layout: videos must not overlap, but two of them hold position {where}")
        taken[layout.sample, tokens] = True


def check_length(layout: VideoLayout, length: int) -> None:
    """Raise a ValueError if the layout is for a prompt of another length."""
    if layout.length not in (None, length):
        raise ValueError(
            f"layout: was made for a prompt of {layout.length} tokens, got {length}: what it was made from (the number "
            "of frames, tokens per frame, newlines, padding) does not fit the model"
        )


def patch_ids(layouts: Sequence[VideoLayout], batch: int, length: int, device: torch.device) -> Tensor:
    """[batch, length] int64: a number for each patch of each video, the same in all its frames; -1 for other tokens."""
    return _number(layouts, batch, length, dim=1).to(device)


def frame_ids(layouts: Sequence[VideoLayout], batch: int, length: int, device: torch.device) -> Tensor:
    """[batch, length] int64: a number for each frame of each video; -1 for other tokens."""
    return _number(layouts, batch, length, dim=0).to(device)


def _number(layouts: Sequence[VideoLayout], batch: int, length: int, dim: int) -> Tensor:
    """[batch, length] int64: each token's index along `dim` of its layout, numbered consecutively over all videos."""
    ids = torch.full((batch, length), -1, dtype=torch.int64)
    first = 0
    for layout in layouts:
        positions = layout.positions.cpu()
        size = positions.shape[dim]
        number = torch.arange(first, first + size).unsqueeze(1 - dim).expand_as(positions)
        ids[layout.sample, positions[positions >= 0]] = number[positions >= 0]
        first += size
    return ids


def previous_of_patch(patch: Tensor) -> Tensor:
    """[B, N] int64 -> [B, N] int64: the nearest earlier token of the same patch; -1 if there is none or patch is -1."""
    order = torch.argsort(patch, dim=1, stable=True)
    ordered = patch.gather(1, order)
    follows = torch.zeros_like(patch, dtype=torch.bool)
    follows[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    previous = torch.where(follows, order.roll(1, dims=1), -1)
    return torch.empty_like(patch).scatter_(1, order, previous)
