"""SparseKV-QA: annotations become questions, questions get labels, and labels are split."""

from __future__ import annotations

import csv
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripted_endpoint import Reply, chat, endpoint
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from bench.kvtp.small import word_tokenizer
from bench.kvtp.triples import read_triples
from fftriton.evaluate.file_task import FileTask
from fftriton.labels import labelling, models, prompts
from fftriton.labels.__main__ import app
from fftriton.labels.cache import Cache
from fftriton.labels.datasets import Files, egoschema, nextgqa, nextqa, videomme
from fftriton.labels.endpoint import Endpoint, EndpointError, RefusedError
from fftriton.labels.labelling import Labeller
from fftriton.labels.models import Model, Settings, make_captioner, make_reader
from fftriton.labels.prompts import ReplyError, parse_caption, query_parser, score_parser, scoring_prompt
from fftriton.labels.questions import Question, clip_seconds, read_questions, span_relevance, write_questions
from fftriton.labels.splitting import is_sparse, split
from fftriton.needle import generate_sample
from fftriton.runtime.processing import load_processor
from fftriton.runtime.shipped import MODEL
from fftriton.runtime.target import Target
from fftriton.runtime.video import write_video

pytest.importorskip("av")


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def write_csv(path: Path, *rows: dict[str, Any]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


# ---- annotations

NEXT = {
    "frame_count": 900, "width": 640, "height": 480, "question": "why did the boy run", "qid": 3, "type": "CW",
    "a0": "to hide", "a1": "he is late", "a2": "to win", "a3": "a dog came", "a4": "it rains",
}  # fmt: skip


def test_videomme(tmp_path):
    row = {
        "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "History", "url": "https://x",
        "videoID": "fFjv93ACGo8", "question_id": "001-1", "task_type": "Counting Problem", "question": "How many?",
        "options": ["A. One.", "B. Two.", "C. A. Bell.", "D. None."], "answer": "C",
    }  # fmt: skip
    (question,) = videomme(Files(write_json(tmp_path / "test.json", [row]), Path("videos")))
    assert question == Question(
        "videomme-001-1", Path("videos/fFjv93ACGo8.mp4"), "How many?", ("One.", "Two.", "A. Bell.", "None."), "C",
        kind="Counting Problem",
    )  # fmt: skip
    with pytest.raises(ValueError, match="question 1 of .*: answer must be the letter of one of 4 options, got 'E'"):
        videomme(Files(write_json(tmp_path / "bad.json", [row | {"answer": "E"}]), Path()))
    del row["options"]
    with pytest.raises(ValueError, match="question 1 of .* must have 'options'"):
        videomme(Files(write_json(tmp_path / "bad.json", [row]), Path()))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"videoID": "v", "question_id": "1", "question": "Q?", "options": ["A. x", "B. y"], "answer": "B"},
        {"videoID": "w", "question_id": "2", "question": "R?", "options": ["A. x", "B. y"], "answer": "A"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = videomme(Files(tmp_path / "t.parquet", Path()))
    assert [(one.question, one.options, one.letter) for one in found] == [
        ("Q?", ("x", "y"), "B"),
        ("R?", ("x", "y"), "A"),
    ]
    (tmp_path / "t.parquet").write_text("no table")
    with pytest.raises(ValueError, match="annotations must be a parquet file"):
        videomme(Files(tmp_path / "t.parquet", Path()))


def test_egoschema(tmp_path):
    rows = [
        {"q_uid": uid, "google_drive_id": "1", "question": "What does C do?"}
        | {f"option {i}": f"C {i}" for i in range(5)}
        for uid in ("one", "two")
    ]
    answers = write_json(tmp_path / "subset_answers.json", {"two": 3})
    files = Files(write_json(tmp_path / "questions.json", rows), Path("v"), answers=answers)
    one, two = egoschema(files)
    assert (one.letter, two.letter, one.is_answered, two.is_answered) == (None, "D", False, True)
    assert (two.video, two.options) == (Path("v/two.mp4"), ("C 0", "C 1", "C 2", "C 3", "C 4"))
    hub = [
        {"question_idx": "7", "video_idx": "two", "question": "Q?", "option": ["A. C a", "B. C b"], "answer": "1"},
        {"question_idx": "8", "video_idx": "two", "question": "Q?", "option": ["C a", "C b"], "answer": None},
    ]
    first, second = egoschema(Files(write_json(tmp_path / "hub.json", hub), Path("v")))
    assert (first.letter, first.options, second.letter, second.options) == ("B", ("C a", "C b"), None, ("C a", "C b"))
    write_json(answers, {"two": 5})
    with pytest.raises(ValueError, match="answer must be a number from 0 to 4, got 5"):
        egoschema(files)


def test_nextqa(tmp_path):
    table = write_csv(tmp_path / "val.csv", {"video": 4010069381, "answer": 1} | NEXT)
    (question,) = nextqa(Files(table, Path("v")))
    assert (question.letter, question.kind, question.question) == ("B", "CW", "why did the boy run?")
    assert question.video == Path("v/4010069381.mp4")
    places = write_json(tmp_path / "map.json", {"4010069381": "1164/4010069381"})
    assert nextqa(Files(table, Path("v"), video_map=places))[0].video == Path("v/1164/4010069381.mp4")
    write_json(places, {})
    with pytest.raises(ValueError, match="must have an entry for video '4010069381', got none"):
        nextqa(Files(table, Path("v"), video_map=places))


def test_nextgqa(tmp_path):
    rows = [{"video_id": 7, "answer": "to win"} | NEXT | {"qid": qid} for qid in (3, 4)]
    spans = {"7": {"duration": 34, "location": {"3": [[20.0, 23.5], [29.7, 34.2]]}, "fps": 29.97}}
    files = Files(
        write_csv(tmp_path / "val.csv", *rows), Path("v"), spans=write_json(tmp_path / "gsub_val.json", spans)
    )
    (question,) = nextgqa(files)  # the other has no spans
    assert (question.id, question.letter, question.frames) == ("nextgqa-7-3", "C", 34)
    assert question.relevance == (0, 0, 5, 5, 5)
    with pytest.raises(ValueError, match="spans must be the file gsub_val.json or gsub_test.json"):
        nextgqa(Files(files.annotations, Path("v")))
    write_csv(files.annotations, rows[0] | {"answer": "to lose"})
    with pytest.raises(ValueError, match="answer must be one of .*, got 'to lose'"):
        nextgqa(files)


def test_labels_from_spans():
    assert span_relevance([[0, 1]], 20) == (20, (5, 0, 0))
    assert span_relevance([[8.2, 8.4]], 20)[1] == (0, 5, 0)  # between two frames
    assert span_relevance([[7.9, 8.1]], 20)[1] == (0, 5, 0)  # across an edge, without a frame
    assert span_relevance([[7, 9]], 20)[1] == (5, 5, 0)
    assert span_relevance([[19.6, 21.5]], 20)[1] == (0, 0, 5)  # ends after the video
    assert span_relevance([[0, 0.2]], 0.4) == (1, (5,))
    frames, relevance = span_relevance([[300, 310]], 1280)
    assert (frames, len(relevance), relevance.index(5), sum(relevance)) == (128, 16, 3, 5)
    for span in ([5, 5], [6, 5], [-1, 5], [20, 22], [math.nan, 5]):
        with pytest.raises(ValueError, match="spans must start before they end"):
            span_relevance([span], 20)


def test_read_leaves_out_what_is_not_here(tmp_path):
    table = write_csv(tmp_path / "val.csv", {"video": 1, "answer": 1} | NEXT, {"video": 2, "answer": 0} | NEXT)
    (tmp_path / "videos").mkdir()
    arguments = ("read", "nextqa", table, "--videos", tmp_path / "videos", "--out", tmp_path / "sub" / "q.jsonl")
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "videos must be a folder with '1.mp4'" in result.output
    (tmp_path / "videos" / "2.mp4").touch()
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "1 questions:" in result.output
    assert "1 questions left out: 1 videos are not in" in result.output
    line = json.loads((tmp_path / "sub" / "q.jsonl").read_text())
    assert line["video"] == "../videos/2.mp4"
    assert FileTask(tmp_path / "sub" / "q.jsonl").sample(0).answer == "A"
    assert invoke("read", "nextqa", tmp_path / "no.csv", "--videos", tmp_path, "--out", "q").exit_code == 2


def test_lines_come_back(tmp_path):
    questions = [
        Question("a", tmp_path / "v" / "a.mp4", "Q?", ("x", "y"), "B", kind="k", query="q", frames=9, relevance=(0, 5)),
        Question("b", tmp_path / "b.mp4", "Wer?", answer=["Käse", "cheese"]),
    ]
    (tmp_path / "v").mkdir()
    for question in questions:
        question.video.touch()
    write_questions(tmp_path / "q.jsonl", questions)
    assert read_questions([tmp_path / "q.jsonl"]) == questions
    task = FileTask(tmp_path / "q.jsonl")
    assert (task.sample(0).query, task.sample(0).sampling.frames, task.sample(1).query) == ("q", 9, "Wer?")
    assert task.unrelated_question(task.sample(1)) == "q"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of .*: Expecting"),
        ("[]", "a line must be an object"),
        ('{"video": "v"}', "missing 1 required|question"),
        ('{"video": "v", "question": " "}', "question must be a text"),
        ('{"video": "v", "question": "Q", "query": 3}', "query must be a text, got 3"),
        ('{"video": "v", "question": "Q", "start": 3}', "one frame a second of the whole video, got start"),
        ('{"video": "v", "question": "Q", "relevance": [1]}', "for each of the None clips"),
        ('{"video": "v", "question": "Q", "frames": 9, "relevance": [1]}', "for each of the 2 clips of 9 frames"),
        ('{"video": "v", "question": "Q", "frames": 8, "relevance": [6]}', "a number from 0 to 5"),
        ('{"video": "v", "question": "Q", "optons": []}', "keys must not be nearly 'options'"),
    ],
)
def test_lines_that_cannot_be(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_questions([tmp_path / "q.jsonl"])


# ---- the sparsity rule and the split


def labelled(name: str, frames: int, relevance: list[float], **others: Any) -> Question:
    return Question(name, Path(f"/v/{name}.mp4"), "Q?", frames=frames, relevance=tuple(relevance), **others)


@pytest.mark.parametrize(("label", "most"), [(5, 7), (3, 5), (2, 3), (1, 0)])
def test_sparse_with_128_frames(label, most):
    """As worked out for the authors' rule: labels 5/0 pass up to 7 of 16 clips, 3/0 up to 5, 2/0 up to 3."""
    passes = [is_sparse(labelled("v", 128, [label] * clips + [0] * (16 - clips))) for clips in range(17)]
    assert passes == [0 < clips <= most for clips in range(17)]


def test_sparse_is_for_long_videos():
    assert not is_sparse(labelled("v", 63, [5, *[0] * 7]))
    assert is_sparse(labelled("v", 64, [5, *[0] * 7]))
    assert is_sparse(labelled("v", 65, [*[0] * 8, 5]))  # one frame in the last clip
    with pytest.raises(ValueError, match="relevance must be known"):
        is_sparse(Question("v", Path("v"), "Q?"))


def test_split():
    sparse, level = [5, *[0] * 7], [1] * 8
    questions = [
        labelled(f"{video}", 64, labels, answer="x")
        for video in range(10)
        for labels in (sparse, level, [5] * 6 + [0] * 2)
    ]
    questions += [labelled("unanswered", 64, sparse), labelled("3", 64, sparse)]
    found = split(questions, 0.3, seed=1)
    parts = {name: {one.video for one in getattr(found, name)} for name in ("train", "sparse", "dense")}
    assert len(parts["sparse"]) == 7
    assert parts["sparse"] == parts["dense"]
    assert not parts["train"] & parts["sparse"]
    assert Path("/v/unanswered.mp4") in parts["train"]
    assert all(one.tells_clips_apart for one in found.train)
    assert len(found.sparse) == 7
    assert len(found.dense) == 14
    assert sum(map(len, (found.train, found.sparse, found.dense, found.unused))) == len(questions)
    assert split(questions, 0.3, seed=1) == found
    assert split(questions, 0.3, seed=2) != found
    assert split(questions[::-1], 0.3, seed=1).sparse == found.sparse[::-1]
    with pytest.raises(ValueError, match="share must be in"):
        split(questions, 2)
    with pytest.raises(ValueError, match="got 1 without: 'q'"):
        split([Question("q", Path("v"), "Q?")])


# ---- replies

CLIPS = [(0.0, 8.0), (8.0, 16.0), (16.0, 20.25)]
GOOD = '{"[0, 8]": 0, "[8, 16]": 5, "[16, 20.2]": 2}'


@pytest.mark.parametrize(
    "reply",
    [
        GOOD, f"```json\n{GOOD}\n```", f"\n```\n{GOOD}\n```\n", f"<think>[0, 8] is 3?\n{{}}</think>\n{GOOD}",
        '{"[8.0,16]": 5, "[ 0 , 8 ]": 0, "[16, 20.2]": 2}',
    ],
)  # fmt: skip
def test_scores_are_read(reply):
    assert score_parser(CLIPS)(reply) == [0, 5, 2]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("", "one JSON object and nothing else"),
        (f"Sure! {GOOD}", "one JSON object and nothing else"),
        (f"{GOOD} I hope this helps", "one JSON object and nothing else"),
        (GOOD[:-8], "one JSON object and nothing else"),
        ("[0, 5, 2]", "one flat JSON object"),
        ("null", "one flat JSON object"),
        ('{"scores": {"[0, 8]": 0}}', "one flat JSON object"),
        ('{"[0, 8]": 0, "[8, 16]": 5}', r"all 3 clips must be there, \[16, 20.2\] is missing"),
        (GOOD.replace("[16, 20.2]", "[16, 21]"), r"the times of a clip, such as \[0, 8\], got '\[16, 21\]'"),
        (GOOD.replace("[16, 20.2]", "1.2.3"), "the times of a clip"),
        (GOOD.replace("[16, 20.2]", "[1.2.3, 4]"), "the times of a clip"),
        (GOOD.replace("}", ', "[0, 8]": 1}'), r"each clip must be there once, got \[0, 8\] again"),
        (GOOD.replace("5", "6"), "an integer from 0 to 5, got 6"),
        (GOOD.replace("5", "-1"), "an integer from 0 to 5, got -1"),
        (GOOD.replace("5", "4.5"), "an integer from 0 to 5, got 4.5"),
        (GOOD.replace("5", "true"), "an integer from 0 to 5, got True"),
        (GOOD.replace("5", '"5"'), "an integer from 0 to 5, got '5'"),
        (GOOD.replace("5", "null"), "an integer from 0 to 5, got None"),
        (GOOD.replace("5", "NaN"), "an integer from 0 to 5, got nan"),
        (GOOD.replace("5", "[5]"), "an integer from 0 to 5"),
    ],
)  # fmt: skip
def test_scores_that_are_refused(reply, message):
    with pytest.raises(ReplyError, match=message):
        score_parser(CLIPS)(reply)


