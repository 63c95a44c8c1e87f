"""`fftriton calibrate`: resumable, shared by processes, and a file of settings that the other commands take."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fftriton
import fftriton.app.clips
import fftriton.app.run
from fftriton.app.calibrate import Calibration
from fftriton.app.cli import app
from fftriton.app.requests import Defaults, read_requests
from fftriton.evaluate.comparing import Comparer
from fftriton.evaluate.records import RecordFolder
from fftriton.methods.settings import Settings
from fftriton.needle import generate_sample
from fftriton.needle.samples import RECIPES, draw_video, write_clip
from fftriton.runtime.shipped import NEEDLE
from fftriton.runtime.target import Target

pytest.importorskip("av")

FEW = ("--methods", "framefusion,uniformframes", "--budgets", "0.5,0.2", "--keep", "0.95")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four videos with a labelled question each; the first has another question."""
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for index in range(4):
        sample = generate_sample("easy", 1, index)
        write_clip(folder / f"{index}.mp4", sample.frames)
        lines.append({"video": f"{index}.mp4", "question": sample.question, "answer": sample.answer})
    lines.append({"video": "0.mp4", "question": "How many boxes appear?"})
    write_lines(folder / "requests.jsonl", lines)
    return folder


def write_lines(path: Path, lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def invoke(*arguments: object, given: str | None = None, command: str = "calibrate"):
    return CliRunner().invoke(app, [command, *map(str, arguments)], input=given, env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def calibrated(folder, tmp_path_factory):
    """An uninterrupted run: its output and its folder. Times count: on a busy machine every setting may be too slow."""
    for _ in range(4):
        out = tmp_path_factory.mktemp("calibrated") / "out"
        with pytest.MonkeyPatch.context() as patch:  # as the fixture `interpreter`, which comes later
            patch.setattr("fftriton_kernels._dispatch.INTERPRET", False)
            result = invoke(folder / "requests.jsonl", "--out", out, *FEW)
        assert result.exit_code == 0, result.output
        if "Use framefusion" in " ".join(result.output.split()):
            break
    return result.output, out


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(Target, "load_model", lambda target: pytest.fail("the model was loaded"))


def rows(out: Path) -> dict[tuple[str, float], dict[str, str]]:
    """The rows of results.csv, without what differs from run to run."""
    with (out / "results.csv").open() as file:
        found = {(row["method"], float(row["budget"])): row for row in csv.DictReader(file)}
    for row in found.values():
        for name in ("prefill_ms", "dense_ms", "peak_mib", "dense_peak_mib", "command", "recommended"):
            del row[name]
    return found


def test_the_table_the_advice_and_the_files(calibrated):
    output, out = calibrated
    text = " ".join(output.split())
    assert "Use framefusion at a budget of 0." in text
    assert "5 of 5 answers stay the same (95 % interval" in text
    assert "5 requests are few" in text
    assert "Stopped: cannot keep 0.95 any more" in text
    for word in ("take this", "keeps", "stopped", "control"):
        assert word in text
    assert max(map(len, output.splitlines()[:11])) <= 80
    assert "…" not in output  # nothing is cut off
    found = rows(out)
    fusion, dropped, blank = found["framefusion", 0.5], found["uniformframes", 0.2], found["blank video", 1.0]
    assert (fusion["kind"], blank["kind"]) == ("setting", "control")
    assert float(fusion["overlap"]) > 0.95 > 0.6 > float(blank["overlap"])
    assert float(fusion["accuracy"]) == float(fusion["dense_accuracy"]) == 1.0
    assert abs(float(fusion["budget_achieved"]) - 0.5) < 0.005
    assert dropped["same"] == dropped["overlap"] == ""
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_the_settings_are_what_was_recommended(calibrated):
    output, out = calibrated
    settings = json.loads((out / "settings.json").read_text())
    assert f"Use {settings['method']} at a budget of {settings['budget']}" in " ".join(output.split())
    assert (settings["requests"], settings["videos"], settings["keep"]) == (5, 4, 0.95)
    assert settings["model"] == Target().name
    assert settings["overlap"] >= 0.95
    assert settings["controls"].keys() == {"blank video", "random tokens"}
    method = fftriton.load_settings(out / "settings.json")
    assert method == fftriton.FrameFusion(settings["budget"])
    with fftriton.reduce(Target().load_model(), method):
        pass


def test_run_and_batch_take_the_settings(calibrated, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fftriton.app.run, "_REPEATS", 1)
    _, out = calibrated
    budget = json.loads((out / "settings.json").read_text())["budget"]
    arguments = ["--settings", out / "settings.json", "--out"]
    result = invoke("--video", folder / "1.mp4", *arguments, tmp_path / "run", "--no-compare", command="run")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "report.json").read_text())["budget"] == budget
    assert "was measured with" not in result.output
    result = invoke(folder / "requests.jsonl", *arguments, tmp_path / "answers.jsonl", command="batch")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {(line["method"], line["budget"]) for line in lines} == {("framefusion", budget)}


