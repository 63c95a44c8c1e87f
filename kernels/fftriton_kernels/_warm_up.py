"""Compiling the kernels that a model needs before its first request."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import FLOATS, check_at_least
from .attention import attention_column_sum
from .cosine import linked_cosine_similarity
from .merge import merge_mean, merge_roots
from .select import gather_rows, segmented_topk_keep, topk_keep

_LENGTHS = (1024, 1001)  # Triton compiles one kernel for strides that are multiples of 16, and one for the others
_FEW = (1, 4)  # queries whose attention counts, as the authors of FastV and FrameFusion choose
_SEGMENT = 7  # tokens in a frame; any number compiles the same kernels


def warm_up(
    hidden_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    rotary_axes: int = 1,
) -> None:
    """Compile the kernels that merging and pruning need for models of one shape, by running each op on zeros.

    Without it Triton compiles each kernel when a prompt first needs it, which takes seconds inside that prompt's
    prefill. Prompts of other lengths, batches and budgets need no further compilation. Triton keeps what it has
    compiled on disk, so that a second process warms up quickly. Does nothing on a CPU.

    Args:
        hidden_size: D of the hidden states.
        heads, kv_heads: attention heads of queries, and of keys and values.
        head_dim: width of a head.
        dtype: of hidden states, queries and keys: fp16, bf16 or fp32.
        device: where the model runs; None for the GPU if there is one.
        rotary_axes: 1, or 3 for models whose rotary embeddings keep an axis for time, height and width (Qwen2-VL).

    Raises:
        TypeError, ValueError: an argument that is no such number, dtype or device.
    """
    counts = {
        "hidden_size": hidden_size, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
        "rotary_axes": rotary_axes,
    }  # fmt: skip
    for name, value in counts.items():
        check_at_least("warm_up", name, value, 1)
    if heads % kv_heads:
        raise ValueError(f"warm_up: heads must be a multiple of kv_heads {kv_heads}, got {heads}")
    if dtype not in FLOATS:
        raise TypeError(f"warm_up: dtype must be {' or '.join(map(str, FLOATS))}, got {dtype}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"warm_up: device must be one that torch knows, got {device!r}") from error
    if device.type == "cuda":
        run_ops(hidden_size, heads, kv_heads, head_dim, dtype, device, rotary_axes)


def run_ops(
    hidden_size: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, axes: int
) -> None:
    """Call each op so often that every kernel of it has been launched."""
    for length in _LENGTHS:
        for batch in (1, 2):
            _merge_and_prune(batch, length, hidden_size, head_dim, dtype, device, axes)
            _attend(batch, length, heads, kv_heads, head_dim, dtype, device)


def _merge_and_prune(
    batch: int, length: int, hidden_size: int, head_dim: int, dtype: torch.dtype, device: torch.device, axes: int
) -> None:
    """A merge step and a prune step, as the methods make them."""
    x = torch.zeros(batch, length, hidden_size, dtype=dtype, device=device)
    position = torch.arange(length, device=device).expand(batch, -1).contiguous()
    links = (position - _SEGMENT).clamp_min(-1)
    rotary = _rotary(batch, length, head_dim, dtype, device, axes)
    companions: tuple[Tensor, ...] = (position, links, *rotary)
    similarity = linked_cosine_similarity(x, links)
    merge_roots(similarity, links, 0.5)
    roots = merge_roots(similarity, links, 0.5, max_merges=length // 2)
    merge_mean(x, roots, companions, predecessor=links)
    kept, _ = topk_keep(similarity, length // 2, candidates=links >= 0, capacity=length)
    counts = torch.ones(batch, length // _SEGMENT + 1, dtype=torch.int64, device=device)
    segmented_topk_keep(similarity, position // _SEGMENT, counts, capacity=length)
    gather_rows(kept, x, *companions)


def _rotary(
    batch: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device, axes: int
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, N, d], or [B, N, axes, d] with the axes outermost in memory, as decoders keep them."""
    if axes == 1:
        cos = torch.zeros(batch, length, head_dim, dtype=dtype, device=device)
    else:
        cos = torch.zeros(axes, batch, length, head_dim, dtype=dtype, device=device).permute(1, 2, 0, 3)
    return cos, torch.zeros_like(cos)


def _attend(
    batch: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """The column sums of all queries and of a few, with a log-sum-exp and without."""
    q, k = (
        torch.zeros(batch, length, count, head_dim, dtype=dtype, device=device).transpose(1, 2)
        for count in (heads, kv_heads)
    )
    attention_column_sum(q, k)
    attention_column_sum(q, k, lse=torch.zeros(batch, heads, length, device=device))
    for queries in _FEW:
        attention_column_sum(q, k, num_queries=queries)
