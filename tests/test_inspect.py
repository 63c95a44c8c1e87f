"""`fftriton inspect`: figures that the model's own hidden states and attention confirm, and files that show them."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration
from typer.testing import CliRunner

import fftriton
from fftriton.app.cli import app
from fftriton.app.inspect_pictures import draw
from fftriton.evaluate.observing import Observed, Observer
from fftriton.evaluate.redundancy import TOP, analyse, kept_top, rank_correlation
from fftriton.hf.modules import has_attention
from fftriton.methods import parse
from fftriton.needle.samples import generate_sample
from fftriton.runtime.processing import load_processor
from fftriton.runtime.shipped import MODEL, NEEDLE
from fftriton.runtime.target import to_model
from fftriton.runtime.video import read_video

PICTURES = ["matrix.png", "distribution.png", "correlation.png", "retention.png", "variance.png", "joint.png"]
TABLES = ["layers.csv", "retention.csv", "distances.csv", "tokens.csv"]


def invoke(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture(scope="module")
def shipped():
    """The shipped model with eager attention, which can return its weights, and a prompt."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(MODEL, attn_implementation="eager", dtype=torch.float32)
    sample = generate_sample("easy", seed=3, index=0)
    return model, to_model(load_processor(MODEL)(sample.video, sample.question), model)


@torch.no_grad()
def observe(model, inputs):
    observer = Observer()
    with fftriton.reduce(model, observer) as reduction:
        output = model(**inputs)
    return observer.observed, output, reduction.report


