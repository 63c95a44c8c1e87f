"""bench.prefill: its prompts repeat as much as they say, its rows agree with its counts, and its fits with powers."""

from __future__ import annotations

import csv

import pytest
import torch
import typer
from typer.testing import CliRunner

import fftriton
from bench.prefill import __main__ as command
from bench.prefill import measure, prompts, scale
from fftriton.hf.flops import prefill_flops
from fftriton_kernels import linked_cosine_similarity


@pytest.fixture(scope="module")
def model():
    return prompts.make_model("toy", torch.float32, "cpu")


@pytest.mark.parametrize("redundancy", [0.0, 0.5, 1.0])
def test_a_share_of_the_patches_repeats(model, redundancy):
    prompt = prompts.make_prompt(model, 30, patches=40, redundancy=redundancy)
    positions = prompt.layout[0].positions
    links = torch.full(prompt.embeddings.shape[:2], -1)
    links[0, positions[1:].flatten()] = positions[:-1].flatten()
    similar = (linked_cosine_similarity(prompt.embeddings, links) > 0.6)[0, positions[1:].flatten()]
    assert similar.float().mean() == pytest.approx(redundancy, abs=0.05)


def test_causal_operations_count_the_scores_that_a_mask_leaves(model):
    config, rows, attended = model.config, [7, 5], [7, 3]
    queries = config.hidden_size
    seen = [sum(min(i + 1, most) for i in range(n)) for n, most in zip(rows, attended, strict=True)]
    full = sum(n * most for n, most in zip(rows, attended, strict=True))
    difference = prefill_flops(config, rows, attended) - prefill_flops(config, rows, attended, causal=True)
    assert difference == 2 * queries * (full - sum(seen))


def test_in_turns(model):
    prompt = prompts.make_prompt(model, 6, patches=8, text=4, batch=2)
    every = {"half": fftriton.UniformFrames(0.5), "too low": fftriton.FastV(0.1)}
    results = dict(measure.in_turns(model, prompt, every, turns=2, steps=1))
    dense, half = results["dense"], results["half"]
    assert results["too low"] is None  # which two whole layers of eight do not allow
    tokens = 8 + 48
    assert dense.cache == 2 * 2 * 8 * tokens * 2 * 16 * 4  # samples, keys and values, layers, rows, heads, width, bytes
    assert half.cache == dense.cache * (8 + 24) / tokens
    faster, full, causal = half.against(dense)
    assert faster == dense.prefill / half.prefill
    assert full == prefill_flops(model.config, [56] * 8, [56] * 8) / prefill_flops(model.config, [32] * 8, [32] * 8)
    assert full > causal > 1
    assert min(half.limit, dense.limit) > 0


def test_layers_alone_are_those_of_the_model(model):
    prompt = prompts.make_prompt(model, 6, patches=8, text=4, batch=2)
    seen = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for layer in model.model.layers
    ]
    alone = measure.layers_alone(model, prompt, [56] * 8)
    assert torch.equal(alone, measure.forward(model, prompt).logits)
    seen.clear()
    with fftriton.reduce(model, fftriton.FastV(0.5), prompt.layout) as reduction:
        measure.forward(model, prompt)
    rows = measure.rows_of(model.config, prompt, reduction.report)
    reduced, seen[:] = [*seen], []
    measure.layers_alone(model, prompt, rows)
    for hook in hooks:
        hook.remove()
    assert seen == reduced
    assert min(seen) < 56
    assert measure.rows_of(model.config, prompt, None) == [56] * 8


def test_logits_that_are_not_finite_have_no_time(model):
    prompt = prompts.make_prompt(model, 3, patches=4, text=2)
    prompt.embeddings[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="dense: logits are not finite"):
        list(measure.in_turns(model, prompt, {}, turns=1, steps=1))


@pytest.mark.filterwarnings("ignore:.*the budget 0.2 cannot be reached")
def test_the_command(tmp_path):
    path = tmp_path / "prefill.csv"
    given = "--shape toy --frames 3,4,5 --patches 6 --dtype float32 --budgets 0.2 --turns 1 --steps 1"
    done = run(command.main, *given.split(), "--out", str(path))
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(path.open()))
    assert [row["method"] for row in rows[:6]] == ["dense", "framefusion", "fastv", "kvtp", "temporalmerge", "anchors"]
    assert {row["tokens"] for row in rows} == {"98", "104", "110"}
    for row in rows:
        if row["method"] == "fastv":  # two whole layers of eight are too much
            assert row["prefill_ms"] == row["ratio"] == row["of_limit"] == ""
        else:
            assert float(row["ratio"]) == pytest.approx(float(row["faster"]) / float(row["predicted_causal"]), rel=1e-2)
            limit = float(row["limit_ms"]) / float(row["prefill_ms"])
            assert float(row["of_limit"]) == pytest.approx(limit, rel=1e-2)
    done = run(scale.main, str(path))
    assert done.exit_code == 0, done.output
    assert done.output.count("98 to 110") == 5


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [("--shape", "8B", "'8B' must be one of"), ("--frames", "4,x", "numbers between commas"),
     ("--budgets", "0.3,-1", "must be positive"), ("--dtype", "int8", "'int8' must be one of")],
)  # fmt: skip
def test_what_it_refuses(option, value, why):
    done = run(command.main, option, value)
    assert done.exit_code == 2
    assert why in " ".join(done.output.replace("│", " ").split())


def test_exponents():
    about = dict.fromkeys(scale.KEY, "x")
    rows = [about | {"tokens": str(n), "prefill_ms": f"{n**1.5}"} for n in (100, 200, 400, 800)]
    rows += [about | {"method": "short", "tokens": str(n), "prefill_ms": "1"} for n in (100, 200)]
    rows += [about | {"tokens": "800", "prefill_ms": "1e9"}]  # of one length the least counts
    rows += [about | {"method": "twice", "tokens": str(n), "prefill_ms": "1"} for n in (100, 200, 200)]
    rows += [about | {"tokens": "1600", "prefill_ms": ""}]
    (fit,) = scale.fits(rows)
    assert fit.exponent == pytest.approx(1.5)
    assert fit.last == pytest.approx(1.5)
    assert fit.tokens == (100, 800)


def run(main, *arguments):
    """A command of typer's."""
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(arguments))
