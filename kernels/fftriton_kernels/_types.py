"""Data types that the kernels, the CPU implementations and the reference share."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

NO_LINK = -2.0
"""Similarity of a token without a partner. It is below every cosine, and reaches no threshold."""


class Merged(NamedTuple):
    """What `merge_mean` returns. Rows are padded on the left to the batch's longest M, or to the capacity.

    Packed sequences come back packed: x [M, D], companions [M, ...], kept and predecessor [M], lengths [S].
    """

    x: Tensor  # [B, M, D] group means in their roots' order
    companions: tuple[Tensor, ...]  # each [B, M, ...], taken at the roots
    kept: Tensor  # [B, M] int64 original positions ascending, -1 for padding
    lengths: Tensor  # [B] int64 rows that are not padding
    predecessor: Tensor | None  # [B, M] int64 links among the compacted rows, -1 for none

    @property
    def cu_seqlens(self) -> Tensor | None:
        """[S+1] int32: where each sequence of packed rows begins and ends. None if rows are not packed.

        The first is 0, or with a capacity the number of padding rows, which belong to no sequence.
        """
        if self.x.ndim != 2:
            return None
        ends = self.lengths.cumsum(0)
        return F.pad(ends, (1, 0)).add(self.x.shape[0] - self.lengths.sum()).int()


class Groups(NamedTuple):
    """The rows of a sequence whose groups become one row each."""

    kept: Tensor  # [B, M] int64 as in Merged
    lengths: Tensor  # [B] int64
    predecessor: Tensor  # [B, M] int64 links among the rows, [B, 0] without links
    row: Tensor  # [B, N] int64 the row that each token is in, -1 for none
    starts: Tensor  # [B, M] int64 where in members a row's tokens begin
    sizes: Tensor  # [B, M] int64 how many there are, 0 for padding
    members: (
        Tensor  # [B, N] int64 tokens by row, those of rows that were cut off first, ascending within a row, then -1
    )