def test_the_segments_of_a_prompt_are_those_that_are_read():
    for frames, seconds in ((1, 0.3), (9, 9.04), (128, 3600.0), (128, 131.7), (43, 43.27)):
        clips = clip_seconds(frames, seconds)
        prompt = scoring_prompt(Question("q", Path("v"), "Q?", ("x", "y")), ["a\nb"] * len(clips), clips)
        segments = [line.split(": ")[0] for line in prompt.splitlines() if line.endswith(": a b")]
        assert len(segments) == len(clips)
        assert score_parser(clips)(json.dumps(dict.fromkeys(segments, 1))) == [1] * len(clips)
        assert "- x\n- y" in prompt


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0c"])
def test_ends_of_lines_within_a_text_come_back(tmp_path, end):
    question = Question("a", Path("/v/a.mp4"), f"One{end}two?", answer="3")
    write_questions(tmp_path / "q.jsonl", [question])
    assert [one.question for one in read_questions([tmp_path / "q.jsonl"])] == [f"One{end}two?"]


def test_thoughts_are_no_caption():
    for thoughts in ("<think>Hm.</think>", "Hm, a template may have opened these.\n</think>\n\n"):
        assert parse_caption(f"{thoughts}A man walks.") == "A man walks."


def test_a_model_that_labels_need_not_be_reducible(monkeypatch):
    def refuses(*_: Any) -> None:
        raise TypeError("reduce: layer 0 of the decoder must be built as ...")

    monkeypatch.setattr("fftriton.runtime.target.reduce", refuses)
    with pytest.raises(TypeError):
        Target(str(MODEL), "cpu").load_model()
    assert models._load_model.__wrapped__(Target(str(MODEL), "cpu")).device.type == "cpu"


