"""Training of the relevance predictor: its loss, its data, that it learns, and that it goes on where it stopped."""

import csv
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import launch
from typer.testing import CliRunner

from bench.kvtp import memory, needle, train, triples
from bench.kvtp import planted as planted_videos
from bench.kvtp.small import small_siglip
from fftriton.relevance import ContextFusion, SiglipRelevance
from fftriton.runtime.video import write_video


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """(train, held out) triples: two clips of two frames, in one of which the square is asked about."""
    two = {colour: planted_videos.COLOURS[colour] for colour in ("red", "green")}
    monkeypatch.setattr(planted_videos, "COLOURS", two)  # six take a few hundred steps
    write = planted_videos.write_planted
    return write(tmp_path / "train.jsonl", 240, 2, 2, seed=0), write(tmp_path / "held.jsonl", 40, 2, 2, seed=1)


def small(head=None, **arguments):
    return small_siglip(planted_videos.WORDS, head=head, **arguments)


def test_loss_by_hand():
    frames = torch.tensor([1.0, 3.0, -2.0, -2.0])
    clips = train.clip_logits(frames, 2)
    weight = math.exp(3) / (math.exp(1) + math.exp(3))
    assert clips.tolist() == pytest.approx([1 * (1 - weight) + 3 * weight, -2.0])
    expected = -sum(math.log(1 / (1 + math.exp(-z * y))) for z, y in zip(clips.tolist(), (2.0, -2.0), strict=True))
    assert float(train.relevance_loss(clips, torch.tensor([5.0, 1.0]))) == pytest.approx(expected)


def test_a_short_last_clip():
    frames = torch.tensor([1.0, 3.0, -2.0, 0.5, 1.5])
    clips = train.clip_logits(frames, 3)
    last = torch.tensor([0.5, 1.5])
    assert float(clips[1]) == pytest.approx(float((last.softmax(0) * last).sum()))
    assert torch.equal(clips[:1], train.clip_logits(frames[:3], 3))
    assert train.clip_logits(frames[:2], 3).shape == (1,)


def test_the_short_last_clip_of_a_video(tmp_path):
    np.save(tmp_path / "video.npy", np.arange(11 * 12, dtype=np.uint8).reshape(11, 2, 2, 3))
    triple = triples.Triple(tmp_path / "video.npy", "q", (0.0, 5.0, 0.0), 11)
    triples.write_triples(tmp_path / "data.jsonl", [triple])
    assert triples.read_triples(tmp_path / "data.jsonl") == [triple]
    assert np.array_equal(triple.frames(4), np.load(triple.video))
    assert train.score_clips(small(ContextFusion(4), width=16, depth=1), triple, 4).shape == (3,)
    with pytest.raises(ValueError, match="relevance must have a number for each of the 2 clips of 11 frames, got 3"):
        triple.frames(8)