@torch.no_grad()
def test_it_observes_what_the_model_itself_returns(shipped):
    model, inputs = shipped
    observed, output, report = observe(model, inputs)
    plain = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert torch.equal(output.logits, plain.logits)
    positions = report.layouts[0].positions  # [F, P]
    frames, patches = positions.shape
    assert observed.patches == patches
    assert observed.frame.tolist() == np.repeat(np.arange(frames), patches).tolist()
    assert (observed.patch.reshape(frames, patches) == observed.patch[:patches]).all()
    for layer, (hidden, attention) in enumerate(zip(plain.hidden_states, plain.attentions, strict=False)):
        video = hidden[0, positions.flatten()].double()
        cosine = torch.cosine_similarity(video[patches:], video[:-patches], dim=-1)
        assert np.isnan(observed.similarity[layer, :patches]).all()
        torch.testing.assert_close(
            torch.tensor(observed.similarity[layer, patches:]).double(), cosine, atol=1e-5, rtol=0
        )
        received = attention[0].double().mean(0).sum(0)[positions.flatten()]
        torch.testing.assert_close(torch.tensor(observed.importance[layer]).double(), received, atol=1e-4, rtol=1e-4)
    assert layer == len(observed.similarity) - 1
    first = plain.hidden_states[0][0, positions.flatten()].double()
    unit = first / first.norm(dim=-1, keepdim=True)
    cosines = unit @ unit.mT
    count = len(observed.matrix)
    assert count == min(8, frames) * patches
    torch.testing.assert_close(torch.tensor(observed.matrix).double(), cosines[:count, :count], atol=1e-5, rtol=0)
    for distance in (1, patches, 2 * patches + 3):
        expected = cosines.diagonal(-distance).mean().item()
        assert observed.by_distance[distance - 1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_observed_and_left_as_it_is(name):
    """One video; layers without attention have no importance."""
    model = FAMILIES[name].model()
    inputs = FAMILIES[name].inputs(videos=(4,), image=False)
    with torch.no_grad():
        plain = model(**inputs).logits
    observed, output, report = observe(model, inputs)
    torch.testing.assert_close(output.logits, plain, atol=1e-5, rtol=1e-5)
    assert len(observed.frame) == report.num_video_tokens
    assert np.isfinite(observed.similarity).any(1).all()
    attends = np.isfinite(observed.importance).all(1)
    assert attends.tolist() == [has_attention(layer) for layer in model.get_decoder().layers]
    assert attends.any()
    assert (observed.importance[attends] >= 0).all()
    found = analyse(observed)
    assert found.threshold == pytest.approx(np.nanmedian(observed.similarity[0]))
    assert [row.importance_variance is not None for row in found.layers] == attends.tolist()


def test_a_run(tmp_path):
    result = invoke("--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["files"] == [*PICTURES, *TABLES]
    for name in PICTURES:
        image = np.asarray(Image.open(tmp_path / name).convert("L"), dtype=float)
        assert min(image.shape) > 400
        assert image.std() > 10, name  # it is not blank
    lines = {name: list(csv.DictReader((tmp_path / name).open())) for name in TABLES}
    layers, tokens, patches = found["layers"], found["vision_tokens"], found["tokens_per_frame"]
    assert (len(layers), tokens, patches) == (8, 256, 16)
    assert len(lines["layers.csv"]) == 8
    assert len(lines["retention.csv"]) == len(found["retention"]) == 36
    assert len(lines["tokens.csv"]) == 8 * tokens
    distances = [float(line["similarity"]) for line in lines["distances.csv"]]
    assert max(distances) == distances[patches - 1]  # the t - P diagonal
    first = [float(line["similarity"]) for line in lines["tokens.csv"] if line["layer"] == "0" and line["similarity"]]
    assert len(first) == tokens - patches
    assert found["similarity_threshold"] == pytest.approx(np.median(first), abs=1e-4)
    assert layers[0]["similarity_50"] == pytest.approx(np.median(first), abs=1e-5)
    assert all(pair["similarity"] == 1 for pair in found["retention"] if pair["start"] == pair["layer"])
    assert lines["layers.csv"][0]["command"]


def test_the_method_to_paste_merges_half_of_the_tokens(tmp_path):
    result = invoke("--out", tmp_path)
    assert result.exit_code == 0, result.output
    (text,) = [line.split()[-1] for line in result.output.splitlines() if "--method" in line]
    model = Qwen2VLForConditionalGeneration.from_pretrained(MODEL).eval()
    inputs = to_model(load_processor(MODEL)(read_video(NEEDLE.path, 16), NEEDLE.question), model)
    with torch.no_grad(), fftriton.reduce(model, parse(text, budget=0.1)) as reduction:
        model(**inputs)
    merged = len(reduction.report.merge_steps[0].merged)
    later = reduction.report.num_video_tokens - reduction.report.layouts[0].positions.shape[1]
    assert merged == pytest.approx(later / 2, abs=2)


def test_a_single_frame_is_refused(tmp_path):
    result = invoke("--out", tmp_path / "out", "--frames", 1)
    assert result.exit_code == 2
    assert "inspect: frames must be such that two of them share a patch, got 1 for the model" in " ".join(
        result.output.split()
    )
    assert not (tmp_path / "out").exists()


def test_a_prompt_without_a_video_is_refused(shipped):
    model, inputs = shipped
    observer = Observer()
    with pytest.raises(ValueError, match="inspect: the prompt must contain a video, got none"):
        _ = observer.observed


def made(similarity, importance, frames=4):
    similarity, importance = np.asarray(similarity, np.float32), np.asarray(importance, np.float32)
    patches = similarity.shape[1] // frames
    frame = np.repeat(np.arange(frames), patches)
    matrix = np.ones((2 * patches, 2 * patches), np.float32)
    return Observed(
        frame, np.tile(np.arange(patches), frames), similarity, importance, matrix, np.ones(3 * patches - 1)
    )


def test_a_still_video_without_attention_is_drawn(tmp_path):
    """All are equally similar, so that nothing has ranks, and no layer has importances."""
    similarity = np.full((3, 24), np.nan)
    similarity[:, 6:] = 1.0
    found = analyse(made(similarity, np.full((3, 24), np.nan)))
    assert found.threshold == 1
    for row in found.layers:
        assert row.similarity_correlation is row.importance_correlation is row.joint_correlation is None
        assert (row.importance_variance, row.similarity_variance) == (None, 0)
    assert all(pair.similarity is pair.importance is None for pair in found.retention)
    paths = draw(tmp_path, made(similarity, np.full((3, 24), np.nan)), found, "$still$")
    assert [path.name for path in paths] == PICTURES
    assert all(path.exists() for path in paths)


def test_no_layer_without_attention_is_a_gap_in_the_ranking():
    """The next layer is the next one that has attention."""
    importance = [[1.0, 2.0, 3.0, 6.0], [math.nan] * 4, [6.0, 3.0, 2.0, 1.0]]
    similarity = [[math.nan, 0.1, 0.2, 0.3]] * 3
    first, second, third = analyse(made(similarity, importance)).layers
    assert first.importance_correlation == pytest.approx(-1)
    assert second.importance_correlation is third.importance_correlation is None


def test_figures_by_hand():
    similarity = [[math.nan, 0.1, 0.2, 0.9], [math.nan, 0.3, 0.5, 0.4]]
    importance = [[1.0, 2.0, 3.0, 6.0], [4.0, 4.0, 4.0, 4.0]]
    found = analyse(made(similarity, importance))
    first, second = found.layers
    assert first.similarity_50 == found.threshold == pytest.approx(0.2)
    assert first.similarity_correlation == pytest.approx(0.5)  # ranks 1 2 3 and 1 3 2
    assert first.joint_correlation == pytest.approx(1)
    assert first.importance_correlation is None  # all equal in the next layer
    assert first.importance_variance == pytest.approx(np.var([1, 2, 3, 6]) / 9)
    assert second.similarity_variance == pytest.approx(np.var([0.3, 0.5, 0.4]))
    assert second.similarity_correlation is None


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([1, 1, 2, 3], [1, 2, 3, 4], 0.9486833),  # ties share their mean rank
        ([1, 2, math.nan, 3], [1, 2, -9, 3], 1),
        ([1, 1, 1], [1, 2, 3], None),
        ([1, math.nan], [math.nan, 1], None),
    ],
)
def test_rank_correlation(first, second, expected):
    found = rank_correlation(np.array(first, float), np.array(second, float))
    assert found is None if expected is None else found == pytest.approx(expected)


def test_kept_top():
    values = np.arange(10.0)
    assert kept_top(values, values) == 1
    assert kept_top(values, -values) == 0
    other = values.copy()
    other[9] = -1  # one of the three at the top falls
    assert round(TOP * 10) == 3
    assert kept_top(values, other) == pytest.approx(2 / 3)
    assert kept_top(values, np.ones(10)) is None
