"""Cosine similarity between each token and an earlier one.

    s[b, t] = <x[b, t], x[b, p]> / (|x[b, t]| |x[b, p]|),   p = t - stride, or an explicit predecessor

Bound by DRAM bandwidth: x is read about once, N floats are written. Each row is scaled by a power of two before it is
squared, so rows of any finite size have a cosine.
Reference: reference.strided_cosine_similarity, reference.linked_cosine_similarity.
Source: FrameFusion, arXiv:2501.01986, eq. 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _cpu
from ._dispatch import (
    FLOATS,
    INDICES,
    block,
    cdiv,
    check_below,
    check_dtype,
    check_most,
    check_same_device,
    check_shape,
    check_stride,
    runs_triton,
)
from ._operators import operator, without_gradient
from ._packed import any_rows, check_cu_seqlens, rows_of, strided_predecessor
from ._specialisation import VARYING
from ._tiles import lookup
from ._types import NO_LINK

_NO_LINK = tl.constexpr(NO_LINK)
_FRAMES_A_PROGRAM = 16


@triton.jit
def _sums_of_two(a, b, BLOCK_D: tl.constexpr):
    # at once, so that threads wait for each other once; eight neighbours, which one thread holds, come first
    return tl.split(tl.sum(tl.sum(tl.reshape(tl.join(a, b), (BLOCK_D // 8, 8, 2)), 1), 0))


@triton.jit
def _sums_of_four(a, b, c, d, BLOCK_D: tl.constexpr):
    rows = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK_D // 8, 8, 2, 2))
    first, second = tl.split(tl.sum(tl.sum(rows, 1), 0))
    sum_a, sum_b = tl.split(first)
    sum_c, sum_d = tl.split(second)
    return sum_a, sum_b, sum_c, sum_d


@triton.jit
def _factor(peak):
    # the power of two that brings the largest entry into [1, 2); NaN and Inf survive and are caught by the norm
    exponent = ((peak.to(tl.uint32, bitcast=True) >> 23) & 0xFF).to(tl.int32)
    biased = tl.minimum(tl.maximum(254 - exponent, 1), 254)
    return (biased.to(tl.uint32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _cosine(dot, square, partner_square):
    usable = (square > 0) & (square < float("inf")) & (partner_square > 0) & (partner_square < float("inf"))
    norms = tl.where(usable, tl.sqrt_rn(square) * tl.sqrt_rn(partner_square), 1.0)
    return tl.where(usable, tl.div_rn(dot, norms), _NO_LINK)


@triton.jit(do_not_specialize=VARYING)
def _strided_cosine_kernel(
    x_ptr, out_ptr,                                # x [B, N, D], out [B, N] fp32
    stride_xb, stride_xn, stride_xd,
    stride_ob, stride_on,
    N, P,
    D: tl.constexpr, BLOCK_D: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    # grid (P * ceil(frames / FRAMES), B): one program walks one patch over FRAMES frames, from the frame before them;
    # two rows are on their way while one is reduced. A row that does not exist is 0, and so has no cosine
    P = P.to(tl.int64)  # for 2 * P
    t = tl.program_id(0).to(tl.int64) % P + (tl.program_id(0).to(tl.int64) // P * FRAMES - 1) * P
    pid_b = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    x_ptr += pid_b * stride_xb + offs_d * stride_xd
    loaded = tl.load(x_ptr + t * stride_xn, mask=offs_d < tl.where(t >= 0, D, 0), other=0.0)
    ahead = tl.load(x_ptr + (t + P) * stride_xn, mask=offs_d < tl.where(t + P < N, D, 0), other=0.0)
    earlier = tl.zeros((BLOCK_D,), tl.float32)
    earlier_square = 0.0
    for frame in range(FRAMES + 1):
        wanted = (frame < FRAMES - 1) & (t + 2 * P < N)
        x = loaded.to(tl.float32)
        loaded = ahead
        ahead = tl.load(x_ptr + (t + 2 * P) * stride_xn, mask=offs_d < tl.where(wanted, D, 0), other=0.0)
        x *= _factor(tl.max(tl.abs(x), 0))
        square, dot = _sums_of_two(x * x, x * earlier, BLOCK_D)
        if (frame > 0) & (t < N):  # no mask: Triton 3.2's interpreter ignores that of a scalar
            tl.store(out_ptr + pid_b * stride_ob + t * stride_on, _cosine(dot, square, earlier_square))
        earlier = x
        earlier_square = square
        t += P


@triton.jit(do_not_specialize=VARYING)
def _linked_cosine_kernel(
    x_ptr, predecessor_ptr, out_ptr,               # x [B, N, D], predecessor [B, N], out [B, N] fp32
    stride_xb, stride_xn, stride_xd,
    stride_pb, stride_pn,
    stride_ob, stride_on,
    N,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # grid (N, B): one program owns one output element; its own row is on its way before the partner is known
    pid_n = tl.program_id(0).to(tl.int64)
    pid_b = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    x_ptr += pid_b * stride_xb + offs_d * stride_xd
    x = tl.load(x_ptr + pid_n * stride_xn, mask=offs_d < D, other=0.0)
    partner = tl.load(predecessor_ptr + pid_b * stride_pb + pid_n * stride_pn).to(tl.int64)
    linked = (partner >= 0) & (partner < N)
    mask_d = offs_d < tl.where(linked, D, 0)  # the norm of no partner is 0, so NO_LINK
    y = tl.load(x_ptr + tl.where(linked, partner, 0) * stride_xn, mask=mask_d, other=0.0)
    x = x.to(tl.float32)
    y = y.to(tl.float32)
    x_peak, y_peak = tl.split(tl.max(tl.join(tl.abs(x), tl.abs(y)), 0))
    x *= _factor(x_peak)
    y *= _factor(y_peak)
    dot, square, partner_square, _ = _sums_of_four(x * y, x * x, y * y, y * y, BLOCK_D)
    tl.store(out_ptr + pid_b * stride_ob + pid_n * stride_on, _cosine(dot, square, partner_square))


def _check_sizes(op: str, batch: int, width: int) -> None:
    check_most(op, "B", batch)
    check_most(op, "D", width, 2**18)  # four rows are one tensor, whose elements Triton counts up to 2**20


def _per_token(x, _):
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@operator("strided_cosine_similarity", fake=_per_token)
def _strided_cosine_similarity(x: Tensor, stride: int) -> Tensor:
    batch, length, width = x.shape
    if not runs_triton(x):
        return _cpu.strided_cosine_similarity(x, stride)
    _check_sizes("strided_cosine_similarity", batch, width)
    out = x.new_empty(batch, length, dtype=torch.float32)
    if out.numel():
        segments = cdiv(cdiv(length, stride), _FRAMES_A_PROGRAM)
        with torch.cuda.device_of(x):
            _strided_cosine_kernel[(stride * segments, batch)](
                x, out, *x.stride(), *out.stride(), length, stride,
                D=width, BLOCK_D=block(width), FRAMES=_FRAMES_A_PROGRAM,
                num_warps=lookup("strided_cosine", x, width).num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return out


@operator("linked_cosine_similarity", fake=_per_token)
def _linked_cosine_similarity(x: Tensor, predecessor: Tensor) -> Tensor:
    batch, length, width = x.shape
    check_below("linked_cosine_similarity", "predecessor", predecessor, "N", length)
    if not runs_triton(x):
        return _cpu.linked_cosine_similarity(x, predecessor)
    _check_sizes("linked_cosine_similarity", batch, width)
    out = x.new_empty(batch, length, dtype=torch.float32)
    if out.numel():
        with torch.cuda.device_of(x):
            _linked_cosine_kernel[(length, batch)](
                x, predecessor, out, *x.stride(), *predecessor.stride(), *out.stride(), length,
                D=width, BLOCK_D=block(width), num_warps=lookup("cosine", x, width).num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def strided_cosine_similarity(x: Tensor, stride: int, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Cosine similarity of each token with the one `stride` places earlier.

    With the P patches of every frame stored one after the other, `stride=P` compares a patch with the same patch one
    frame earlier.

    Args:
        x: [B, N, D] fp16, bf16 or fp32, any strides.
        stride: how many places earlier the partner is, at least 1. If it is N or more, no token has a partner.
        cu_seqlens: [S+1] int32 or int64, ascending from 0 to T (not checked, because that would stall a GPU). x [T, D]
            then holds packed sequences, and t counts from the start of each.

    Returns:
        [B, N] fp32; packed: [T]. NO_LINK (-2) if t < stride, or if either row is zero or has a NaN or Inf.

    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape or a stride that does not fit the above, or tensors
            on two devices.

    Source:
        FrameFusion, arXiv:2501.01986, eq. 1.
    """
    op = "strided_cosine_similarity"
    check_dtype(op, "x", x, FLOATS)
    check_shape(op, "x", x, **any_rows(cu_seqlens is not None), D=None)
    check_cu_seqlens(op, cu_seqlens, "x", x)
    stride = check_stride(op, "stride", stride, x.shape[-2])
    if cu_seqlens is None:
        return without_gradient(op, _strided_cosine_similarity, x, stride)
    links = strided_predecessor(1, x.shape[0], stride, x.device, cu_seqlens)
    return without_gradient(op, _strided_cosine_similarity, x[None], stride).masked_fill(links < 0, NO_LINK)[0]


