"""Output folders are tried before any work; a failed write ends in one line and leaves no half-written file."""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fftriton.app.cli
import fftriton.app.display
import fftriton.app.request
import fftriton.app.run
import fftriton.evaluate.output
import fftriton.evaluate.runner
from fftriton.evaluate.records import Record, RecordFolder
from fftriton.runtime.files import check_out, writing
from fftriton.runtime.shipped import NEEDLE

COMMANDS = {
    "run": ["run", "--question", NEEDLE.question, "--no-compare"],
    "eval": ["eval", "--samples", "1", "--methods", "keep-all", "--budgets", "1"],
}


@contextmanager
def full_disk(largest=0):
    """No file grows past so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def invoke(command, out):
    return CliRunner().invoke(fftriton.app.cli.app, [*COMMANDS[command], "--out", str(out)])


def error_line(result):
    """The one line about what went wrong."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line


@pytest.fixture
def no_work(monkeypatch):
    """Any work fails the test."""

    def work(*arguments, **settings):
        pytest.fail("work was done before the folder was refused")

    for name in ("fftriton.app.request.read_video", "fftriton.runtime.target.Target.load_model"):
        monkeypatch.setattr(name, work)


def file_in_the_way(folder):
    (folder / "file").touch()
    return folder / "file"


def link_to_nowhere(folder):
    (folder / "link").symlink_to(folder / "nowhere")
    return folder / "link"


UNWRITABLE = {
    "a file": file_in_the_way,
    "in a file": lambda folder: file_in_the_way(folder) / "deeper" / "out",
    "link to nowhere": link_to_nowhere,
    "name too long": lambda folder: folder / ("long" * 100),
    "processes": lambda folder: Path("/proc/self"),
    "in processes": lambda folder: Path("/proc/self/deeper/out"),
    "settings of the kernel": lambda folder: Path("/sys"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_folders_that_cannot_be_written_are_refused_before_any_work(no_work, tmp_path, command, kind):
    out = UNWRITABLE[kind](tmp_path)
    line = error_line(invoke(command, out))
    assert f"out must be a folder that can be written, got '{out}': " in line


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("exists", [False, True], ids=["new folder", "folder that exists"])
def test_full_disks_are_refused_before_any_work(no_work, tmp_path, command, exists):
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    with full_disk():
        line = error_line(invoke(command, out))
    assert f"out must be a folder that can be written, got '{out}': File too large" in line
    assert out.exists() == exists
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("path", ["out", "a/b/c", "."])
def test_a_check_leaves_nothing_behind(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    check_out(Path(path))
    assert not list(tmp_path.iterdir())


def test_only_the_folder_that_is_written_is_checked(tmp_path, monkeypatch):
    """The default of another command's folder may be anything."""
    monkeypatch.chdir(tmp_path)
    Path("fftriton-out").touch()
    assert invoke("eval", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("largest", [0, 1000])
def test_a_disk_that_fills_up_during_a_run(tmp_path, monkeypatch, largest):
    before = '{"of": "an earlier run"}'
    (tmp_path / "report.json").write_text(before)
    monkeypatch.setattr(fftriton.app.run, "_REPEATS", 1)
    draw = fftriton.app.run._draw

    def fill_up(*arguments):
        with full_disk(largest):
            return draw(*arguments)

    monkeypatch.setattr(fftriton.app.run, "_draw", fill_up)
    line = error_line(invoke("run", tmp_path))
    assert line == f"Error: cannot write '{tmp_path / 'needle-merges.png'}': File too large"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.json": before}


def test_a_report_is_whole_or_that_of_before(tmp_path, monkeypatch):
    monkeypatch.setattr(fftriton.app.run, "_REPEATS", 1)
    write = fftriton.app.display.write_report

    def fill_up(*arguments):
        with full_disk(100):
            write(*arguments)

    monkeypatch.setattr(fftriton.app.display, "write_report", fill_up)
    assert f"cannot write '{tmp_path / 'report.json'}'" in error_line(invoke("run", tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"needle-merges.png", "needle-tokens.png"}


@pytest.mark.parametrize(
    ("owner", "name", "file"),
    [
        (fftriton.evaluate.runner.RecordFolder, "append", "records-0.jsonl"),
        (fftriton.evaluate.output, "write_csv", "results.csv"),
        (fftriton.evaluate.output, "draw_pareto", "pareto.png"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_evaluation_whose_disk_filled_up_resumes(tmp_path, monkeypatch, owner, name, file):
    call = getattr(owner, name)

    def fill_up(*arguments, **settings):
        with full_disk(100):
            return call(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fill_up)
        assert error_line(invoke("eval", tmp_path)) == f"Error: cannot write '{tmp_path / file}': File too large"
    assert {path.suffix for path in tmp_path.iterdir()} <= {".jsonl", ".csv", ".png"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    result = invoke("eval", tmp_path)
    assert result.exit_code == 0, result.output
    assert {"results.csv", "pareto.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_line_that_was_left_unfinished_costs_no_other_record(tmp_path):
    record = Record("key", 0, "kind", 4, None, "3", "3", True, 0.5, 1.0, 2.0, 0.1, None, [4])
    (tmp_path / "records-0.jsonl").write_text('{"key": "key", "ind')
    RecordFolder(tmp_path, 0, Record).append([record])
    assert RecordFolder(tmp_path, 0, Record).read(["key"]) == {("key", 0): record}


def test_writing_replaces_a_file_at_once(tmp_path):
    path = tmp_path / "new" / "report.json"
    for content in ("first", "second"):
        with writing(path) as partial:
            assert (path.read_text() if path.exists() else "first") == "first"
            partial.write_text(content)
        assert path.read_text() == content
    with pytest.raises(ZeroDivisionError), writing(path) as partial:
        partial.write_text("half")
        1 / 0  # noqa: B018
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("report.json", "second")]
