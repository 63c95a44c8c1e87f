"""The budget is met wherever it can be, for every method, depth and kind of video."""

import warnings

import pytest
import torch
from by_hand import decoder_of
from families import FAMILIES
from models import tiny_qwen2, video_embeddings
from newer_families import NEWER_FAMILIES

import fftriton

ALL = FAMILIES | NEWER_FAMILIES

BUDGETS = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]


def run(method, layers, kind, frames=8, patches=12, seed=0):
    embeddings, layout = video_embeddings(frames, patches, kind, seed=seed)
    with torch.no_grad(), fftriton.reduce(tiny_qwen2(layers), method, layout) as reduction:
        tiny_qwen2(layers)(inputs_embeds=embeddings)
    return reduction.report


def assert_met(report, budget):
    wanted = max(budget, report.least_budget)
    assert abs(report.budget_achieved - wanted) <= 1 / report.num_video_tokens + 1e-9
    assert min(report.vision_tokens_per_layer) >= 1
    assert report.vision_tokens_per_layer == sorted(report.vision_tokens_per_layer, reverse=True)


@pytest.mark.parametrize("kind", ["static", "mixed", "unrelated"])
@pytest.mark.parametrize("layers", [2, 6, 28])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.filterwarnings("ignore:fftriton. the budget")
def test_framefusion_meets_its_budget(budget, layers, kind):
    assert_met(run(fftriton.FrameFusion(budget), layers, kind), budget)


@pytest.mark.parametrize("kind", ["static", "mixed", "unrelated"])
@pytest.mark.parametrize("layers", [1, 2, 6])
@pytest.mark.filterwarnings("ignore:fftriton. the budget", "ignore:STSimDiff. the layout")
def test_st_simdiff_meets_its_budget(layers, kind):
    for budget in BUDGETS:
        assert_met(run(fftriton.STSimDiff(budget), layers, kind), budget)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.9, 1.0])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore:fftriton. the budget")
def test_framefusion_meets_it_with_any_threshold(threshold, ratio):
    for seed in range(3):
        method = fftriton.FrameFusion(0.25, similarity_threshold=threshold, min_merge_ratio=ratio)
        assert_met(run(method, 6, "mixed", seed=seed), 0.25)


def test_layers_that_cannot_merge_leave_a_token_for_each_layer_after_them():
    budget = (9 * 96 + 1) / (28 * 96)  # nine full layers would leave one token for the other nineteen
    report = run(fftriton.FrameFusion(budget, min_merge_ratio=0.0), 28, "unrelated")
    assert report.budget_achieved <= budget + 0.5 / 96  # half a token a layer: pruning rounds


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("patches", [1, 5])
@pytest.mark.filterwarnings("ignore:fftriton. the budget")
def test_few_tokens(frames, patches):
    for budget in BUDGETS:
        assert_met(run(fftriton.FrameFusion(budget), 6, "mixed", frames, patches), budget)


def test_unreachable_budget_warns_once_and_names_both():
    embeddings, layout = video_embeddings(8, 12, "unrelated")
    model = tiny_qwen2(2)
    with torch.no_grad(), fftriton.reduce(model, fftriton.FrameFusion(0.3), layout) as reduction:
        with pytest.warns(UserWarning, match=r"budget 0\.3 cannot be reached .* least possible is 0\.5052"):
            model(inputs_embeds=embeddings)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(inputs_embeds=embeddings)
    assert reduction.report.least_budget == pytest.approx((96 + 1) / (2 * 96))
    assert reduction.report.vision_tokens_per_layer == [96, 1]


@pytest.mark.parametrize("layers", [6, 28])
@pytest.mark.parametrize("budget", [0.5, 0.7, 1.0])
def test_fastv_meets_its_budget(budget, layers):
    report = run(fftriton.FastV(budget), layers, "mixed")
    assert_met(report, budget)
    assert report.vision_tokens_per_layer[:2] == [96, 96]
    assert report.prune_layer == (None if budget == 1 else 1)


def test_fastv_refuses_what_its_first_layers_exceed():
    with pytest.raises(ValueError, match=r"FastV: budget must be above layer / num_layers = 2/6.* got 0\.3"):
        fftriton.reduce(tiny_qwen2(6), fftriton.FastV(0.3, layer=2), layout=[])


def test_static_video_merges_at_once_and_unrelated_frames_only_prune():
    static, unrelated = (run(fftriton.FrameFusion(0.3), 6, kind) for kind in ("static", "unrelated"))
    assert len(static.merge_steps) == 1
    assert static.prune_layer is None
    assert len(unrelated.merge_steps[0].merged) == 0
    assert unrelated.prune_layer == 0


EXACT = [fftriton.UniformFrames, fftriton.RandomTokens, fftriton.EVS, fftriton.DyCoke, fftriton.Anchors]


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("budget", [0.001, *BUDGETS])
def test_methods_before_the_first_layer_meet_their_budget_exactly(budget, method):
    report = run(method(budget), 6, "mixed")
    assert report.vision_tokens_per_layer == [max(1, round(96 * budget))] * 6
    video = torch.cat([layout.tokens for layout in report.layouts])
    dropped = video[~torch.isin(video, report.kept_positions[0])]
    assert torch.equal(report.pruned, dropped)


