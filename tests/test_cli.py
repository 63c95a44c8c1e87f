"""`fftriton run`: right answers, honest figures, and bad input refused before the model is loaded."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import rope
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from typer.testing import CliRunner

import fftriton.app.cli
import fftriton.app.run
from bench.kvtp.needle import WORDS
from bench.kvtp.small import small_siglip
from fftriton.app.display import summarise_layers
from fftriton.app.request import Options, choose_clips, prepare
from fftriton.runtime.answers import is_right
from fftriton.runtime.shipped import BUNNY, MODEL, NEEDLE
from fftriton.runtime.target import Target

av = pytest.importorskip("av")


@pytest.fixture(autouse=True)
def single_repeat(monkeypatch):
    monkeypatch.setattr(fftriton.app.run, "_REPEATS", 1)


@pytest.fixture
def no_model(monkeypatch):
    """Any attempt to load a model fails the test."""

    def load_model(target):
        pytest.fail("the model was loaded before the input was refused")

    monkeypatch.setattr(Target, "load_model", load_model)


def invoke(*arguments: object):
    return CliRunner().invoke(fftriton.app.cli.app, ["run", *map(str, arguments)])


def lines(output: str) -> str:
    """The output with its table's lines unwrapped into single spaces."""
    return " ".join(output.split())


def write_video(path: Path, num_frames: int) -> Path:
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=8, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(num_frames):
            image = np.full((48, 64, 3), 20 * level % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_demo(tmp_path):
    """Without arguments: both clips, dense and reduced, answer right or said to be meaningless, everything drawn."""
    result = invoke("--out", tmp_path)
    assert result.exit_code == 0, result.output
    output = lines(result.output)
    assert "3 (right)" in output
    assert "wrong" not in output
    assert "cannot describe this video" in output
    for row in ("budget asked", "budget achieved", "prefill", "decode", "peak memory", "faster"):
        assert row in output
    report = json.loads((tmp_path / "report.json").read_text())
    assert [clip["video"] for clip in report["clips"]] == ["needle.mp4", "bunny.mp4"]
    needle, bunny = report["clips"]
    assert needle["dense"]["answer"] == needle["reduced"]["answer"] == needle["right_answer"] == "3"
    assert needle["dense"]["vision_tokens_per_layer"] == [256] * 8
    assert bunny["dense"]["vision_tokens_per_layer"] == [3520] * 8
    assert "same answer" in output
    assert needle["agreement"]["same"]
    assert bunny["agreement"]["same"] == (bunny["dense"]["answer"] == bunny["reduced"]["answer"])
    assert 0.9 < needle["agreement"]["overlap"] <= 1
    assert f"overlap {100 * bunny['agreement']['overlap']:.1f} %" in output
    for clip in report["clips"]:
        assert abs(clip["budget_achieved"] - 0.3) < 0.005
        for name in clip["pictures"]:
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["framefusion", "fastv", "keep-all"])
def test_methods_answer_the_needle(tmp_path, method):
    result = invoke("--question", NEEDLE.question, "--method", method, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (clip,) = json.loads((tmp_path / "report.json").read_text())["clips"]
    assert clip["reduced"]["answer"] == "3"
    assert clip["budget"] == (1.0 if method == "keep-all" else 0.3)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("When does the red box appear?", "third quarter"),
        ("Where is the red box?", "top right"),
        ("How many boxes appear?", "one"),
        ("Which color is the box with the digit 3?", "red"),
    ],
)
def test_other_questions_at_30_percent(tmp_path, question, answer):
    result = invoke("--video", NEEDLE.path, "--question", question, "--out", tmp_path, "--no-compare")
    assert result.exit_code == 0, result.output
    (clip,) = json.loads((tmp_path / "report.json").read_text())["clips"]
    assert clip["reduced"]["answer"] == answer
    assert clip["dense"] is None


def test_kvtp_takes_its_budgets_from_a_predictor(tmp_path):
    predictor = small_siglip(WORDS, side=64, patch=16, width=16, depth=1)
    predictor.save_pretrained(tmp_path / "siglip")
    arguments = ["--method", "kvtp", "--relevance", tmp_path / "siglip", "--video", NEEDLE.path]
    result = invoke(*arguments, "--out", tmp_path / "out", "--no-compare")
    assert result.exit_code == 0, result.output
    assert "KVTP" in result.output
    assert re.search(r"of which relevance\D+[\d.]+ ms, [\d.e-]+ GMACs", result.output)
    assert "because it knows no relevance" not in result.output
    (clip,) = json.loads((tmp_path / "out" / "report.json").read_text())["clips"]
    (scored,), (counts,) = clip["relevance"], clip["tokens_of_frames"]
    assert len(scored["scores"]) == len(counts) == clip["frames"]
    assert sum(counts) == round(0.3 * clip["vision_tokens"])
    assert scored["macs"] > 0
    reduced = clip["reduced"]
    assert reduced["seconds_to_first_token"] == pytest.approx(reduced["seconds_prefill"] + scored["seconds"])
    options = Options(method="kvtp", relevance=str(tmp_path / "siglip"), video=NEEDLE.path, out=tmp_path / "out")
    (job,) = prepare(options, lambda _: nullcontext(lambda done, total: None))
    expected = predictor(job.video.frames, job.clip.question)
    torch.testing.assert_close(job.method.relevance.scores, expected)


