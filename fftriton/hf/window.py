"""Attention that is restricted to the first and the most recent tokens: masks, and a KV cache that forgets the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods.base import Window

_EVERYTHING = Window(0, 2**62)


@dataclass(frozen=True)
class Windows:
    """The window of each sample of a batch, over the rows of a KV cache and those of the forward that follows.

    Rows are counted from a sample's first one that is not padding. Those that a cache has forgotten do not matter: they
    lay between the sinks and the window, and no later window reaches back to them.

    Args:
        sinks, recent: [B] int64 on the CPU: `Window.sinks` and `Window.recent`.
    """

    sinks: Tensor
    recent: Tensor

    @classmethod
    def of(cls, windows: Sequence[Window | None]) -> Windows | None:
        """From the samples' windows (None for a sample without one). Returns None if no sample has one."""
        if not any(windows):
            return None
        found = [window or _EVERYTHING for window in windows]
        return cls(torch.tensor([window.sinks for window in found]), torch.tensor([window.recent for window in found]))

    def __getitem__(self, samples: Tensor) -> Windows:
        """Those of these samples, [n] int64."""
        return Windows(self.sinks[samples.cpu()], self.recent[samples.cpu()])

    def mask(self, valid: Tensor | None, rows: int, device: torch.device) -> Callable[..., Tensor]:
        """The function of sample, head, query and key from which transformers makes masks, over all `rows`.

        valid: [B, rows] bool, False for padding; None: no padding.
        """
        order = self._order(valid, rows).to(device)
        sinks, recent = (part.to(device)[:, None, None] for part in (self.sinks, self.recent))
        near = order[:, :, None] - order[:, None] < recent  # [B, query, key]
        table = near | (order[:, None] < sinks)
        return lambda sample, head, query, key: table[sample, query, key]

    def kept(self, valid: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None] | None:
        """What the next token may attend to, out of `rows` rows.

        Returns:
            The indices of these rows [B, M] int64, left-padded, and which of them are not padding [B, M] bool. The
            latter is None for all, but never if `valid` is known, since the caller's masks are then padded, too.
            None if it may attend to everything.
        """
        order = self._order(valid, rows)
        count = order[:, -1:] + 1
        sinks, recent = (part.to(order.device)[:, None] for part in (self.sinks, self.recent))
        keep = (order < sinks) | (order >= count + 1 - recent)
        if valid is not None:
            keep &= valid
        lengths = keep.sum(1)
        most = int(lengths.max())
        if most == rows:
            return None
        index = keep.int().argsort(dim=1, stable=True)[:, rows - most :]
        equal = valid is None and bool((lengths == most).all())
        return index, None if equal else keep.gather(1, index)

    def _order(self, valid: Tensor | None, rows: int) -> Tensor:
        """[B, rows] int64: the number of each row among those of its sample, without padding."""
        if valid is None:
            return torch.arange(rows).expand(len(self.sinks), -1)
        return valid.long().cumsum(1) - 1
