"""What all commands share: options, `--config FILE`, the log, JSON, exit codes, completion."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import fftriton.app.batch
import fftriton.app.cli
import fftriton.app.run
import fftriton.evaluate.output
import fftriton.evaluate.runner
from fftriton.app.cli import app
from fftriton.runtime.options import CommonOptions, ModelOptions, with_options
from fftriton.runtime.shipped import NEEDLE
from fftriton.runtime.target import Target
from fftriton.runtime.terminal import INTERRUPTED

pytest.importorskip("av")

GROUP = typer.main.get_command(app)
SHARED = {
    ("run", "batch", "eval"): "config quiet verbose model revision device device_map dtype attention max_new_tokens "
    "trust_remote_code",
    ("run", "batch"): "method budget max_pixels frames fps min_frames max_frames start end",
    ("run", "eval"): "as_json",
}
ONE_ANSWER = ["--question", NEEDLE.question, "--no-compare"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fftriton.app.run, "_REPEATS", 1)
    monkeypatch.setattr(fftriton.app.run, "_draw", lambda *arguments: [])


def invoke(*arguments: object, **settings):
    return CliRunner().invoke(app, list(map(str, arguments)), **settings)


def parsed(name: str, *arguments: object) -> dict[str, object]:
    """The values that a command would be called with."""
    parent = type(GROUP).context_class(GROUP, info_name="fftriton")
    return GROUP.commands[name].make_context(name, list(map(str, arguments)), parent=parent).params


@pytest.mark.parametrize("commands", SHARED, ids=" ".join)
def test_options_are_the_same_in_every_command_that_has_them(commands):
    options = [{option.name: option for option in GROUP.commands[name].params} for name in commands]
    for name in SHARED[commands].split():
        texts = {(option[name].help, tuple(option[name].opts), str(option[name].default)) for option in options}
        assert len(texts) == 1, name


def test_a_group_of_options_becomes_one_argument():
    seen = []

    @with_options
    def command(*, model: ModelOptions, word: str = "none", common: CommonOptions) -> None:
        seen.append((model, word, common))

    alone = typer.Typer()
    alone.command()(command)
    result = CliRunner().invoke(alone, ["--attn", "eager", "--word", "one", "-q"])
    assert result.exit_code == 0, result.output
    assert seen == [(ModelOptions(attention="eager"), "one", CommonOptions(quiet=True))]


# ---- --config FILE


@pytest.fixture
def config(tmp_path):
    """A function that writes a file of options."""

    def write(text: str):
        (tmp_path / "options.yaml").write_text(text)
        return tmp_path / "options.yaml"

    return write


FILE = """
model: some/model
max-new-tokens: 7
attention: eager
budgets: [0.5, 0.30]
run:
  video: [a.mp4, b.mp4]
  question: What happens?
  compare: no
  fps: 2
  revision: null
batch:
  requests: requests.jsonl
  trust_remote_code: true
