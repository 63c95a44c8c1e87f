"""Rows of many tensors at the same positions, copied bit for bit.

    out_i[b, k] = tensor_i[b, index[b, k]],   zeros where index[b, k] is -1

Bound by DRAM bandwidth: each taken row is read once and written once. Tensors are copied as raw integers of their
element size, so every dtype keeps its bits; up to four that agree in element size, trailing shape and strides (the
cosines and sines of a rotary embedding, say) share a launch.
Reference: reference.gather_rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _cpu, reference
from ._dispatch import check_below, runs_triton
from ._ops import add_op_namespace_prefix
from ._specialisation import VARYING

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TILE = 1024  # elements a program


class _Layout(NamedTuple):
    """How the elements of a row lie in memory: OUTER runs of INNER elements."""

    bits: torch.dtype
    rows: int
    outer: int
    inner: int
    stride_b: int
    stride_n: int
    stride_outer: int
    stride_inner: int


@triton.jit(do_not_specialize=VARYING)
def _gather_kernel(
    index_ptr,                                     # index [B, K]
    tensor0_ptr, tensor1_ptr, tensor2_ptr, tensor3_ptr,  # each [B, N, OUTER, INNER], one layout for all
    out0_ptr, out1_ptr, out2_ptr, out3_ptr,        # each [B, K, WIDTH] contiguous, WIDTH = OUTER * INNER
    stride_ib, stride_ik,
    stride_tb, stride_tn, stride_outer, stride_inner,
    N, K, WIDTH, INNER,
    NESTED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # grid (ceil(K / BLOCK_K), tensors * ceil(WIDTH / BLOCK_W), B): one program copies a tile of one tensor
    chunks = tl.cdiv(WIDTH, BLOCK_W)
    which = tl.program_id(1) // chunks
    pid_b = tl.program_id(2).to(tl.int64)
    offs_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
    offs_w = (tl.program_id(1) % chunks) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    row = tl.load(index_ptr + pid_b * stride_ib + offs_k * stride_ik, mask=offs_k < K, other=-1).to(tl.int64)
    if NESTED:
        place = (offs_w // INNER).to(tl.int64) * stride_outer + (offs_w % INNER).to(tl.int64) * stride_inner
    else:
        place = offs_w.to(tl.int64) * stride_inner
    offset = pid_b * stride_tb + row * stride_tn + place
    offs_out = (pid_b * K + offs_k) * WIDTH + offs_w
    mask = (offs_k < K) & (offs_w < WIDTH)
    taken = (row >= 0) & (row < N) & (offs_w < WIDTH)
    tensor_ptr, out_ptr = tensor0_ptr, out0_ptr
    if which == 1:
        tensor_ptr, out_ptr = tensor1_ptr, out1_ptr
    if which == 2:
        tensor_ptr, out_ptr = tensor2_ptr, out2_ptr
    if which == 3:
        tensor_ptr, out_ptr = tensor3_ptr, out3_ptr
    # zeros where nothing is taken
    tl.store(out_ptr + offs_out, tl.load(tensor_ptr + offset, mask=taken, other=0), mask=mask)


def _layout(tensor: Tensor) -> _Layout | None:
    """The layout of a tensor's rows; None where the trailing dimensions are more than two runs or elements too wide."""
    runs: list[tuple[int, int]] = []  # (size, stride), innermost last
    for size, stride in zip(tensor.shape[2:], tensor.stride()[2:], strict=True):
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        elif size != 1:
            runs.append((size, stride))
    if len(runs) > 2 or tensor.element_size() not in _BITS:
        return None
    (outer, stride_outer), (inner, stride_inner) = [(1, 0)] * (2 - len(runs)) + runs
    bits = _BITS[tensor.element_size()]
    return _Layout(bits, tensor.shape[1], outer, inner, tensor.stride(0), tensor.stride(1), stride_outer, stride_inner)


def _launch(index: Tensor, tensors: list[Tensor], outs: list[Tensor], layout: _Layout) -> None:
    batch, rows = index.shape
    width = layout.outer * layout.inner
    block_w = min(triton.next_power_of_2(width), _TILE)
    block_k = _TILE // block_w
    padded = [*tensors, *tensors[:1] * (4 - len(tensors))], [*outs, *outs[:1] * (4 - len(outs))]
    grid = (triton.cdiv(rows, block_k), len(tensors) * triton.cdiv(width, block_w), batch)
    with torch.cuda.device_of(index):
        _gather_kernel[grid](
            index, *(part.view(layout.bits) for group in padded for part in group), *index.stride(),
            layout.stride_b, layout.stride_n, layout.stride_outer, layout.stride_inner, layout.rows, rows, width,
            layout.inner,
            NESTED=layout.outer > 1, BLOCK_K=block_k, BLOCK_W=block_w, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


@torch.library.custom_op(
    add_op_namespace_prefix("gather_rows"), mutates_args=(), schema="(Tensor index, Tensor[] tensors) -> Tensor[]"
)
def gather(index: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """index [B, K] int32 or int64 (-1: a row of zeros), tensors [B, N, ...] of any dtype -> [B, K, ...] contiguous.

    Tensors whose trailing dimensions do not collapse to two strided ones, or whose elements are wider than 8 bytes,
    take the PyTorch path.
    """
    for tensor in tensors:
        check_below("gather_rows", "kept", index, "N", tensor.shape[1])
    if not runs_triton(index):
        return [out.contiguous() for out in _cpu.gather_rows(index, *tensors)]
    outs = [tensor.new_empty(*index.shape, *tensor.shape[2:]) for tensor in tensors]
    alike: dict[_Layout, list[int]] = {}
    for i, (tensor, out) in enumerate(zip(tensors, outs, strict=True)):
        layout = _layout(tensor)
        if layout is None:
            out.copy_(reference.gather_rows(index, tensor)[0])
        elif out.numel():
            alike.setdefault(layout, []).append(i)
    for layout, places in alike.items():
        for i in range(0, len(places), 4):
            group = places[i : i + 4]
            _launch(index, [tensors[j] for j in group], [outs[j] for j in group], layout)
    return outs


@gather.register_fake
def _(index, tensors):
    return [tensor.new_empty(*index.shape, *tensor.shape[2:]) for tensor in tensors]


def _setup_context(ctx, inputs, output):
    index, tensors = inputs
    ctx.save_for_backward(index)
    ctx.lengths = [tensor.shape[1] for tensor in tensors]


def _backward(ctx, grads):
    (index,) = ctx.saved_tensors
    wanted = zip(grads, ctx.lengths, ctx.needs_input_grad[1], strict=True)
    return None, [_scatter_rows(index, grad, length) if needs else None for grad, length, needs in wanted]


def _scatter_rows(index: Tensor, grad: Tensor, length: int) -> Tensor:
    """The transpose of a gather: grad [B, K, ...] -> [B, N, ...]; what rows of zeros received goes nowhere."""
    batch = index.shape[0]
    sample = torch.arange(batch, device=index.device)[:, None]
    outside = (index < 0) | (index >= length)
    place = torch.where(outside, batch * length, index + sample * length).flatten()
    out = grad.new_zeros(batch * length + 1, *grad.shape[2:]).index_add(0, place, grad.flatten(0, 1))
    return out[:-1].unflatten(0, (batch, length))


gather.register_autograd(_backward, setup_context=_setup_context)