def test_no_call_begins_after_an_interruption(needles, tmp_path):
    calls = []

    def slow(*_: Any) -> str:
        calls.append(1)
        raise KeyboardInterrupt

    labeller = Labeller(Cache(tmp_path / "cache"), Model("slow", slow), Model("slow", slow))
    with pytest.raises(KeyboardInterrupt):
        labeller.label(needles[1], no_progress)
    assert len(calls) == 1
    with pytest.raises(InterruptedError):
        labeller._call(Model("slow", slow), "x")


def test_other_replies():
    assert parse_caption("<think>hm</think> A man runs. ") == "A man runs."
    with pytest.raises(ReplyError, match="must not be empty"):
        parse_caption("<think>hm</think>\n")
    parse = query_parser(lambda text: len(text.split()))
    assert parse(" who runs, a man or a dog ") == "who runs, a man or a dog"
    for reply in ("", "Here it is:\nwho runs"):
        with pytest.raises(ReplyError, match="must be one line"):
            parse(reply)
    with pytest.raises(ReplyError, match="at most 64 tokens, got 65"):
        parse("word " * 65)


# ---- endpoints

TROUBLE: list[Reply] = [
    (429, {"Retry-After": "0"}, b"slow down"), (500, {}, b""), (503, {}, b"loading"), (200, {}, b"<html>nonsense"),
    (200, {}, b'{"error": "none"}'), (200, {}, b'{"choices": []}'), chat(None), chat("  "), chat(["x"]), None, 0.5,
    (200, {"Content-Length": "900"}, b'{"choices"'),
]  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLE, ids=str)
def test_trouble_is_tried_again(trouble):
    with endpoint(lambda body, number: trouble if number < 3 else chat("fine")) as (url, requests):
        assert Endpoint(url, "m", "secret", timeout=0.2, pause=0.01)("hello") == "fine"
    assert len(requests) == 3
    assert requests[0] == {
        "model": "m", "messages": [{"role": "user", "content": "hello"}], "temperature": 0,
        "path": "/v1/chat/completions", "key": "Bearer secret",
    }  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLE[:5], ids=str)
