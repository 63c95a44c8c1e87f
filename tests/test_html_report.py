"""HTML reports: what stands in the file, whatever shows it; tests/browser opens it."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from report_pages import MERGES_AND_PRUNES, write_run_report
from transformers import Qwen2VLForConditionalGeneration
from typer.testing import CliRunner

import fftriton
from fftriton import VideoLayout
from fftriton.app.cli import app
from fftriton.app.report.strip import make_strip, states_at_threshold, states_of
from fftriton.evaluate.observing import Observed
from fftriton.runtime.processing import load_processor
from fftriton.runtime.shipped import MODEL, NEEDLE
from fftriton.runtime.target import Target
from fftriton.runtime.video import Video, read_video, write_video

MEBIBYTES = 5
HOSTILE = 'Is <b>this</b> </script><script>alert(1)</script> [red]bold[/red] & "quoted"?'


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    page, (result,) = write_run_report(tmp_path_factory.mktemp("run"), "--method", MERGES_AND_PRUNES)
    return page, result


def data_of(path: Path) -> dict:
    """What the first strip of a page gives its script."""
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', path.read_text(encoding="utf-8"))[1])


def decoded(script: dict) -> list[list[int]]:
    """The states of all layers, as the page's script makes them."""
    state = list(range(script["frames"] * script["rows"] * script["columns"]))
    states = []
    for patches, values in script["changes"]:
        for patch, value in zip(patches, values, strict=True):
            state[patch] = value
        states.append(list(state))
    return states


def test_a_page_says_what_was_found(made):
    path, result = made
    page = Page(path)
    assert NEEDLE.question in page.text
    assert f"the next-token distributions overlap by {100 * result.agreement.overlap:.1f} %" in page.text
    for way in (result.dense, result.reduced):
        assert f"{way.name} {way.answer}" in page.text
        assert f"{way.first_token * 1000:.1f} ms" in page.text
        assert f"{way.cost.peak_memory / 2**20:.1f} MiB" in page.text
    report = json.loads((path.parent / "report.json").read_text())
    for name in ("torch", "transformers", "device", "dtype", "date"):
        assert f"{name} {report[name]}" in page.text
    assert report["command"] in page.text
    (chart,) = [each for each in page.all("svg") if each.get("role") == "img"]
    assert str(result.reduced.report.vision_tokens_per_layer) in chart["aria-label"]
    bars = [
        float(each["style"].removeprefix("width: ").removesuffix("%")) for each in page.all("span") if "style" in each
    ]
    ways = (result.dense, result.reduced)
    figures = [[w.first_token for w in ways], [w.cost.decode for w in ways], [w.cost.peak_memory for w in ways]]
    assert bars == pytest.approx([100 * one / max(group) for group in figures for one in group], abs=0.051)


