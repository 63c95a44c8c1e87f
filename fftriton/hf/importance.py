"""Attention importance at one layer, and sizes in attention, whatever attention back end the model uses.

While a prompt is reduced, the config of each attention module is a proxy. In the thread and the layer that listens, it
names an attention function of ours, which keeps the queries and keys and then calls the function that the model chose,
so outputs are unchanged. Where sdpa runs one of PyTorch's causal flash kernels on a GPU, the log-sum-exp of each row is
kept, too, which saves the first of two passes over the scores. If tensor parallelism splits the heads over processes,
all of them get the mean over all heads. Sizes go through the same function, with the channels of sizes.py, so
importance has them, too.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fftriton_kernels import attention_column_sum

from .compat import UnknownReleaseError, attention_function, attention_name, head_group
from .sizes import Carriers, check_width

_WHOLE_ROWS = ("cpu",)  # where the scores of a row are there at once, and a softmax is faster than their exp alone


@dataclass(frozen=True)
class Attention:
    """One attention call.

    Args:
        q: [B, H, N, d] queries. k: [B, Hkv, past + N, d] keys. scale: of their products; None for 1 / sqrt(d).
        group: the processes that have the other heads, or None if all of them are here.
        lse: [B, H, N] log-sum-exp of each row of scaled scores over the keys up to its own; None: not known.
    """

    q: Tensor
    k: Tensor
    scale: float | None
    group: Any = None
    lse: Tensor | None = None

    def received(
        self, sample: int, rows: slice | Tensor, past_valid: Tensor | None, later: int, num_queries: int | None
    ) -> Tensor:
        """The attention that each new token of one sample received, averaged over the heads, [1, n] fp32.

        Args:
            sample: the row of the batch.
            rows: which n of the N new rows are its tokens.
            past_valid: [B, past] bool, which cached rows are not padding; None: all.
            later: how many of the last tokens do not count, either as queries or as keys.
            num_queries: attention is summed over the last num_queries of the tokens that count; None: over all of them.
        """
        q = self.q[sample : sample + 1, :, rows]
        n, past = q.shape[2], self.k.shape[2] - self.q.shape[2]
        k, lse = self.k[sample : sample + 1], None if self.lse is None else self.lse[sample : sample + 1]
        if n < self.q.shape[2] or past_valid is not None:
            before, new = k[:, :, :past], k[:, :, past:][:, :, rows]
            before = before if past_valid is None else before[:, :, past_valid[sample]]
            k = torch.cat([before, new], 2) if before.shape[2] else new
            lse = None  # it counts keys that are left out
        last, end = n - later, k.shape[2] - later
        scores = attention_column_sum(
            q[:, :, :last], k[:, :, :end], scale=self.scale, num_queries=num_queries and min(num_queries, last),
            lse=None if lse is None else lse[:, :, :last], columns=(end - last, end),
        )  # fmt: skip
        if self.group is not None:  # every process has the mean over its heads, and as many of them
            dist.all_reduce(scores, group=self.group)
            scores /= self.group.size()
        return F.pad(scores, (0, later)) if later else scores


class AttentionTap:
    """Keeps the queries and keys of the attention calls that it listens to, separately for each thread."""

    def __init__(self) -> None:
        self.name = f"fftriton_{id(self)}"
        self._local = _Heard()

    def install(self) -> None:
        """Make the tap's attention function known to transformers."""
        ALL_ATTENTION_FUNCTIONS[self.name] = self._attend

    def remove(self) -> None:
        """Remove that function again."""
        ALL_ATTENTION_FUNCTIONS.pop(self.name, None)

    def open(self, attention: Any) -> None:
        """Make it possible to listen to this module."""
        object.__setattr__(attention, "config", _TappedConfig(attention.config, self))  # a module's own way is slow

    @staticmethod
    def close(attention: Any) -> None:
        """Put the module's config back; harmless if that is done already."""
        if isinstance(attention.config, _TappedConfig):
            object.__setattr__(attention, "config", attention.config.original)

    @property
    def listening(self) -> bool:
        """Whether this thread listens to its next attention call."""
        return self._local.listening

    def listen(self) -> None:
        """Listen to this thread's next attention call."""
        self._local.listening, self._local.seen = True, None

    def weigh(self, log_sizes: Tensor | None) -> None:
        """Add log(size) [B, M] fp32 to the scores of the keys in this thread's next attention call; None: nothing."""
        self._local.log_sizes = log_sizes

    @property
    def is_weighing(self) -> bool:
        """Whether this thread's next attention call is to take sizes into account."""
        return self._local.log_sizes is not None

    def stop(self) -> None:
        """Stop listening."""
        self._local.listening = False

    def end(self) -> None:
        """Keep nothing beyond this thread's forward, however that has ended."""
        self._local.listening, self._local.seen = False, None
        self._local.log_sizes = self._local.carriers = None

    def take(self) -> Attention | None:
        """What was heard since `listen`, or None if the module did not ask its config for a function."""
        seen, self._local.seen = self._local.seen, None
        return seen

    def _carriers(self, log_sizes: Tensor, scale: float, key: Tensor) -> Carriers:
        """Those of the layer before, if its keys were such and had these sizes."""
        asked = scale, key.dtype, key.device, key.shape[-1]
        if self._local.carriers is None or self._local.carriers[0] is not log_sizes or self._local.carriers[1] != asked:
            self._local.carriers = log_sizes, asked, Carriers.of(log_sizes, scale, key)
        return self._local.carriers[2]

    def _attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        log_sizes, width, listening = self._local.log_sizes, value.shape[-1], self.listening
        self.stop()
        self.weigh(None)
        if log_sizes is not None:
            scale = kwargs.get("scaling")
            kwargs["scaling"] = query.shape[-1] ** -0.5 if scale is None else scale
            _check_weighable(key, log_sizes, kwargs)
            query, key, value = self._carriers(log_sizes, kwargs["scaling"], key).added_to(query, key, value)
        norms = _RowNorms(query, kwargs.get("scaling")) if listening and _has_norms(module, query) else None
        with norms or nullcontext():
            out = attention_function(module)(module, query, key, value, *args, **kwargs)
        if listening:
            group, lse = head_group(module, query.shape[1]), None if norms is None else norms.lse
            self._local.seen = Attention(query, key, kwargs.get("scaling"), group, lse)
        return out if log_sizes is None else (out[0][..., :width], *out[1:])


