"""KVTP in the wrapper: exact counts before the first layer, true positions, and another method behind it."""

import json
import math
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand, Scripted, generate, see_prompt
from families import FAMILIES, collate
from models import tiny_qwen2, video_embeddings

import fftriton
from fftriton import KVTP, FastV, FrameFusion, PruMerge, ToMe, TopKPruner, UniformFrames, VisionZip, frame_budgets
from fftriton.evaluate import Setting
from fftriton.hf.flops import prefill_flops, reduced_flops
from fftriton.hf.sizes import channels
from fftriton.methods import BeforeLayers, OwnAttention, from_dict, parse, to_dict, to_text
from fftriton.relevance import BoundRelevance

PRUNERS = ["random", "topk", "prumerge", "tome"]
SCORES = torch.tensor([0.0, 6.0, -1.0, 0.5, 3.0, 0.0, 1.0, 2.0])


def relevance(context):
    """Scores of as many frames as the video has, from another one on for each video."""
    return SCORES.roll(context.video)[: context.num_frames]


def qwen2():
    embeddings, layout = video_embeddings(6, 8)
    return tiny_qwen2(3), {"inputs_embeds": embeddings}, layout


def case_of(family):
    return lambda: (family.model(), family.inputs(), None)


CASES = {"qwen2": qwen2} | {name: case_of(family) for name, family in FAMILIES.items()}
EVERY_FAMILY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@torch.no_grad()
def forward(model, inputs, method, layout):
    with fftriton.reduce(model, method, layout) as reduction:
        logits = model(**inputs).logits
    return logits, reduction.report


def frames_of(report):
    """The positions [n] of each frame of all videos, and their scores [F]."""
    scores = torch.cat([SCORES.roll(i)[: len(one.positions)] for i, one in enumerate(report.layouts)])
    return [frame[frame >= 0] for one in report.layouts for frame in one.positions], scores


@pytest.mark.parametrize("pruner", PRUNERS)
@EVERY_FAMILY
def test_every_frame_gets_its_count(case, pruner):
    model, inputs, layout = case()
    for budget in (0.3, 0.77):
        _, report = forward(model, inputs, KVTP(budget, relevance, pruner), layout)
        total = round(budget * report.num_video_tokens)
        assert set(report.vision_tokens_per_layer) == {total}
        kept = report.kept_positions[0]
        assert bool((kept.diff() > 0).all())
        assert len(kept) == report.num_tokens - report.num_video_tokens + total
        frames, scores = frames_of(report)
        counts = frame_budgets(scores, torch.tensor([len(frame) for frame in frames]), budget)
        assert [int(torch.isin(frame, kept).sum()) for frame in frames] == counts.tolist()


class Grouped(ByHand):
    """Before the first layer each of these groups of positions becomes its mean, at the first of them."""

    def __init__(self, model, groups):
        super().__init__(model, [])
        self.groups, self.length = groups, 1 + max(place for group in groups for place in group)

    def merge(self, position):
        return self.groups + [[place] for place in position if place >= self.length]


@pytest.mark.parametrize("pruner", ["topk", ToMe("weighted"), "visionzip"], ids=["topk", "tome", "visionzip"])
@EVERY_FAMILY
@torch.no_grad()
def test_equals_a_recomputation_by_hand(case, pruner):
    """The rows that stay, with the position ids they had, through every layer; twelve tokens generated."""
    model, inputs, layout = case()
    with fftriton.reduce(model, KVTP(0.4, relevance, pruner), layout) as reduction:
        tokens, logits = generate(model, inputs)
    report = reduction.report
    groups = {place: [place] for place in report.kept_positions[0].tolist()}
    for step in report.merge_steps:
        for place, root in zip(step.merged.tolist(), step.into.tolist(), strict=True):
            groups[root].append(place)
    by_hand = Grouped(model, list(groups.values()))
    by_hand.check(see_prompt(model, inputs), Scripted(merge_after=(), drop_after=()), tokens, logits)
    assert max(map(len, groups.values())) > 1 or pruner == "topk"


