"""The needle videos, and that what ships was made from them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fftriton.shipped import MODEL, NEEDLE
from fftriton.video import read_video

BENCH = Path(__file__).parents[1] / "bench" / "needle"


@pytest.fixture
def clips(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("clips")


@pytest.fixture
def make_assets(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("make_assets")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_same_seed_same_video(clips):
    needles = [clips.Needle(digit=7, colour="blue", cell=3, start=5)]
    videos = [clips.make_video(16, needles, generator(seed)) for seed in (0, 0, 1)]
    assert videos[0].shape == (16, clips.SIDE, clips.SIDE, 3)
    assert torch.equal(videos[0], videos[1])
    assert not torch.equal(videos[0], videos[2])


@pytest.mark.parametrize(("start", "duration"), [(0, 1), (5, 2), (15, 1)])
def test_needle_fills_its_patch_and_nothing_else(clips, start, duration):
    cell = 6  # second row, third column
    needle = clips.Needle(digit=1, colour="blue", cell=cell, start=start, duration=duration)
    video = clips.make_video(16, [needle], generator(), noise=0.0)
    patch = video[:, 16:32, 32:48].float().mean((1, 2))  # [16, 3]
    shown = (patch[:, 2] > 150) & (patch[:, 0] < 150)
    assert shown.nonzero().flatten().tolist() == list(range(start, start + duration))


def test_held_out_digits_are_every_fourth(clips):
    train, _ = clips.digit_images(held_out=False)
    test, labels = clips.digit_images(held_out=True)
    assert (len(train), len(test)) == (1347, 450)
    assert set(labels.tolist()) == set(range(10))


def test_questions_and_answers(clips):
    needles = [clips.Needle(4, "green", cell=9, start=3), clips.Needle(8, "red", cell=0, start=9)]
    assert clips.questions(16, needles) == [
        ("Which digit is on the green box?", "4"),
        ("When does the green box appear?", "first quarter"),
        ("Where is the green box?", "bottom left"),
        ("How many boxes appear?", "two"),
        ("Which colour is the box with the digit 4?", "green"),
    ]


def test_shipped_processor_is_what_the_script_makes(make_assets, tmp_path):
    make_assets.write_processor(tmp_path)
    for made in tmp_path.iterdir():
        assert made.read_text() == (MODEL / made.name).read_text(), made.name


def test_shipped_clip_is_what_the_script_makes(make_assets):
    drawn = make_assets.needle_clip()
    shipped = read_video(NEEDLE.path, len(drawn))
    assert shipped.frames.shape == drawn.shape
    difference = np.abs(shipped.frames.astype(int) - drawn.astype(int))
    assert difference.mean() < 4  # of 255: the encoder's loss
    assert make_assets.NEEDLE.digit == int(NEEDLE.answer)


def test_vocabulary_fits_the_model(make_assets):
    config = json.loads((MODEL / "config.json").read_text())
    ids = make_assets.IDS
    assert len(ids) <= config["text_config"]["vocab_size"]
    named = {"video_token_id": make_assets.VIDEO, "vision_start_token_id": make_assets.VISION_START}
    assert {name: ids[token] for name, token in named.items()} == {name: config[name] for name in named}
