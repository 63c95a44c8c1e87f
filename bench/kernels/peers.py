"""Other libraries that compute the same as one of the ops, and when they do. All are optional."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def refuse_flash_colreduce(q: Tensor, k: Tensor, lse: Tensor | None = None, **_) -> str | None:
    """Why flash-colreduce cannot serve these inputs; None if it can."""
    if find_spec("flash_colreduce") is None:
        return "flash-colreduce is not installed"
    if not q.is_cuda:
        return "flash-colreduce needs a CUDA device"
    if q.shape[1] != k.shape[1]:
        return "flash-colreduce needs as many key heads as query heads"
    return "flash-colreduce takes no log-sum-exp" if lse is not None else None


def flash_colreduce(q: Tensor, k: Tensor, num_queries: int | None = None, lse: Tensor | None = None) -> Tensor:
    """attention_column_sum by https://pypi.org/project/flash-colreduce."""
    from flash_colreduce import flash_colreduce

    queries = q if num_queries is None else q[:, :, -num_queries:]
    return flash_colreduce(queries, k, reduction="sum", is_causal=True).float().mean(1)


def refuse_scipy(edges: Tensor, **_) -> str | None:
    """Why SciPy cannot serve these inputs; None if it can."""
    if find_spec("scipy") is None:
        return "SciPy is not installed"
    return "SciPy runs on CPU tensors" if edges.is_cuda else None


def scipy_components(edges: Tensor, num_nodes: int) -> Tensor:
    """connected_components by scipy.sparse.csgraph; its labels become the smallest node of each component."""
    import numpy as np
    from scipy.sparse import coo_array, csgraph

    first, second = edges.numpy().T
    graph = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(num_nodes, num_nodes))
    label = csgraph.connected_components(graph, directed=False)[1]
    lowest = np.unique(label, return_index=True)[1]
    return torch.from_numpy(lowest[label])