def test_trouble_that_stays_is_reported(trouble):
    with endpoint(lambda body, number: trouble) as (url, requests):
        with pytest.raises(EndpointError, match="gave no usable reply in 3 attempts"):
            Endpoint(url, "m", attempts=3, pause=0.01)("hello")
    assert len(requests) == 3
    assert requests[0]["key"] is None


def test_requests_that_nobody_would_answer():
    """An address, a key or a model that is wrong ends everything; a request that is too long ends itself."""
    for status, kind in ((401, RefusedError), (403, RefusedError), (404, RefusedError), (400, EndpointError)):
        with endpoint(lambda body, number, status=status: (status, {}, b"why")) as (url, requests):
            with pytest.raises(kind, match=f"HTTP {status} .*why"):
                Endpoint(url, "m", pause=0.01)("hello")
        assert len(requests) == 1
    with endpoint(lambda body, number: chat("half of", finish_reason="length")) as (url, requests):
        with pytest.raises(EndpointError, match="cut off at its maximum length"):
            Endpoint(url, "m", pause=0.01)("hello")
    with pytest.raises(EndpointError, match="gave no usable reply in 2 attempts: URLError"):
        Endpoint("http://127.0.0.1:9", "m", attempts=2, pause=0.01)("hello")


def test_a_key_is_not_sent_elsewhere():
    with endpoint(lambda body, number: chat("stolen")) as (elsewhere, stolen):
        for status in (301, 302, 303, 307, 308):
            place = {"Location": f"{elsewhere}/chat/completions"}
            with endpoint(lambda body, number, status=status, place=place: (status, place, b"")) as (url, _):
                with pytest.raises(RefusedError, match=f"HTTP {status}"):
                    Endpoint(url, "m", "secret", pause=0.01)("hello")
    assert stolen == []


