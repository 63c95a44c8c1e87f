"""FrameFusion against outputs recorded from the authors' implementation: same rows in every layer, same tokens out."""

import json
from pathlib import Path

import pytest
import torch
from models import behind, cache_of, golden_model, patch_layout
from safetensors.torch import load_file

import fftriton

FOLDER = Path(__file__).parents[1] / "golden"
RECORD = json.loads((FOLDER / "cases.json").read_text())
CASES = {case["name"]: case for case in RECORD["cases"]}


def load(name):
    case = CASES[name]
    tensors = load_file(FOLDER / f"{name}.safetensors")
    model = golden_model(FOLDER, case["model"])
    if case["family"] == "qwen2":
        return (
            case,
            tensors,
            model,
            {"inputs_embeds": tensors["inputs_embeds"]},
            [patch_layout(tensors["patch_type"][0])],
        )
    inputs = {"input_ids": tensors["input_ids"], "attention_mask": torch.ones_like(tensors["input_ids"])}
    inputs |= {name: tensors[name] for name in ("pixel_values_videos", "video_grid_thw", "position_ids")}
    return case, tensors, model, inputs, None


def method(case, **changes):
    parameters = {
        "budget": case["cost"],
        "similarity_threshold": case["similarity_lower_bound"],
        "min_merge_ratio": case["ratio_lower_bound"],
        "importance_queries": case.get("last_queries"),
    }
    return fftriton.FrameFusion(**parameters | changes)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_same_rows_and_logits(name):
    case, tensors, model, inputs, layout = load(name)
    with fftriton.reduce(model, method(case), layout) as reduction:
        logits = model(**inputs).logits[0, -1]
    kept = reduction.report.kept_positions
    assert len(kept) == len(case["tokens_in_attention_per_layer"])
    for layer, positions in enumerate(kept):
        assert torch.equal(positions, tensors[f"kv_positions.layer{layer:02d}"])
    assert (logits - tensors["last_token_logits"]).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_same_greedy_tokens(name):
    case, tensors, model, inputs, layout = load(name)
    cache, tokens = None, []
    with fftriton.reduce(model, method(case), layout):
        for step in range(len(case["generated_ids"])):
            if step:
                inputs = {"input_ids": torch.tensor([[tokens[-1]]]), **behind(cache)}
                inputs["position_ids"] = tensors["generated_position_ids"][step - 1].expand(*position_shape(case), 1, 1)
            out = model(**inputs, use_cache=True)
            cache = cache_of(out)
            tokens.append(int(out.logits[0, -1].argmax()))
    assert tokens == case["generated_ids"]


def position_shape(case):
    return (3,) if case["family"] == "qwen2_vl" else ()


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["family"] == "qwen2"])
def test_generate_gives_the_same_tokens(name):
    case, tensors, model, inputs, layout = load(name)
    with fftriton.reduce(model, method(case), layout):
        out = model.generate(**inputs, max_new_tokens=len(case["generated_ids"]), do_sample=False)
    assert out[0].tolist() == case["generated_ids"]


REFUSED = [case for case in RECORD["official_raises"] if case["raised"].startswith("ValueError")]


@torch.no_grad()
@pytest.mark.parametrize("refused", REFUSED, ids=lambda case: f"{case['inputs_of_case']}-{case['cost']}")
def test_budgets_that_the_authors_code_refuses(refused):
    case, _, model, inputs, layout = load(refused["inputs_of_case"])
    changes = {"budget": refused["cost"], "min_merge_ratio": refused["ratio_lower_bound"]}
    with fftriton.reduce(model, method(case, **changes), layout) as reduction:
        if refused["cost"] == 0.03:  # below what layer 0 alone costs
            with pytest.warns(UserWarning, match=r"budget 0\.03 cannot be reached .* least possible is 0\.04777"):
                model(**inputs)
        else:
            model(**inputs)
    report = reduction.report
    assert report.budget_achieved <= max(refused["cost"], report.least_budget) + 1 / report.num_video_tokens
    assert min(report.vision_tokens_per_layer) >= 1


ACCEPTED = [case for case in RECORD["official_does_not_raise"] if case["cost"] <= 1]


@torch.no_grad()
@pytest.mark.parametrize("accepted", ACCEPTED, ids=lambda case: case["note"].replace(" ", "-"))
def test_same_merges_with_other_parameters(accepted):
    case, _, model, inputs, layout = load(accepted["inputs_of_case"])
    changes = {"budget": accepted["cost"], "min_merge_ratio": accepted["ratio_lower_bound"]}
    with fftriton.reduce(model, method(case, **changes), layout) as reduction:
        model(**inputs)
    report = reduction.report
    text = report.num_tokens - report.num_video_tokens
    ours = [f"{text + step.tokens_before}>{text + step.tokens_after}" for step in report.merge_steps]
    assert ours == [event.rpartition(":")[2] for event in accepted["events_before"].split()]
    assert report.prune_layer is None