def test_the_rate_falls_to_zero_and_bf16_moves_small_steps(planted, tmp_path):
    """Adam's first step is the rate itself, in any precision; with checkpointing the gradients are the same."""
    steps = {}
    for precision, checkpointing in (("float32", False), ("float32", True), ("bfloat16", True)):
        relevance = small(ContextFusion(2), width=16, depth=1)
        recipe = train.Recipe(clip=2, precision=precision, checkpointing=checkpointing)
        trainer = train.Trainer(relevance, planted[0][:4], recipe, tmp_path / f"{precision}{checkpointing}")
        weights = [parameter.detach().clone() for parameter in trainer.modules.parameters()]
        rates = []
        for _ in range(4):
            trainer.train_step()
            rates.append(trainer.optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx([1e-6, 0.75e-6, 0.5e-6, 0.25e-6])
        moved = [(a - b).detach().abs() for a, b in zip(weights, trainer.modules.parameters(), strict=True)]
        assert 1e-6 < float(max(one.max() for one in moved)) < 3e-6
        assert float(torch.cat([one.flatten() for one in moved]).count_nonzero()) > 1000
        assert trainer.modules[0].dtype == torch.float32
        steps[precision, checkpointing] = torch.cat([p.detach().flatten() for p in trainer.modules.parameters()])
    assert torch.equal(steps["float32", False], steps["float32", True])


def test_auc_by_hand(monkeypatch):
    videos = [triples.Triple(Path("x"), "q", labels) for labels in ((5.0, 0.0, 0.0), (1.0, 4.0))]
    scores = iter([torch.tensor([2.0, 1.0, 2.0]), torch.tensor([0.0, 3.0])])
    monkeypatch.setattr(train, "score_clips", lambda *_: next(scores))
    assert train.key_clip_auc(None, videos, 1) == pytest.approx((1 + 0.5 + 1) / 3)


def test_learns_which_clip_is_asked_about(planted, tmp_path):
    relevance = small(ContextFusion(2), width=32, depth=1)
    recipe = train.Recipe(learning_rate=4e-3, epochs=2, batch_size=4, clip=2, save_every=60)
    with train.progress_bar() as progress:
        rows = train.Trainer(relevance, planted[0], recipe, tmp_path / "out", planted[1]).run(progress)
    assert 0.3 < rows[0]["key_clip_auc"] < 0.7
    assert rows[-1]["key_clip_auc"] > 0.95
    loaded = SiglipRelevance.from_pretrained(tmp_path / "out")
    assert loaded.head.log_temperature.abs().min() > 1e-4  # it learned, too
    assert train.key_clip_auc(loaded, planted[1], 2) == rows[-1]["key_clip_auc"]


def test_goes_on_where_it_stopped(planted, tmp_path):
    recipe = train.Recipe(learning_rate=1e-3, epochs=2, batch_size=8, clip=2, save_every=2)
    triples, held_out = planted[0][:28], planted[1][:5]

    def run(out, stop_at=None):
        trainer = train.Trainer(small(ContextFusion(2), width=16, depth=1), triples, recipe, out, held_out)
        if stop_at is not None:
            step = trainer.train_step
            trainer.train_step = lambda: step() if trainer.step < stop_at else 1 / 0
        with train.progress_bar() as progress:
            return trainer.run(progress), trainer

    rows, whole = run(tmp_path / "whole")
    for epoch in (0, 4):  # each of four steps
        seen = [triple.video for step in range(epoch, epoch + 4) for triple in whole._batch(step)]
        assert sorted(seen) == sorted(triple.video for triple in triples)
    assert whole._batch(0) != whole._batch(4)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "parts", stop_at=5)  # in the middle of the second epoch; the checkpoint is of step 4
    again, resumed = run(tmp_path / "parts")
    assert resumed.step == whole.step == 8
    assert [row["step"] for row in again] == [row["step"] for row in rows] == [0, 2, 4, 6, 8]
    assert [row["loss"] for row in again[1:]] == [row["loss"] for row in rows[1:]]
    for name, weight in whole.modules.state_dict().items():
        assert torch.equal(resumed.modules.state_dict()[name], weight), name
    assert run(tmp_path / "parts")[1].step == 8  # nothing left to do
    other = train.Recipe(learning_rate=2e-3, epochs=2, batch_size=8, clip=2)
    with pytest.raises(ValueError, match="out must be empty or hold a checkpoint of the same recipe and data"):
        train.Trainer(small(ContextFusion(2), width=16, depth=1), triples, other, tmp_path / "parts")


def test_processes_share_a_step(planted, tmp_path):
    """Two processes give the weights that one gives by accumulating two triples; the last step has only one."""
    triples.write_triples(tmp_path / "nine.jsonl", planted[1][:9])
    small(ContextFusion(2), width=16, depth=1).save_pretrained(tmp_path / "siglip")
    arguments = [
        tmp_path / "nine.jsonl", "--checkpoint", tmp_path / "siglip", "--eval-data", tmp_path / "nine.jsonl", "--clip",
        2, "--batch-size", 2, "--learning-rate", 1e-3, "--device", "cpu", "--save-every", 2,
    ]  # fmt: skip
    one = CliRunner().invoke(command(), [*map(str, arguments), "--out", str(tmp_path / "one")])
    assert one.exit_code == 0, one.output
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable)
    launch(launcher, "-m", "bench.kvtp.train", *arguments, "--out", tmp_path / "two")
    first, second = (SiglipRelevance.from_pretrained(tmp_path / name) for name in ("one", "two"))
    start = SiglipRelevance.from_pretrained(tmp_path / "siglip")
    for part in ("model", "head"):
        weights = [getattr(one, part).state_dict() for one in (first, second, start)]
        for name, weight in weights[0].items():
            torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-6)
        assert any(not torch.equal(weight, weights[2][name]) for name, weight in weights[0].items())
    logs = [list(csv.DictReader((tmp_path / name / train.LOG).open())) for name in ("one", "two")]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    for one, two in zip(*logs, strict=True):
        assert float(one["key_clip_auc"]) == float(two["key_clip_auc"])
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-5, nan_ok=True)