def test_the_pause_that_is_asked_for(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr("fftriton.labels.endpoint.time.sleep", pauses.append)
    date = "Wed, 21 Oct 2015 07:28:00 GMT"  # over
    asked = iter(["7", date, "100000", "soon"])
    with endpoint(lambda body, number: (429, {"Retry-After": next(asked)}, b"")) as (url, _):
        with pytest.raises(EndpointError):
            Endpoint(url, "m", attempts=5, pause=1.0)("hello")
    assert pauses[:3] == [7, 0, 120]
    assert 6 <= pauses[3] <= 10


# ---- labelling


@pytest.fixture(scope="module")
def needles(tmp_path_factory):
    """Two videos of 72 and 20 seconds, one frame a second; and a question about the digit in each."""
    folder, questions = tmp_path_factory.mktemp("needles"), []
    for index, seconds in enumerate((72, 20)):
        sample = generate_sample("easy", 0, index)
        frames = np.repeat(sample.frames[:1], seconds, 0)
        frames[8:16] = sample.frames[::2]
        write_video(folder / f"{index}.mp4", frames, 1, crf=1)
        questions.append(Question(f"q{index}", folder / f"{index}.mp4", sample.question, answer=sample.answer))
    write_questions(folder / "questions.jsonl", questions)
    return folder, questions


def no_progress(done: int, total: int) -> None:
    pass


def scripted(*replies: str) -> Model:
    left = iter(replies)
    return Model("scripted", lambda *arguments: next(left))


def captioner() -> Model:
    return Model("means", lambda frames, prompt: f"mean {frames.mean():.3f} of {len(frames)}")


def scores(*values: int, seconds: int = 20) -> str:
    clips = [[low, min(low + 8, seconds)] for low in range(0, seconds, 8)]
    return json.dumps({str(clip): value for clip, value in zip(clips, values, strict=True)})


def test_every_clip_is_captioned_once(needles, tmp_path):
    _, questions = needles
    calls: list[tuple[int, ...]] = []

    def caption(frames, prompt):
        calls.append(frames.shape)
        assert prompt == prompts.CAPTION
        return "a box"

    two = [questions[1], Question("other", questions[1].video, "What else?", ("x", "y"), "A")]
    asked: list[str] = []

    def score(prompt):
        asked.append(prompt)
        return scores(0, 5, 1)

    labeller = Labeller(Cache(tmp_path / "c"), Model("a", caption), Model("b", score))
    found, failures = labeller.label(two, no_progress)
    assert not failures
    assert calls == [(8, 64, 64, 3), (8, 64, 64, 3), (4, 64, 64, 3)]
    assert [(one.id, one.frames, one.relevance, one.query) for one in found] == [
        ("q1", 20, (0, 5, 1), None), ("other", 20, (0, 5, 1), None),
    ]  # fmt: skip
    assert "What else?\n- x\n- y" in asked[1]
    assert "[16, 20]: a box" in asked[0]
    again = Labeller(Cache(tmp_path / "c"), Model("a", None), Model("b", None)).label(two, no_progress)
    assert again == (found, [])
    for other in ({"captioner": Model("c", caption)}, {"caption": "Which?"}):
        with pytest.raises(TypeError):  # other captions would be needed, and None cannot make them
            arguments = {"captioner": Model("a", None), "scorer": Model("b", None)} | other
            arguments["captioner"] = Model(arguments["captioner"].identity, None)
            Labeller(Cache(tmp_path / "c"), **arguments).label(two, no_progress)


def test_interrupted_labelling_resumes(needles, tmp_path):
    """After an interruption at any call, no call that was answered is made again."""
    _, questions = needles
    made: list[str] = []

    def run(stop: int | None) -> Any:
        made.clear()

        def call(name: str, reply: str) -> str:
            if len(made) == stop:
                raise KeyboardInterrupt
            made.append(name)
            return reply

        labeller = Labeller(
            Cache(tmp_path / "c"),
            Model("a", lambda frames, prompt: call("caption", "x")),
            Model("b", lambda prompt: call("score", scores(0, 5, 1))),
            Model("r", lambda prompt: call("rewrite", "short")),
        )
        return labeller.label(questions[1:], no_progress)

    for _ in range(5):  # three captions, a score, and a short form
        with pytest.raises(KeyboardInterrupt):
            run(1) if (tmp_path / "c").exists() else run(0)
        with (tmp_path / "c").open("a") as file:
            file.write('{"key": "half of')  # cut off
    (found,), failures = run(None)
    assert made == ["rewrite"]
    assert (found.relevance, found.query, failures) == ((0, 5, 1), "short", [])
    run(0)
    for text, line in (("something else\n", 1), ('{"a": 1}', 1), ('{"key": "a", "value": 1}\n{"b": 2}', 2)):
        (tmp_path / "c").write_text(text)
        with pytest.raises(ValueError, match=f"cache must be a file that labelling wrote, got line {line}"):
            run(0)
        assert (tmp_path / "c").read_text() == text


def test_a_reply_that_cannot_be_read_is_asked_for_again(needles, tmp_path):
    _, questions = needles
    prompts_seen: list[str] = []

    def score(prompt):
        prompts_seen.append(prompt)
        return ["[16, 20] is best", scores(0, 5, 9), scores(0, 5, 4)][len(prompts_seen) - 1]

    labeller = Labeller(Cache(tmp_path / "c"), captioner(), Model("b", score))
    (found,), _ = labeller.label(questions[1:], no_progress)
    assert found.relevance == (0, 5, 4)
    assert "could not be used: a reply must be one JSON object" in prompts_seen[1]
    assert "could not be used: a score must be an integer from 0 to 5, got 9" in prompts_seen[2]


def test_failures_are_reported_and_never_labelled(needles, tmp_path):
    folder, questions = needles
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    others = [
        Question("broken", tmp_path / "broken.mp4", "Q?"), Question("missing", tmp_path / "missing.mp4", "Q?"),
        questions[1],
    ]  # fmt: skip
    labeller = Labeller(Cache(tmp_path / "c"), captioner(), scripted("no", "no", "I cannot tell"))
    found, failures = labeller.label(others, no_progress)
    assert found == []
    assert [one.question.id for one in failures] == ["broken", "missing", "q1"]
    assert "none of 3 replies can be used, the last because a reply must be one JSON object" in failures[2].reason
    found, failures = Labeller(Cache(tmp_path / "c"), captioner(), scripted(scores(1, 0, 0))).label(others, no_progress)
    assert [one.id for one in found] == ["q1"]  # asked again
    with pytest.raises(ValueError, match="scorer must be given for questions without relevance, got None and 'q1'"):
        Labeller(Cache(tmp_path / "c"), captioner(), None).label(questions[1:], no_progress)
    kept = labelled("l", 8, [3])
    found, _ = Labeller(Cache(tmp_path / "c"), None, None, scripted("short")).label([kept], no_progress)
    assert (found[0].relevance, found[0].query) == ((3,), "short")


def test_the_command_with_the_shipped_model_and_an_endpoint(needles, tmp_path, monkeypatch):
    """The shipped model reads the digits of each clip; a scripted scorer finds the one that is asked for."""
    folder, questions = needles
    processor, model = load_processor(MODEL), Target(str(MODEL)).load_model()
    ask = "Which digit is on the red box?"

    def score(body: dict[str, Any], number: int) -> Reply:
        if number == 1:
            return 429, {"Retry-After": "0"}, b""
        prompt = body["messages"][0]["content"]
        if prompt.startswith("A search engine"):
            return chat("digit on a box")
        captions = dict(line.split(": ") for line in prompt.splitlines() if line.startswith("["))
        return chat(json.dumps({clip: 5 * (caption == seen[0]) for clip, caption in captions.items()}))

    frames = [labelling.Clips(question.video).video.frames for question in questions]
    expected = [
        [models._generate(model, processor_inputs(processor, part[low : low + 8], ask, model), processor.tokenizer, 5)
         for low in range(0, len(part), 8)]
        for part in frames
    ]  # fmt: skip
    seen = [expected[0][1]]
    monkeypatch.setenv("OWN_KEY", "secret")
    with endpoint(score) as (url, requests):
        arguments = [
            "label", folder / "questions.jsonl", "--out", tmp_path / "out.jsonl", "--captioner", MODEL, "--scorer",
            f"own@{url}", "--rewriter", f"own@{url}", "--caption-prompt", ask, "--api-key", "OWN_KEY", "--parameters",
            '{"top_p": 0.5}', "--workers", "2",
        ]  # fmt: skip
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
        count = len(requests)
        assert invoke(*arguments).exit_code == 0
    assert (count, len(requests)) == (5, 5)
    assert (requests[0]["top_p"], requests[0]["key"], requests[0]["model"]) == (0.5, "Bearer secret", "own")
    found = read_questions([tmp_path / "out.jsonl"])
    for question, captions in zip(found, expected, strict=True):
        assert question.relevance == tuple(5 * (caption == seen[0]) for caption in captions)
        assert question.query == "digit on a box"
    assert found[0].frames == 72
    triple = read_triples(tmp_path / "out.jsonl")[0]
    assert (triple.question, triple.num_frames, triple.relevance) == ("digit on a box", 72, found[0].relevance)
    assert np.array_equal(triple.frames(8), frames[0])  # those that were captioned
    assert FileTask(tmp_path / "out.jsonl").sample(0).sampling.frames == 72
    assert not (tmp_path / "out.jsonl.failed").exists()


def processor_inputs(processor: Any, frames: np.ndarray, question: str, model: Any) -> Any:
    video = models.Video(frames, list(range(len(frames))), len(frames), fps=1.0)
    return models.to_model(processor(video, question), model)


def test_a_scorer_that_cannot_score(needles, tmp_path):
    """Checkpoints are run for real: one that only answers with digits, and one with random weights."""
    folder, _ = needles
    words = [*"abcdefgh", "score", "clip"]
    tokenizer = word_tokenizer(words, 512)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "language")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Qwen2Config(**size, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=1024)
    language = Qwen2ForCausalLM(config)
    language.generation_config.max_new_tokens = 4
    language.save_pretrained(tmp_path / "language")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "language")  # of the class that the checkpoint's kind has
    ids = loaded("score clip", add_special_tokens=False, return_tensors="pt")["input_ids"]
    tokens = language.eval().generate(ids, do_sample=False)[0, ids.shape[1] :]
    reply = loaded.decode(tokens, skip_special_tokens=True)
    assert make_reader("scorer", str(tmp_path / "language"), Settings()).call("score clip") == reply.strip()
    for scorer in (tmp_path / "language", MODEL):
        out = tmp_path / f"{scorer.name}.jsonl"
        result = invoke("label", folder / "questions.jsonl", "--out", out, "--captioner", MODEL, "--scorer", scorer)
        assert result.exit_code == 1, result.output
        assert "0 questions labelled" in result.output
        assert "2 failed" in result.output
        failed = [json.loads(line) for line in (tmp_path / f"{out.name}.failed").read_text().splitlines()]
        assert [one["id"] for one in failed] == ["q0", "q1"]
        assert "none of 3 replies can be used" in failed[0]["error"]
        assert out.read_text() == ""


