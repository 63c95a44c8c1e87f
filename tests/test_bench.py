"""The kernel bench: its providers agree, its CSV has its columns, and a red test gives no number."""

from __future__ import annotations

import csv
import importlib
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from bench.kernels import measure, ops, peers, results, run, timing
from bench.provenance import ROOT, provenance
from bench.tables import write_csv

BENCH = ROOT / "bench"
COLUMNS = (
    "op,provider,shape,dtype,metric,p50,p20,p80,gbps_or_tflops,percent_of_ceiling,device,torch,triton,commit,date,"
    "host_ms,waits"
)
ORIGIN = {"device": "a device", "torch": "2", "triton": "3", "commit": "abc", "date": "2025-01-01"}
EAGER_AND_OURS = ["eager", "fftriton"]
OPS = [
    "strided_cosine_similarity", "linked_cosine_similarity", "merge_roots", "merge_roots_bounded", "merge_mean",
    "connected_components", "column_sum", "column_sum_given_lse", "column_sum_last_1", "column_sum_last_4",
    "topk_keep", "segmented_topk_keep", "gather_rows", "merge_step", "prune_step",
]  # fmt: skip


def tiny_case(name: str, dtype: torch.dtype = torch.float32):
    """An op at a size that takes no time, without torch.compile, which takes seconds to say the same as eager."""
    op = next(op for op in ops.OPS if op.name == name)
    providers = {name: provider for name, provider in op.providers.items() if name != "torch.compile"}
    return measure.Case(replace(op, providers=providers), ops.Shape(5, 33, 4, 2, 16, P=7), dtype)


def new_bench(device: str):
    ceilings = {"GB/s": 10.0, "TFLOP/s float32": 1.0, "TFLOP/s bfloat16": 1.0}
    return measure.Bench(device, 0.001, ORIGIN, ceilings=ceilings)


def measured(case, device: str):
    """What one case adds to a bench."""
    result = new_bench(device)
    for _ in result.measure(case):
        pass
    return result


def test_every_op_of_the_library_is_timed():
    assert [op.name for op in ops.OPS] == OPS
    assert all(next(iter(op.providers)) == "eager" for op in ops.OPS)
    assert all((run.KERNEL_TESTS / file).exists() for op in ops.OPS for file in op.tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_providers_agree(name, dtype, device):
    result = measured(tiny_case(name, dtype), device)
    assert result.failures == []
    assert [row.provider for row in result.rows if row.provider in EAGER_AND_OURS] == EAGER_AND_OURS
    assert all(0 < row.p20 <= row.p50 <= row.p80 and row.percent_of_ceiling > 0 for row in result.rows)


def test_peer_for_equal_heads_only():
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    assert peers.refuse_flash_colreduce(q, k)


@pytest.mark.parametrize("name", ["topk_keep", "merge_mean", "prune_step"])
def test_wrong_result_gives_no_number(name, device):
    case = tiny_case(name)

    def wrong(**inputs):
        out = case.op.providers["fftriton"].run(**inputs)
        first, *others = out if isinstance(out, tuple) else (out,)
        return spoiled(first), *others

    providers = {"eager": case.op.providers["eager"], "wrong": replace(case.op.providers["fftriton"], run=wrong)}
    result = measured(measure.Case(replace(case.op, providers=providers), case.shape, case.dtype), device)
    assert [row.provider for row in result.rows] == ["eager"]
    assert "not the baseline's" in result.failures[0]


def spoiled(out: Tensor) -> Tensor:
    """One row wrong; of positions, all of them."""
    out = out.clone()
    if out.is_floating_point():
        out[0, 0] += 3
        return out
    return out + 1


def test_baseline_may_write_into_its_inputs(device):
    """The authors' merge works in place, so every provider has inputs of its own."""
    case = tiny_case("merge_step")
    inputs = case.op.inputs(case.shape, case.dtype, device)
    given = measure.cloned(inputs)
    case.op.providers["eager"].run(**given)
    assert not torch.equal(given["hidden"], inputs["hidden"])
    torch.testing.assert_close(case.op.inputs(case.shape, case.dtype, device), inputs)


def test_bytes_of_a_merge_step():
    """Two and a half times the hidden states where half survive, which is what the formula is for."""
    shape = ops.Shape(64)
    hidden = shape.N * shape.D * 2
    assert ops.merge_step_bytes(shape, 2) == pytest.approx(2.5 * hidden, rel=0.05)


def test_cases_fit_their_device():
    on_gpu = measure.cases("cuda")
    assert {case.dtype for case in on_gpu} == {torch.bfloat16}
    assert {case.shape.F for case in on_gpu if case.op.name == "merge_step"} == {16, 64, 256, 512}
    assert len({(case.op.name, case.label) for case in on_gpu}) == len(on_gpu)
    steps = {(case.shape.N, case.shape.D, case.dtype) for case in measure.cases("cpu", ["merge_step"])}
    assert steps == {(13440, D, dtype) for D in (896, 3584) for dtype in (torch.float32, torch.bfloat16)}


def test_csv_and_picture(device, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "passing", lambda files, device: set(files))
    monkeypatch.setattr(run, "cases", lambda device, names: [tiny_case("topk_keep")])
    monkeypatch.setattr("bench.kernels.timing.COPY_BYTES", {device: 1 << 16})
    monkeypatch.setattr("bench.kernels.timing.MATMUL_SIZE", {device: 16})
    done = run_bench("--out", str(tmp_path), "--device", device, "--seconds", "0.001", "--commit", "abc")
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("kernels-*.csv")
    assert path.read_text().splitlines()[0] == COLUMNS
    rows = list(csv.DictReader(path.open()))
    assert [row["provider"] for row in rows if row["op"] == "topk_keep"] == EAGER_AND_OURS
    assert [row["op"] for row in rows[:2]] == ["copy", "matmul"]
    assert {row["commit"] for row in rows} == {"abc"}
    assert path.with_suffix(".png").stat().st_size > 0


def test_red_test_gives_no_number(tmp_path, monkeypatch):
    red, green = tmp_path / "test_red.py", tmp_path / "test_green.py"
    red.write_text("def test_it():\n    assert 1 == 2\n")
    green.write_text("def test_it():\n    pass\n")
    assert run.passing([red, green], "cpu") == {green}
    monkeypatch.setattr(run, "passing", lambda files, device: {f for f in files if f.name != "test_merge.py"})
    kept, reasons = run.green_cases(measure.cases("cpu"), "cpu")
    without = {"merge_roots", "merge_roots_bounded", "merge_mean", "merge_step"}
    assert {case.op.name for case in kept} == set(OPS) - without
    assert len(reasons) == len(without)


def test_nothing_green_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "passing", lambda files, device: set())
    done = run_bench("--out", str(tmp_path), "--device", "cpu", "--op", "topk_keep")
    assert done.exit_code == 1
    assert "its tests fail" in done.output
    assert list(tmp_path.iterdir()) == []


