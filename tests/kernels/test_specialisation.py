"""Prompts of new lengths compile nothing new, and `warm_up` compiles all that they need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

import fftriton_kernels as ops

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(autouse=True)
def interpreter():
    """Nothing runs in this process."""


@pytest.fixture(scope="module")
def counted():
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
        pytest.skip("an older Triton makes its key in another way")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SUPPORT / "specialisation.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_lengths_compile_nothing_after_the_first_few(counted):
    numbers = counted["cold"]["counts"]
    assert numbers[-1] - numbers[9] <= 1, numbers
    assert numbers[-1] <= 20, numbers


def test_nothing_is_left_to_compile_after_a_warm_up(counted):
    assert counted["warm"]["new"] == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "warm_up: hidden_size must be at least 1, got 0"),
        ({"heads": 2.0}, TypeError, "warm_up: heads must be an int, got float"),
        ({"heads": 5}, ValueError, "warm_up: heads must be a multiple of kv_heads 2, got 5"),
        ({"device": "cudaa"}, ValueError, "warm_up: device must be one that torch knows, got 'cudaa'"),
        ({"dtype": torch.float64}, TypeError, "warm_up: dtype must be torch.float16 or .*, got torch.float64"),
    ],
)
def test_what_is_refused(changes, error, message):
    arguments = {"hidden_size": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "device": "cpu"}
    with pytest.raises(error, match=message):
        ops.warm_up(**arguments | changes)
