"""The training of the needle model, and that the model that ships knows what its card says."""

from __future__ import annotations

import csv
import json
from math import comb

import numpy as np
import pytest
import torch
import transformers
from transformers import Qwen2VLForConditionalGeneration

from bench.needle import batches, train
from bench.needle import model as needle_model
from fftriton.needle import HARDER_SPLITS, KINDS, generate_sample
from fftriton.needle.digits import digit_images
from fftriton.needle.needles import covered, small
from fftriton.needle.samples import HARDER_KINDS
from fftriton.needle.scenes import real_scenes
from fftriton.needle.vocabulary import HARDER_IDS, HARDER_TOKENS
from fftriton.runtime.processing import load_processor
from fftriton.runtime.shipped import BUNNY, HARDER_MODEL, MODEL

pytest.importorskip("av")  # reads videos

RESUME_AFTER = "time" if transformers.__version__ < "5" else "space"


@pytest.fixture(scope="module")
def shipped():
    return Qwen2VLForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def harder():
    return Qwen2VLForConditionalGeneration.from_pretrained(HARDER_MODEL, dtype=torch.float32).eval()


def tiny_phases():
    """Both losses, and few enough steps for a laptop."""
    lengths = (batches.Length(4, 2),)
    return (
        train.Phase("see", 3, lambda seed, phase: batches.AlignmentBatches(seed, 4), train.align, sees=True),
        train.Phase("find", 3, train.asking((train.BUSY,), lengths, ("space", "time")), train.answer, warm_up=2),
    )


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("stopped_at", [(0, 2), (1, 3)])
def test_a_resumed_training_ends_with_the_same_weights(tmp_path, stopped_at):
    phases = tiny_phases()
    whole = train.Trainer(tmp_path / "whole", phases)
    untrained = weights(whole)
    whole.run()

    def stop(phase, step, loss, right):
        if (phase, step) == stopped_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.Trainer(tmp_path / "parts", phases, checkpoint_every=1, on_step=stop).run()
    resumed = train.Trainer(tmp_path / "parts", phases, checkpoint_every=1)
    assert any(not torch.equal(value, untrained[name]) for name, value in weights(resumed).items())
    resumed.run()
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, rtol=0, atol=0)

    with (tmp_path / "parts" / "training.csv").open() as file:
        rows = [(row["phase"], int(row["step"])) for row in csv.DictReader(file)]
    assert rows == [(phase.name, step) for phase in phases for step in (1, 2, 3)]


def test_a_phase_trains_its_own_part(tmp_path):
    trainer = train.Trainer(tmp_path, tiny_phases())
    changed = []
    for _ in range(2):
        before = weights(trainer)
        trainer._run_phase(trainer._phases[trainer.phase])
        trainer.phase, trainer._step = 1, 0
        changed.append({name for name, value in weights(trainer).items() if not torch.equal(value, before[name])})
    vision, decoder = ({name for name in before if part in name} for part in (".visual.", ".layers."))
    assert vision <= changed[0]
    assert decoder <= changed[1]
    assert not decoder & changed[0]
    assert not vision & changed[1]


def test_another_seed_than_the_checkpoints_is_refused(tmp_path):
    phases = tiny_phases()[:1]
    train.Trainer(tmp_path, phases, seed=3).run()
    with pytest.raises(ValueError, match=r"seed must be that of the checkpoint in .*, 3, got 4"):
        train.Trainer(tmp_path, phases, seed=4)


def test_the_rate_warms_up_holds_and_falls():
    phase = train.Phase("find", 100, None, None, rate=1.0, warm_up=10, hold=0.5)
    rates = np.array([phase.rate_at(step) for step in range(100)])
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:51] == pytest.approx(1)
    assert (np.diff(rates[51:]) < 0).all()
    assert rates[-1] == pytest.approx(0.02, abs=0.01)