@pytest.mark.parametrize("budget", [0.001, *BUDGETS])
@pytest.mark.parametrize("method", [fftriton.FlashVID, fftriton.FastVID])
def test_methods_of_segments_meet_their_budget_exactly(budget, method):
    for kind in ("static", "mixed", "unrelated"):
        report = run(method(budget), 6, kind)
        assert report.vision_tokens_per_layer == [max(1, round(96 * budget))] * 6


@pytest.mark.parametrize("method", [fftriton.VidCom2, fftriton.VisionZip])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.filterwarnings("ignore:fftriton. the budget")
def test_methods_that_keep_a_token_of_each_frame(budget, method):
    report = run(method(budget), 6, "mixed")
    assert_met(report, budget)
    assert report.vision_tokens_per_layer == [max(8, round(96 * budget))] * 6
    assert report.least_budget == max(budget, 8 / 96)


@pytest.mark.parametrize("family", ALL.values(), ids=ALL)
@torch.no_grad()
def test_methods_that_look_at_frames_meet_their_budget_on_every_family(family):
    model, inputs = family.model(), family.inputs()
    sizes = {"proportional": all(hasattr(layer, "self_attn") for layer in decoder_of(model).layers)}
    methods = [fftriton.EVS, fftriton.VidCom2, fftriton.DyCoke, fftriton.VisionZip, fftriton.FlashVID, fftriton.FastVID]
    for method in [make(0.6) for make in methods] + [fftriton.Anchors(0.6, **sizes)]:
        with fftriton.reduce(model, method) as reduction:
            logits = model(**inputs).logits
        report = reduction.report
        assert set(report.vision_tokens_per_layer) == {round(0.6 * report.num_video_tokens)}
        kept = report.kept_positions[0]
        assert len(kept) == report.num_tokens - report.num_video_tokens + report.vision_tokens_per_layer[0]
        assert bool(logits[0, kept].isfinite().all())


def test_temporal_merge_leaves_room_for_pruning():
    report = run(fftriton.TemporalMerge(0.4) + fftriton.FastV(0.3, layer=3, importance_queries=4), 6, "mixed")
    early = round(96 * 0.4)
    assert report.vision_tokens_per_layer == [early] * 3 + [round((6 * 96 * 0.3 - 3 * early) / 3)] * 3


@pytest.mark.filterwarnings("ignore:fftriton. the budget")
def test_temporal_merge_keeps_the_first_frame():
    report = run(fftriton.TemporalMerge(0.01), 6, "unrelated")
    frames = len(report.layouts[0].positions)
    assert report.least_budget == report.budget_achieved == 1 / frames


@pytest.mark.parametrize("threshold", [-1.0, 0.6])
@pytest.mark.parametrize("stages", [("merge",), ("prune",), ("prune", "merge")], ids="-then-".join)
@pytest.mark.parametrize("start", [0, 1, 3])
def test_halves_of_framefusion_meet_their_budget(start, stages, threshold):
    method = fftriton.FrameFusion(0.8, threshold, stages=stages, start_layer=start)
    report = run(method, 6, "static")
    assert abs(report.budget_achieved - 0.8) <= 1 / 96
    first = max(start, stages[0] == "prune")  # pruning needs attention
    assert report.vision_tokens_per_layer[:first] == [96] * first
    assert report.vision_tokens_per_layer[first] < 96
    assert bool(report.merge_steps) == ("merge" in stages)
    assert report.prune_layer == (first - 1 if "prune" in stages else None)


def test_pruning_before_merging_drops_half_of_what_has_to_go():
    report = run(fftriton.FrameFusion(0.5, -1.0, stages=("prune", "merge")), 6, "mixed")
    affordable = (0.5 * 6 - 1) / 5 * 96
    assert len(report.pruned) == round((96 - affordable) / 2)
    assert (report.prune_layer, [step.layer for step in report.merge_steps]) == (0, [1])


@pytest.mark.filterwarnings("ignore:fftriton. the budget")
def test_merging_at_one_layer_only():
    cascaded, once = (run(fftriton.FrameFusion(0.4, 0.9, 0.0, cascaded=flag), 28, "mixed") for flag in (True, False))
    assert len(once.merge_steps) == 1
    assert once.prune_layer == 0
    assert len(cascaded.merge_steps) > 1
    late = run(fftriton.FrameFusion(0.4, 0.9, start_layer=4, cascaded=False), 28, "mixed")
    assert [step.layer for step in late.merge_steps] == [3]
    assert_met(late, 0.4)


def test_merging_alone_says_what_it_could_not_meet():
    method = fftriton.FrameFusion(0.3, 0.99, stages=("merge",))
    with pytest.warns(UserWarning, match=r"budget 0\.3 cannot be reached .* least possible is 1, and 1 of"):
        report = run(method, 6, "unrelated")
    assert report.vision_tokens_per_layer == [96] * 6
    assert report.least_budget == 1


def test_a_start_that_exceeds_the_budget_is_refused():
    with pytest.raises(
        ValueError, match=r"FrameFusion: budget must be above start_layer / num_layers = 2/6.* got 0\.3"
    ):
        fftriton.reduce(tiny_qwen2(6), fftriton.FrameFusion(0.3, start_layer=2), layout=[])
