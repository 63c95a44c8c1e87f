"""How often a step launches: each launch costs the host more than most kernels take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench.kernels import busy

ROOT = Path(__file__).parents[2]
COUNT = """
import json, fftriton_kernels
from bench.kernels import host
host.JITFunction.run = host.count_launches
host.take_the_gpus_path(fftriton_kernels)
print(json.dumps({name: host.launches_of(step, fftriton_kernels) for name, step in host.steps().items()}))
"""


def test_a_step_takes_few_launches():
    """A prune step makes PyTorch launch one more, the comparison that says which tokens are candidates."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {"merge": 8, "prune": 4}


def test_both_steps_are_timed_beside_a_neighbour():
    with busy.beside(1):
        ours, authors = busy.measure(torch.float32, 16, pairs=2)
    assert len(ours) == len(authors) == 2
    assert min(ours + authors) > 0