class FakeCuda:
    """A device and its host on clocks of their own: milliseconds; a spinning kernel's million cycles take one."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.device = max(self.device, self.host) + device

    def _sleep(self, cycles: int) -> None:
        self.launch(0.001, cycles / 1e6)

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        cuda = self

        class Event:
            def record(self) -> None:
                self.time = max(cuda.device, cuda.host)

            def query(self) -> bool:
                return cuda.host >= self.time

            def elapsed_time(self, end: Any) -> float:
                return end.time - self.time

        return Event()


@pytest.fixture
def cuda(monkeypatch):
    """timing with a device that is made up."""
    fake = FakeCuda()
    for name in ("_sleep", "synchronize", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: fake.host / 1e3)
    monkeypatch.setattr(timing, "_flush_buffer", lambda: torch.zeros(1))
    return fake


def test_host_time_is_no_device_time(cuda):
    def call():
        for _ in range(30):
            cuda.launch(host=0.2, device=0.01)  # in a row they take 6 ms, on the device 0.3

    times = timing.time_calls({"": call}, "cuda", 0.01)[""]
    assert times.p50 == pytest.approx(0.3)
    assert times.host == pytest.approx(6)
    assert not times.waits


def test_a_call_that_waits_is_marked(cuda):
    def call():
        cuda.launch(host=0.01, device=0.1)
        cuda.synchronize()
        cuda.launch(host=0.5, device=0.1)

    times = timing.time_calls({"": call}, "cuda", 0.01)[""]
    assert times.waits
    assert times.p50 == pytest.approx(0.01 + 0.1 + 0.5 + 0.1)  # all that happens, from an idle device on


def test_without_the_gate_no_test_runs(monkeypatch):
    monkeypatch.setattr(run, "green_cases", lambda *_: pytest.fail("ran the tests"))
    monkeypatch.setattr(run, "cases", lambda device, names: [])
    assert run_bench("--device", "cpu", "--no-gate").exit_code == 0


def test_rows_are_read_as_they_were_written(device, tmp_path):
    rows = measured(tiny_case("topk_keep"), device).rows
    write_csv(rows, tmp_path / "rows.csv")
    assert [row.provider for row in results.read_csv(tmp_path / "rows.csv")] == EAGER_AND_OURS
    (saved,) = (ROOT / "bench" / "results").glob("kernels-intel-*.csv")
    assert all(row.host_ms is None and not row.waits for row in results.read_csv(saved))


def test_every_row_says_where_it_comes_from():
    origin = provenance("cpu", also=("pytest", "no-such-package"))
    assert list(origin) == ["device", "torch", "triton", "pytest", "no-such-package", "commit", "date"]
    assert (origin["torch"], origin["pytest"], origin["no-such-package"]) == (torch.__version__, pytest.__version__, "")
    assert "thread" in origin["device"]
    assert origin["commit"]
    assert provenance("cpu", "abc")["commit"] == "abc"
    assert set(provenance("cpu")) < {field.name for field in fields(results.Row)}


@pytest.mark.parametrize("path", sorted(BENCH.rglob("*.py")), ids=lambda path: str(path.relative_to(BENCH)))
def test_every_module_is_found_in_the_package(path):
    assert "sys.path" not in path.read_text()
    if path.name not in ("__init__.py", "conftest.py", "test_micro.py"):
        importlib.import_module(".".join(["bench", *path.relative_to(BENCH).with_suffix("").parts]))


def test_unknown_op():
    done = run_bench("--op", "no_such_op")
    assert done.exit_code == 2
    assert "no_such_op" in done.output


def run_bench(*arguments: str):
    """The command line, without the process."""
    import typer

    app = typer.Typer()
    app.command()(run.main)
    return CliRunner().invoke(app, arguments)


def test_rows_that_both_kept_must_be_equal_where_one_row_differs():
    case = tiny_case("prune_step")
    kept = torch.arange(0, 200, 2)[None]
    other = kept.clone()
    other[0, 50] += 1  # rounding decided otherwise
    values = torch.arange(200.0)[None, :, None].expand(1, 200, 3)

    def taken(index):
        return index, values[:, index[0]]

    assert measure.agree(taken(kept), taken(other), case)
    index, rows = taken(other)
    assert not measure.agree(taken(kept), (index, torch.zeros_like(rows)), case)
    assert not measure.agree(taken(kept), (kept + 1, values[:, kept[0] + 1]), case)
    assert not measure.agree(taken(kept), (other,), case)