def test_settings_bring_their_frames_and_say_what_differs(folder, tmp_path):
    sampling = {"frames": 8, "fps": None, "min_frames": None, "max_frames": None, "start": None, "end": None}
    measured = {"model": "another", "sampling": sampling, "max_pixels": 4096, "answers": {"dtype": "torch.float16"}}
    (tmp_path / "settings.json").write_text(Settings("fastv", 0.6, measured).to_json())
    arguments = [folder / "1.mp4", "--question", "How many boxes appear?", "--settings", tmp_path / "settings.json"]
    result = invoke(*arguments, "--out", "-", command="batch")
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout.splitlines()[-1])
    assert (line["method"], line["budget"], line["frames"]) == ("fastv", 0.6, 8)
    text = " ".join(result.stderr.split())
    assert "was measured with model another, not needle-qwen2vl" in text
    assert "was measured with dtype torch.float16, not torch.float32" in text
    assert "sampling" not in text
    result = invoke(*arguments, "--out", "-", "--frames", 4, command="batch")
    assert json.loads(result.stdout.splitlines()[-1])["frames"] == 4
    assert "was measured with sampling" in " ".join(result.stderr.split())
    (tmp_path / "settings.json").write_text(Settings("fastv", 0.6, measured | {"max_pixels": None}).to_json())
    result = invoke(*arguments, "--out", "-", "--max-pixels", 4096, "--quiet", command="batch")
    assert "was measured with max_pixels None, not 4096" in " ".join(result.stderr.split())  # a warning, so also here


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "settings must be a file that 'fftriton calibrate' wrote"),
        ("{", "which is not JSON"),
        ("[1]", "which lacks 'fftriton_settings'"),
        ('{"method": "framefusion", "budget": 0.3}', "which lacks 'fftriton_settings'"),
        (
            '{"fftriton_settings": 2, "method": "framefusion", "budget": 0.3}',
            "in format 2; this release reads format 1",
        ),
        ('{"fftriton_settings": 1, "budget": 0.3}', "which lacks 'method'"),
        ('{"fftriton_settings": 1, "method": "framefusion", "budget": 1.3}', "budget must be in (0, 1], got 1.3"),
        ('{"fftriton_settings": 1, "method": "framefuson", "budget": 0.3}', "got 'framefuson'"),
        ('{"fftriton_settings": 1, "method": 3, "budget": 0.3}', "method must be a text, got 3"),
        ('{"fftriton_settings": 1, "method": "fastv", "budget": 0.5, "sampling": {"a": 1}}', "a sampling of frames"),
    ],
)
@pytest.mark.parametrize("command", ["run", "batch"])
def test_settings_that_cannot_be_used(tmp_path, no_model, content, error, command):
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_text(content)
    arguments = [NEEDLE.path] if command == "batch" else ["--video", NEEDLE.path]
    result = invoke(*arguments, "--settings", path, "--out", tmp_path / "out", command=command)
    assert result.exit_code == 2
    assert error in " ".join(result.stderr.split())
    if content is None or "sampling" not in content:
        with pytest.raises((ValueError, TypeError)):
            fftriton.load_settings(path)


