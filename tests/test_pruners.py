"""The base pruners against one frame after the other, written out."""

import math

import pytest
import torch
import torch.nn.functional as F

import fftriton
from fftriton import PruMerge, RandomPruner, ToMe, TopKPruner, VideoLayout
from fftriton.layouts.layout import patch_ids
from fftriton.methods.base import VideoTokens
from fftriton.methods.pruners import FrameRows, distinctness, feature_norm

PRUNERS = [RandomPruner(), TopKPruner(), TopKPruner("norm"), PruMerge(neighbours=3), ToMe()]


def ragged(seed=0, dtype=torch.float32):
    """A sample of two videos between text: frames of 1 to 7 tokens, holes in the middle."""
    generator = torch.Generator().manual_seed(seed)
    layouts, position = [], 2
    for frames, patches in ((5, 7), (3, 4)):
        there = torch.rand(frames, patches, generator=generator) < 0.7
        there[:, seed % patches] = True
        positions = torch.where(there, (there.flatten().cumsum(0) - 1).view_as(there) + position, -1)
        layouts.append(VideoLayout(positions))
        position = int(positions.max()) + 3
    x = torch.randn(1, position, 16, generator=generator)
    x[:, 3:] += x[:, 2:3]  # similar tokens, so that means and cosines are not all alike
    patch = patch_ids(layouts, 1, position, torch.device("cpu"))
    tokens = VideoTokens(x.to(dtype), torch.arange(position)[None], patch, sum(len(one.tokens) for one in layouts))
    return tokens, layouts


def counts_for(frames, seed=0):
    """Any counts from 1 to the frame's size."""
    generator = torch.Generator().manual_seed(seed)
    return 1 + (torch.rand(len(frames.sizes), generator=generator) * frames.sizes).long()


def run(pruner, tokens, layouts, seed=0):
    frames = FrameRows.of(layouts, tokens)
    counts = counts_for(frames, seed)
    return pruner(tokens, frames, counts, int(counts.sum())), frames, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pruner", PRUNERS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_each_frame_gets_its_count_in_order(pruner, seed, dtype):
    tokens, layouts = ragged(seed, dtype)
    left, frames, counts = run(pruner, tokens, layouts, seed)
    kept = set(left.position[0].tolist())
    assert left.position[0].tolist() == sorted(kept)
    assert [len(kept & set(rows.tolist())) for rows in frames.rows] == counts.tolist()
    assert left.num_video == int(counts.sum()) == int((left.patch >= 0).sum())
    text = tokens.patch[0] < 0
    assert set(text.nonzero()[:, 0].tolist()) <= kept
    assert torch.equal(left.hidden[left.patch < 0], tokens.hidden[:, text][0])
    assert left.hidden.dtype == dtype
    assert torch.equal(left.patch[0], tokens.patch[0, left.position[0]])


def keeps_best_by_hand(scores, frames, counts):
    kept = []
    for rows, count in zip(frames.rows, counts.tolist(), strict=True):
        there = [row for row in rows.tolist() if row >= 0]
        kept += sorted(there, key=lambda row: (-float(scores[row]), row))[:count]
    return sorted(kept)


def distinctness_by_hand(x, frames):
    scores = torch.zeros(x.shape[1])
    for rows in frames.rows:
        rows = rows[rows >= 0]
        unit = F.normalize(x[0, rows].double(), dim=-1)
        scores[rows] = (1 - F.cosine_similarity(unit, unit.mean(0)[None])).float()
    return scores


@pytest.mark.parametrize("seed", range(4))
def test_topk_keeps_the_most_important(seed):
    tokens, layouts = ragged(seed)
    for importance, scores in (
        ("norm", tokens.hidden[0].norm(dim=-1)),
        ("distinctness", distinctness_by_hand(tokens.hidden, FrameRows.of(layouts, tokens))),
        (lambda x, present: x[..., 0], tokens.hidden[0, :, 0]),
    ):
        left, frames, counts = run(TopKPruner(importance), tokens, layouts, seed)
        assert left.position[left.patch >= 0].tolist() == keeps_best_by_hand(scores, frames, counts)
        assert torch.equal(left.hidden, tokens.hidden[:, left.position[0]])


