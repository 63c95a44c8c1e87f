"""What a merge step and a prune step cost the host: launches, and Python's time beside that of an earlier commit.

    python -m bench.kernels.host --before 9e5961f

Needs git and no GPU. Launches are replaced by a count, tensors are small and on the CPU, so that what is left is the
time of our own code and of PyTorch's dispatcher. Both commits take turns in one process; times are medians.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import pkgutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from triton.runtime.jit import JITFunction

import fftriton_kernels
from bench.provenance import provenance

RESULTS = Path(__file__).parents[1] / "results" / "host.csv"
TURNS = 400
ROWS = 512  # that a merge leaves
WRITES_LENGTHS = ("_group_kernel", "_slot_kernel")  # the host reads these

launches = 0


def count_launches(kernel: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
    """Stands in for a launch."""
    global launches
    launches += 1
    if kernel.__name__ in WRITES_LENGTHS:
        arguments[_place_of_lengths(kernel)].fill_(ROWS)


@cache
def _place_of_lengths(kernel: Any) -> int:
    return kernel.arg_names.index("lengths_ptr")


def package_at(commit: str, folder: Path) -> ModuleType:
    """The kernels of a commit, under a name of their own."""
    archive = subprocess.run(
        ["git", "archive", commit, "kernels/fftriton_kernels"], capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    name, package = "fftriton_kernels_before", folder / "kernels" / "fftriton_kernels"
    spec = importlib.util.spec_from_file_location(name, package / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def take_the_gpus_path(package: ModuleType) -> None:
    """Make the launchers take CPU tensors, unchecked as on a GPU."""
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, stand_in in (("runs_triton", lambda _: True), ("check_below", lambda *_: None)):
            if hasattr(module, name):
                setattr(module, name, stand_in)


def steps() -> dict[str, Callable[[ModuleType], Any]]:
    """A merge step and a prune step as fftriton.FrameFusion makes them, by a package's ops."""
    N, D, heads, kv_heads, width = 1024, 64, 28, 4, 128
    x = torch.zeros(1, N, D, dtype=torch.bfloat16)
    position = torch.arange(N)[None].clone()
    links, patch = (position - 64).clamp_min(-1), position % 64
    cos, sin = (torch.zeros(1, N, width, dtype=torch.bfloat16) for _ in range(2))
    q, k = (torch.zeros(1, N, count, width, dtype=torch.bfloat16).transpose(1, 2) for count in (heads, kv_heads))

    def merge(ops: ModuleType) -> Any:
        similarity = ops.linked_cosine_similarity(x, links)
        roots = ops.merge_roots(similarity, links, 0.6, max_merges=300)
        return ops.merge_mean(x, roots, (position, patch, cos, sin), predecessor=links)

    def prune(ops: ModuleType) -> Any:
        scores = ops.attention_column_sum(q, k, num_queries=1)
        kept, _ = ops.topk_keep(scores, 300, candidates=patch >= 0, capacity=400)
        return ops.gather_rows(kept, x, position, patch, cos, sin)

    return {"merge": merge, "prune": prune}


def launches_of(step: Callable[[ModuleType], Any], package: ModuleType) -> int:
    """Our own launches of a step; PyTorch's come on top."""
    before = launches
    step(package)
    return launches - before


@torch.no_grad()
def measure(now: ModuleType, before: ModuleType) -> list[dict[str, Any]]:
    """A row for each step."""
    rows = []
    for name, step in steps().items():
        row = {"step": name, "launches": launches_of(step, now), "launches_before": launches_of(step, before)}
        times: dict[ModuleType, list[float]] = {now: [], before: []}
        for _ in range(TURNS):
            for package, taken in times.items():
                begin = time.perf_counter()
                step(package)
                taken.append(time.perf_counter() - begin)
        own, former = (statistics.median(times[package]) * 1e6 for package in (now, before))
        rows.append(
            row | {"python_us": f"{own:.0f}", "python_us_before": f"{former:.0f}", "ratio": f"{own / former:.3f}"}
        )
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="9e5961f", help="the commit to compare with")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    JITFunction.run = count_launches
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        before = package_at(options.before, Path(folder))
        for package in (fftriton_kernels, before):
            take_the_gpus_path(package)
        rows = [{"before": options.before} | row for row in measure(fftriton_kernels, before)]
    rows = [row | provenance("cpu") for row in rows]
    with options.out.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    print(options.out.read_text())


if __name__ == "__main__":
    main()
