"""How often a step launches: each launch costs the host more than most kernels take."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COUNT = """
import json, fftriton_kernels
from bench.kernels import host
host.JITFunction.run = host.count_launches
host.take_the_gpus_path(fftriton_kernels)
print(json.dumps({name: host.launches_of(step, fftriton_kernels) for name, step in host.steps().items()}))
"""


def run(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_step_takes_few_launches():
    """A prune step makes PyTorch launch one more, the comparison that says which tokens are candidates."""
    assert json.loads(run("-c", COUNT)) == {"merge": 8, "prune": 4}


def test_both_steps_are_timed_beside_a_neighbour(tmp_path):
    out = tmp_path / "busy.csv"
    run("-m", "bench.kernels.busy", "--neighbours", "1", "--widths", "16", "--pairs", "1", "--out", str(out))
    rows = list(csv.DictReader(out.open()))
    assert [(row["neighbours"], row["dtype"]) for row in rows] == [("1", "bfloat16"), ("1", "float32")]
    assert all(float(row["ms"]) > 0 < float(row["authors_ms"]) for row in rows)
