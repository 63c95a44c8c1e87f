"""bench/gpu.py: what is wrong, hangs or crashes is reported, and the rest goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fftriton_kernels
from bench import gpu_plots
from bench.first_contact import checking, findings, kernels, merge, parts, runner, selection, summary, tracing, worker
from bench.tables import write_csv

ROOT = Path(__file__).parents[1]
OPTIONAL = ["av", "kernels", "matplotlib", "pytest", "typer"]  # rich comes with transformers, where it is installed
MODULES = ["versions", "merge", "selection", "attention", "sanitized", "kernels", "prefill", "profiles", "graphs"]


@pytest.fixture(autouse=True)
def without_poison() -> Any:
    """The checks' fill of torch.empty ends with the test."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def run(tmp_path) -> Any:
    """A part's view of a rehearsal."""
    return worker.Run("a part", tmp_path, toy=True)


def part(name: str, code: str, seconds: float = 60, **more: Any) -> Any:
    """A part that runs a line of Python."""
    return parts.Part(name, "group", (sys.executable, "-c", code), seconds, dict(os.environ), **more)


def of_kind(out: Path, kind: str) -> dict[str, dict]:
    return {finding["part"]: finding for finding in findings.read(out) if finding["kind"] == kind}


def test_what_hangs_or_crashes_loses_its_own_results_only(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LEAST", 0.0)
    monkeypatch.setattr(runner, "GRACE", 0.2)
    running = runner.Runner(tmp_path, minutes=1)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('began', flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    running.run(
        [
            part("hangs", stubborn, seconds=2, required=True),
            part("crashes", "import os; print('before', flush=True); os.abort()"),
            part("absent", "", missing="not installed"),
            part("works", "print('done')", required=True),
        ]
    )
    assert time.monotonic() - start < 30
    ended = of_kind(tmp_path, "ended")
    assert {name: finding["code"] for name, finding in ended.items()} == {"hangs": None, "crashes": -6, "works": 0}
    assert of_kind(tmp_path, "skipped")["absent"]["why"] == "not installed"
    log = (tmp_path / "log.txt").read_text()
    assert all(line in log for line in ("began", "before", "done"))
    assert len(summary.problems(findings.read(tmp_path))) == 2
    text = summary.summarise(tmp_path)
    assert text == (tmp_path / "summary.txt").read_text().rstrip("\n")
    for line in ("hangs: stopped after 2 s", "crashes: exit status -6, see log.txt", "Correctness was NOT shown."):
        assert line in text.splitlines()


def test_a_folder_keeps_what_is_not_ours(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    findings.add(tmp_path, "old", "ok")
    runner.Runner(tmp_path, minutes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_only_what_must_end_counts_against_correctness(tmp_path):
    running = runner.Runner(tmp_path, minutes=0)
    running.run([part("optional", "")])
    assert of_kind(tmp_path, "not run").keys() == {"optional"}
    assert summary.correctness_holds(tmp_path)
    running.run([part("check", "", required=True)])
    assert not summary.correctness_holds(tmp_path)


def test_what_was_skipped_was_not_checked(tmp_path):
    runner.Runner(tmp_path, minutes=1).run([part("check", "", required=True)])
    findings.add(tmp_path, "check", "skipped", why="the interpreter does not work")
    assert summary.correctness_holds(tmp_path)
    assert summary.summarise(tmp_path).endswith("but correctness was not checked: check.")


def test_a_tool_that_does_not_work_is_no_wrong_kernel(tmp_path):
    running = runner.Runner(tmp_path, minutes=1)
    running.run([part("tool", "raise SystemExit(1)", wrong=(9,))])
    assert summary.correctness_holds(tmp_path)
    running.run([part("tool", "raise SystemExit(9)", wrong=(9,))])
    assert not summary.correctness_holds(tmp_path)


def test_right_kernels_are_found_right(run):
    selection.main(run)
    kinds = {finding["kind"] for finding in findings.read(run.out)}
    assert kinds == {"ok"}
    assert summary.correctness_holds(run.out)


@pytest.mark.parametrize(
    ("module", "op", "found"),
    [(selection, "topk_keep", 5), (selection, "gather_rows", 6), (merge, "merge_roots", 5)],
)
def test_a_broken_kernel_is_found(module, op, found, run, monkeypatch):
    right = getattr(fftriton_kernels, op)

    def broken(*arguments, **options):
        out = right(*arguments, **options)
        spoil(out if isinstance(out, torch.Tensor) else out[0])
        return out

    monkeypatch.setattr(fftriton_kernels, op, broken)
    module.main(run)
    kinds = [finding["kind"] for finding in findings.read(run.out)]
    assert kinds.count("wrong") == found
    refused = kinds.count("error")  # by an op that gets what the broken one gives, on a CPU
    assert kinds.count("ok") == len(kinds) - found - refused > 0
    assert refused == 0 or op == "merge_roots"
    assert not summary.correctness_holds(run.out)


def spoil(out: torch.Tensor) -> None:
    """Change the last entry."""
    if out.numel():
        last = out.view(-1)[-1:]
        last.copy_(~last if out.dtype == torch.bool else last + 1)


def test_runs_that_differ_are_found(run):
    results = iter([torch.zeros(2), torch.zeros(2), torch.tensor([0.0, -0.0])])
    with run.check("a case"):
        checking.thrice(lambda: next(results))
    assert of_kind(run.out, "wrong")["a part"]["why"] == "three runs differ in bits"


def test_a_lost_device_ends_the_part(run):
    with pytest.raises(SystemExit):
        with run.check("a case"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert of_kind(run.out, "error")


def test_cases_are_shared_and_stop_in_time(tmp_path):
    Run = worker.Run
    shares = [list(Run("", tmp_path, share=(i, 3)).cases(range(7), 1)) for i in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    assert list(Run("late", tmp_path, deadline=time.time() + 5).cases("ab", 10)) == []
    assert of_kind(tmp_path, "not run")["late"]["case"] == "2 cases"


def test_parts(tmp_path):
    phases = parts.gpu_phases(tmp_path, 7.0)
    every = [part for phase in phases for part in phase]
    assert {part.group for part in every} == set(parts.NAMES)
    assert len({part.name for part in every}) == len(every)
    assert all((ROOT / word).exists() for part in every for word in part.command if word.startswith("tests/"))
    assert sum(max(part.seconds for part in phase) for phase in phases[:-1]) <= 7 * 60
    rehearsed = {part.group for phase in parts.toy_phases(tmp_path) for part in phase}
    assert rehearsed == set(parts.NAMES) - {"large"}


def test_each_provider_is_timed_once():
    steps = [(case.op.name, case.label, name) for case, names in kernels.plan() for name in names or case.op.providers]
    assert len(set(steps)) == len(steps)
    assert {op for op, _, _ in steps} == {op.name for op in kernels.OPS}


def test_busy_and_idle():
    events = [(0.0, 10.0, "_mean_kernel"), (10.0, 12.0, "copy"), (11.0, 14.0, "fill"), (20.0, 30.0, "_mean_kernel")]
    found = tracing.busy_and_idle(events)
    assert (found["span_ms"], found["busy_ms"], found["idle_ms"]) == (0.030, 0.024, 0.006)
    assert found["largest_gaps_us"] == [(6.0, "_mean_kernel")]
    assert found["our_kernels_us"] == {"_mean_kernel": 20.0}


def test_pictures_and_tables(tmp_path, monkeypatch):
    row = gpu_plots.Row(
        "topk_keep", "eager", "F64-P210", "bfloat16", "GB/s", 2.0, 2.0, 2.0, 5.0, 4.0, "A GPU", "2", "3", "abc", "day"
    )
    ours = replace(row, provider="fftriton", p50=0.5)
    rows = [
        row,
        ours,
        replace(row, op="merge_mean"),
        replace(row, op="gather_rows"),
        replace(ours, op="gather_rows", waits="yes"),
    ]
    folder = tmp_path / "results" / "a-gpu"
    folder.mkdir(parents=True)
    write_csv(rows, folder / findings.KERNELS)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{gpu_plots.BEGIN}{gpu_plots.END}\nafter")
    monkeypatch.setattr(gpu_plots, "README", readme)
    monkeypatch.setattr(gpu_plots, "RESULTS", tmp_path / "results")
    gpu_plots.main()
    text = readme.read_text()
    assert "A GPU, torch 2, triton 3, commit abc, day" in text
    assert "| `topk_keep` | F64-P210 | 0.5 | 4 % | 4.0 |  |  |" in text
    assert "| `gather_rows` | F64-P210 | 0.5 (waits) | 4 % |  |  |  |" in text  # times of two kinds are not compared
    assert "| `merge_mean` | F64-P210 |  |  |  |  |  |" in text  # what did not run stays empty
    assert (folder / "kernels.png").stat().st_size > 0
    gpu_plots.main()
    assert readme.read_text() == text


def test_the_readme_says_what_there_is():
    measured = list(gpu_plots.RESULTS.glob(f"*/{gpu_plots.KERNELS}"))
    assert (gpu_plots.NOTHING in gpu_plots.README.read_text()) == (not measured)


def test_optional_packages_are_not_imported():
    names = ", ".join(f"bench.first_contact.{name}" for name in MODULES)
    code = f"import sys, {names}; print(sorted(set({OPTIONAL}) & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=parts.environment(), capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
