"""What is timed, and how: cases, the check against the baseline, rows. Needs torch and triton, nothing else."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernels.ops import OPS, Inputs, Op, Provider, Shape
from bench.kernels.results import Row
from bench.kernels.timing import Milliseconds, copy_gbps, free_bytes, matmul_tflops, time_calls

QWEN2_05B, QWEN2_7B, QWEN2_72B = (896, 14, 2, 64), (3584, 28, 4, 128), (8192, 64, 8, 128)
QWEN3_17B, EQUAL_HEADS = (2048, 16, 8, 128), (2048, 16, 16, 128)
GPU_SHAPES = [
    *(Shape(frames, *QWEN2_7B) for frames in (16, 64, 256, 512)),
    *(Shape(64, *model) for model in (QWEN2_05B, QWEN3_17B, QWEN2_72B, EQUAL_HEADS)),
    Shape(512, *QWEN2_72B),
]
CPU_SHAPE = Shape(16, *QWEN2_05B)
CPU_STEPS = [Shape(64, *QWEN2_05B), Shape(64, *QWEN2_7B)]  # N = 13440
LARGEST_ERROR = {torch.float32: 1e-4}  # of the largest entry
LARGEST_HALF_ERROR = 5e-2  # the baselines of half types round after each addition
SAME_ROWS = 0.98  # of those kept, where rounding may decide which of two nearly equal tokens is
ROOM = 0.9  # of the free memory that a provider may take


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    op: Op
    shape: Shape
    dtype: torch.dtype

    @property
    def label(self) -> str:
        """The shape, as far as the op depends on it."""
        return self.shape.label(self.op.axes)


@dataclass
class Bench:
    """What is the same for all cases, and what they add.

    Args:
        device: "cuda" or "cpu".
        seconds: a measurement's time.
        origin: the CSV's columns from device to date, see bench/provenance.py.
        rows: results so far.
        ceilings: by metric, or metric and dtype.
        notes: why a provider has no number where that is to be expected.
        failures: why one has none where that is not.
    """

    device: str
    seconds: float
    origin: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def measure_ceilings(self, dtypes: Iterable[torch.dtype]) -> None:
        """The copy bandwidth, and the rate of matrix products in each dtype."""
        times, rate = copy_gbps(self.device, self.seconds)
        self._add_ceiling("copy", torch.int8, "GB/s", times, rate)
        for dtype in dtypes:
            times, rate = matmul_tflops(self.device, dtype, self.seconds)
            self._add_ceiling("matmul", dtype, "TFLOP/s", times, rate)

    def _add_ceiling(self, name: str, dtype: torch.dtype, metric: str, times: Milliseconds, rate: float) -> None:
        self.ceilings[_ceiling(metric, dtype)] = rate
        self._add_row(name, "torch", "large", dtype, metric, times, rate)

    def measure(self, case: Case, names: Sequence[str] = ()) -> Iterator[str]:
        """Time the providers of a case, and yield each one's name before its result is checked.

        Args:
            case: the op at a shape.
            names: only these are timed; all if empty. The baseline runs in any case, for the others to compare with.
        """
        given = case.op.inputs(case.shape, case.dtype, self.device)
        baseline, calls = None, {}
        first = next(iter(case.op.providers.values()))
        for name, provider in case.op.providers.items():
            timed = not names or name in names
            if not timed and provider is not first:
                continue
            yield name
            inputs = cloned(given)  # a provider may write into its own
            where = f"{case.op.name} {case.label} {dtype_name(case.dtype)} {name}"
            if refusal := self._refusal(case, provider, inputs):
                self.notes.append(f"{where}: {refusal}")
                continue
            try:
                out = provider.run(**inputs)
                if baseline is not None and not agree(out, baseline, case):
                    self._note(provider, f"{where}: its result is not the baseline's")
                    continue
                baseline = out if baseline is None else baseline
                if timed:
                    calls[name] = partial(provider.run, **inputs)
            except torch.cuda.OutOfMemoryError:
                self.notes.append(f"{where}: does not fit into memory")
            except Exception as error:
                self._note(provider, f"{where}: {type(error).__name__}: {str(error).strip()[:200]}")
        for name, times in time_calls(calls, self.device, self.seconds).items():
            self._add_times(case, name, times)

    def _note(self, provider: Provider, reason: str) -> None:
        (self.notes if provider.may_fail else self.failures).append(reason)

    def _refusal(self, case: Case, provider: Provider, inputs: Inputs) -> str | None:
        if provider.dense and case.op.dense_bytes(case.shape) > ROOM * free_bytes(self.device):
            return "does not fit into memory"
        return provider.refuse(**inputs)

    def _add_times(self, case: Case, provider: str, times: Milliseconds) -> None:
        if case.op.flops is not None:
            metric, work = "TFLOP/s", case.op.flops(case.shape) / 1e9
        else:
            metric, work = "GB/s", case.op.bytes_moved(case.shape, case.dtype.itemsize) / 1e6
        self._add_row(case.op.name, provider, case.label, case.dtype, metric, times, work / times.p50)

    def _add_row(
        self, op: str, provider: str, shape: str, dtype: torch.dtype, metric: str, times: Milliseconds, rate: float
    ) -> None:
        share = 100 * rate / self.ceilings[_ceiling(metric, dtype)]
        self.rows.append(
            Row(
                op, provider, shape, dtype_name(dtype), metric,
                times.p50, times.p20, times.p80, rate, share, **self.origin,
                host_ms=times.host, waits="yes" if times.waits else "",
            )
        )  # fmt: skip


def _ceiling(metric: str, dtype: torch.dtype) -> str:
    return metric if metric == "GB/s" else f"{metric} {dtype_name(dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, say."""
    return str(dtype).removeprefix("torch.")


