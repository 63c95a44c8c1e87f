"""`fftriton run --model` on a checkpoint of every family, through the family's own processor."""

import json

import pytest
from checkpoints import PARTS, needs_torchvision, save_checkpoint
from families import FAMILIES
from typer.testing import CliRunner

import fftriton.app.cli
import fftriton.app.run
from fftriton.runtime.processing import HubProcessor
from fftriton.runtime.shipped import NEEDLE
from fftriton.runtime.video import read_video

pytest.importorskip("av")  # reads videos

EVERY_FAMILY = pytest.mark.parametrize("name", PARTS)


@pytest.fixture
def folder(name, tmp_path):
    save_checkpoint(FAMILIES[name], tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@needs_torchvision
@EVERY_FAMILY
def test_a_run(name, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fftriton.app.run, "_REPEATS", 1)
    arguments = ["--video", NEEDLE.path, "--question", "word5 word6", "--frames", 6, "--max-new-tokens", 3]
    command = ["run", "--model", folder, *arguments, "--budget", 0.5, "--compare", "--out", tmp_path / "out"]
    result = CliRunner().invoke(fftriton.app.cli.app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    (clip,) = json.loads((tmp_path / "out" / "report.json").read_text())["clips"]
    tokens = clip["dense"]["vision_tokens_per_layer"][0]
    assert tokens == layout_of(name, folder).positions.ge(0).sum()
    assert abs(clip["budget_achieved"] - 0.5) <= 1 / tokens
    for picture in clip["pictures"]:
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")


def layout_of(name, folder):
    """The layout of the processor's prompt, by the family's rule."""
    inputs = HubProcessor(folder)(read_video(NEEDLE.path, 6), "word5 word6")
    (layout,) = fftriton.layouts.families.RULES[name](FAMILIES[name].model(), inputs)
    return layout
