"""FlashVID and its parts, against the authors' code and against loops over frames."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from frame_samples import ragged, sequence
from safetensors.torch import load_file

import fftriton
from fftriton import FlashVID, VideoLayout
from fftriton.methods.base import Prompt, list_steps
from fftriton.methods.clusters import density_peaks
from fftriton.methods.diversity import most_diverse
from fftriton.methods.flashvid import _shares
from fftriton.methods.frames import FrameRows
from fftriton.methods.segments import segment_starts

RECORDED = load_file(Path(__file__).parent / "golden" / "methods" / "flashvid.safetensors")
FRAMES, PATCHES = RECORDED["x"].shape[:2]
ONE_SEGMENT = {"min_segments": 1, "segment_threshold": -1.0}


def shorten(method, tokens, layouts):
    return list_steps(method.begin(Prompt(6, tokens.length, layouts)).before_attention(0, tokens))


def recorded():
    tokens, frames = sequence(RECORDED["x"])
    return tokens, frames, [VideoLayout(frames.rows)]


def columns_of(chosen):
    """[F, P] bool -> [F, K] the chosen columns, as many of each frame."""
    return chosen.nonzero()[:, 1].view(len(chosen), -1)


# ---- its parts


@pytest.mark.parametrize("weight", [None, "importance"])
def test_the_most_diverse_tokens_are_the_authors(weight):
    tokens, frames, _ = recorded()
    expected = RECORDED["diverse" if weight is None else "diverse_important"]
    chosen = most_diverse(tokens, frames, torch.full((FRAMES,), 6), RECORDED.get(weight))
    assert torch.equal(columns_of(chosen), expected.long())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_most_diverse_tokens_by_hand(seed, weighted):
    tokens, layouts = ragged(seed)
    frames = FrameRows.of(layouts, tokens)
    weight = torch.rand(frames.rows.shape, generator=torch.Generator().manual_seed(seed)) if weighted else None
    counts = (torch.arange(len(frames.rows)) % 4).minimum(frames.sizes)
    chosen = most_diverse(tokens, frames, counts, weight)
    for frame, count in enumerate(counts.tolist()):
        there = frames.present[frame].nonzero()[:, 0]
        direction = F.normalize(tokens.hidden[0, frames.rows[frame, there]], dim=-1)
        distance = 1 - direction @ direction.T
        if weighted:
            distance = distance * weight[frame, there]
        nearest = (distance + torch.diag(torch.full((len(there),), math.inf))).amin(0)
        taken = []
        for _ in range(count):
            taken.append(max((i for i in range(len(there)) if i not in taken), key=lambda i: float(nearest[i])))
            nearest = distance[taken].amin(0)
        assert chosen[frame].nonzero()[:, 0].tolist() == sorted(there[taken].tolist())


def test_clusters_are_the_authors():
    tokens, frames, _ = recorded()
    column, centres = density_peaks(tokens, frames, frames.present, torch.full((FRAMES,), 5))
    assert torch.equal(column, RECORDED["cluster"].long())
    assert torch.equal(centres, column == torch.arange(PATCHES))


def test_clusters_of_some_tokens():
    """A frame with holes and strangers is clustered as if it had only its members."""
    tokens, layouts = ragged(1)
    frames = FrameRows.of(layouts, tokens)
    members = frames.present & (torch.rand(frames.rows.shape, generator=torch.Generator().manual_seed(0)) < 0.7)
    counts = (members.sum(1) + 1) // 2
    counts[0] = 0
    column, centres = density_peaks(tokens, frames, members, counts)
    assert centres.sum(1).tolist() == counts.tolist()
    for frame, count in enumerate(counts.tolist()):
        own = members[frame].nonzero()[:, 0]
        moved = column[frame] != torch.arange(frames.rows.shape[1])
        assert not bool((moved & ~members[frame]).any())
        if count == 0:
            assert not bool(moved.any())
            continue
        alone, rows = sequence(tokens.hidden[0, frames.rows[frame, own]][None])
        expected, _ = density_peaks(alone, rows, rows.present, torch.tensor([count]))
        assert column[frame, own].tolist() == own[expected[0]].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_a_video_is_cut_where_its_frames_differ_most(seed):
    x = torch.randn(9, 4, 6, generator=torch.Generator().manual_seed(seed)) + 1
    tokens, frames = sequence(x)
    means = x.mean(1)
    cosine = F.cosine_similarity(means[1:], means[:-1], dim=-1)
    for threshold, least in ((-1.0, 1), (-1.0, 4), (0.8, 1), (0.8, 8), (0.8, 20)):
        cuts = {0} | {i + 1 for i in range(8) if cosine[i] < threshold}
        cuts |= {int(i) + 1 for i in cosine.argsort()[: least - 1]}
        starts = segment_starts(next(frames.contexts(tokens)), threshold, least)
        assert starts.nonzero()[:, 0].tolist() == sorted(cuts)


def test_the_recorded_video_is_cut_as_by_the_authors():
    tokens, frames, _ = recorded()
    starts = segment_starts(next(frames.contexts(tokens)), 0.9, 3)
    lengths = F.pad(starts.nonzero()[:, 0], (0, 1), value=FRAMES).diff()
    assert lengths.tolist() == RECORDED["segments"].tolist()


def test_a_segment_gets_tokens_by_its_length_and_a_frame_by_what_is_left_of_it():
    sizes, starts = torch.full((5,), 10), torch.tensor([True, False, True, False, False])
    left = torch.tensor([2, 2, 16, 8, 0])
    assert _shares(left, sizes, starts, 5, 28).tolist() == [1, 1, 2, 1, 0]
    assert _shares(left, sizes, starts, 0, 28).tolist() == [0, 0, 0, 0, 0]
    assert _shares(left, sizes, starts, 28, 28).tolist() == left.tolist()


# ---- all of it


def test_the_trees_are_the_authors():
    tokens, _, layouts = recorded()
    trees = shorten(FlashVID(8 / PATCHES, diverse=0.75, **ONE_SEGMENT), tokens, layouts)[0]
    diverse = RECORDED["diverse"].long() + PATCHES * torch.arange(FRAMES)[:, None]
    expected = torch.cat([diverse.flatten(), RECORDED["tree_kept"].long()]).sort().values
    assert torch.equal(trees.position[0], expected)
    assert trees.num_video < tokens.num_video


def test_what_stays_is_the_authors():
    """Where nothing merges through time; the means of their trees count what is further away less."""
    tokens, _, layouts = recorded()
    expected = RECORDED["kept_apart"].long()
    method = FlashVID(8 / PATCHES, diverse=0.75, similarity_threshold=1.0, **ONE_SEGMENT)
    left = shorten(method, tokens, layouts)[-1]
    assert torch.equal(left.position[0], expected)
    torch.testing.assert_close(left.hidden[0], RECORDED["rows_apart"])


def test_as_many_of_each_frame_stay_as_of_the_authors():
    tokens, _, layouts = recorded()
    expected = RECORDED["kept"].long()
    method = FlashVID(len(expected) / tokens.num_video, diverse=72 / len(expected), **ONE_SEGMENT)
    left = shorten(method, tokens, layouts)[-1]
    counts, theirs = (torch.bincount(one // PATCHES, minlength=FRAMES) for one in (left.position[0], expected))
    assert (counts - theirs).abs().max() <= 1  # they round up
    diverse = (RECORDED["diverse"].long() + PATCHES * torch.arange(FRAMES)[:, None]).flatten()
    assert bool(torch.isin(diverse, left.position[0]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("diverse", [0.0, 0.7, 1.0])
def test_the_budget_is_met_exactly_and_text_stays(diverse, dtype):
    for seed in range(4):
        tokens, layouts = ragged(seed, dtype)
        for budget in (0.01, 0.1, 0.31, 0.5, 0.9, 0.99):
            for threshold in (-1.0, 0.8):
                left = shorten(FlashVID(budget, diverse, threshold, min_segments=2), tokens, layouts)[-1]
                assert left.num_video == max(1, round(budget * tokens.num_video)) == int((left.patch >= 0).sum())
                assert bool((left.position.diff() > 0).all())
                text = tokens.position[tokens.patch < 0]
                assert torch.equal(left.hidden[left.patch < 0], tokens.hidden[0, text])


def test_trees_stay_in_their_segment_and_video():
    tokens, layouts = ragged(0)
    frames = FrameRows.of(layouts, tokens)
    nowhere = torch.full_like(tokens.position, -1)
    frame = frames.spread(torch.arange(8)[:, None].expand_as(frames.rows), nowhere)[0]
    trees = shorten(FlashVID(0.1, 0.0, -1.0, **ONE_SEGMENT), tokens, layouts)[0]
    merged, into = trees.merge.merged, trees.merge.into
    assert len(merged) > 10
    assert bool(((frame[merged] < 5) == (frame[into] < 5)).all())  # the first video has five frames
    apart = shorten(FlashVID(0.1, 0.0, -1.0, min_segments=9), tokens, layouts)[0]  # each frame is a segment
    assert len(apart.merge.merged) == 0


def test_rows_that_are_zero_or_not_finite():
    for value in (0.0, math.nan, math.inf):
        tokens, layouts = ragged(2)
        tokens.hidden[0, int(layouts[0].tokens[3])] = value
        left = shorten(FlashVID(0.5, 0.3), tokens, layouts)[-1]
        assert left.num_video == round(0.5 * tokens.num_video)
        assert int(left.hidden.isfinite().all(-1).logical_not().sum()) <= 1


def test_one_token_and_a_full_budget():
    tokens, frames = sequence(torch.ones(1, 1, 1))
    assert shorten(FlashVID(0.2), tokens, [VideoLayout(frames.rows)])[-1].position.tolist() == [[0]]
    tokens, layouts = ragged()
    assert shorten(FlashVID(1.0), tokens, layouts) == []


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"diverse": 1.5}, ValueError, r"FlashVID: diverse must be in \[0.0, 1.0\], got 1.5"),
        ({"similarity_threshold": -2}, ValueError, "FlashVID: similarity_threshold must be in"),
        ({"segment_threshold": 2}, ValueError, "FlashVID: segment_threshold must be in"),
        ({"min_segments": 0}, ValueError, "FlashVID: min_segments must be at least 1, got 0"),
        ({"importance": "loudness"}, ValueError, "FlashVID: importance must be one of 'distinctness'"),
        ({"importance": "predictor"}, ValueError, "FlashVID: importance must be one of 'distinctness', 'norm'"),
        ({"budget": 0}, ValueError, "FlashVID: budget must be in"),
    ],
)  # fmt: skip
def test_parameters(parameters, error, message):
    with pytest.raises(error, match=message):
        fftriton.FlashVID(**parameters)