def test_batches_follow_from_seed_phase_and_step():
    def pixels(seed, phase, step):
        data = train.asking((train.BUSY,), (batches.Length(4, 2),), ("space",))(seed, phase)
        return data[step].pixels

    assert torch.equal(pixels(0, 1, 5), pixels(0, 1, 5))
    for other in ((1, 1, 5), (0, 2, 5), (0, 1, 6)):
        assert not torch.equal(pixels(0, 1, 5), pixels(*other))


def test_training_draws_no_held_out_digit(monkeypatch):
    asked = set()
    monkeypatch.setattr("fftriton.needle.digits.digit_images", lambda half: asked.add(half) or digit_images(half))
    for phase in tiny_phases():
        phase.data(0, 1)[0]
    assert asked == {False}


def assert_plain(packed, model, processor, samples, texts):
    """The logits are those of each question alone."""
    for row, questions in enumerate(texts):
        for column, text in enumerate(questions):
            inputs = processor(samples[row].video, text)
            if RESUME_AFTER == "time":
                inputs.pop("mm_token_type_ids")
            torch.testing.assert_close(packed[row, column], model(**inputs).logits[0, -1], rtol=0, atol=1e-4)


def test_packed_questions_get_the_logits_of_plain_ones(shipped):
    samples = [generate_sample("easy", 3, index, num_frames=8) for index in range(6)]
    asked = [[(sample.question, sample.answer) for sample in samples[i::2]] for i in (0, 1)]
    texts = [[question for question, _ in row] for row in asked]
    batch = batches.pack([batches.Asked(samples[i].frames, asked[i]) for i in (0, 1)], RESUME_AFTER)
    processor = load_processor(MODEL)
    with torch.no_grad():
        packed = train.question_logits(shipped, batch)
        assert_plain(packed, shipped, processor, samples, texts)


def test_packed_relations_get_the_logits_of_plain_ones(tmp_path):
    model = needle_model.make_harder_model(0).eval()
    needle_model.save_model(model, tmp_path, HARDER_IDS)
    processor = load_processor(tmp_path)
    samples = [generate_sample("relations", 3, index, num_frames=8) for index in range(8)]
    texts = [[samples[row + 2].question, samples[3].question] for row in (0, 0)]
    asked = [list(zip(row, ("1", "yes"), strict=True)) for row in texts]
    batch = batches.pack([batches.Asked(samples[i].frames, asked[i]) for i in (0, 1)], RESUME_AFTER)
    with torch.no_grad():
        packed = train.question_logits(model, batch)
        assert_plain(packed, model, processor, samples, texts)


def test_relations_are_learnt_through_the_digits_that_they_name(shipped):
    model = needle_model.make_harder_model(0).eval()
    batch = train.relating((covered,), (batches.Length(8, 2),))(0, 1)[0]
    digits = {HARDER_IDS[digit] for digit in "0123456789"}
    for row, shown in zip(batch.input_ids[:, batch.named_at], batch.named, strict=True):
        assert {HARDER_TOKENS[token] for token in row.tolist()} <= {"red", "green", "blue", "yellow"}
        assert set(shown.tolist()) <= digits
        of_colour = dict(zip(row.tolist(), shown.tolist(), strict=True))
        assert [of_colour[token] for token in row.tolist()] == shown.tolist()  # a colour has one digit
    with torch.no_grad():
        loss, right = train.answer_in_steps(model, batch)
        plain, same = train.answer(model, batch)
        assert torch.equal(right, same)
        assert loss > plain
        batch.named = batch.named.roll(1, dims=1)
        assert train.answer_in_steps(model, batch)[0] != loss


