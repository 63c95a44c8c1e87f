"""`fftriton eval --task FILE.jsonl`: questions of one's own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fftriton.evaluate.file_task
from fftriton.app.cli import app
from fftriton.evaluate.file_task import FileTask, chosen_letter
from fftriton.evaluate.tasks import make_task, sample_count
from fftriton.needle import generate_sample
from fftriton.needle.samples import write_clip
from fftriton.runtime.processing import load_processor
from fftriton.runtime.shipped import MODEL
from fftriton.runtime.target import Target

pytest.importorskip("av")


def write(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def questions(tmp_path):
    """Three videos with two questions each, next to the file that names them."""
    lines = []
    for index in range(3):
        sample = generate_sample("easy", 0, index)
        write_clip(tmp_path / f"{index}.mp4", sample.frames)
        lines.append({"video": f"{index}.mp4", "question": sample.question, "answer": sample.answer, "kind": "own"})
        lines.append({"video": f"{index}.mp4", "question": f"Is it {index}?", "answer": "no such word"})
    return write(tmp_path / "questions.jsonl", *lines)


def test_an_evaluation(questions, tmp_path, monkeypatch):
    read, decoded = fftriton.evaluate.file_task.read_video, []
    monkeypatch.setattr(
        fftriton.evaluate.file_task, "read_video", lambda path, **rest: decoded.append(path) or read(path, **rest)
    )
    methods = ["--methods", "framefusion,keep-all", "--budgets", "0.5"]
    arguments = ["eval", "--task", str(questions), *methods, "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    fusion, dense = json.loads(result.stdout)
    assert (dense["samples"], dense["accuracy"], dense["by_kind"]) == (6, 0.5, {"own": 1.0, "question": 0.0})
    assert (fusion["accuracy"], fusion["against"]) == (0.5, "keep-all")
    assert len(decoded) == 3
    decoded.clear()
    assert CliRunner().invoke(app, arguments).stdout == result.stdout
    assert not decoded  # everything is on record
    os.utime(tmp_path / "1.mp4")
    CliRunner().invoke(app, arguments)
    assert len(decoded) == 3  # a video has changed


def test_what_a_line_says(tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        {"video": "a.mp4", "question": "Which?", "options": ["red", "blue"], "answer": "blue"},
        {"video": "a.mp4", "question": "Which?", "options": ["red", "blue"], "letter": "A"},
        {
            "video": "a.mp4",
            "question": "Which?",
            "options": ["red", "blue"],
            "answer": "(b)",
            "fps": 2.0,
            "query": "which colour",
        },
        {"video": "b.mp4", "question": "What?", "answer": ["cat", "kitten"], "question_id": 7},
        {"video": "b.mp4", "question": "How many?", "answer": 3},
    )
    task = make_task(str(path), num_frames=(8,))
    samples = [task.sample(index) for index in range(5)]
    assert samples[0].question == "Which?\nA. red\nB. blue\nAnswer with the letter of the right option only."
    assert [sample.answer for sample in samples] == ["B", "A", "B", "cat|kitten", "3"]
    assert [(sample.sampling.frames, sample.sampling.fps) for sample in samples[1:3]] == [(8, None), (None, 2.0)]
    assert task.score(samples[3], "A kitten sleeps.")
    assert not task.score(samples[3], "A dog.")
    assert task.score(samples[4], "There are 3.")
    assert task.unrelated_question(samples[1]) == "What?"
    assert task.unrelated_question(samples[4]).startswith("Which?")
    assert [sample.query for sample in samples[2:]] == ["which colour", "What?", "How many?"]
    assert task.unrelated_question(samples[4]).startswith("Which?\nA. red")
    assert sample_count(task, None) == 5
    with pytest.raises(ValueError, match="samples must be at most 5, as many as the task has, got 6"):
        sample_count(task, 6)


def test_a_letter_is_no_option(tmp_path):
    """Options may be letters themselves, or alike; what stands under "letter" means the place."""
    line = {"video": "a.mp4", "question": "Which?"}
    path = write(
        tmp_path / "q.jsonl",
        line | {"options": ["C", "B", "A", "D"], "letter": "A"}, line | {"options": ["x", "x", "y"], "letter": "B"},
        line | {"options": ["C", "B", "A", "D"], "answer": "A"},
        line | {"options": ["C", "B", "A", "D"], "answer": "A", "letter": None},  # as tables are exported
    )  # fmt: skip
    assert [FileTask(path).sample(index).answer for index in range(4)] == ["A", "B", "C", "C"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b. blue", "B"), ("b", "B"), ("B.", "B"), (" (C) the dog", "C"), ("C: the dog", "C"),
        ("The answer is B.", "B"),
        ("Option C", "C"), ("The answer is (A).", "A"), ("the dog", "C"), ("It is a red box.", "A"), ("D", None),
        ("A red box", "A"), ("A blue box", "B"), ("red or blue", None), ("", None), ("(A) or (B)", None),
        ("Both", None), ("A", "A"), ("A blue box, answer: B", "B"),
    ],
)  # fmt: skip
def test_letters(answer, letter):
    assert chosen_letter(answer, ["red", "blue", "the dog"]) == letter


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of .*: Expecting"),
        ("[1]", "a line must be an object"),
        ('{"question": "Q?", "answer": "a"}', "video must be a text, got None"),
        ('{"video": "a.mp4", "question": "Q?"}', "answer must be a text or a list of texts, got None"),
        ('{"video": "a.mp4", "question": "Q?", "answer": []}', "answer must be a text or a list of texts"),
        (
            '{"video": "a.mp4", "question": "Q?", "answer": "yes", "options": "yes, no"}',
            "options must be a list of texts",
        ),
        ('{"video": "a.mp4", "question": "Q?", "answer": "C", "options": ["x", "y"]}', "a letter from A to B, got 'C'"),
        ('{"video": "a.mp4", "question": "Q?", "answer": "x", "options": ["x", "x"]}', "at most 26 different texts"),
        ('{"video": "a.mp4", "question": "Q?", "answer": "x", "optons": ["x"]}', "nearly 'options', got 'optons'"),
        ('{"video": "a.mp4", "question": "Q?", "answer": "x", "frames": 0}', "frames must be at least 1, got 0"),
        ("", "task must have one question or more"),
    ],
)
def test_lines_that_are_no_questions(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        FileTask(tmp_path / "q.jsonl")
    result = CliRunner().invoke(app, ["eval", "--task", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")


def test_files_that_are_no_tasks(tmp_path):
    with pytest.raises(ValueError, match=r"task must be a file of JSON lines, got '.*missing.jsonl'"):
        make_task(str(tmp_path / "missing.jsonl"))
    path = str(write(tmp_path / "q.jsonl", {"video": "a.mp4", "question": "Q?", "answer": "a"}))
    with pytest.raises(ValueError, match="split must be None for a file of questions, got 'easy'"):
        make_task(path, "easy")
    with pytest.raises(ValueError, match="seed must be 0 for a file of questions, got 1"):
        make_task(path, seed=1)
    with pytest.raises(ValueError, match="frames must be one number for a file of questions"):
        make_task(path, num_frames=(4, 8))


def test_a_bad_video_stops_the_evaluation_in_one_line(questions, tmp_path):
    (tmp_path / "1.mp4").write_text("not a video")
    result = CliRunner().invoke(app, ["eval", "--task", str(questions), "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 2
    assert "video must be a video file" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_video_comes_with_the_inputs(questions):
    task = make_task(str(questions))
    sample = task.sample(0)
    with pytest.raises(RuntimeError, match="must be made before"):
        _ = sample.video
    inputs = task.inputs(sample, load_processor(MODEL))
    assert len(sample.video.frames) == 16
    assert inputs["video_grid_thw"].tolist() == [[16, 4, 4]]
    assert Target().is_shipped