def test_a_step_must_have_a_triple_for_each_process(planted, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="batch_size must be at least the number of processes, .* got 1 for 2"):
        train.Trainer(small(width=16, depth=1), planted[0], train.Recipe(clip=2), tmp_path / "out")


def test_triples_from_a_video_file(tmp_path):
    pytest.importorskip("av")
    frames = np.repeat(np.arange(8, dtype=np.uint8) * 30, 16 * 16 * 3).reshape(8, 16, 16, 3)
    write_video(tmp_path / "clip.mp4", frames, 4, crf=1)
    np.save(tmp_path / "clip.npy", frames)
    line = {"question": "when is it dark", "relevance": [5, 0]}
    (tmp_path / "data.jsonl").write_text(
        "\n".join(json.dumps(line | {"video": f"clip.{kind}"}) for kind in ("mp4", "npy"))
    )
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write("\n" + json.dumps(line | {"video": "clip.mp4", "query": "dark"}))
    assert [triple.question for triple in triples.read_triples(tmp_path / "data.jsonl")][1:] == [
        line["question"],
        "dark",
    ]
    for triple in triples.read_triples(tmp_path / "data.jsonl"):
        assert [round(float(frame.mean()) / 30) for frame in triple.frames(2)] == [1, 3, 5, 7]
        assert len(triple.frames(6)) == 12  # more than there are: some twice


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "data must hold at least one triple"),
        ("{", r"data must hold .* in each line, got .* in line 1 of"),
        ('{"video": "a.npy", "question": "q"}', r"got KeyError\('relevance'\) in line 1"),
        (
            '{"video": "a.npy", "question": "q", "relevance": []}',
            r"relevance must be finite numbers, one a clip, got \[\]",
        ),
        ('{"video": "a.npy", "question": "q", "relevance": [1], "frames": 0}', "frames must be an integer of at least"),
        ('{"video": "a.npy", "question": "q", "relevance": [NaN]}', r"relevance must be finite numbers"),
        ('{"video": "a.npy", "question": " ", "relevance": [1]}', "question must not be empty"),
        ('{"video": "a.npy", "question": "q", "relevance": [1]}', "video must be a file, got 'a.npy' in line 1"),
    ],
)
def test_bad_data(tmp_path, line, message):
    (tmp_path / "data.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        triples.read_triples(tmp_path / "data.jsonl")


def command():
    app = train.typer.Typer()
    app.command()(train.main)
    return app


def test_command_line(planted, tmp_path):
    small(width=16, depth=1).save_pretrained(tmp_path / "siglip")
    (tmp_path / "options.yaml").write_text("clip: 2\nhead: unscaled\n")
    arguments = [
        str(tmp_path / "held.jsonl"), "--checkpoint", str(tmp_path / "siglip"), "--out", str(tmp_path / "out"),
        "--eval-data", str(tmp_path / "held.jsonl"), "--config", str(tmp_path / "options.yaml"), "--device", "cpu",
        "--batch-size", "8", "--precision", "bfloat16", "--checkpointing",
    ]  # fmt: skip
    result = CliRunner().invoke(command(), arguments)
    assert result.exit_code == 0, result.output
    assert "5 steps: key-clip AUC" in result.output
    assert not SiglipRelevance.from_pretrained(tmp_path / "out").head.scaled
    result = CliRunner().invoke(command(), [*arguments, "--learning-rate", "0.1"])
    assert result.exit_code == 2
    assert "the same recipe" in result.output


def test_a_step_of_so400m_fits():
    """128 frames in bf16 with checkpointing, extrapolated from one layer of that size: below 40 GB."""
    app = train.typer.Typer()
    app.command()(memory.main)
    result = CliRunner().invoke(app, ["--measured", "2"])
    assert result.exit_code == 0, result.output
    (total,) = re.findall(r"extrapolated: a step of 128 frames: ([\d.]+) GiB", result.output)
    assert 15 < float(total) * 2**30 / 1e9 < 40


def test_needle_stills_and_samples(tmp_path):
    frames, questions, shows = needle.Stills(True, 0).draw(64)
    assert frames.shape == (64, 64, 64, 3)
    assert shows.shape == (64, len(questions)) == (64, 15)
    assert bool((shows[:, :4].any(1) == shows[:, -1]).all())
    triples = needle.write_samples(tmp_path / "needle.jsonl", 5, 2, held_out=True, seed=0)
    assert all(len(triple.relevance) == 8 and max(triple.relevance) == 5 for triple in triples)
    unknown = [w for triple in triples for w in triple.question.replace("?", " ?").split() if w not in needle.WORDS]
    assert unknown == []
