"""`fftriton batch`: each request one line, whatever happens; each video decoded and encoded once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fftriton.app.answer_file
import fftriton.app.batch
import fftriton.app.clips
from fftriton.app.answer_file import AnswerFile
from fftriton.app.cli import app
from fftriton.app.clips import make_tasks
from fftriton.app.requests import Defaults, read_requests
from fftriton.needle import generate_sample
from fftriton.needle.samples import write_clip
from fftriton.runtime.shipped import NEEDLE
from fftriton.runtime.target import Target

pytest.importorskip("av")

QUESTIONS = ["How many boxes appear?", "Where is the red box?"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Videos with a question of their own, and the answer that the shipped model gives."""
    folder = tmp_path_factory.mktemp("clips")
    samples = [generate_sample("easy", 0, index) for index in range(4)]
    for sample in samples:
        write_clip(folder / f"{sample.index}.mp4", sample.frames)
    (folder / "bad.mp4").write_text("not a video")
    return folder, samples


@pytest.fixture
def requests(clips, tmp_path):
    """A file of eleven requests, with a bad video and a missing one among them."""
    folder, samples = clips
    lines = [
        {"id": f"{sample.index}/{number}", "video": f"{folder / str(sample.index)}.mp4", "question": question}
        for sample in samples[:3]
        for number, question in enumerate([sample.question, *QUESTIONS])
    ]
    lines.insert(2, {"id": "bad", "video": str(folder / "bad.mp4"), "question": "Where is it?"})
    lines.append({"id": "missing", "video": str(folder / "missing.mp4"), "question": "Where is it?"})
    return write_lines(tmp_path / "requests.jsonl", lines)


def write_lines(path: Path, lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def invoke(*arguments: object, given: str | None = None):
    return CliRunner().invoke(app, ["batch", *map(str, arguments)], input=given)


def answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def uninterrupted(requests, tmp_path):
    """What a run without interruption writes."""
    assert invoke(requests, "--out", tmp_path / "expected.jsonl").exit_code == 0
    return (tmp_path / "expected.jsonl").read_text()


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(Target, "load_model", lambda target: pytest.fail("the model was loaded"))


def test_every_request_gets_one_line(requests, clips, uninterrupted):
    lines = [json.loads(line) for line in uninterrupted.splitlines()]
    assert [line["id"] for line in lines] == [json.loads(line)["id"] for line in requests.read_text().splitlines()]
    assert [line["id"] for line in lines if line["error"] is not None] == ["bad", "missing"]
    for sample in clips[1][:3]:
        (own,) = (line for line in lines if line["id"] == f"{sample.index}/0")
        assert (own["answer"], own["question"], own["frames"]) == (sample.answer, sample.question, 16)
        assert abs(own["budget_achieved"] - 0.3) < 0.005
    bad, missing = (line for line in lines if line["error"] is not None)
    assert "video must be a video file" in bad["error"]
    assert "video must be a file that exists" in missing["error"]
    assert bad["answer"] is None


@pytest.mark.parametrize("when", [1, 4, 7])
def test_an_interrupted_run_resumes(requests, tmp_path, uninterrupted, monkeypatch, when):
    """Interrupted right after a line, with the next one half written; a bad video counts as answered."""
    out, append, calls = tmp_path / "out.jsonl", AnswerFile.append, []

    def interrupted(file, lines):
        append(file, lines)
        calls.append(lines)
        if len(calls) == when:
            with out.open("a") as text:
                text.write('{"key": "abc')
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerFile, "append", interrupted)
    result = invoke(requests, "--out", out)
    assert result.exit_code == 130
    assert "the same command resumes" in " ".join(result.stderr.split())
    calls.clear()
    monkeypatch.setattr(AnswerFile, "append", lambda file, lines: calls.append(lines) or append(file, lines))
    assert invoke(requests, "--out", out).exit_code == 0
    assert out.read_text() == uninterrupted
    assert sum(map(len, calls)) < 11  # what was answered is not asked again
    calls.clear()
    assert "All 11 requests are answered" in invoke(requests, "--out", out).stderr
    assert not calls