"""


def test_a_file_of_options(config):
    path = config(FILE)
    run, batch, evaluate = (parsed(name, "--config", path) for name in ("run", "batch", "eval"))
    for values in (run, batch, evaluate):
        assert (values["model"], values["max_new_tokens"], values["attention"]) == ("some/model", 7, "eager")
    assert [str(video) for video in run["video"]] == ["a.mp4", "b.mp4"]
    assert run["question"] == ["What happens?"]
    assert (run["compare"], run["fps"], run["revision"]) == (False, 2.0, None)
    assert (batch["requests"], batch["trust_remote_code"]) == ("requests.jsonl", True)
    assert (batch["fps"], evaluate["trust_remote_code"]) == (None, False)
    assert evaluate["budgets"] == "0.5,0.30"


def test_a_file_takes_every_name_that_the_command_line_takes(config):
    """Also where the name in the code is another one."""
    assert parsed("eval", "--config", config("json: true\nattn: eager\n"))["as_json"] is True
    assert parsed("eval", "--config", config("attn: eager\n"))["attention"] == "eager"
    assert parsed("eval", "--config", config("attention: eager\n"))["attention"] == "eager"


def test_the_command_line_comes_first_and_a_section_before_the_top(config):
    path = config("budget: 0.2\nframes: 4\nrun:\n  budget: 0.4\n")
    assert (parsed("run", "--config", path)["budget"], parsed("run", "--config", path)["frames"]) == ("0.4", 4)
    assert parsed("run", "--budget", 0.6, "--config", path)["budget"] == "0.6"
    assert parsed("batch", "x", "--config", path)["budget"] == "0.2"
    assert parsed("batch", "x", "--config", config(""))["budget"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bugdet: 0.3", "config must hold options of the commands, got 'bugdet' in .*; did you mean 'budget'?"),
        ("run:\n  requests: x", "config must hold options of the commands, got 'requests'"),
        ("eval:\n  max-pixels: 4", "got 'max_pixels'"),
        ("config: other.yaml", "got 'config'"),
        ("budget: 0.3\nbudget: 0.5", "config must name each option once, got 'budget' again in line 2"),
        ("max-frames: 3\nmax_frames: 5", "config must name each option once, got 'max_frames' again in line 2"),
        ("run: 5", "config must hold options under 'run', got '5'"),
        ("budget: {a: 1}", "config must have one value or a list for 'budget'"),
        ("[budget]", "which holds no names with values"),
        ("budget: [", "config must be a YAML file of options"),
        ("frames: yes", "Invalid value for '--frames'"),
        ("frames: 1.5", "Invalid value for '--frames'"),
        ("budget: 2", r"budget must be in \(0, 1\], got 2"),
    ],
)
def test_files_that_are_no_options(config, monkeypatch, text, message):
    monkeypatch.setattr(Target, "load_model", lambda target: pytest.fail("the model was loaded"))
    result = invoke("run", "--config", config(text))
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert re.search(message, " ".join(result.output.split())), result.output


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_files_that_cannot_be_read(tmp_path, name):
    result = invoke("eval", "--config", tmp_path / name)
    assert result.exit_code == 2
    assert "Error: config must be a YAML file of options, got" in result.output


# ---- log, JSON, exit codes


def test_json_is_all_that_stands_on_standard_output(config, tmp_path):
    path = config(f"budget: 0.5\nrun:\n  out: {tmp_path / 'out'}\n  frames: 8\n")
    result = invoke("run", *ONE_ANSWER, "--config", path, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["budget"], report["sampling"]["frames"]) == (0.5, 8)
    assert result.stderr == ""


def test_quiet(tmp_path):
    result = invoke("run", *ONE_ANSWER, "--out", tmp_path, "-q")
    assert result.stderr == ""
    assert "3 (right)" in result.stdout
    both = invoke("run", "-q", "-v")
    assert both.exit_code == 2
    assert both.stderr.splitlines()[-1] == "Error: quiet must go without verbose, got both"


def test_verbose(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    told = " ".join(invoke("run", *ONE_ANSWER, "--out", tmp_path, "-v").stderr.split())
    for part in ("inputs are made by", "of 64 frames", "with sdpa attention", "holds the report of an earlier run"):
        assert part in told
    assert logging.getLogger("fftriton").level == logging.NOTSET
    assert not logging.getLogger("fftriton").handlers


@pytest.mark.parametrize("command", [["run"], ["eval"], ["batch", "missing.jsonl"]], ids=lambda command: command[0])
def test_verbose_shows_the_traceback_of_a_failure(command):
    result = invoke(*command, "--device", "toaster", "-v")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: device must be")


WORK = {
    "run": (fftriton.app.run, "_run", [*ONE_ANSWER], ""),
    "eval": (fftriton.evaluate.runner.Answerer, "answer", ["--samples", 1, "--methods", "keep-all"], "resumes"),
    "batch": (fftriton.app.batch, "generate_batch", [NEEDLE.path], "resumes"),
}


@pytest.mark.parametrize("command", WORK)
def test_ctrl_c(tmp_path, monkeypatch, command):
    owner, name, arguments, told = WORK[command]

    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    result = invoke(command, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == INTERRUPTED == 130
    assert "Interrupted." in result.stderr
    assert told in result.stderr
    assert "Traceback" not in result.output


def test_ctrl_c_while_a_package_is_imported(monkeypatch):
    """transformers turns whatever stops an import into an ImportError."""

    def interrupted(target):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module") from error

    monkeypatch.setattr(Target, "__post_init__", interrupted)
    result = invoke("run")
    assert (result.exit_code, result.stderr) == (INTERRUPTED, "Interrupted.\n")


def test_results_of_an_earlier_evaluation_are_replaced_with_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr(
        fftriton.evaluate.output, "write_results", lambda plan, *rest: (plan.out / "results.csv").touch()
    )
    arguments = ["eval", "--samples", 1, "--methods", "keep-all", "--out", tmp_path, "--json"]
    assert "earlier run" not in invoke(*arguments).stderr
    assert "holds the results of an earlier run, which this one replaces" in " ".join(invoke(*arguments).stderr.split())


PIPED = {
    "run": ["run", *ONE_ANSWER, "--frames", "4", "--json"],
    "eval": ["eval", "--samples", "1", "--methods", "keep-all,framefusion"],
}


@pytest.mark.parametrize("command", ["run", pytest.param("eval", marks=pytest.mark.night)])
def test_a_pipe_that_is_closed(tmp_path, command):
    """As in `fftriton run | head -1`: exit code 1, and no traceback."""
    start = [sys.executable, "-m", "fftriton", *PIPED[command], "--out", str(tmp_path), "-q"]
    reading, writing = os.pipe()
    os.close(reading)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(start, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_the_shell_completes():
    asked = {"_FFTRITON_COMPLETE": "complete_bash", "COMP_WORDS": "fftriton run --dev", "COMP_CWORD": "2"}
    result = CliRunner().invoke(app, [], env=asked, prog_name="fftriton")
    assert set(result.stdout.split()) == {"--device", "--device-map"}
