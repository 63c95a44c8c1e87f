"""Attention importance at one layer, whatever attention back end the model uses.

For the length of one attention call the module's config is replaced by a proxy that names a function of ours. That
function keeps the queries and keys, puts the config back and calls the model's own choice, so outputs are unchanged.
Where tensor parallelism splits the heads over processes, all of them get the mean over all heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fftriton_kernels import attention_column_sum

from .compat import attention_function, head_group


@dataclass(frozen=True)
class Attention:
    """One attention call.

    Args:
        q: [B, H, N, d] queries. k: [B, Hkv, past + N, d] keys. scale: of their products; None for 1 / sqrt(d).
        group: the processes that have the other heads; None where all of them are here.
    """

    q: Tensor
    k: Tensor
    scale: float | None
    group: Any = None

    def received(
        self, sample: int, rows: slice | Tensor, past_valid: Tensor | None, later: int, num_queries: int | None
    ) -> Tensor:
        """The attention that each new token of one sample received, averaged over the heads, [1, n] fp32.

        Args:
            sample: the row of the batch.
            rows: which n of the N new rows are its tokens.
            past_valid: [B, past] bool, which cached rows are no padding; None: all.
            later: how many of the last tokens do not count, neither as queries nor as keys.
            num_queries: attention is summed over the last so many of the tokens that count; None: over all of them.
        """
        q = self.q[sample : sample + 1, :, rows]
        n, past = q.shape[2], self.k.shape[2] - self.q.shape[2]
        k = self.k[sample : sample + 1]
        if n < self.q.shape[2] or past_valid is not None:
            before, new = k[:, :, :past], k[:, :, past:][:, :, rows]
            before = before if past_valid is None else before[:, :, past_valid[sample]]
            k = torch.cat([before, new], 2) if before.shape[2] else new
        last, end = n - later, k.shape[2] - later
        scores = attention_column_sum(
            q[:, :, :last], k[:, :, :end], scale=self.scale, num_queries=num_queries and min(num_queries, last),
            columns=(end - last, end),
        )  # fmt: skip
        if self.group is not None:  # every process has the mean over its heads, and as many of them
            dist.all_reduce(scores, group=self.group)
            scores /= self.group.size()
        return F.pad(scores, (0, later)) if later else scores


class AttentionTap:
    """Keeps the queries and keys of the attention calls that it is opened for."""

    def __init__(self) -> None:
        self.name = f"fftriton_{id(self)}"
        self.seen: Attention | None = None

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

    def take(self) -> Attention | None:
        """What was heard since `open`; None where the module asked its config for no function."""
        seen, self.seen = self.seen, None
        return seen

    def _attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.close(module)
        self.seen = Attention(query, key, kwargs.get("scaling"), head_group(module, query.shape[1]))
        return attention_function(module)(module, query, key, value, *args, **kwargs)


class _NamedConfig:
    """A config that names another attention implementation and is the original in all else."""

    def __init__(self, original: Any, name: str) -> None:
        self.original, self._attn_implementation = original, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)