def test_batches_of_videos_give_the_same_answers(requests, tmp_path, uninterrupted, monkeypatch):
    sizes, generate = [], fftriton.app.batch.generate_batch

    def counted(model, inputs, *rest):
        sizes.append(len(inputs["input_ids"]))
        return generate(model, inputs, *rest)

    monkeypatch.setattr(fftriton.app.batch, "generate_batch", counted)
    assert invoke(requests, "--out", tmp_path / "out.jsonl", "--batch-size", 2).exit_code == 0
    assert max(sizes) == 2
    assert (tmp_path / "out.jsonl").read_text() == uninterrupted


def test_a_batch_that_was_interrupted_is_run_whole(requests, tmp_path, monkeypatch):
    """A row may depend, in its last bit, on the other rows."""
    out, seen, generate = tmp_path / "out.jsonl", [], fftriton.app.batch.generate_batch
    monkeypatch.setattr(
        fftriton.app.batch,
        "generate_batch",
        lambda model, inputs, *rest: seen.append(inputs["input_ids"].shape) or generate(model, inputs, *rest),
    )
    invoke(requests, "--out", out, "--batch-size", 3)
    expected, first = out.read_text(), list(seen)
    seen.clear()
    out.write_text("".join(expected.splitlines(keepends=True)[1:]))  # the first line is missing
    invoke(requests, "--out", out, "--batch-size", 3)
    assert out.read_text() == expected
    assert seen == first[: len(seen)]
    assert seen


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_video_is_decoded_and_encoded_once(clips, tmp_path, monkeypatch, batch_size):
    folder, _ = clips
    lines = [{"video": str(folder / f"{i}.mp4"), "question": question} for question in QUESTIONS for i in range(2)]
    decoded, encoded = [], []
    read, load = fftriton.app.clips.read_video, Target.load_model

    def load_model(target):
        model = load(target)
        model.model.visual.register_forward_hook(lambda module, arguments, output: encoded.append(arguments))
        return model

    monkeypatch.setattr(Target, "load_model", load_model)
    monkeypatch.setattr(
        fftriton.app.clips, "read_video", lambda path, **rest: decoded.append(path) or read(path, **rest)
    )
    requests = write_lines(tmp_path / "requests.jsonl", lines)
    assert invoke(requests, "--out", tmp_path / "out.jsonl", "--batch-size", batch_size).exit_code == 0
    assert len(answers(tmp_path / "out.jsonl")) == 4
    assert sorted(decoded) == [folder / "0.mp4", folder / "1.mp4"]
    assert len(encoded) == 2 / batch_size


def test_processes_share_the_requests(requests, tmp_path, uninterrupted, monkeypatch):
    out = tmp_path / "out.jsonl"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        before = len(out.read_text().splitlines()) if out.exists() else 0
        assert invoke(requests, "--out", out).exit_code == 0
        assert len(out.read_text().splitlines()) > before
    assert out.read_text() == uninterrupted


def test_lines_may_differ_in_everything(clips, tmp_path):
    folder, samples = clips
    video, question = str(folder / "0.mp4"), samples[0].question
    ways = [
        {"method": "keep-all", "budget": 1.0},
        {"method": "fastv", "budget": 0.5, "frames": 8},
        {"fps": 2.0, "max_frames": 6},
        {"start": 1.0, "frames": 4, "max_new_tokens": 1, "answer": "7"},
    ]
    requests = write_lines(tmp_path / "requests.jsonl", [{"video": video, "question": question} | way for way in ways])
    assert invoke(requests, "--out", tmp_path / "out.jsonl").exit_code == 0
    lines = answers(tmp_path / "out.jsonl")
    assert [line["error"] for line in lines] == [None] * 4
    assert [line["frames"] for line in lines] == [16, 8, 6, 4]
    assert [line["method"] for line in lines] == ["keep-all", "fastv", "framefusion", "framefusion"]
    assert lines[0]["budget_achieved"] == 1
    assert lines[3]["expected"] == "7"
    assert lines[2].keys() - lines[0].keys() == {"fps", "max_frames"}
    assert (lines[3]["start"], lines[3]["max_new_tokens"]) == (1.0, 1)


