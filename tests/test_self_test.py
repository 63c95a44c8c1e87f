"""`fftriton_kernels.self_test`: every op is tried, and an op that is wrong or raises is a finding."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import fftriton_kernels
from fftriton_kernels import _cpu, _self_test, implementation, self_test

NO_OPS = {"implementation", "self_test", "tune", "verified", "warm_up"}
OPS = {name for name in fftriton_kernels.__all__ if inspect.isfunction(getattr(fftriton_kernels, name))} - NO_OPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_op_is_right_here(dtype):
    checks = self_test("cpu", dtype)
    assert {check.op for check in checks} == OPS
    assert len(checks) == len(OPS)
    for check in checks:
        assert check.fault == ""
        assert check.implementation == implementation("cpu") == "PyTorch"
        assert 0 < check.seconds < 60
        assert check.error <= (1e-5 if dtype == torch.float32 else 0.05)  # bf16 means are rounded once
    floats = {check.op: check.error for check in checks if check.error > 0}
    assert floats.keys() >= {"strided_cosine_similarity", "merge_mean", "attention_column_sum"}


@pytest.mark.parametrize("frames", [_self_test._FRAMES, _self_test._FRAMES_INTERPRETED])
def test_some_tokens_merge_and_some_do_not(frames, monkeypatch):
    monkeypatch.setattr(_self_test, "_FRAMES", frames)
    (call,) = (
        call for call in _self_test._calls(torch.device("cpu"), torch.float32) if call[0].__name__ == "merge_mean"
    )
    roots = call[1][1]
    merged = roots != torch.arange(roots.shape[1])
    assert merged.any(1).all()
    assert not merged[:, _self_test._PATCHES :].all(1).any()


@pytest.mark.parametrize(
    ("op", "broken"),
    [
        ("topk_keep", lambda out: out[0].flip(-1)),
        ("merge_roots", lambda out: out + (out == 3)),
        ("linked_cosine_similarity", lambda out: out * 1.001),
        ("attention_column_sum", lambda out: torch.full_like(out, math.nan)),
    ],
)
def test_a_wrong_op_is_named(op, broken, monkeypatch):
    right = getattr(_cpu, op)

    def wrong(*arguments, **options):
        out = right(*arguments, **options)
        return (broken(out), *out[1:]) if isinstance(out, tuple) else broken(out)

    monkeypatch.setattr(_cpu, op, wrong)
    faults = {check.op: check for check in self_test("cpu") if check.fault}
    assert op in faults
    assert "is not what the reference gives" in faults[op].fault
    assert math.isnan(faults[op].error)


def test_an_op_that_raises_is_named(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no C compiler\nsecond line")

    monkeypatch.setattr(_cpu, "connected_components", fails)
    faults = {check.op: check.fault for check in self_test("cpu") if check.fault}
    assert faults == {"connected_components": "RuntimeError: no C compiler"}


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"self_test: dtype must have dtype torch\.float16 or .*, got torch\.float64"):
        self_test("cpu", torch.float64)