def test_random_is_reproducible_and_another_seed_is_another_draw():
    tokens, layouts = ragged(1)
    one, again, other = (run(RandomPruner(seed), tokens, layouts)[0].position for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("neighbours", [1, 3, 32])
@pytest.mark.parametrize("seed", range(3))
def test_prumerge_adds_what_is_lost_around_a_token(seed, neighbours):
    tokens, layouts = ragged(seed)
    left, frames, counts = run(PruMerge("norm", neighbours), tokens, layouts, seed)
    x = tokens.hidden[0].double()
    norm = x.norm(dim=-1)
    kept = keeps_best_by_hand(norm, frames, counts)
    assert left.position[left.patch >= 0].tolist() == kept
    for rows in frames.rows:
        rows = rows[rows >= 0].tolist()
        weight = dict(zip(rows, norm[rows].softmax(0).tolist(), strict=True))
        for row in set(rows) & set(kept):
            others = [other for other in rows if other != row]
            near = sorted(others, key=lambda other: -float(F.cosine_similarity(x[row], x[other], dim=0)))[:neighbours]
            expected = x[row] + sum((weight[other] * x[other] for other in near if other not in kept), torch.zeros(16))
            place = int((left.position[0] == row).nonzero())
            torch.testing.assert_close(left.hidden[0, place].double(), expected, rtol=0, atol=1e-5)


def tome_by_hand(x, rows, count):
    """The groups of one frame: rounds of bipartite matching between every second token and the others."""
    groups = [[row] for row in rows]
    while len(groups) > count:
        means = F.normalize(torch.stack([x[0, group].double().mean(0) for group in groups]), dim=-1)
        similarity = means[::2] @ means[1::2].T
        best, partner = similarity.max(1)
        order = sorted(range(len(best)), key=lambda i: -float(best[i]))[: min(len(groups) - count, len(groups) // 2)]
        for i in order:
            groups[2 * int(partner[i]) + 1] = groups[2 * int(partner[i]) + 1] + groups[2 * i]
        gone = {2 * i for i in order}
        groups = [group for i, group in enumerate(groups) if i not in gone]
    return groups  # the first of each is where it stands


@pytest.mark.parametrize("seed", range(5))
def test_tome_by_hand(seed):
    tokens, layouts = ragged(seed)
    left, frames, counts = run(ToMe(), tokens, layouts, seed)
    for rows, count in zip(frames.rows, counts.tolist(), strict=True):
        rows = rows[rows >= 0].tolist()
        for group in tome_by_hand(tokens.hidden, rows, count):
            place = (left.position[0] == group[0]).nonzero()
            assert len(place) == 1
            mean = tokens.hidden[0, group].mean(0)
            torch.testing.assert_close(left.hidden[0, int(place)], mean, rtol=0, atol=1e-5)


def test_tome_with_rows_that_are_zero_or_not_finite():
    tokens, layouts = ragged(2)
    tokens.hidden[0, 3:6] = 0
    tokens.hidden[0, 6] = math.nan
    tokens.hidden[0, 7] = math.inf
    left, frames, counts = run(ToMe(), tokens, layouts)
    assert left.num_video == int(counts.sum())


def test_many_frames_are_compared_in_parts(monkeypatch):
    tokens, layouts = ragged(3)
    for pruner in PRUNERS:
        monkeypatch.setattr("fftriton.methods.pruners._FRAMES", 64)
        whole = run(pruner, tokens, layouts)[0]
        monkeypatch.setattr("fftriton.methods.pruners._FRAMES", 3)
        parts = run(pruner, tokens, layouts)[0]
        assert torch.equal(whole.position, parts.position)
        assert torch.equal(whole.hidden, parts.hidden)


def test_importances_do_not_see_holes():
    x, present = torch.randn(2, 4, 8), torch.tensor([[True] * 4, [True, True, False, True]])
    other = x.clone()
    other[1, 2] = 50.0
    for importance in (distinctness, feature_norm):
        assert torch.equal(importance(x, present)[present], importance(other, present)[present])


@pytest.mark.parametrize("pruner", [TopKPruner, PruMerge])
def test_unknown_importance(pruner):
    with pytest.raises(ValueError, match="importance must be one of 'distinctness', 'norm', got 'size'"):
        pruner("size")


def test_parameters_out_of_range():
    with pytest.raises(ValueError, match="PruMerge: neighbours must be at least 1, got 0"):
        PruMerge(neighbours=0)
    with pytest.raises(ValueError, match="RandomPruner: seed must be at least 0, got -1"):
        RandomPruner(-1)
    with pytest.raises(ValueError, match="KVTP: pruner must be one of 'random', 'topk', 'prumerge', 'tome', got 'x'"):
        fftriton.KVTP(pruner="x")