def _has_norms(module: Any, query: Tensor) -> bool:
    """Whether log-sum-exps are worth having, and may be watched for."""
    is_sdpa = attention_name(module.config) == "sdpa"  # others may be made of what a dispatch mode disturbs
    is_known = torch.version.hip is None  # AMD's kernels have returned it to another base
    return query.device.type not in _WHOLE_ROWS and is_sdpa and is_known and not torch.compiler.is_compiling()


def _check_weighable(key: Tensor, log_sizes: Tensor, arguments: Mapping[str, Any]) -> None:
    """Raise unless these keys [B, Hkv, M, d] have the sizes [B, M], and nothing is done to scores before a softmax."""
    if arguments.get("softcap") is not None:
        raise ValueError(
            f"reduce: proportional must be False for scores that are capped, got softcap={arguments['softcap']}"
        )
    check_width(key.shape[-1])
    if log_sizes.shape != (key.shape[0], key.shape[2]):
        raise UnknownReleaseError(
            f"attention must get one key for each of the {list(log_sizes.shape)} rows that have a size, got "
            f"{[key.shape[0], key.shape[2]]}"
        )


class _RowNorms(TorchDispatchMode):
    """Keeps the log-sum-exp that a flash kernel of PyTorch returns, if it is that of causal attention of these queries.

    The kernels differ in what they are given beside queries, keys and values, and are asked by the names of their
    arguments. Where anything is not as expected, nothing is kept.
    """

    supports_higher_order_operators = True  # it calls every operator as it is

    def __init__(self, query: Tensor, scale: float | None) -> None:
        super().__init__()
        self._query = query
        self._scale = query.shape[-1] ** -0.5 if scale is None else scale
        self._found: list[Tensor | None] = []

    @property
    def lse(self) -> Tensor | None:
        """[B, H, N] fp32, or None."""
        return self._found[0] if len(self._found) == 1 else None

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if op in _FLASH_KERNELS:
            names = (argument.name for argument in op._schema.arguments)
            self._found.append(self._causal_norm(dict(zip(names, args, strict=False)) | (kwargs or {}), out))
        return out

    def _causal_norm(self, given: dict[str, Any], out: Any) -> Tensor | None:
        query, key, lse = given.get("query"), given.get("key"), out[1]
        same = query is self._query
        square = isinstance(key, Tensor) and key.shape[2] == self._query.shape[2]
        causal = given.get("is_causal") is True and given.get("attn_mask") is None and not given.get("dropout_p")
        scale = given.get("scale")
        scale = self._query.shape[-1] ** -0.5 if scale is None else scale
        as_returned = lse.shape == self._query.shape[:3] and lse.dtype == torch.float32
        return lse.detach() if same and square and causal and scale == self._scale and as_returned else None


_FLASH_KERNELS = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu")
    if hasattr(torch.ops.aten, name)
)


class _Heard(threading.local):
    listening = False
    log_sizes: Tensor | None = None
    carriers: tuple[Tensor, tuple, Carriers] | None = None
    seen: Attention | None = None


class _TappedConfig:
    """A config that names our attention function to a thread that listens or weighs, and is the original otherwise."""

    def __init__(self, original: Any, tap: AttentionTap) -> None:
        self.original, self._tap = original, tap

    @property
    def _attn_implementation(self) -> str:
        return self._tap.name if self._tap.listening or self._tap.is_weighing else attention_name(self.original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)
