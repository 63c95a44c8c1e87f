"""Every op on small random inputs, judged by its formula: whether the library works on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _dispatch, reference
from ._dispatch import FLOATS, check_dtype, runs_triton
from ._verify import doubled, verified
from .attention import attention_column_sum
from .components import connected_components
from .cosine import linked_cosine_similarity, strided_cosine_similarity
from .merge import merge_mean, merge_roots
from .select import gather_rows, segmented_topk_keep, topk_keep

_REPEATS = 3
_REPEATS_INTERPRETED = 1  # the interpreter takes milliseconds per program
_INTERPRETER = "Triton interpreter"
_BATCH = 2
_FRAMES = 120
_FRAMES_INTERPRETED = 2
_PATCHES = 6
_WIDTH = 256
_HEADS = 4
_KV_HEADS = 2
_HEAD_DIM = 64


class OpCheck(NamedTuple):
    """What the self-test found out about one op."""

    op: str  # name of the public function
    implementation: str  # see `implementation`
    error: float  # largest absolute difference from the formula in fp64; nan if the op failed
    seconds: float  # shortest of a few calls after the first; nan if the op failed
    fault: str  # what is wrong; empty if nothing is


def implementation(device: str | torch.device) -> str:
    """What serves the ops on tensors of this device: "Triton", "Triton interpreter" or "PyTorch"."""
    if not runs_triton(torch.empty(0, device=device)):
        return "PyTorch"
    return _INTERPRETER if _dispatch.INTERPRET else "Triton"


def self_test(device: str | torch.device, dtype: torch.dtype = torch.float32) -> list[OpCheck]:
    """Run every op on a device and compare its results with the formulas of `reference`.

    Results are judged as in `verified`. An op that raises is a fault as well, so this returns whatever happens to an
    op. It takes a second or so, and on a GPU the time of compiling the kernels if they have never run there.

    Args:
        device: where to run the ops.
        dtype: of hidden states, queries and keys: fp16, bf16 or fp32.

    Returns:
        One result per public op.

    Raises:
        TypeError: any other dtype.
    """
    check_dtype("self_test", "dtype", torch.empty(0, dtype=dtype), FLOATS)
    device = torch.device(device)
    return [_check(op, arguments, options, device) for op, arguments, options in _calls(device, dtype)]


def _check(op: Callable[..., Any], arguments: list[Any], options: dict[str, Any], device: torch.device) -> OpCheck:
    name, served = op.__name__, implementation(device)
    try:
        with verified():
            out = op(*arguments, **options)
        exact = [doubled(argument) for argument in arguments]
        error = _distance(out, getattr(reference, name)(*exact, **options))
        return OpCheck(name, served, error, _shortest(lambda: op(*arguments, **options), device), "")
    except Exception as error:  # of Triton, of a compiler, of a driver: all are findings
        text = str(error).strip().partition("\n")[0]
        fault = text if text.startswith(name) else f"{type(error).__name__}: {text}"
        return OpCheck(name, served, math.nan, math.nan, fault)


def _calls(device: torch.device, dtype: torch.dtype) -> list[tuple[Callable[..., Any], list[Any], dict[str, Any]]]:
    """Each op with arguments that depend on no other op: [B, N] tokens of a video."""
    frames = _FRAMES_INTERPRETED if implementation(device) == _INTERPRETER else _FRAMES
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens = frames * _PATCHES
    steps = normal(_BATCH, frames, _PATCHES, _WIDTH)
    steps[:, 1:] *= torch.linspace(0.05, 2, _PATCHES)[:, None]  # some patches hardly change, others do
    x = (steps.cumsum(1) / frames**0.5).reshape(_BATCH, tokens, _WIDTH).to(device, dtype)
    q, k = (normal(_BATCH, heads, tokens, _HEAD_DIM).to(device, dtype) for heads in (_HEADS, _KV_HEADS))
    scores = normal(_BATCH, tokens).to(device)
    position = torch.arange(tokens, device=device).expand(_BATCH, -1).contiguous()
    links = (position - _PATCHES).clamp_min(-1)
    similarity = reference.linked_cosine_similarity(x, links)
    roots = reference.merge_roots(similarity, links, 0.8)
    kept = reference.topk_keep(scores, tokens // 3)
    counts = torch.arange(frames, device=device).remainder(_PATCHES).expand(_BATCH, -1).contiguous()
    edges = torch.randint(tokens, (tokens, 2), generator=generator).to(device)
    return [
        (strided_cosine_similarity, [x, _PATCHES], {}),
        (linked_cosine_similarity, [x, links], {}),
        (merge_roots, [similarity, links, 0.8], {"max_merges": tokens // 2}),
        (merge_mean, [x, roots, [position], links], {}),
        (connected_components, [edges, tokens], {}),
        (attention_column_sum, [q, k], {}),
        (topk_keep, [scores, tokens // 3], {}),
        (segmented_topk_keep, [scores, position // _PATCHES, counts], {}),
        (gather_rows, [kept, x, position], {}),
    ]


def _distance(out: Any, truth: Any) -> float:
    """The largest absolute difference, over all tensors of two results of the same form."""
    if isinstance(out, Tensor):
        return float((out.double() - truth.double()).abs().amax()) if out.numel() else 0.0
    return max((_distance(*pair) for pair in zip(out, truth, strict=True) if pair[0] is not None), default=0.0)


def _shortest(call: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS_INTERPRETED if implementation(device) == _INTERPRETER else _REPEATS):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
