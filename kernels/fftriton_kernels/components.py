"""Connected components of an undirected graph, labelled by their smallest node.

    label[v] = min{u : u and v are connected}

Union-find: every edge hooks the larger of its two roots below the smaller one with an atomic minimum, and tries again
with what it displaced; then every node follows its parents. Parents only ever decrease and a stale one is still an
ancestor, so the outcome is the same in whatever order edges are worked on.

Bound by the latency of following parents: 16 bytes per edge, 8 per node.
Reference: reference.connected_components.
Source: Jaiganesh and Burtscher, A High-Performance Connected Components Implementation for GPUs, HPDC 2018.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _cpu
from ._dispatch import (
    INDICES,
    cdiv,
    check_dtype,
    check_rows,
    check_shape,
    runs_triton,
)
from ._operators import operator
from ._specialisation import VARYING

BLOCK = 256  # edges or nodes a program


@triton.jit
def _find(parents_ptr, node, mask):
    # the root of each node
    parent = tl.load(parents_ptr + node, mask=mask, other=0, volatile=True)
    moves = mask & (parent != node)
    moving = tl.max(moves.to(tl.int32), 0)
    while moving > 0:
        node = tl.where(moves, parent, node)
        parent = tl.load(parents_ptr + node, mask=moves, other=0, volatile=True)
        moves = moves & (parent != node)
        moving = tl.max(moves.to(tl.int32), 0)
    return node


@triton.jit(do_not_specialize=VARYING)
def _hook_kernel(
    edges_ptr, parents_ptr,                        # edges [E, 2], parents [num_nodes] int64
    stride_ee, stride_ei,
    E, num_nodes,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    # grid (ceil(E / BLOCK_E),)
    offs_e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    first = tl.load(edges_ptr + offs_e * stride_ee, mask=offs_e < E, other=-1).to(tl.int64)
    second = tl.load(edges_ptr + offs_e * stride_ee + stride_ei, mask=offs_e < E, other=-1).to(tl.int64)
    active = (first >= 0) & (second >= 0) & (first < num_nodes) & (second < num_nodes)
    unfinished = tl.max(active.to(tl.int32), 0)
    while unfinished > 0:
        first = _find(parents_ptr, first, active)
        second = _find(parents_ptr, second, active)
        upper = tl.maximum(first, second)
        lower = tl.minimum(first, second)
        active = active & (upper != lower)
        displaced = tl.atomic_min(parents_ptr + upper, lower, mask=active, sem="relaxed")
        active = active & (displaced != upper)  # `upper` was no root any more: its parent is still to be joined
        first = tl.where(active, displaced, first)
        second = lower
        unfinished = tl.max(active.to(tl.int32), 0)


@triton.jit(do_not_specialize=VARYING)
def _flatten_kernel(parents_ptr, num_nodes, BLOCK_N: tl.constexpr):
    # grid (ceil(num_nodes / BLOCK_N),): parents become roots in place
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(parents_ptr + offs_n, _find(parents_ptr, offs_n, offs_n < num_nodes), mask=offs_n < num_nodes)


def _labels(edges, num_nodes):
    return edges.new_empty(num_nodes, dtype=torch.int64)


@operator("connected_components", fake=_labels)
def _connected_components(edges: Tensor, num_nodes: int) -> Tensor:
    if not runs_triton(edges):
        return _cpu.connected_components(edges, num_nodes)
    parents = torch.arange(num_nodes, device=edges.device)
    if edges.numel() and num_nodes:
        count = edges.shape[0]
        with torch.cuda.device_of(edges):
            _hook_kernel[(cdiv(count, BLOCK),)](
                edges, parents, *edges.stride(), count, num_nodes, BLOCK_E=BLOCK, enable_fp_fusion=True
            )
            _flatten_kernel[(cdiv(num_nodes, BLOCK),)](parents, num_nodes, BLOCK_N=BLOCK, enable_fp_fusion=True)
    return parents


def connected_components(edges: Tensor, num_nodes: int) -> Tensor:
    """Label each node with the smallest node it is connected to.

    Several graphs can share a call without a special argument: number their nodes consecutively, as packed tokens are.
    num_nodes is then the number of all nodes, and labels are numbers among them.

    Args:
        edges: [E, 2] int32 or int64, any strides. Direction, order, repetition and loops do not matter. An edge with an
            end outside 0 .. num_nodes - 1 is ignored, so a list may be padded with -1.
        num_nodes: the number of nodes, from 0 to 2^31 - 1.

    Returns:
        [num_nodes] int64. label[v] <= v; a node without an edge is its own label.

    Raises:
        TypeError: a dtype that is not listed, a num_nodes that is not an int. ValueError: a shape or a number that does
            not fit the above.

    Source:
        Jaiganesh and Burtscher, A High-Performance Connected Components Implementation for GPUs, HPDC 2018.
    """
    op = "connected_components"
    check_dtype(op, "edges", edges, INDICES)
    check_shape(op, "edges", edges, E=None, ends=2)
    check_rows(op, "num_nodes", num_nodes)
    return _connected_components(edges, num_nodes)
