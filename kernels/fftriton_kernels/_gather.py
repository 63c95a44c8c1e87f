"""Rows of many tensors at the same positions, copied bit for bit.

    out_i[b, k] = tensor_i[b, index[b, k]],   zeros where index[b, k] is -1

Bound by DRAM bandwidth: each taken row is read once and written once. Tensors are copied as raw integers, the widest
that their sizes and strides allow, so every dtype keeps its bits. Up to six of one such width share a launch, whatever
their rows look like: hidden states, positions, the cosines and sines of a rotary embedding.
Reference: reference.gather_rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _cpu, reference
from ._dispatch import cdiv, check_below, check_most, runs_triton
from ._operators import needs_gradient, operator
from ._specialisation import VARYING

_UNITS = {1: tl.uint8, 2: tl.int16, 4: tl.int32, 8: tl.int64}  # by bytes
_KNOWN = {  # to Triton, as what pointers point to
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8,
}  # fmt: skip
_TOGETHER = 6  # tensors a launch
_BLOCK_K = 32  # rows a program
_BLOCK_BYTES = 256  # of a row a program
_POINTERS = [f"{kind}{i}_ptr" for i in range(_TOGETHER) for kind in ("tensor", "out")]
_VARIED = ("stride_b", "stride_n", "stride_o", "INNER", "WIDTH", "first")
_SIZES = [f"{name}{i}" for i in range(_TOGETHER) for name in _VARIED]


@triton.jit(do_not_specialize=[*VARYING, *_SIZES], do_not_specialize_on_alignment=_POINTERS)
def _gather_kernel(
    index_ptr,                                     # index [B, K]
    # tensors [B, N, WIDTH], outs [B, K, WIDTH] contiguous; first: the first chunk of a row that belongs to a tensor
    tensor0_ptr, out0_ptr, stride_b0, stride_n0, stride_o0, INNER0, WIDTH0, first0,
    tensor1_ptr, out1_ptr, stride_b1, stride_n1, stride_o1, INNER1, WIDTH1, first1,
    tensor2_ptr, out2_ptr, stride_b2, stride_n2, stride_o2, INNER2, WIDTH2, first2,
    tensor3_ptr, out3_ptr, stride_b3, stride_n3, stride_o3, INNER3, WIDTH3, first3,
    tensor4_ptr, out4_ptr, stride_b4, stride_n4, stride_o4, INNER4, WIDTH4, first4,
    tensor5_ptr, out5_ptr, stride_b5, stride_n5, stride_o5, INNER5, WIDTH5, first5,
    stride_ib, stride_ik,
    N, K, chunks,
    UNIT: tl.constexpr, NESTED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # grid (chunks of all tensors * ceil(K / BLOCK_K), B): one program copies a tile of one tensor. Its arguments are
    # selected, not branched to: the layout pass of Triton 3.6 fails where branches share offsets
    unit = tl.pointer_type(UNIT)
    chunk = tl.program_id(0) % chunks
    tensor_ptr, out_ptr, stride_b, stride_n = tensor0_ptr.to(unit), out0_ptr.to(unit), stride_b0, stride_n0
    stride_o, INNER, WIDTH, first = stride_o0, INNER0, WIDTH0, first0
    if chunk >= first1:
        tensor_ptr, out_ptr, stride_b, stride_n = tensor1_ptr.to(unit), out1_ptr.to(unit), stride_b1, stride_n1
        stride_o, INNER, WIDTH, first = stride_o1, INNER1, WIDTH1, first1
    if chunk >= first2:
        tensor_ptr, out_ptr, stride_b, stride_n = tensor2_ptr.to(unit), out2_ptr.to(unit), stride_b2, stride_n2
        stride_o, INNER, WIDTH, first = stride_o2, INNER2, WIDTH2, first2
    if chunk >= first3:
        tensor_ptr, out_ptr, stride_b, stride_n = tensor3_ptr.to(unit), out3_ptr.to(unit), stride_b3, stride_n3
        stride_o, INNER, WIDTH, first = stride_o3, INNER3, WIDTH3, first3
    if chunk >= first4:
        tensor_ptr, out_ptr, stride_b, stride_n = tensor4_ptr.to(unit), out4_ptr.to(unit), stride_b4, stride_n4
        stride_o, INNER, WIDTH, first = stride_o4, INNER4, WIDTH4, first4
    if chunk >= first5:
        tensor_ptr, out_ptr, stride_b, stride_n = tensor5_ptr.to(unit), out5_ptr.to(unit), stride_b5, stride_n5
        stride_o, INNER, WIDTH, first = stride_o5, INNER5, WIDTH5, first5
    pid_b = tl.program_id(1).to(tl.int64)
    offs_k = (tl.program_id(0) // chunks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
    offs_w = (chunk - first) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    row = tl.load(index_ptr + pid_b * stride_ib + offs_k * stride_ik, mask=offs_k < K, other=-1).to(tl.int64)
    if NESTED:
        place = (offs_w // INNER).to(tl.int64) * stride_o + offs_w % INNER
    else:
        place = offs_w.to(tl.int64)
    taken = (row >= 0) & (row < N) & (offs_w < WIDTH)
    rows = tl.load(tensor_ptr + pid_b * stride_b + row * stride_n + place, mask=taken, other=0)
    # zeros where nothing is taken
    tl.store(out_ptr + (pid_b * K + offs_k) * WIDTH + offs_w, rows, mask=(offs_k < K) & (offs_w < WIDTH))


def _layout(tensor: Tensor) -> tuple[int, tuple[int, ...]] | None:
    """Bytes of a unit, and in units: stride_b, stride_n, stride_o, INNER, WIDTH.

    None where rows are not one or two runs of neighbours.
    """
    return _layout_of(tensor.shape, tensor.stride(), tensor.element_size(), tensor.data_ptr() % 8)


@lru_cache(maxsize=4096)
def _layout_of(
    shape: torch.Size, strides: tuple[int, ...], size: int, offset: int
) -> tuple[int, tuple[int, ...]] | None:
    if len(shape) == 2:
        apart, inner, width = 0, 1, 1
    elif len(shape) == 3 and strides[2] == 1:
        apart, inner, width = 0, shape[2], shape[2]
    else:
        runs: list[tuple[int, int]] = []  # (size, stride), innermost last
        for count, stride in zip(shape[2:], strides[2:], strict=True):
            if runs and runs[-1][1] == count * stride:
                runs[-1] = (runs[-1][0] * count, stride)
            elif count != 1:
                runs.append((count, stride))
        if len(runs) > 2 or (runs and runs[-1][1] != 1):
            return None
        (outer, apart), (inner, _) = [(1, 0)] * (2 - len(runs)) + runs
        width = outer * inner
    in_bytes = [size * count for count in (strides[0], strides[1], apart, inner, width)]
    unit = math.gcd(8, offset, *in_bytes)
    return unit, tuple(count // unit for count in in_bytes)


def _launch(index: Tensor, copies: list[tuple[Tensor, Tensor, tuple[int, ...]]], unit: int) -> None:
    """Copy the rows of up to six tensors: (tensor, out, layout)."""
    batch, rows = index.shape
    check_most("gather_rows", "B", batch)
    block_w = _BLOCK_BYTES // unit
    arguments: list[object] = []
    chunks, nested = 0, False
    for tensor, out, layout in copies:
        if tensor.dtype not in _KNOWN:
            tensor, out = triton.reinterpret(tensor, _UNITS[unit]), triton.reinterpret(out, _UNITS[unit])
        arguments += [tensor, out, *layout, chunks]
        chunks += cdiv(layout[-1], block_w)
        nested |= layout[-2] != layout[-1]
    arguments += (*arguments[:7], chunks) * (_TOGETHER - len(copies))  # where no program is
    with torch.cuda.device_of(index):
        _gather_kernel[(chunks * cdiv(rows, _BLOCK_K), batch)](
            index, *arguments, *index.stride(), copies[0][0].shape[1], rows, chunks,
            UNIT=_UNITS[unit], NESTED=nested, BLOCK_K=_BLOCK_K, BLOCK_W=block_w, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def _fake_rows(index, tensors):
    return [tensor.new_empty(*index.shape, *tensor.shape[2:]) for tensor in tensors]


@operator("gather_rows", "(Tensor index, Tensor[] tensors) -> Tensor[]", fake=_fake_rows)
def _gather_rows(index: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """index [B, K] int32 or int64 (-1: a row of zeros), tensors [B, N, ...] of any dtype -> [B, K, ...] contiguous.

    Tensors whose rows are not one or two runs of neighbours take the PyTorch path.
    """
    if tensors:
        check_below("gather_rows", "kept", index, "N", tensors[0].shape[1])
    if not runs_triton(index):
        return [out.contiguous() for out in _cpu.gather_rows(index, *tensors)]
    batch, rows = index.shape
    outs = []
    alike: dict[int, list[tuple[Tensor, Tensor, tuple[int, ...]]]] = {}  # by unit
    for tensor in tensors:
        out = tensor.new_empty(batch, rows, *tensor.shape[2:])  # a third faster than with a torch.Size
        outs.append(out)
        found = _layout(tensor)
        if found is None:
            out.copy_(reference.gather_rows(index, tensor)[0])
        elif out.numel():
            alike.setdefault(found[0], []).append((tensor, out, found[1]))
    for unit, copies in alike.items():
        for i in range(0, len(copies), _TOGETHER):
            _launch(index, copies[i : i + _TOGETHER], unit)
    return outs


class _Gather(torch.autograd.Function):
    """The operator with its gradients."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(index)
        ctx.lengths = [tensor.shape[1] for tensor in tensors]
        out = tuple(_gather_rows(index, tensors))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(rows for rows, needs in zip(out, ctx.needs_input_grad[1:], strict=True) if not needs)
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        received = zip(grads, ctx.lengths, strict=True)
        return None, *(None if grad is None else _scatter_rows(index, grad, length) for grad, length in received)


def _scatter_rows(index: Tensor, grad: Tensor, length: int) -> Tensor:
    """The transpose of a gather: grad [B, K, ...] -> [B, N, ...]; what rows of zeros received goes nowhere."""
    batch = index.shape[0]
    sample = torch.arange(batch, device=index.device)[:, None]
    outside = (index < 0) | (index >= length)
    place = torch.where(outside, batch * length, index + sample * length).flatten()
    out = grad.new_zeros(batch * length + 1, *grad.shape[2:]).index_add(0, place, grad.flatten(0, 1))
    return out[:-1].unflatten(0, (batch, length))


def gather(index: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows of each tensor [B, N, ...] at index [B, K], [B, K, ...] contiguous; differentiable."""
    if needs_gradient(*tensors):
        return _Gather.apply(index, *tensors)
    return _gather_rows(index, tensors)