@pytest.mark.parametrize(
    ("method", "printed"),
    [
        ("kvtp", "because it knows no relevance. Give --relevance the checkpoint of a SigLIP, or take"),
        ("kvtp:pruner=tome:temperature=1 + framefusion", "because it knows no relevance"),
        ("kvtp:relevance=attention(tokens=2)", r"of which relevance\D+[\d.e-]+ GMACs"),
        ("kvtp:pruner=tome(means=plain):relevance=attention + framefusion:start_layer=1", "score of each frame"),
    ],
)
def test_kvtp_without_a_predictor(tmp_path, method, printed):
    result = invoke("--method", method, "--video", NEEDLE.path, "--out", tmp_path, "--no-compare", "--budget", "0.2")
    assert result.exit_code == 0, result.output
    assert re.search(printed, " ".join(result.output.split()))
    assert ("no relevance" in result.output) != ("attention" in method)


def test_a_budget_below_the_floor_of_kvtp_is_met_as_closely_as_possible(tmp_path):
    result = invoke("--method", "kvtp", "--video", NEEDLE.path, "--out", tmp_path, "--no-compare", "--budget", "0.05")
    assert result.exit_code == 0, result.output
    assert "No budget below 6.2% can be met" in result.output


def test_a_predictor_may_be_named_in_the_method(tmp_path):
    small_siglip(WORDS, side=64, patch=16, width=16, depth=1).save_pretrained(tmp_path / "siglip")
    named = Options(method=f"kvtp:relevance='{tmp_path / 'siglip'}'", video=NEEDLE.path, out=tmp_path / "out")
    given = replace(named, method="kvtp", relevance=str(tmp_path / "siglip"))
    (first,), (second,) = (
        prepare(options, lambda _: nullcontext(lambda done, total: None)) for options in (named, given)
    )
    torch.testing.assert_close(first.method.relevance.scores, second.method.relevance.scores)
    with pytest.raises(ValueError, match="relevance must be given once, got 'x' and method"):
        replace(named, relevance="x")
    with pytest.raises(ValueError, match="must be told the question that is asked"):
        replace(named, method=named.method + ":question=unrelated")