@pytest.mark.parametrize("pruner", PRUNERS)
@torch.no_grad()
def test_generates_as_without_a_cache(pruner):
    model, inputs, layout = CASES["qwen2_vl"]()
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with fftriton.reduce(model, KVTP(0.3, relevance, pruner), layout):
        cached = model.generate(**inputs, **options)
        slow = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached.sequences, slow.sequences)
    assert (torch.cat(cached.logits) - torch.cat(slow.logits)).abs().max() < 1e-4


@EVERY_FAMILY
def test_a_full_budget_is_bit_identical(case):
    model, inputs, layout = case()
    with torch.no_grad():
        dense = model(**inputs).logits
    assert torch.equal(forward(model, inputs, KVTP(1.0, relevance), layout)[0], dense)


def test_frames_with_holes_share_exactly():
    embeddings, (layout,) = video_embeddings(6, 8)
    positions = layout.positions.clone()
    positions[1, 2:] = -1  # what stands there is text then
    positions[4, ::2] = -1
    layout = fftriton.VideoLayout(positions)
    for pruner in PRUNERS:
        _, report = forward(tiny_qwen2(3), {"inputs_embeds": embeddings}, KVTP(0.4, SCORES[:6], pruner), [layout])
        counts = frame_budgets(SCORES[:6], (positions >= 0).sum(1), 0.4)
        kept = report.kept_positions[0]
        assert [int(torch.isin(frame[frame >= 0], kept).sum()) for frame in positions] == counts.tolist()
        assert counts[1] == 2  # all that it has


def test_a_newline_token_outside_the_layout_stays_and_does_not_count():
    embeddings, (layout,) = video_embeddings(6, 9)
    rows = fftriton.VideoLayout(layout.positions[:, :8].contiguous())  # the ninth ends a frame
    _, report = forward(tiny_qwen2(3), {"inputs_embeds": embeddings}, KVTP(0.25, SCORES[:6], "tome"), [rows])
    assert report.vision_tokens_per_layer == [12] * 3
    assert bool(torch.isin(layout.positions[:, 8], report.kept_positions[0]).all())


