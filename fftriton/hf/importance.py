"""Attention importance at one layer, whatever attention back end the model uses.

For the length of one attention call the module's config is replaced by a proxy that names a function of ours. That
function keeps the queries and keys, puts the config back and calls the model's own choice, so outputs are unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fftriton_kernels import attention_column_sum

from .compat import attention_function


class AttentionTap:
    """Keeps the queries and keys of the attention calls that it is opened for."""

    def __init__(self) -> None:
        self.name = f"fftriton_{id(self)}"
        self.seen: tuple[Tensor, Tensor, float | None] | None = None  # q, k, scale

    def install(self) -> None:
        """Make the tap's attention function known to transformers."""
        ALL_ATTENTION_FUNCTIONS[self.name] = self._attend

    def remove(self) -> None:
        """Take it out again."""
        ALL_ATTENTION_FUNCTIONS.pop(self.name, None)

    def open(self, attention: Any) -> None:
        """Listen to the next call of this module."""
        self.seen = None
        self.close(attention)  # where a KeyboardInterrupt left it open: torch runs no hook behind one
        attention.config = _NamedConfig(attention.config, self.name)

    @staticmethod
    def close(attention: Any) -> None:
        """Put the module's config back; harmless where it is back already."""
        if isinstance(attention.config, _NamedConfig):
            attention.config = attention.config.original

    def scores(self, valid: Tensor | None) -> Callable[[int | None], Tensor] | None:
        """The attention that each new row received, as a function of how many of the last queries count."""
        seen, self.seen = self.seen, None
        if seen is None:
            return None
        return lambda num_queries: _received(*seen, valid, num_queries)

    def _attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.close(module)
        self.seen = (query, key, kwargs.get("scaling"))
        return attention_function(module)(module, query, key, value, *args, **kwargs)


class _NamedConfig:
    """A config that names another attention implementation and is the original in all else."""

    def __init__(self, original: Any, name: str) -> None:
        self.original, self._attn_implementation = original, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def _received(q: Tensor, k: Tensor, scale: float | None, valid: Tensor | None, num_queries: int | None) -> Tensor:
    """q [1, H, n, d], k [1, Hkv, past + n, d], valid [1, past + n] bool or None -> [1, n] fp32."""
    new, past = q.shape[2], k.shape[2] - q.shape[2]
    if valid is None:
        return attention_column_sum(
            q, k, scale=scale, num_queries=num_queries and min(num_queries, new), columns=(past, past + new)
        )
    rows = valid[0].nonzero()[:, 0]
    new_rows = rows[rows >= past] - past
    received = attention_column_sum(
        q[:, :, new_rows], k[:, :, rows], scale=scale, num_queries=num_queries and min(num_queries, len(new_rows))
    )
    out = received.new_zeros(1, new)
    out[:, new_rows] = received[:, len(rows) - len(new_rows) :]
    return out
