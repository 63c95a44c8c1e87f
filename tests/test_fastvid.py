"""FastVID, against the authors' code and against loops over segments."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from frame_samples import ragged, sequence
from safetensors.torch import load_file

import fftriton
from fftriton import FastVID, VideoLayout
from fftriton.methods.base import Prompt, list_steps
from fftriton.methods.fastvid import _anchor_weights, _groups
from fftriton.methods.frames import FrameRows

RECORDED = load_file(Path(__file__).parent / "golden" / "methods" / "fastvid.safetensors")


def shorten(method, tokens, layouts):
    return [tokens, *list_steps(method.begin(Prompt(6, tokens.length, layouts)).before_attention(0, tokens))][-1]


def test_what_stays_is_the_authors():
    x, kept = RECORDED["x"], RECORDED["kept"].long()
    tokens, frames = sequence(x)
    contextual = 1 - RECORDED["salient"].numel() / len(kept)
    method = FastVID(0.4, contextual, min_segments=4, importance=lambda _: RECORDED["importance"])
    left = shorten(method, tokens, [VideoLayout(frames.rows)])
    assert torch.equal(left.position[0], kept)
    torch.testing.assert_close(left.hidden[0], RECORDED["rows"], rtol=0, atol=1e-5)
    changed = (left.hidden[0] != tokens.hidden[0, kept]).any(-1)
    assert int(changed.sum()) > 40  # anchors have taken up others


def test_the_recorded_video_has_segments_of_several_lengths():
    assert RECORDED["segments"].tolist() == [2, 1, 4, 8]


def test_anchors_are_shared_among_every_fourth_frame_of_a_segment():
    segment = torch.tensor([0, 0, 1, 2, 2, 2, 2, 2])
    weights = _anchor_weights(segment, torch.full((8,), 10), 4)
    assert weights.tolist() == [0, 20, 10, 25, 0, 0, 0, 25]


@pytest.mark.parametrize("seed", range(3))
def test_anchors_by_hand(seed):
    """Every frame with anchors of a segment takes up all tokens of the segment that are not salient."""
    tokens, layouts = ragged(seed)
    frames = FrameRows.of(layouts, tokens)
    method = FastVID(0.4, 0.5, 0.3, 2, 2, 0.25, "norm")
    left = shorten(method, tokens, layouts)
    x, kept = tokens.hidden[0], left.position[0]
    changed = {int(row): out for row, out in zip(kept, left.hidden[0], strict=True) if not torch.equal(out, x[row])}
    segments = []
    for first, last in ((0, 5), (5, 8)):
        means = torch.stack([x[rows[rows >= 0]].mean(0) for rows in frames.rows[first:last]])
        cosine = F.cosine_similarity(means[1:], means[:-1], dim=-1)
        cuts = {i + 1 for i in range(len(cosine)) if cosine[i] < 0.3} | {int(cosine.argmin()) + 1}
        bounds = [0, *sorted(cuts), last - first]
        segments += [list(range(first + a, first + b)) for a, b in pairwise(bounds)]
    total = max(1, round(0.4 * tokens.num_video))
    number = total - math.floor(0.5 * total)
    importance = x.norm(dim=-1)
    even = fftriton.frame_budgets(torch.zeros(8), frames.sizes, number / tokens.num_video, math.inf, 0).tolist()
    salient = set()
    for rows, count in zip(frames.rows.tolist(), even, strict=True):
        there = sorted((row for row in rows if row >= 0), key=lambda row: -float(importance[row]))
        salient |= set(there[:count])
    assert salient <= set(kept.tolist())
    anchors = [row for row in kept.tolist() if int(tokens.patch[0, row]) >= 0 and row not in salient]
    assert len(anchors) == total - number
    assert set(changed) <= set(anchors)
    expected = {}
    for segment in segments:
        members = [row for f in segment for row in frames.rows[f].tolist() if row >= 0 and row not in salient]
        for f in segment:
            own = [row for row in frames.rows[f].tolist() if row in anchors]
            joined = {row: [] for row in own}
            for member in members if own else []:
                cosines = [float(F.cosine_similarity(x[member], x[row], dim=0)) for row in own]
                joined[own[max(range(len(own)), key=cosines.__getitem__)]].append(member)
            for row, those in joined.items():
                weight = max(1 / (len(those) + 1), 0.25)
                expected[row] = weight * x[row] + (1 - weight) * x[those].mean(0)
    for row, out in zip(kept.tolist(), left.hidden[0], strict=True):
        torch.testing.assert_close(out, expected.get(row, x[row]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("contextual", [0.0, 0.4, 1.0])
def test_the_budget_is_met_exactly_and_text_stays(contextual, dtype):
    for seed in range(4):
        tokens, layouts = ragged(seed, dtype)
        for budget in (0.01, 0.1, 0.31, 0.5, 0.9, 0.99):
            for stride in (1, 4):
                left = shorten(FastVID(budget, contextual, min_segments=2, stride=stride), tokens, layouts)
                assert left.num_video == max(1, round(budget * tokens.num_video)) == int((left.patch >= 0).sum())
                assert bool((left.position.diff() > 0).all())
                text = tokens.position[tokens.patch < 0]
                assert torch.equal(left.hidden[left.patch < 0], tokens.hidden[0, text])


def test_what_later_layers_add_is_mixed_as_the_tokens_are():
    tokens, layouts = ragged(3)
    tokens = replace(tokens, additions=(tokens.hidden * 2 + 1, -tokens.hidden))
    plain = shorten(FastVID(0.4, min_segments=2), replace(tokens, additions=()), layouts)
    left = shorten(FastVID(0.4, min_segments=2), tokens, layouts)
    assert torch.equal(left.hidden, plain.hidden)
    assert not torch.equal(left.hidden, tokens.hidden[:, left.position[0]])
    for added, expected in zip(left.additions, (left.hidden * 2 + 1, -left.hidden), strict=True):
        torch.testing.assert_close(added, expected, rtol=0, atol=1e-5)


def test_videos_do_not_see_each_other():
    tokens, layouts = ragged(1)
    method = FastVID(0.5, segment_threshold=-1.0, min_segments=1)
    left = shorten(method, tokens, layouts)
    tokens.hidden[0, layouts[1].tokens] *= -2
    again = shorten(method, tokens, layouts)
    first = left.position[0] < layouts[1].tokens[0]
    assert torch.equal(left.hidden[0, first], again.hidden[0, again.position[0] < layouts[1].tokens[0]])


def test_rows_that_are_zero_or_not_finite():
    for value in (0.0, math.nan, math.inf):
        tokens, layouts = ragged(2)
        tokens.hidden[0, int(layouts[0].tokens[3])] = value
        left = shorten(FastVID(0.5), tokens, layouts)
        assert left.num_video == round(0.5 * tokens.num_video)
        assert int(left.hidden.isfinite().all(-1).logical_not().sum()) <= 1


def test_nothing_joins_an_anchor_that_it_cannot_be_compared_with():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.2], [1.0, -0.3], [math.nan, 0.0]])[None]
    tokens, frames = sequence(x)
    left = shorten(FastVID(0.25, 1.0), tokens, [VideoLayout(frames.rows)])
    assert left.position.tolist() == [[0]]
    torch.testing.assert_close(left.hidden[0, 0], 0.6 * x[0, 0] + 0.4 * x[0, :3].mean(0))


def test_frames_with_anchors_of_all_segments_take_turns_together():
    tokens, frames = sequence(RECORDED["x"])
    segment = torch.arange(4).repeat_interleave(RECORDED["segments"])
    anchors = torch.zeros_like(frames.present)
    anchors[[1, 2, 6, 10, 14], :3] = True
    turns = list(_groups(tokens, frames, frames.present, anchors, segment))
    assert [number for number, _ in turns] == [12, 3]
    assert [sorted(roots.unique().tolist())[::3] for _, roots in turns] == [[20, 40, 120, 200], [-1, 282]]


def test_one_token_and_a_full_budget():
    tokens, frames = sequence(torch.ones(1, 1, 1))
    assert shorten(FastVID(0.2), tokens, [VideoLayout(frames.rows)]).position.tolist() == [[0]]
    tokens, layouts = ragged()
    assert shorten(FastVID(1.0), tokens, layouts) is tokens


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"contextual": 1.5}, ValueError, r"FastVID: contextual must be in \[0.0, 1.0\], got 1.5"),
        ({"segment_threshold": 2}, ValueError, "FastVID: segment_threshold must be in"),
        ({"min_segments": 0}, ValueError, "FastVID: min_segments must be at least 1, got 0"),
        ({"stride": 0}, ValueError, "FastVID: stride must be at least 1, got 0"),
        ({"anchor_weight": -0.1}, ValueError, r"FastVID: anchor_weight must be in \[0.0, 1.0\], got -0.1"),
        ({"importance": "loudness"}, ValueError, "FastVID: importance must be one of 'distinctness'"),
        ({"importance": "predictor"}, ValueError, "FastVID: importance must be one of 'distinctness', 'norm'"),
    ],
)  # fmt: skip
def test_parameters(parameters, error, message):
    with pytest.raises(error, match=message):
        FastVID(**parameters)