@torch.no_grad()
def test_renumbered_it_is_a_shorter_prompt():
    model, inputs, layout = qwen2()
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with fftriton.reduce(model, KVTP(0.3, SCORES[:6], renumber=True), layout) as reduction:
        out = model.generate(**inputs, **options)
    kept = reduction.report.kept_positions[0]
    short = model.generate(inputs_embeds=inputs["inputs_embeds"][:, kept], **options)
    assert torch.equal(out.sequences, short.sequences)
    assert (torch.cat(out.logits) - torch.cat(short.logits)).abs().max() < 1e-4
    with fftriton.reduce(model, KVTP(0.3, SCORES[:6]), layout):
        with_gaps = model.generate(**inputs, **options)
    assert (torch.cat(with_gaps.logits) - torch.cat(short.logits)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_positions_of_three_axes_are_not_renumbered(name):
    model = CASES[name]()[0]
    with pytest.raises(ValueError, match="renumber must be False for .*, whose positions have three axes"):
        fftriton.reduce(model, KVTP(0.5, renumber=True) + FrameFusion(0.2))


def test_without_relevance_all_frames_get_the_same():
    model, inputs, layout = qwen2()
    kept = forward(model, inputs, KVTP(0.25), layout)[1].kept_positions[0]
    assert [int(torch.isin(frame, kept).sum()) for frame in layout[0].positions] == [2] * 6


@pytest.mark.parametrize("pruner", ["random", "topk", "prumerge"])
def test_hard_key_frames(pruner):
    model, inputs, layout = qwen2()
    method = KVTP(1 / 3, SCORES[:6], pruner, temperature=1e-6, min_tokens=0)
    logits, report = forward(model, inputs, method, layout)
    kept = report.kept_positions[0]
    assert [int(torch.isin(frame, kept).sum()) for frame in layout[0].positions] == [0, 8, 0, 0, 8, 0]
    assert bool(logits.isfinite().all())


def test_a_function_sees_each_video_and_the_text():
    seen = []

    def noting(context):
        seen.append((context.sample, context.video, tuple(context.present.sum(1).tolist()), tuple(context.text.shape)))
        assert context.hidden.shape == (*context.present.shape, 64)
        return relevance(context)

    model, inputs, _ = CASES["qwen2_vl"]()
    logits, report = forward(model, inputs, KVTP(0.3, noting), None)
    text = (report.num_tokens - report.num_video_tokens, 64)
    sizes = [(one.positions.shape[1],) * len(one.positions) for one in report.layouts]
    assert seen == [(0, video, size, text) for video, size in enumerate(sizes)]
    assert len(seen) == 2
    scores = [SCORES.roll(i)[: len(size)] for i, size in enumerate(sizes)]
    assert torch.equal(logits, forward(model, inputs, KVTP(0.3, scores), None)[0])


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("total", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("name", ["qwen2", "qwen2_vl", "qwen3_vl"])
@pytest.mark.filterwarnings("ignore:fftriton. the budget")
def test_a_chain_meets_its_total(name, total, pruner):
    model, inputs, layout = CASES[name]()
    _, report = forward(model, inputs, KVTP(0.4, relevance, pruner) + FrameFusion(total), layout)
    assert report.budget == total
    assert report.vision_tokens_per_layer[0] <= round(0.4 * report.num_video_tokens)
    wanted = max(total, report.least_budget)
    assert abs(report.budget_achieved - wanted) <= 1.5 / report.num_video_tokens


@torch.no_grad()
def test_a_chain_is_the_second_on_what_the_first_leaves():
    model, inputs, layout = qwen2()
    logits, report = forward(model, inputs, KVTP(0.5, relevance, "topk") + FrameFusion(0.2), layout)
    kept = forward(model, inputs, KVTP(0.5, relevance, "topk"), layout)[1].kept_positions[0]
    row = torch.full((report.num_tokens,), -1).index_copy(0, kept, torch.arange(len(kept)))
    short = fftriton.VideoLayout(row[layout[0].positions])
    arguments = {"inputs_embeds": inputs["inputs_embeds"][:, kept], "position_ids": kept[None]}
    by_hand, second = forward(model, arguments, FrameFusion(0.2 * 48 / 24), [short])
    torch.testing.assert_close(logits[:, kept], by_hand, rtol=0, atol=1e-5)
    assert report.vision_tokens_per_layer == second.vision_tokens_per_layer
    assert [kept[positions].tolist() for positions in second.kept_positions] == [
        positions.tolist() for positions in report.kept_positions
    ]


def test_a_chain_reports_both_steps():
    model, inputs, layout = qwen2()
    report = forward(model, inputs, KVTP(0.5, relevance, "topk") + FrameFusion(0.2), layout)[1]
    first = forward(model, inputs, KVTP(0.5, relevance, "topk"), layout)[1]
    assert torch.equal(report.pruned[: len(first.pruned)], first.pruned)
    assert (report.merge_steps[0].tokens_before, len(first.pruned)) == (24, 24)
    gone = torch.cat([report.pruned, *(step.merged for step in report.merge_steps)]).sort().values
    video = layout[0].tokens
    assert torch.equal(gone, video[~torch.isin(video, report.kept_positions[-1])])


@dataclass(frozen=True)
class WithoutFirstVideo(BeforeLayers):
    """Drops the first video of the sample."""

    budget: float = 0.5

    def shorten(self, tokens, prompt):
        gone = torch.isin(tokens.position[0], prompt.layouts[0].tokens)
        rows = (~gone).nonzero()[:, 0][None]
        return tokens.keep(rows, tokens.num_video - int(gone.sum()))


def test_a_chain_keeps_the_numbers_of_the_videos():
    """The first of two videos is dropped; what is left is still number 1."""
    seen = []

    def noting(context):
        seen.append(context.video)
        return relevance(context)

    model, inputs, _ = CASES["qwen2_vl"]()
    logits, report = forward(model, inputs, WithoutFirstVideo() + KVTP(0.2, noting), None)
    assert seen == [1]
    assert len(report.layouts) == 2
    scores = [torch.zeros(len(report.layouts[0].positions)), SCORES.roll(1)[: len(report.layouts[1].positions)]]
    assert torch.equal(logits, forward(model, inputs, WithoutFirstVideo() + KVTP(0.2, scores), None)[0])


def test_a_chain_of_which_the_first_leaves_nothing():
    model, inputs, layout = qwen2()
    _, report = forward(model, inputs, KVTP(0.01, min_tokens=0) + FrameFusion(0.01), layout)
    assert report.vision_tokens_per_layer == [0] * 3


def test_a_chain_with_nothing_to_do_first():
    model, inputs, layout = qwen2()
    chained = forward(model, inputs, KVTP(1.0, relevance) + FrameFusion(0.3), layout)
    alone = forward(model, inputs, FrameFusion(0.3), layout)
    assert torch.equal(chained[0], alone[0])
    assert chained[1].least_budget == alone[1].least_budget


def test_other_chains():
    model, inputs, layout = qwen2()
    report = forward(model, inputs, KVTP(0.5, relevance) + FastV(0.3, layer=1), layout)[1]
    assert report.vision_tokens_per_layer == [24, 10, 10]  # 24 + 2 n = 0.3 * 48 * 3
    report = forward(model, inputs, UniformFrames(0.5) + FrameFusion(0.25), layout)[1]
    assert report.budget_achieved == pytest.approx(0.25, abs=0.01)


def test_chains_that_cannot_be():
    with pytest.raises(
        ValueError, match=r"budgets must not rise.* FrameFusion must not be above .* KVTP, 0.2; got 0.3"
    ):
        KVTP(0.2) + FrameFusion(0.3)
    with pytest.raises(TypeError, match="unsupported operand"):
        FrameFusion(0.3) + KVTP(0.2)
    with pytest.raises(ValueError, match=r"FastV: budget must be above layer / num_layers"):
        fftriton.reduce(tiny_qwen2(3), KVTP(0.5) + FastV(0.25, layer=2), layout=[])
    assert str(KVTP(0.5) + FrameFusion(0.2)).startswith("KVTP(budget=0.5, pruner='topk', ")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: KVTP(0.3, SCORES[:5]), r"one score for each of the 6 frames of video 0, got 5"),
        (lambda: KVTP(0.3, []), r"relevance must hold scores for each video of the batch, got 0 for 1"),
        (lambda: KVTP(0.3, lambda context: SCORES[:4]), r"one score for each of the 6 frames of video 0, got 4"),
        (lambda: KVTP(0.3, lambda context: SCORES[:6] * math.nan), r"relevance must be finite, got nan"),
        (lambda: KVTP(0.3, [SCORES[:6], SCORES[:6]]), r"for each video of the batch, got 2 for 1"),
        (lambda: KVTP(0.3, BoundRelevance(torch.zeros(42))), r"whose tokens make 6 frames, got 42"),
        (lambda: KVTP(0.3, SCORES[:6], TopKPruner("predictor")), r"needs a relevance that knows patches"),
        (
            lambda: KVTP(0.3, SCORES[:6], PruMerge(lambda context: context.hidden[..., 0] * math.nan)),
            "PruMerge: importance must be finite",
        ),
    ],
)
def test_bad_relevance_is_refused_and_the_model_stays_as_it_was(method, message):
    model, inputs, layout = qwen2()
    with torch.no_grad():
        dense = model(**inputs).logits
    with pytest.raises(ValueError, match=message):
        forward(model, inputs, method(), layout)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, dense)