def linked_cosine_similarity(x: Tensor, predecessor: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Cosine similarity of each token with an explicit partner.

    Args:
        x: [B, N, D] fp16, bf16 or fp32, any strides.
        predecessor: [B, N] int32 or int64, the position of each token's partner in its own sample, -1 for none.
            On a GPU a position of N or more also counts as none: checking it would stall the GPU.
        cu_seqlens: [S+1] int32 or int64. x [T, D] and predecessor [T] then hold packed sequences, and predecessors are
            positions among all T tokens. The caller sees to it that a partner is in the same sequence.

    Returns:
        [B, N] fp32; packed: [T]. NO_LINK (-2) without a partner, or if either row is zero or has a NaN or Inf.

    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape that does not fit the above, tensors on two devices,
            or, on a CPU, a predecessor of N or more.

    Source:
        FrameFusion, arXiv:2501.01986, eq. 1, with partners at any distance.
    """
    op = "linked_cosine_similarity"
    check_dtype(op, "x", x, FLOATS)
    packed = cu_seqlens is not None
    check_shape(op, "x", x, **any_rows(packed), D=None)
    check_cu_seqlens(op, cu_seqlens, "x", x)
    check_dtype(op, "predecessor", predecessor, INDICES)
    check_shape(op, "predecessor", predecessor, **rows_of(x, packed))
    check_same_device(op, x=x, predecessor=predecessor)
    if packed:
        return without_gradient(op, _linked_cosine_similarity, x[None], predecessor[None])[0]
    return without_gradient(op, _linked_cosine_similarity, x, predecessor)