def test_a_page_needs_nothing_beside_it(made):
    path, _ = made
    page = Page(path)
    targets = [
        value for _, each in page.elements for name, value in each.items() if name in ("src", "href", "xlink:href")
    ]  # fmt: skip
    assert len(targets) > 16
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert not re.search(r"url\((?!#)|@import|\bfetch\b", path.read_text(encoding="utf-8"))
    (policy,) = [each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    ids = [each["id"] for _, each in page.elements if "id" in each]
    assert len(ids) == len(set(ids))


def test_the_script_gets_what_the_report_recorded(made):
    path, result = made
    script = data_of(path)
    report = result.reduced.report
    positions = report.layouts[0].positions.flatten()
    states = decoded(script)
    assert len(states) == len(report.kept_positions)
    for state, kept in zip(states, report.kept_positions, strict=True):
        shown = [int(positions[patch]) for patch, value in enumerate(state) if value == patch]
        assert shown == positions[torch.isin(positions, kept)].tolist()
    assert {-1} < set(states[-1])
    merged = [patch for patch, value in enumerate(states[-1]) if value not in (-1, patch)]
    assert merged
    assert all(states[-1][states[-1][patch]] == states[-1][patch] for patch in merged)


def test_a_page_without_a_comparison(tmp_path):
    """And of a method that only restricts attention, which the page says."""
    path, (result,) = write_run_report(tmp_path, "--no-compare", "--method", "streamingllm")
    page = Page(path)
    assert result.dense is None
    assert "all tokens" not in page.text.replace("all tokens kept", "")
    assert "what the last token of the prompt does not attend to" in page.text
    script = json.loads(re.search(r'<script type="application/json">(.*?)</script>', path.read_text("utf-8"))[1])
    kept = [sum(value == patch for patch, value in enumerate(state)) for state in decoded(script)]
    assert kept == result.reduced.report.vision_tokens_per_layer


def test_states_by_hand():
    """Two layers: one merge before the first attention, one after it; then a pruning."""
    steps = [
        SimpleNamespace(layer=0, stage="before_attention", merged=torch.tensor([5]), into=torch.tensor([3])),
        SimpleNamespace(layer=0, stage="after_attention", merged=torch.tensor([3]), into=torch.tensor([2])),
    ]
    report = SimpleNamespace(
        layouts=[VideoLayout(torch.tensor([[2, 3], [4, 5], [6, -1]]))],
        num_tokens=8,
        merge_steps=steps,
        kept_positions=[torch.tensor([0, 1, 2, 3, 4, 6, 7]), torch.tensor([0, 1, 2, 6, 7])],
    )
    first, second = states_of(report)
    assert first.tolist() == [[0, 1], [2, 1], [4, -1]]
    assert second.tolist() == [[0, 0], [-1, 0], [4, -1]]


def test_states_at_a_threshold():
    similarity = np.array([[np.nan, np.nan, 0.9, 0.5, 0.9, 0.9]], np.float32)
    observed = Observed(np.repeat(np.arange(3), 2), np.tile([0, 1], 3), similarity, similarity, similarity, similarity)
    (state,) = states_at_threshold(observed, 0.8)
    assert state.tolist() == [[0, 1], [0, 3], [0, 3]]


@pytest.mark.parametrize(
    ("frames", "rows", "captions"),
    [
        (2, 2, ["0.0 s", "0.5 s"]),
        (4, 2, ["0.0 to 0.5 s", "1.0 to 1.5 s"]),
        (5, 3, ["0.0 to 0.5 s", "1.0 to 1.5 s", "2.0 s"]),  # the processor repeats the last frame
    ],
)
def test_a_frame_of_tokens_may_show_several_frames(frames, rows, captions):
    strip = make_strip(prompt(np.zeros((frames, 8, 12, 3), np.uint8)), [np.arange(rows * 6).reshape(rows, 6)])
    assert [frame["caption"] for frame in strip.frames] == captions
    assert strip.grid == (2, 3)


def prompt(frames: np.ndarray) -> SimpleNamespace:
    video = Video(frames, list(range(len(frames))), len(frames), 2.0)
    return SimpleNamespace(video=video, inputs={}, name="clip")


def test_64_large_frames_fit():
    """The worst case for a JPEG, in a model of 28 layers that merges in each."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (64, 360, 640, 3), dtype=np.uint8)
    root = np.arange(64 * 196).reshape(64, 196)
    states = []
    for _ in range(28):
        joins = rng.random((64, 196)) < 0.1
        joins[0] = False
        root = np.where(joins, np.roll(root, 1, axis=0), root)
        states.append(root)
    strip = make_strip(prompt(frames), states)
    size = sum(len(frame["picture"]) for frame in strip.frames) + len(json.dumps(strip.script))
    assert size < MEBIBYTES * 2**20


def test_hostile_text_stays_text_in_a_page_of_64_frames(tmp_path):
    video = tmp_path / "<i>clip.mp4"
    write_video(video, np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8), Fraction(8), 18)
    path, (result,) = write_run_report(tmp_path, "--video", video, "--frames", 64, question=HOSTILE)
    assert len(result.job.video.frames) == 64
    page = Page(path)
    assert not page.all("b")
    assert not page.all("i")
    assert len(page.all("script")) == 2  # the data, and the page's own
    assert " ".join(HOSTILE.split()) in page.text
    assert path.stat().st_size < MEBIBYTES * 2**20


def test_inspect_and_calibrate_write_pages(tmp_path):
    found = CliRunner().invoke(app, ["inspect", "--out", str(tmp_path), "--report", str(tmp_path / "a" / "i.html")])
    assert found.exit_code == 0, found.output
    page = Page(tmp_path / "a" / "i.html")
    threshold = re.search(r"similarity_threshold=([\d.]+)", found.output)[1]
    assert f"--method framefusion:similarity_threshold={threshold}" in page.text
    assert len([each for each in page.all("img") if each["src"].startswith("data:image/png")]) == 6
    assert all(each["alt"] for each in page.all("img") if each["src"].startswith("data:image/png"))
    requests = tmp_path / "requests.jsonl"
    requests.write_text(json.dumps({"video": str(NEEDLE.path), "question": NEEDLE.question}) + "\n")
    arguments = ["calibrate", requests, "--methods", "framefusion", "--budgets", "0.5", "--out", tmp_path / "c"]
    done = CliRunner().invoke(app, [*map(str, arguments), "--report", str(tmp_path / "c.html")])
    assert done.exit_code == 0, done.output
    page = Page(tmp_path / "c.html")
    assert NEEDLE.question in page.text
    assert "Use framefusion at a budget of 0.5" in page.text
    (row,) = re.findall(r"framefusion 0.5 100 \S+ [\d.]+ [\d.]+ \S+ take this", page.text)
    assert row
    inputs = load_processor(MODEL)(read_video(NEEDLE.path, num_frames=16), NEEDLE.question)
    model = Qwen2VLForConditionalGeneration.from_pretrained(MODEL)
    with fftriton.reduce(model, fftriton.FrameFusion(0.5)) as reduction:
        model.generate(**{name: value for name, value in inputs.items() if name != "mm_token_type_ids"})
    states = [state.reshape(-1).tolist() for state in states_of(reduction.report)]
    assert decoded(data_of(tmp_path / "c.html")) == states
    assert states[-1] != list(range(len(states[-1])))  # some are merged
    assert (tmp_path / "c.html").stat().st_size < MEBIBYTES * 2**20


def test_a_calibration_whose_example_fails_says_so(tmp_path):
    requests = tmp_path / "requests.jsonl"
    requests.write_text(json.dumps({"video": str(NEEDLE.path), "question": NEEDLE.question}) + "\n")
    arguments = ["calibrate", requests, "--methods", "framefusion", "--budgets", "0.5", "--out", tmp_path / "c"]
    page = tmp_path / "c.html"

    def broken(*_: object) -> None:
        raise ValueError("no <memory>")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fftriton.app.calibrate.make_example", broken)
        done = CliRunner().invoke(app, [*map(str, arguments), "--report", str(page)])
    assert done.exit_code == 0, done.output
    assert f"cannot be shown: {NEEDLE.path}: no <memory>" in Page(page).text
    assert not Page(page).all("ol")


@pytest.mark.parametrize("command", [["run"], ["inspect"], ["calibrate", "requests.jsonl"]], ids=lambda given: given[0])
def test_a_report_that_cannot_be_written_is_refused_at_once(command, tmp_path, monkeypatch):
    monkeypatch.setattr(Target, "load_model", lambda _: pytest.fail("the model was loaded first"))
    refused = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out"), "--report", str(tmp_path)])
    assert refused.exit_code == 2
    expected = f"report must be a file that can be written, got '{tmp_path}': it is a folder"
    assert expected in " ".join(refused.output.split()).replace("\n", "")
    assert not (tmp_path / "out").exists()