def test_bad_parameters():
    for relevance, got in (([0.5, 0.7], "float"), (np.array(["a"]), "an array of <U1"), ([[0.5]], "list")):
        with pytest.raises(TypeError, match=f"relevance must be a tensor, an array, .* or None, got {got}"):
            KVTP(0.2, relevance)
    with pytest.raises(ValueError, match=r"relevance must be real numbers \[F\], got \[2, 3\] of torch.float64"):
        KVTP(0.2, np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"relevance must be real numbers \[F\], got \[1, 8\] of torch.float32"):
        KVTP(0.2, SCORES[None])
    with pytest.raises(ValueError, match="relevance must be finite, got nan"):
        KVTP(0.2, SCORES * math.nan)
    with pytest.raises(ValueError, match=r"KVTP: budget must be in \(0, 1\], got 0"):
        KVTP(0)
    with pytest.raises(ValueError, match="KVTP: temperature must be above 0, got 0"):
        KVTP(0.2, temperature=0)
    with pytest.raises(ValueError, match="KVTP: min_tokens must be at least 0, got -1"):
        KVTP(0.2, min_tokens=-1)
    with pytest.raises(ValueError, match="min_tokens must be at least 1 for ToMe, .* got 0"):
        KVTP(0.2, pruner="tome", min_tokens=0)