def test_dtype_and_attention_are_those_of_the_model(tmp_path, monkeypatch):
    load, models = Target.load_model, []
    monkeypatch.setattr(Target, "load_model", lambda target: models.append(load(target)) or models[-1])
    result = invoke("--video", NEEDLE.path, "--dtype", "bfloat16", "--attention", "eager", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (model,) = models
    assert (model.dtype, model.config.get_text_config()._attn_implementation) == (torch.bfloat16, "eager")


def test_unknown_words_are_named(tmp_path):
    result = invoke("--question", "Which llama is on the red box?", "--out", tmp_path, "--no-compare")
    assert result.exit_code == 0, result.output
    assert "vocabulary does not contain 'Which', 'llama'" in lines(result.output)


def test_video_of_one_frame(tmp_path):
    video = write_video(tmp_path / "one.mp4", 1)
    result = invoke("--video", video, "--compare", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "1 of 1 frames" in lines(result.output)
    assert (tmp_path / "out" / "one-merges.png").exists()


def test_other_checkpoints_take_the_same_path(tmp_path):
    """A small random Qwen2.5-VL with pairs of frames and squares of four patches to a token."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
            "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 6, "pad_token_id": 0,
            **rope(rope_theta=10000.0, mrope_section=[2, 3, 3]),
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 8, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 32,
            "fullatt_block_indexes": [1], "tokens_per_second": 2,
        },
        image_token_id=7, video_token_id=8, vision_start_token_id=3, vision_end_token_id=4,
        bos_token_id=1, eos_token_id=6, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tmp_path / "model"
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, model)
    pixels = json.loads((MODEL / "preprocessor_config.json").read_text())
    pixels |= {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2, "processor_class": "Qwen2_5_VLProcessor"}
    (model / "preprocessor_config.json").write_text(json.dumps(pixels))

    video = write_video(tmp_path / "video.mp4", 9)
    result = invoke(
        "--model", model, "--video", video, "--question", "what red", "--frames", 7, "--max-pixels", 3072,
        "--max-new-tokens", 3, "--budget", 0.5, "--compare", "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "trained on digits" not in lines(result.output)
    (clip,) = json.loads((tmp_path / "out" / "report.json").read_text())["clips"]
    assert clip["dense"]["vision_tokens_per_layer"] == [4 * 3 * 4] * 4
    assert clip["budget_achieved"] <= 0.5 + 1 / 48


BUDGETS = {
    "0": "budget must be in (0, 1], got 0",
    "-1": "budget must be in (0, 1], got -1",
    "1.5": "budget must be in (0, 1], got 1.5",
    "nan": "budget must be in (0, 1], got nan",
    "a": "budget must be a number in (0, 1], got 'a'",
}


@pytest.mark.parametrize("method", ["framefusion", "fastv", "keep-all"])
@pytest.mark.parametrize("value", BUDGETS)
def test_bad_budgets_are_refused(no_model, method, value):
    result = invoke("--method", method, "--budget", value)
    assert result.exit_code == 2
    assert BUDGETS[value] in result.output
    assert "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_budget_under_what_the_method_can_reach_is_refused(no_model, tmp_path):
    result = invoke("--method", "fastv", "--budget", "0.2", "--out", tmp_path)
    assert result.exit_code == 2
    assert "FastV: budget must be above layer / num_layers = 2/8" in result.output


def test_bad_videos_are_refused(no_model, tmp_path):
    data = write_video(tmp_path / "whole.mp4", 40).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video")
    rules = {
        "missing.mp4": "video must be a file that exists",
        "empty.mp4": "video must not be empty",
        "text.mp4": "video must be a video file",
        "cut.mp4": "video must be whole",
    }
    for name, rule in rules.items():
        result = invoke("--video", tmp_path / name)
        assert result.exit_code == 2, name
        assert rule in result.output
        assert name in result.output
        assert "Error: " in result.output
        assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "slowv"], "method must be one of 'keep-all', 'framefusion'"),
        (["--frames", "0"], "frames must be at least 1, got 0"),
        (["--max-pixels", "0"], "max_pixels must be at least 1, got 0"),
        (["--max-new-tokens", "-3"], "max_new_tokens must be at least 1, got -3"),
        (["--device", "toaster"], "device must be one that torch can use here, got 'toaster'"),
        (["--dtype", "int8"], "dtype must be one of 'float32', 'bfloat16', 'float16', got 'int8'"),
        (["--device", "meta"], "device must be one that torch can use here, got 'meta'"),
        (["--out", str(NEEDLE.path)], "out must be a folder that can be written, got"),
        (["--relevance", "siglip"], "relevance must go with method kvtp, got method 'framefusion'"),
        (["--method", "kvtp", "--relevance", str(NEEDLE.path.parent)], "relevance must be the checkpoint of a SigLIP"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_options_are_refused(no_model, arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_folder_that_cannot_be_made_is_refused(no_model, tmp_path):
    (tmp_path / "file").touch()
    result = invoke("--out", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert "out must be a folder that can be written" in result.output


def test_folders_without_a_model_are_refused(no_model, tmp_path):
    result = invoke("--model", tmp_path)
    assert result.exit_code == 2
    assert "model must be the folder or the hub name of a video language model" in result.output
    assert str(tmp_path) in result.output


def test_models_that_see_no_video_are_refused(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "num_hidden_layers": 4}))
    result = invoke("--model", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "Error: model must " in result.output
    assert not (tmp_path / "out").exists()


def test_clips():
    both = choose_clips(Options())
    assert [(clip.path, clip.answer, clip.max_pixels) for clip in both] == [
        (NEEDLE.path, "3", None),
        (BUNNY.path, None, 320 * 176),
    ]
    (asked,) = choose_clips(Options(question="Where is the red box?"))
    assert (asked.path, asked.answer) == (NEEDLE.path, None)
    other_model = choose_clips(Options(Target("some/model")))
    assert [clip.question for clip in other_model] == [NEEDLE.question, "Describe this video."]
    assert [clip.max_pixels for clip in other_model] == [None, None]
    (own,) = choose_clips(Options(video=Path("x.mp4"), max_pixels=5))
    assert (own.path, own.max_pixels) == (Path("x.mp4"), 5)


def test_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Target().threads == 1
    assert Target("some/model").threads == torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert Target().threads == torch.get_num_threads()


def test_is_right():
    assert is_right("3", "3")
    assert is_right("The digit on the red box is 3.", "3")
    assert not is_right("13", "3")
    assert is_right("In the Top Left corner", "top left")
    assert not is_right("A catalogue", "cat")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("It is 50%.", "50%"), ("$5", "$5"), ("C++ is on the screen", "c++"), ("He cooks", "He cooks."), ("-3", "-3"),
     ("A dog.", "a dog!"), ("3.", "3"), ("3, then 4", "3"),
     ("\u8fd9\u662f\u7ea2\u8272\u7684", "\u7ea2\u8272"), ("what?", "?"),
     ("US$5", "$5"), ("\ube68\uac04\uc0c9\uc785\ub2c8\ub2e4", "\ube68\uac04\uc0c9"), (" red ", "red ")],
)  # fmt: skip
def test_texts_with_other_signs_than_letters_are_right(answer, expected):
    assert is_right(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("3.5", "3"), ("3.5", "5"), ("1,000", "1"), ("50%", "5"), ("$50", "$5"), ("C", "C++"), ("He cooksx", "He cooks.")],
)
def test_parts_of_words_and_numbers_are_wrong(answer, expected):
    assert not is_right(answer, expected)


def test_layers_are_summarised_in_runs():
    assert summarise_layers([9]) == "0: 9"
    assert summarise_layers([9, 9, 5, 2, 2]) == "0-1: 9, 2: 5, 3-4: 2"


def test_brackets_are_printed_as_they_are(tmp_path):
    """As yt-dlp names its files; rich takes some for markup, and fails at others."""
    video = write_video(tmp_path / "Bunny [aqz-KE].mp4", 8)
    result = invoke("--video", video, "--question", "Where [/x] [bold]is it?", "--out", tmp_path / "out[a]")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'out[a]'}/Bunny [aqz-KE]-" in result.output
    assert "Where [/x] [bold]is it?" in result.output


def test_several_videos_and_questions(tmp_path):
    """Two files of one name: each job has pictures of its own, and the report says all that repeats the run."""
    videos = []
    for number, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        videos.append(write_video(tmp_path / folder / "x.mp4", 9 + number))
    questions = ["--question", "How many boxes appear?", "--question", "Where is the red box?"]
    arguments = ["--video", videos[0], "--video", videos[1], *questions, "--fps", 4, "--max-frames", 3]
    result = invoke(*arguments, "--out", tmp_path / "out", "--method", "framefusion:similarity_threshold=0.9")
    assert result.exit_code == 0, result.output
    assert "report.json: written" in lines(result.output).replace(" report", "report")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    asked = [(clip["path"], clip["question"]) for clip in report["clips"]]
    assert asked == [(str(video), question) for video in videos for question in questions[1::2]]
    pictures = [name for clip in report["clips"] for name in clip["pictures"]]
    assert len(set(pictures)) == 8
    assert all((tmp_path / "out" / name).exists() for name in pictures)
    assert report["clips"][0]["frame_numbers"] == [0, 3, 6]
    assert report["clips"][0]["frame_seconds"] == [0, 3 / 8, 6 / 8]
    assert report["sampling"] == {
        "frames": None, "fps": 4.0, "min_frames": None, "max_frames": 3, "start": None, "end": None,
    }  # fmt: skip
    assert report["parameters"]["similarity_threshold"] == 0.9
    assert (report["dtype"], report["budget"]) == ("float32", 0.3)
    assert report.keys() >= {"fftriton", "commit", "torch", "transformers", "command", "attention", "max_new_tokens"}
    again = invoke("--video", videos[0], "--out", tmp_path / "out")
    assert "replaced that of an earlier run" in lines(again.output)


def test_part_of_a_video(tmp_path):
    video = write_video(tmp_path / "video.mp4", 40)
    result = invoke("--video", video, "--frames", 4, "--start", 1, "--end", 3, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (clip,) = json.loads((tmp_path / "out" / "report.json").read_text())["clips"]
    assert clip["frame_numbers"] == [10, 14, 18, 22]


def test_version():
    result = CliRunner().invoke(fftriton.app.cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"fftriton {fftriton.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "4", "--fps", "2"], "frames must go without fps, got 4 and 2.0"),
        (["--start", "5", "--end", "2"], "end must be after start, got 2.0 and 5.0"),
        (["--question", "<|video_pad|>"], "question must not contain '<|video_pad|>'"),
        (["--start", "500"], "start must be before the end of"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wishes_that_cannot_be_met_are_refused_in_one_line(tmp_path, arguments, message):
    result = invoke(*arguments, "--video", NEEDLE.path, "--out", tmp_path)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