def cloned(inputs: Inputs) -> Inputs:
    """The same inputs in memory of their own."""

    def clone(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(clone, value))
        return value.clone() if isinstance(value, Tensor) else value

    return {name: clone(value) for name, value in inputs.items()}


def agree(out: Tensor | tuple[Tensor, ...], baseline: Tensor | tuple[Tensor, ...], case: Case) -> bool:
    """Whether two providers computed the same: integers exactly, floats to what the dtype allows."""
    outs, baselines = (result if isinstance(result, tuple) else (result,) for result in (out, baseline))
    if len(outs) != len(baselines):
        return False
    if not case.op.exact and not torch.equal(outs[0], baselines[0]):
        shared = torch.isin(outs[0], baselines[0]), torch.isin(baselines[0], outs[0])
        if outs[0].shape != baselines[0].shape or shared[0].float().mean() < SAME_ROWS:
            return False
        outs, baselines = (
            tuple(part[same] for part in parts) for parts, same in zip((outs, baselines), shared, strict=True)
        )
    largest = LARGEST_ERROR.get(case.dtype, LARGEST_HALF_ERROR)
    return all(map(_close, outs, baselines, [largest] * len(outs)))


def _close(out: Tensor, baseline: Tensor, largest: float) -> bool:
    if out.shape != baseline.shape or not baseline.is_floating_point():
        return torch.equal(out, baseline)
    error = (out.float() - baseline.float()).abs().max()
    return bool(error <= largest * baseline.float().abs().max())  # False for NaN


def cases(device: str, names: Sequence[str] = ()) -> list[Case]:
    """What is timed on a device, each op at each shape that differs for it; all ops without names."""
    chosen = [op for op in OPS if not names or op.name in names]
    if device == "cuda":
        every = [Case(op, shape, torch.bfloat16) for op in chosen for shape in GPU_SHAPES]
    else:
        every = [Case(op, CPU_SHAPE, torch.float32) for op in chosen if op.name != "merge_step"]
        steps = [op for op in chosen if op.name == "merge_step"]
        halves = (torch.float32, torch.bfloat16)
        every += [Case(op, shape, dtype) for op in steps for shape in CPU_STEPS for dtype in halves]
    return list({(case.op.name, case.label, case.dtype): case for case in every}.values())


def free_memory() -> None:
    """Give back what earlier cases took."""
    gc.collect()
    torch.cuda.empty_cache()