def test_arrays_are_scores():
    model, inputs, layout = qwen2()
    logits, _ = forward(model, inputs, KVTP(0.3, SCORES[:6]), layout)
    for scores in (SCORES[:6].numpy(), [SCORES[:6].double().numpy()], lambda context: SCORES[:6].numpy()):
        assert torch.equal(forward(model, inputs, KVTP(0.3, scores), layout)[0], logits)


@pytest.mark.parametrize("temperature", [0.5, 2.0, math.inf])
def test_a_video_without_scores_gets_what_the_average_frame_gets(temperature):
    model, inputs, _ = CASES["qwen2_vl"]()
    for scores in ([None, SCORES[:4]], [SCORES[:4], None]):
        _, report = forward(model, inputs, KVTP(0.2, scores, temperature=temperature, min_tokens=0), None)
        given = 1 if scores[0] is None else 0
        counts, (noted,) = report.frame_counts, report.frame_scores
        assert noted.video == given
        assert max(counts[1 - given]) - min(counts[1 - given]) <= 1
        assert sum(counts[1 - given]) / 4 == pytest.approx(sum(counts[given]) / 4, abs=1)
        assert math.isinf(temperature) or counts[given].argmax() == 1
    even = forward(model, inputs, KVTP(0.5, [None, None]), None)[0]
    assert torch.equal(even, forward(model, inputs, KVTP(0.5), None)[0])


def test_scores_of_one_video_do_not_serve_two():
    model, inputs, _ = CASES["qwen2_vl"]()
    for scores in (SCORES[:2], BoundRelevance(SCORES[:2])):
        with pytest.raises(ValueError, match="relevance must hold scores for each video of the batch, got 1 for 2"):
            forward(model, inputs, KVTP(0.3, scores), None)


def test_a_binding_is_refused_for_another_video():
    model, inputs, layout = qwen2()
    method = KVTP(0.3, BoundRelevance(SCORES[:6]))
    logits = forward(model, inputs, method, layout)[0]
    assert torch.equal(forward(model, inputs, method, layout)[0], logits)
    other = {"inputs_embeds": inputs["inputs_embeds"].roll(8, dims=1)}
    with pytest.raises(ValueError, match="a relevance belongs to the video that it was first used for"):
        forward(model, other, method, layout)


@pytest.mark.parametrize(("method", "least"), [(KVTP(0.05), 6), (KVTP(0.3, SCORES[:6], "tome", min_tokens=4), 24)])
def test_a_budget_below_the_floor_is_met_as_closely_as_possible(method, least):
    model, inputs, layout = qwen2()
    text = f"the budget {method.budget:g} cannot be reached on this prompt; the least possible is {least / 48:.4g}"
    with warnings.catch_warnings(record=True) as warned, fftriton.reduce(model, method, layout) as reduction:
        warnings.simplefilter("always")
        for _ in range(2):
            with torch.no_grad():
                model(**inputs)
    (warning,) = warned
    assert text in str(warning.message)
    assert reduction.report.vision_tokens_per_layer == [least] * 3
    assert reduction.report.least_budget == least / 48


def test_the_report_has_scores_counts_and_the_cost_of_the_predictor():
    model, inputs, layout = qwen2()
    bound = BoundRelevance(SCORES[:6], seconds=1.5, macs=2e9)
    _, report = forward(model, inputs, KVTP(0.5, bound) + FrameFusion(0.4), layout)
    (scores,), (counts,) = report.frame_scores, report.frame_counts
    assert torch.equal(scores.scores, SCORES[:6])
    kept = report.kept_positions[0]
    assert counts.tolist() == [int(torch.isin(frame, kept).sum()) for frame in layout[0].positions]
    assert (report.relevance_seconds, report.relevance_macs) == (1.5, 2e9)
    written = json.loads(json.dumps(report.to_dict()))["samples"][0]
    assert written["frame_counts"] == [counts.tolist()]
    assert written["frame_scores"] == [{"video": 0, "scores": SCORES[:6].tolist(), "seconds": 1.5, "macs": 2e9}]
    assert "relevance: 1.5 s, 2 GMACs" in str(report)
    assert "tokens a frame, scores -1 to 6" in str(report)
    assert forward(model, inputs, KVTP(0.5), layout)[1].frame_scores == []