def test_the_harder_course_starts_with_the_shipped_weights_and_asks_relations(tmp_path, shipped):
    course = train.COURSES["harder"]
    model = course.make(0)
    assert model.config.text_config.max_position_embeddings == 4096
    for name, value in shipped.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    data = train.relating((covered, small), (batches.Length(8, 2),))(0, 1)
    answers = {HARDER_TOKENS[token] for step in range(4) for token in data[step].answers.flatten().tolist()}
    assert {"yes", "no"} < answers
    assert answers & {"first quarter", "second quarter", "third quarter", "last quarter"}
    phases = (train.Phase("relate", 1, lambda seed, phase: data, train.answer, warm_up=2),)
    trainer = train.Trainer(tmp_path, phases, make=course.make, bf16=False)
    trainer.run()
    assert not torch.equal(trainer.model.lm_head.weight, model.lm_head.weight)
    needle_model.save_model(model, tmp_path / "model", course.vocabulary)
    config = json.loads((tmp_path / "model" / "config.json").read_text())["text_config"]
    assert config["rope_theta"] == needle_model.HARDER_ROPE_THETA


def test_the_harder_splits_are_measured(tmp_path):
    model = needle_model.make_harder_model(0)
    needle_model.save_model(model, tmp_path, HARDER_IDS)
    row = train.measure(tmp_path, "relations", 8, 0, "cpu")
    assert list(row) == ["split", "samples", "seed", "all", *HARDER_KINDS]
    samples = [generate_sample("relations", 0, index) for index in range(8)]
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    together = train.answers(loaded, load_processor(tmp_path), samples)  # of two lengths
    assert together == [train.answers(loaded, load_processor(tmp_path), [sample])[0] for sample in samples]


def test_frames_seen_together_look_as_one_by_one():
    model = needle_model.make_model(0)
    pixels, grid = torch.randn(3 * 16, 768), torch.tensor([[3, 4, 4]])
    with torch.no_grad():
        alone = model.model.visual(pixels, grid_thw=grid)
        needle_model.batch_frames(model)
        together = model.model.visual(pixels, grid_thw=grid)
    alone, together = (getattr(seen, "pooler_output", seen) for seen in (alone, together))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_saved_model_is_whole(tmp_path):
    model = needle_model.make_model(0)
    needle_model.save_model(model, tmp_path)
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in model.to(torch.bfloat16).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in MODEL.iterdir()} - {"README.md"}


def test_the_command_trains_saves_and_measures(tmp_path, monkeypatch):
    clips = []
    monkeypatch.setitem(train.COURSES, "needle", train.Course(tiny_phases(), ("easy", "real")))
    monkeypatch.setattr("fftriton.needle.samples.real_scenes", lambda *a: clips.append(a[1]) or real_scenes(*a))
    train.main(tmp_path, samples=5, clip=[BUNNY.path, BUNNY.path])
    Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "model")
    with (tmp_path / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["split"], row["samples"]) for row in rows] == [("easy", "5"), ("real", "5")]
    assert all(0 <= float(row[kind]) <= 1 for row in rows for kind in ("all", *KINDS))
    assert clips == [(BUNNY.path, BUNNY.path)] * 5


def assert_reaches(share, model, checkpoint, samples):
    """The model answers so many right that a lower share is unlikely."""
    answers = train.answers(model, load_processor(checkpoint), samples)
    right = sum(text == sample.answer for text, sample in zip(answers, samples, strict=True))
    at_most = sum(comb(len(samples), k) * share**k * (1 - share) ** (len(samples) - k) for k in range(right + 1))
    assert at_most > 0.01, f"{right} of {len(samples)} right, which a model of {share:.0%} is very unlikely to give"


@pytest.mark.parametrize("seed", [0, 12345])
def test_shipped_model_reaches_95_percent_on_held_out_samples(shipped, seed):
    samples = [generate_sample("easy", seed, index) for index in range(40)]
    assert_reaches(0.95, shipped, MODEL, samples)
    assert {sample.kind for sample in samples} == set(KINDS)


@pytest.mark.parametrize("split", HARDER_SPLITS)
def test_the_harder_model_reaches_90_percent_on_held_out_samples(harder, split):
    samples = [generate_sample(split, 12345, index) for index in range(12 if split == "longer" else 40)]
    assert_reaches(0.9, harder, HARDER_MODEL, samples)
    assert {sample.kind for sample in samples} == set(HARDER_KINDS)