@pytest.mark.parametrize("option", [("--method", "framefusion"), ("--budget", "0.3")])
def test_settings_and_a_method_are_one_too_many(tmp_path, no_model, option):
    (tmp_path / "settings.json").write_text(Settings("fastv", 0.6).to_json())
    result = invoke(NEEDLE.path, "--settings", tmp_path / "settings.json", *option, command="batch")
    assert result.exit_code == 2
    assert f"must come from --settings or from {option[0]}, not from both" in " ".join(result.stderr.split())


@pytest.mark.parametrize("when", [2])
def test_an_interrupted_run_resumes(folder, calibrated, tmp_path, monkeypatch, when):
    """Ctrl-C right after a record, with the next one half written."""
    append, calls, out = RecordFolder.append, [], tmp_path / "out"

    def interrupted(records, new):
        append(records, new)
        calls.append(new)
        if len(calls) == when:
            with (out / "records-0.jsonl").open("a") as text:
                text.write('{"key": "abc')
            raise KeyboardInterrupt

    monkeypatch.setattr(RecordFolder, "append", interrupted)
    result = invoke(folder / "requests.jsonl", "--out", out, *FEW)
    assert result.exit_code == 130
    assert "the same command resumes" in " ".join(result.output.split())
    calls.clear()
    monkeypatch.setattr(RecordFolder, "append", lambda records, new: calls.append(new) or append(records, new))
    decoded, read = [], fftriton.app.clips.read_video
    monkeypatch.setattr(
        fftriton.app.clips, "read_video", lambda path, **rest: decoded.append(path) or read(path, **rest)
    )
    assert invoke(folder / "requests.jsonl", "--out", out, *FEW).exit_code == 0
    assert rows(out) == rows(calibrated[1])
    assert len(calls) == 5 - when  # what was answered is not asked again
    assert len(decoded) <= 4 - when + 1
    calls.clear()
    decoded.clear()
    assert invoke(folder / "requests.jsonl", "--out", out, *FEW).exit_code == 0
    assert not calls
    assert not decoded


def test_more_settings_reuse_what_is_there(folder, calibrated, tmp_path, monkeypatch):
    """Later runs ask only for what is new, and stricter ones for nothing."""
    out = tmp_path / "out"
    shutil.copytree(calibrated[1], out)
    asked, compare = [], Comparer.compare

    def counted(comparer, question, settings, *rest, **more):
        asked.extend(settings)
        return compare(comparer, question, settings, *rest, **more)

    monkeypatch.setattr(Comparer, "compare", counted)
    assert invoke(folder / "requests.jsonl", "--out", out, *FEW[:4], "--keep", "0.97").exit_code == 0
    assert not asked
    more = ("--methods", "framefusion,randomtokens", "--budgets", "0.5", "--keep", "0.95")
    assert invoke(folder / "requests.jsonl", "--out", out, *more).exit_code == 0
    assert {setting.name for setting in asked} == {"randomtokens"}


def test_a_failure_takes_no_answer_away(folder, calibrated, tmp_path, monkeypatch):
    """The answer with all tokens, which everything is compared with, is there; what is new fails."""
    out = tmp_path / "out"
    shutil.copytree(calibrated[1], out)

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Comparer, "compare", fails)
    more = ("--methods", "framefusion,randomtokens", "--budgets", "0.5", "--keep", "0.95")
    assert invoke(folder / "requests.jsonl", "--out", out, *more).exit_code == 0
    monkeypatch.undo()
    assert invoke(folder / "requests.jsonl", "--out", out, *FEW).exit_code == 0
    assert rows(out) == rows(calibrated[1])