@torch.no_grad()
def test_a_batch_is_its_samples_and_beams_share_their_scores():
    family = FAMILIES["qwen2_vl"]
    model, samples = family.model(), [family.inputs(seed=0), family.inputs(videos=(3,), image=False, seed=1)]
    inputs = collate(samples, "left")
    scores = [SCORES[:4], SCORES[4:], SCORES[1:4]]  # two videos of the first sample, one of the second
    with fftriton.reduce(model, KVTP(0.3, scores)) as reduction:
        model(**inputs)
        reports = reduction.report.samples
        model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
        beams = reduction.report.samples
    length = inputs["input_ids"].shape[1]
    for report, sample, own in zip(reports, samples, (scores[:2], scores[2:]), strict=True):
        alone = forward(model, sample, KVTP(0.3, own), None)[1]
        padding = length - sample["input_ids"].shape[1]
        assert torch.equal(report.kept_positions[0] - padding, alone.kept_positions[0])
    assert [beam.kept_positions[0].tolist() for beam in beams] == [
        report.kept_positions[0].tolist() for report in reports for _ in range(2)
    ]
    with pytest.raises(ValueError, match="relevance must hold scores for each video of the batch, got 2 for 3"):
        forward(model, inputs, KVTP(0.3, scores[:2]), None)


def attention_by_hand(model, inputs, layout, tokens, layer, queries):
    """The attention that the most attended of the most distinct tokens of each frame receives, in a short prompt."""
    decoder, seen = model.get_decoder(), {}

    def see(module, args, kwargs):
        seen.update(kwargs)

    with torch.no_grad():
        handle = decoder.register_forward_pre_hook(see, with_kwargs=True)
        model(**inputs)
        handle.remove()
        embeddings = seen["inputs_embeds"] if seen.get("inputs_embeds") is not None else None
        frames = [frame[frame >= 0] for one in layout for frame in one.positions]
        chosen = []
        for frame in frames:
            unit = F.normalize(embeddings[0, frame], dim=-1)
            distinct = 1 - F.cosine_similarity(unit, unit.sum(0)[None])
            chosen.append(frame[distinct.topk(min(tokens, len(frame))).indices])
        video, kept = torch.cat(frames), torch.cat(chosen)
        rows = torch.tensor([i for i in range(embeddings.shape[1]) if i not in video or i in kept])
        position_ids = seen.get("position_ids")
        positions = rows[None] if position_ids is None else position_ids[..., rows]
        before, model.config._attn_implementation = model.config._attn_implementation, "eager"
        model.set_attn_implementation("eager")
        output = decoder(
            inputs_embeds=embeddings[:, rows],
            position_ids=positions,
            output_attentions=True,
            use_cache=False,
            attention_mask=torch.ones(1, len(rows)),
        )
        model.set_attn_implementation(before)
        for module in model.modules():  # transformers 4.57 leaves behind what records attention
            module.__dict__.pop("forward", None)
    received = output.attentions[layer][0].mean(0)[-queries:].sum(0)
    return torch.stack([received[torch.isin(rows, own)].max() for own in chosen])


@pytest.mark.parametrize(
    ("own", "layer"), [(OwnAttention(), None), (OwnAttention(2, 0, 3), 0), (OwnAttention(9, 1, 1), 1)], ids=str
)
@pytest.mark.parametrize("name", ["qwen2", "qwen2_vl", "llava_onevision"])
def test_own_attention_is_that_of_a_short_prompt(name, own, layer):
    model, inputs, layout = CASES[name]()
    _, report = forward(model, inputs, KVTP(0.3, own), layout)
    layer = len(model.get_decoder().layers) // 2 if layer is None else layer
    expected = attention_by_hand(model, inputs, report.layouts, own.tokens, layer, own.queries)
    scores = torch.cat([one.scores for one in report.frame_scores])
    torch.testing.assert_close(scores, 2 * expected.log(), rtol=0, atol=1e-4)
    rows = report.num_tokens - report.num_video_tokens + sum(
        min(own.tokens, int((frame >= 0).sum())) for one in report.layouts for frame in one.positions
    )  # fmt: skip
    counts = [rows] * (layer + 1) + [0]
    assert report.relevance_macs == prefill_flops(model.config.get_text_config(), counts, counts)
    assert report.relevance_seconds == 0  # it is part of the prefill