def test_questions_are_not_overwritten(needles, tmp_path):
    """A question that fails has no line in the output, and would be lost."""
    folder, _ = needles
    before = (folder / "questions.jsonl").read_text()
    result = invoke("label", folder / "questions.jsonl", "--out", folder / "." / "questions.jsonl")
    assert result.exit_code == 2
    assert "out must be another file than the questions" in result.output
    assert (folder / "questions.jsonl").read_text() == before
    result = invoke("label", folder / "questions.jsonl", "--out", "/proc/self/out.jsonl", "--cache", tmp_path / "c")
    assert result.exit_code == 2
    assert "out must be a folder that can be written" in result.output


def test_callables(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(
        "def caption(frames, prompt):\n    return f'{len(frames)} frames'\n\ndef bad(prompt):\n    return 5\n\nx = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    captions = make_captioner("own_models:caption", Settings())
    assert captions.call(np.zeros((3, 2, 2, 3), np.uint8), "p") == "3 frames"
    with pytest.raises(TypeError, match="scorer must return a text, got 5"):
        make_reader("scorer", "own_models:bad", Settings()).call("p")
    for name, message in (
        ("own_models:x", "scorer must be a function"), ("http://localhost/v1", "scorer must be MODEL@URL"),
        ("m@ftp://localhost/v1", "scorer must be MODEL@URL"), (str(tmp_path), "model must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make_reader("scorer", name, Settings())


def test_pictures_for_an_endpoint():
    frames = np.full((2, 900, 1600, 3), 77, np.uint8)
    with endpoint(lambda body, number: chat("grey")) as (url, requests):
        assert make_captioner(f"m@{url}", Settings()).call(frames, "What?") == "grey"
    *pictures, text = requests[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": "What?"}
    assert len(pictures) == 2
    assert all(part["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/") for part in pictures)


def test_videos_are_labelled_side_by_side(needles, tmp_path):
    """With endpoints only; a refusal ends all of it."""
    _, questions = needles
    together = threading.Barrier(2, timeout=20)

    def score(prompt):
        together.wait()
        return json.dumps(
            dict.fromkeys([line.split(": ")[0] for line in prompt.splitlines() if line.startswith("[")], 0)
        )

    models_ = Model("a", lambda frames, prompt: "x", True), Model("b", score, True)
    found, failures = Labeller(Cache(tmp_path / "c"), *models_).label(questions, no_progress, workers=2)
    assert ([one.id for one in found], failures) == (["q0", "q1"], [])

    def refuse(prompt):
        raise RefusedError("wrong key")

    with pytest.raises(RefusedError, match="wrong key"):
        Labeller(Cache(tmp_path / "d"), models_[0], Model("b", refuse, True)).label(questions, no_progress, workers=2)