def test_processes_share_the_videos(folder, calibrated, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("fftriton.app.calibrate.wait_for_all", lambda: None)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        result = invoke(folder / "requests.jsonl", "--out", out, *FEW)
        assert result.exit_code == 0, result.output
        assert (out / "results.csv").exists() == (rank == "0")  # one process writes
    asked = [{json.loads(line)["index"] for line in path.read_text().splitlines()} for path in out.glob("*.jsonl")]
    assert sorted(map(len, asked)) == [2, 3]
    assert not asked[0] & asked[1]
    for way, row in rows(calibrated[1]).items():
        other = rows(out)[way]
        assert row["overlap"] == other["overlap"]  # of stopped ones there is none
        assert row["note"].split(":")[0] == other["note"].split(":")[0]


def test_each_video_is_decoded_and_encoded_once(folder, tmp_path, monkeypatch):
    """The blank video is encoded, too, once for all questions."""
    decoded, encoded = Counter(), []
    read, load = fftriton.app.clips.read_video, Target.load_model

    def load_model(target):
        model = load(target)
        model.model.visual.register_forward_hook(lambda module, arguments, output: encoded.append(arguments))
        return model

    monkeypatch.setattr(Target, "load_model", load_model)
    monkeypatch.setattr(
        fftriton.app.clips, "read_video", lambda path, **rest: decoded.update([path]) or read(path, **rest)
    )
    lines = [{"video": str(folder / "0.mp4"), "question": f"{text} ?"} for text in ("How many boxes", "Where")]
    requests = write_lines(tmp_path / "requests.jsonl", lines + lines)  # each twice
    result = invoke(requests, "--out", tmp_path / "out", *FEW, "--json")
    assert result.exit_code == 0, result.output
    assert list(decoded.values()) == [1]
    assert len(encoded) == 2
    assert json.loads(result.stdout)["requests"] == 2  # equal requests count once


def test_requests_that_do_not_need_the_video(tmp_path):
    """No box in any video, and the same answer for all: no setting is told from a blind model; old settings go."""
    for index in range(3):
        frames = draw_video(RECIPES["easy"], 16, [], True, np.random.default_rng(index))
        write_clip(tmp_path / f"{index}.mp4", frames)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text(Settings("fastv", 0.6).to_json())
    requests = [tmp_path, "--question", "How many boxes appear?"]
    result = invoke(*requests, "--out", tmp_path / "out", "--methods", "framefusion", "--budgets", "0.5")
    assert result.exit_code == 0, result.output
    assert "Nothing is recommended: these requests do not need the video" in " ".join(result.output.split())
    assert not (tmp_path / "out" / "settings.json").exists()
    (tmp_path / "out" / "settings.json").write_text("{}")  # somebody else's
    invoke(*requests, "--out", tmp_path / "out", "--methods", "framefusion", "--budgets", "0.5")
    assert (tmp_path / "out" / "settings.json").read_text() == "{}"


def test_options_and_letters_are_labels(folder, tmp_path):
    lines = [
        {
            "video": str(folder / "0.mp4"),
            "question": "How many boxes appear?",
            "options": ["two", "one"],
            "letter": "B",
        },
        {"video": str(folder / "0.mp4"), "question": "Where is it?", "options": ["here", "there"]},
    ]
    requests = write_lines(tmp_path / "requests.jsonl", lines)
    dense = Defaults(["?"], {"method": "keep-all", "budget": 1.0})
    plan = Calibration(read_requests(str(requests), dense), ("framefusion",), (0.5,), 0.95)
    (first, judge), (second, none) = plan.labelled()
    assert "A. two\nB. one" in first.question
    assert judge("B")
    assert not judge("A")
    assert "A. here\nB. there" in second.question
    assert none is None


def test_videos_that_fail_do_not_count(folder, tmp_path):
    lines = [
        {"video": str(folder / "0.mp4"), "question": "How many boxes appear?"},
        {"video": "missing.mp4", "question": "How many boxes appear?"},
    ]
    requests = write_lines(tmp_path / "requests.jsonl", lines)
    result = invoke(requests, "--out", tmp_path / "out", *FEW)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "1 requests failed and do not count; the first is missing.mp4: video must be a file that exists" in text
    write_lines(requests, lines[1:])
    result = invoke(requests, "--out", tmp_path / "out", *FEW)
    assert result.exit_code == 1
    assert "Nothing is recommended: no request was answered" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("nothing.jsonl",), "requests must be a file or a folder that can be read"),
        ((NEEDLE.path, "--keep", "1"), "keep must be below 1"),
        ((NEEDLE.path, "--keep", "98"), "keep must be in [0.5, 1], got 98"),
        ((NEEDLE.path, "--budgets", "0.5,2"), "budgets must be in (0, 1], got 2"),
        ((NEEDLE.path, "--budgets", "half"), "budget must be a number in (0, 1], got 'half'"),
        ((NEEDLE.path, "--budgets", ""), "budgets must be one or more"),
        ((NEEDLE.path, "--methods", "framefuson"), "got 'framefuson'"),
        ((NEEDLE.path, "--methods", "fastv,keep-all"), "methods must not keep all tokens"),
        ((NEEDLE.path, "--methods", "kvtp:relevance=attention:question=unrelated"), "must be told the question"),
        ((NEEDLE.path, "--device", "nowhere"), "device must be one that torch can use here"),
        ((NEEDLE.path, "--frames", "0"), "frames must be at least 1"),
        ((NEEDLE.path, "--out", NEEDLE.path), "out must be a folder that can be written"),
        ((NEEDLE.path, "--out", "/proc/nowhere"), "out must be a folder that can be written"),
    ],
)
def test_bad_input_is_refused_in_one_line(no_model, tmp_path, arguments, error, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert error in result.stderr
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ({"method": "fastv"}, "requests must leave the method and the budget to --methods and --budgets, got 'fastv'"),
        ({"budget": 0.2}, "got 'keep-all' at 0.2"),
        ({"options": ["a", "b"], "answer": "c"}, "answer must be an option or a letter from A to B, got 'c'"),
        ({"question": ""}, "question must be a text"),
        ({"answer": " "}, "answer must be a text or a list of texts"),
    ],
)
def test_a_bad_line_is_refused(no_model, tmp_path, line, error):
    request = {"video": str(NEEDLE.path), "question": "How many boxes appear?"}
    result = invoke(write_lines(tmp_path / "requests.jsonl", [request | line]), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert error in result.stderr


def test_results_that_cannot_be_written(folder, calibrated, tmp_path):
    out = tmp_path / "out"
    (out / "results.csv").mkdir(parents=True)
    (out / "records-0.jsonl").write_bytes((calibrated[1] / "records-0.jsonl").read_bytes())
    result = invoke(folder / "requests.jsonl", "--out", out, *FEW)
    assert result.exit_code == 2
    assert f"cannot write '{out / 'results.csv'}'" in result.stderr


@pytest.mark.night
def test_a_killed_run_resumes_and_a_closed_pipe_is_no_crash(folder, calibrated, tmp_path):
    arguments = ["calibrate", str(folder / "requests.jsonl"), *FEW, "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "fftriton", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    records = tmp_path / "out" / "records-0.jsonl"
    while process.poll() is None and not (records.exists() and records.read_text().count("\n") > 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    pipe = subprocess.run(
        shlex.join(command) + " | head -c 1", shell=True, capture_output=True, text=True, env=environment
    )
    assert "Traceback" not in pipe.stderr
    assert invoke(folder / "requests.jsonl", "--out", tmp_path / "out", *FEW).exit_code == 0
    assert rows(tmp_path / "out") == rows(calibrated[1])