def test_operations_of_a_short_prompt_with_sizes():
    model, inputs, layout = CASES["qwen2"]()
    chains = [VisionZip(0.6, proportional=sizes) + KVTP(0.3, "attention") for sizes in (False, True)]
    plain, sized = (forward(model, inputs, chain, layout)[1] for chain in chains)
    config, layer = model.config.get_text_config(), len(model.get_decoder().layers) // 2
    assert (plain.sized_layers, sized.sized_layers) == ([], list(range(config.num_hidden_layers)))
    assert plain.rows_per_layer == sized.rows_per_layer
    head = config.hidden_size // config.num_attention_heads
    wider = 2 * config.num_attention_heads * (channels(head) - head)
    rows = next(n for n in range(1, plain.num_tokens) if plain.relevance_macs == prefill_flops(
        config, counts := [n] * (layer + 1) + [0], counts
    ))  # fmt: skip
    assert sized.relevance_macs - plain.relevance_macs == wider * rows**2 * (layer + 1)
    whole = reduced_flops(config, sized) - reduced_flops(config, plain)
    assert whole == wider * (rows**2 * (layer + 1) + sum(n**2 for n in plain.rows_per_layer))


@EVERY_FAMILY
@torch.no_grad()
def test_own_attention_leaves_the_forward_as_it_is(case):
    """What is generated is what the same scores give, and the model is as before."""
    model, inputs, layout = case()
    dense = model(**inputs).logits
    with fftriton.reduce(model, KVTP(0.4, "attention"), layout) as reduction:
        tokens, logits = generate(model, inputs)
    scores = [one.scores for one in reduction.report.frame_scores]
    assert len(torch.cat(scores).unique()) > 1
    with fftriton.reduce(model, KVTP(0.4, scores), layout):
        expected, expected_logits = generate(model, inputs)
    assert torch.equal(tokens, expected)
    assert torch.equal(logits, expected_logits)
    assert torch.equal(model(**inputs).logits, dense)


@torch.no_grad()
def test_own_attention_of_a_padded_batch_and_other_back_ends():
    family = FAMILIES["qwen2_vl"]
    model, samples = family.model(), [family.inputs(seed=0), family.inputs(videos=(3,), image=False, seed=1)]
    with fftriton.reduce(model, KVTP(0.3, "attention")) as reduction:
        alone = []
        for sample in samples:
            model(**sample)
            alone.append(reduction.report.frame_scores)
        model(**collate(samples, "left"))
        together = [sample.frame_scores for sample in reduction.report.samples]
        model.set_attn_implementation("eager")
        model(**samples[0])
        eager = reduction.report.frame_scores
    for one, other in [*zip(alone, together, strict=True), (alone[0], eager)]:
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-4)


def test_own_attention_after_another_method_and_where_it_cannot_work():
    model, inputs, layout = qwen2()
    _, report = forward(model, inputs, UniformFrames(0.5) + KVTP(0.2, "attention"), layout)
    assert len(report.frame_scores[0].scores) == 6
    with pytest.raises(ValueError, match="OwnAttention: layer must be below the number of layers, 3, got 3"):
        fftriton.reduce(model, KVTP(0.3, OwnAttention(layer=3)), layout)
    for name, value in (("tokens", 0), ("layer", -1), ("queries", 0)):
        with pytest.raises(ValueError, match=f"OwnAttention: {name} must be at least"):
            OwnAttention(**{name: value})


def test_own_attention_as_text():
    method = parse("kvtp:relevance=attention(tokens=2;layer=1)", 0.2)
    assert method.relevance == OwnAttention(2, 1)
    assert parse("kvtp:relevance=attention", 0.2).relevance == OwnAttention()
    assert from_dict(to_dict(method)).relevance == parse(to_text(method)).relevance == method.relevance
    assert Setting("kvtp:relevance=attention", 0.2).relevances == []