def test_a_setting_that_cannot_work_is_the_line_s_own_error(clips, tmp_path):
    video = str(clips[0] / "0.mp4")
    lines = [
        {"video": video, "question": "Where is it?", "method": "fastv", "budget": 0.1},  # needs 2 of 8 layers
        {"video": video, "question": "<|video_pad|>?"},
        {"video": video, "question": QUESTIONS[0]},
    ]
    result = invoke(write_lines(tmp_path / "requests.jsonl", lines), "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    fastv, placeholder, fine = (line["error"] for line in answers(tmp_path / "out.jsonl"))
    assert "FastV: budget must be above layer / num_layers" in fastv
    assert "question must not contain '<|video_pad|>'" in placeholder
    assert fine is None


def test_all_that_fails_is_a_failure(clips, tmp_path):
    result = invoke(clips[0] / "bad.mp4", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 1
    assert "0 answered, 1 failed" in result.stderr
    result = invoke(clips[0] / "bad.mp4", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 1
    assert "All 1 requests have failed" in result.stderr
    assert invoke(clips[0] / "bad.mp4", "--out", "-").exit_code == 1


def test_one_failure_more_is_none_of_the_whole(clips, tmp_path):
    """A run that resumes another is judged by all of its lines."""
    lines = [{"video": str(clips[0] / f"{name}.mp4"), "question": QUESTIONS[0]} for name in ("0", "bad")]
    requests, out = write_lines(tmp_path / "requests.jsonl", lines), tmp_path / "out.jsonl"
    assert invoke(requests, "--out", out).exit_code == 0
    result = invoke(requests, "--out", out, "--retry")
    assert "0 answered, 1 failed" in result.stderr
    assert result.exit_code == 0


def test_a_byte_order_mark_is_no_part_of_the_first_line(clips, tmp_path):
    lines = write_lines(tmp_path / "requests.jsonl", [{"video": str(clips[0] / "0.mp4"), "question": "Q?"}])
    lines.write_text(lines.read_text(), encoding="utf-8-sig")
    assert read(lines) == [("0.mp4", "Q?")]


# ---- where requests come from


def read(source, **settings):
    return [
        (request.video.name, request.question) for request in read_requests(str(source), Defaults(["Q?"], settings))
    ]


def test_sources(clips, tmp_path, monkeypatch):
    folder, _ = clips
    (folder / "notes.txt").write_text("no video")
    every = [("0.mp4", "Q?"), ("1.mp4", "Q?"), ("2.mp4", "Q?"), ("3.mp4", "Q?"), ("bad.mp4", "Q?")]
    assert read(folder) == every
    assert read(folder / "1.mp4") == [("1.mp4", "Q?")]
    (tmp_path / "list.txt").write_text(f"{folder / '2.mp4'}\n\n{folder / '0.mp4'}\n")
    assert read(tmp_path / "list.txt") == [("2.mp4", "Q?"), ("0.mp4", "Q?")]
    two = read_requests(str(folder / "1.mp4"), Defaults(["A?", "B?"], {"frames": 4}))
    assert [(request.question, request.sampling.frames) for request in two] == [("A?", 4), ("B?", 4)]
    result = invoke("-", "--out", "-", "-q", "--question", QUESTIONS[0], given=f"{folder / '0.mp4'}\n")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["question"] == QUESTIONS[0]


def test_relative_paths_start_from_the_file_that_names_them(clips, tmp_path, monkeypatch):
    folder, _ = clips
    (folder / "list.txt").write_text("0.mp4\n")
    (request,) = read_requests(str(folder / "list.txt"), Defaults(["Q?"], {}))
    assert (request.video, request.name) == (folder / "0.mp4", "0.mp4")
    monkeypatch.chdir(folder)
    (tmp_path / "list.txt").write_text("0.mp4\n")
    (request,) = read_requests(str(tmp_path / "list.txt"), Defaults(["Q?"], {}))
    assert request.video == Path("0.mp4")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"video": "a.mp4", "question": ', "line 2 of .*: Expecting value"),
        ('{"question": "Where?"}', "line 2 of .*: video must be the path of a file, got None"),
        ('{"video": 5, "question": "Where?"}', "video must be the path of a file, got 5"),
        ('{"video": "a.mp4", "question": ""}', "question must be a text, got ''"),
        ('{"video": "a.mp4", "question": "Q?", "method": "slowv"}', "line 2 of .*: method must be one of"),
        ('{"video": "a.mp4", "question": "Q?", "budget": 2}', "budget must be in"),
        ('{"video": "a.mp4", "question": "Q?", "frames": 0}', "frames must be at least 1, got 0"),
        ('{"video": "a.mp4", "question": "Q?", "frames": 4, "fps": 1}', "frames must go without fps"),
        ('{"video": "a.mp4", "question": "Q?", "max_new_tokens": "x"}', "max_new_tokens must be"),
    ],
)
def test_lines_that_cannot_be_requests(no_model, tmp_path, line, message):
    (tmp_path / "requests.jsonl").write_text('{"video": "a.mp4", "question": "Q?"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_requests(str(tmp_path / "requests.jsonl"), Defaults(["Q?"], {}))
    result = invoke(tmp_path / "requests.jsonl", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "requests must be a file or a folder that can be read"),
        ("empty.jsonl", b"", "requests must be one or more, got none"),
        ("binary.jsonl", b"\xff\xfe\x00", "requests must be lines of text"),
    ],
)
def test_sources_that_cannot_be_read(no_model, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = invoke(tmp_path / name, "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 2
    assert message in result.output


def test_a_folder_without_videos(no_model, tmp_path):
    assert "requests must be a folder with videos in it" in invoke(tmp_path, "--out", tmp_path / "o").output


# ---- where answers go


def test_a_file_of_something_else_is_left_alone(no_model, requests, tmp_path):
    for content in ("notes", "notes\n", '{"id": 5}\n', '{"key": 5}\n'):
        (tmp_path / "out.jsonl").write_text(content)
        result = invoke(requests, "--out", tmp_path / "out.jsonl")
        assert result.exit_code == 2
        assert "which holds something else" in result.output
        assert (tmp_path / "out.jsonl").read_text() == content


def test_other_settings_do_not_mix(requests, tmp_path, uninterrupted, monkeypatch):
    out = tmp_path / "expected.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Target, "load_model", lambda target: pytest.fail("the model was loaded"))
        for option in (["--budget", 0.5], ["--frames", 8], ["--dtype", "bfloat16"], ["--max-new-tokens", 2]):
            result = invoke(requests, "--out", out, *option)
            assert result.exit_code == 2
            assert "11 of 11 lines answer something else" in result.output
    assert out.read_text() == uninterrupted
    assert invoke(requests, "--out", out, "--frames", 8, "--overwrite").exit_code == 0
    assert {line.get("frames") for line in answers(out)} == {8, None}


def test_failures_are_asked_again_on_request(requests, clips, tmp_path, uninterrupted):
    out = tmp_path / "expected.jsonl"
    (clips[0] / "missing.mp4").write_bytes((clips[0] / "3.mp4").read_bytes())
    try:
        assert invoke(requests, "--out", out).exit_code == 0
        assert out.read_text() == uninterrupted
        result = invoke(requests, "--out", out, "--retry")
        assert result.exit_code == 0
        assert "1 answered, 1 failed" in result.stderr
        assert [line["id"] for line in answers(out) if line["error"]] == ["bad"]
    finally:
        (clips[0] / "missing.mp4").unlink()


@pytest.mark.parametrize("kind", ["folder", "in a file", "processes", "full"])
def test_files_that_cannot_be_written_are_refused_before_any_work(no_model, requests, tmp_path, kind):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    out = {
        "folder": tmp_path / "folder", "in a file": tmp_path / "file" / "out.jsonl",
        "processes": "/proc/self/out.jsonl", "full": "/dev/full",
    }[kind]  # fmt: skip
    result = invoke(requests, "--out", out)
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    assert f"out must be a file that can be written, got '{out}': " in line


def test_a_disk_that_fills_up_leaves_whole_lines(requests, tmp_path, monkeypatch):
    out, write = tmp_path / "out.jsonl", os.write

    def full(file, data):
        if b'"1/1"' in data:
            write(file, data[:20])
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(fftriton.app.answer_file.os, "write", full)
    result = invoke(requests, "--out", out)
    assert result.exit_code == 2
    assert f"Error: cannot write '{out}': No space left on device" in result.output
    assert out.read_text().endswith("}\n")
    assert len(answers(out)) >= 3


def test_equal_requests_are_different_ones(tmp_path):
    requests = write_lines(tmp_path / "r.jsonl", 3 * [{"video": "a.mp4", "question": "Q?"}])
    keys = [task.key for task in make_tasks(read_requests(str(requests), Defaults([], {})), Target())]
    assert len(set(keys)) == 3


# ---- processes that are killed


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fftriton", "batch", *map(str, arguments)]


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def sixty_requests(clips, tmp_path) -> Path:
    """Five questions about each of twelve videos, mixed, a bad one among them."""
    folder, samples = clips
    names = [folder / f"{index % 4}.mp4" for index in range(11)] + [folder / "bad.mp4"]
    lines = []
    for number, name in enumerate(names):
        copy = tmp_path / f"{number}.mp4"
        copy.write_bytes(name.read_bytes())
        texts = [samples[number % 4].question, *QUESTIONS, "Where is the blue box?", "When does the red box appear?"]
        lines += [{"id": len(lines) + i, "video": copy.name, "question": text} for i, text in enumerate(texts)]
    random.Random(0).shuffle(lines)
    return write_lines(tmp_path / "requests.jsonl", lines)


@pytest.mark.night
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
def test_killed_at_random_moments(clips, tmp_path, stop):
    requests, rng = sixty_requests(clips, tmp_path), random.Random(stop)
    subprocess.run(command(requests, "--out", tmp_path / "expected.jsonl"), env=ENVIRONMENT, check=True)
    out = tmp_path / "out.jsonl"
    for _ in range(10):
        process = subprocess.Popen(command(requests, "--out", out), env=ENVIRONMENT, stderr=subprocess.PIPE)
        before = lines_of(out)
        while lines_of(out) <= before + rng.randrange(5) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() / 20)
        process.send_signal(stop)
        process.communicate()
    subprocess.run(command(requests, "--out", out), env=ENVIRONMENT, check=True)
    assert out.read_text() == (tmp_path / "expected.jsonl").read_text()
    assert len(answers(out)) == 60


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.night
def test_two_processes(clips, tmp_path):
    requests = sixty_requests(clips, tmp_path)
    subprocess.run(command(requests, "--out", tmp_path / "expected.jsonl"), env=ENVIRONMENT, check=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    subprocess.run(
        [*launch, "fftriton", "batch", str(requests), "--out", str(tmp_path / "out.jsonl")], env=ENVIRONMENT, check=True
    )
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "expected.jsonl").read_text()


def test_a_pipe_that_is_closed(clips):
    """As in `fftriton batch ... --out - | head -1`: no traceback."""
    arguments = command(clips[0], "--out", "-", "-q", *("--question", QUESTIONS[0]))
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(process.stdout.readline())["question"] == QUESTIONS[0]
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait() != 0


@pytest.mark.night
def test_memory_stays(clips, tmp_path, monkeypatch):
    """From the 50th to the 500th request, resident memory grows by less than 200 MB."""
    videos = [tmp_path / f"{number}.mp4" for number in range(100)]
    for number, video in enumerate(videos):
        video.write_bytes((clips[0] / f"{number % 4}.mp4").read_bytes())
    questions = [QUESTIONS[0], *(f"Where is the {colour} box?" for colour in ("red", "blue", "green", "yellow"))]
    lines = [{"video": str(video), "question": question} for video in videos for question in questions]
    resident, append = [], AnswerFile.append

    def measured(file, lines):
        append(file, lines)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE"))

    monkeypatch.setattr(AnswerFile, "append", measured)
    result = invoke(write_lines(tmp_path / "requests.jsonl", lines), "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 0
    assert len(resident) == 500
    assert resident[-1] - resident[49] < 200e6


def test_shipped_clip(tmp_path):
    assert invoke(NEEDLE.path, "--out", tmp_path / "out.jsonl").exit_code == 0
    (line,) = answers(tmp_path / "out.jsonl")
    assert (line["question"], line["answer"]) == (NEEDLE.question, NEEDLE.answer)
