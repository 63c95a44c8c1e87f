"""Every op against the device's copy bandwidth or matrix rate, against PyTorch, torch.compile and other libraries.

What is measured, and how, is bench/kernels'; here it is in the order of interest, because time is short.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress

import torch

from bench.kernels.measure import EQUAL_HEADS, QWEN2_7B, Bench, Case, cases, free_memory
from bench.kernels.ops import OPS, Shape
from bench.provenance import provenance
from bench.tables import write_csv

from .findings import KERNELS
from .worker import Run

FIRST = ("eager", "fftriton")
TOY_SHAPE = Shape(2, 64, 4, 2, 16, P=3)
SECONDS = {"cuda": 0.1, "cpu": 0.01}  # for one measurement
CASE_SECONDS = 6  # that all measurements of a case may take

Step = tuple[Case, tuple[str, ...]]


def main(run: Run) -> None:
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # the authors' code breaks graphs, which is no news
    if run.warm:
        return compile_all(run)
    dtype = torch.float32 if run.toy else torch.bfloat16
    bench = Bench(run.device, SECONDS[run.device], provenance(run.device, run.commit))
    bench.measure_ceilings([dtype])
    op = None
    for case, names in run.cases(toy_plan() if run.toy else plan(), CASE_SECONDS):
        if case.op is not op:
            torch._dynamo.reset()
            op = case.op
        failed = len(bench.failures)
        for _ in bench.measure(case, names):
            pass
        write_csv(bench.rows, run.out / KERNELS)
        for line in bench.failures[failed:]:
            run.note("wrong", case=line)
        free_memory()
    if not bench.failures:
        run.note("ok", case="our results are the baselines'")
    for line in bench.notes:
        run.note("no number", case=line)
    return None


def plan() -> Iterator[Step]:
    """64 and 256 frames in a 7B model with the baseline; the other libraries; then the other shapes."""
    every = cases("cuda")
    short, long = ([case for case in every if case.shape == Shape(frames, *QWEN2_7B)] for frames in (64, 256))
    equal = [case for case in every if case.shape == Shape(64, *EQUAL_HEADS) and case.op.name.startswith("column_sum")]
    yield from ((case, FIRST) for case in short + long)
    yield from ((case, ()) for case in equal)
    yield from ((case, tuple(name for name in case.op.providers if name not in FIRST)) for case in short)
    done = {id(case) for case in short + long + equal}
    yield from ((case, FIRST) for case in every if id(case) not in done)


def toy_plan() -> Iterator[Step]:
    """Each op once, and one of them compiled, which takes long on a CPU."""
    for op in OPS:
        yield Case(op, TOY_SHAPE, torch.float32), (*FIRST, *(["torch.compile"] if op.name == "gather_rows" else []))


def compile_all(run: Run) -> None:
    """Each op once, by our kernels and by torch.compile."""
    for case, _ in run.cases([step for step in plan() if step[0].shape == Shape(64, *QWEN2_7B)], CASE_SECONDS):
        ours, others = case.op.providers["fftriton"], case.op.providers["torch.compile"]
        with run.check(case.op.name):
            ours.run(**case.op.inputs(case.shape, case.dtype, run.device))
        if not others.dense:
            with suppress(Exception):  # it may fail
                others.run(**case.op.inputs(case.shape, case.dtype, run.device))
        free_memory()
