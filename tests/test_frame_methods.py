"""The methods that give each frame a number of tokens, against the authors' code and against loops over frames."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from frame_samples import ragged, sequence
from safetensors.torch import load_file

import fftriton
from fftriton import EVS, DyCoke, VidCom2, VisionZip
from fftriton.layouts.layout import VideoLayout
from fftriton.methods.base import Prompt, list_steps
from fftriton.methods.frames import FrameRows

GOLDEN = Path(__file__).parent / "golden" / "methods"
METHODS = [EVS, VidCom2, DyCoke, VisionZip]


def shorten(method, tokens, layouts):
    """What is left, and the least budget."""
    state = method.begin(Prompt(6, tokens.length, layouts))
    return [tokens, *list_steps(state.before_attention(0, tokens))][-1], state.least_budget


def video(x):
    """x [F, P, D] as the only video of a sample."""
    tokens, frames = sequence(x)
    return tokens, frames, [VideoLayout(frames.rows)]


def kept_of(left):
    return left.position[0].tolist()


# ---- every method


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_met_and_text_stays(method, dtype):
    for seed in range(6):
        tokens, layouts = ragged(seed, dtype)
        floor = sum(int((layout.positions >= 0).any(1).sum()) for layout in layouts) if method.min_tokens else 1
        for budget in (0.01, 0.1, 0.31, 0.5, 0.9, 0.99):
            left, least = shorten(method(budget), tokens, layouts)
            total = max(floor, round(budget * tokens.num_video))
            assert left.num_video == total == int((left.patch >= 0).sum())
            assert least == (total / tokens.num_video if round(budget * tokens.num_video) < floor > 1 else budget)
            assert bool((left.position.diff() > 0).all())
            text = tokens.position[tokens.patch < 0]
            assert torch.equal(left.hidden[left.patch < 0], tokens.hidden[0, text])
            again, _ = shorten(method(budget), tokens, layouts)
            assert kept_of(again) == kept_of(left)


@pytest.mark.parametrize("method", METHODS)
def test_a_full_budget_changes_nothing(method):
    tokens, layouts = ragged()
    assert shorten(method(1.0), tokens, layouts)[0] is tokens


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_zero_or_not_finite(method):
    for value in (0.0, math.nan, math.inf):
        tokens, layouts = ragged(2)
        row = int(layouts[0].tokens[3])
        tokens.hidden[0, row] = value
        left, _ = shorten(method(0.5), tokens, layouts)
        assert left.num_video == round(0.5 * tokens.num_video)
        assert int(left.hidden.isfinite().all(-1).logical_not().sum()) <= 1


@pytest.mark.parametrize("method", METHODS)
def test_one_token(method):
    tokens, _, layouts = video(torch.ones(1, 1, 1))
    left, _ = shorten(method(0.2), tokens, layouts)
    assert kept_of(left) == [0]


@pytest.mark.parametrize("method", METHODS)
def test_as_a_pruner_it_takes_the_numbers_of_frames_from_elsewhere(method):
    tokens, layouts = ragged(1)
    scores = torch.linspace(-3, 3, 8)
    relevance = [scores[:5], scores[5:]]
    kvtp = fftriton.KVTP(0.4, relevance, method())
    left, _ = shorten(kvtp, tokens, layouts)
    frames = FrameRows.of(layouts, tokens)
    counts = fftriton.frame_budgets(scores, frames.sizes, 0.4)
    kept = torch.isin(frames.rows, left.position[0]) & frames.present
    assert kept.sum(1).tolist() == counts.tolist()
    by_name, _ = shorten(fftriton.KVTP(0.4, relevance, method.__name__.lower()), tokens, layouts)
    assert kept_of(by_name) == kept_of(left)


# ---- EVS


@pytest.mark.parametrize("percent", [70, 50, 25])
def test_evs_keeps_what_the_authors_keep(percent):
    recorded = load_file(GOLDEN / "evs.safetensors")
    tokens, _, layouts = video(recorded["x"])
    expected = recorded[f"kept_{percent}"].tolist()
    left, _ = shorten(EVS(len(expected) / tokens.num_video), tokens, layouts)
    assert kept_of(left) == expected


def test_evs_by_hand():
    angle = torch.tensor([0.0, 0.0, 0.5, 3.0, 0.6, 3.2])  # three frames of two patches
    tokens, _, layouts = video(torch.stack((angle.cos(), angle.sin()), 1).view(3, 2, 2))
    kept = {5: [0, 1, 2, 3, 5], 4: [0, 1, 2, 3], 3: [0, 1, 3], 2: [0, 1]}
    for count, expected in kept.items():
        assert kept_of(shorten(EVS(count / 6), tokens, layouts)[0]) == expected


def test_evs_below_one_frame_keeps_what_stands_out_in_it():
    x = torch.ones(4, 5, 3)
    x[0, 3] = -x[0, 3]
    tokens, _, layouts = video(x)
    assert kept_of(shorten(EVS(1 / 20), tokens, layouts)[0]) == [3]


# ---- VidCom2


@pytest.mark.parametrize("percent", [25, 40])
def test_vidcom2_scores_and_shares_are_the_authors(percent):
    recorded = load_file(GOLDEN / "vidcom2.safetensors")
    tokens, frames, _ = video(recorded["x"])
    method, patches = VidCom2(percent / 100), recorded["x"].shape[1]
    scores, priority = method.rate(tokens, frames)
    counts = method.frame_counts(tokens, frames, scores, priority, round(percent / 100 * tokens.num_video))
    torch.testing.assert_close(-scores, recorded["scores"], rtol=0, atol=1e-5)
    assert int(counts.sum()) == round(percent / 100 * tokens.num_video)
    assert (counts - patches * recorded[f"scales_{percent}"]).abs().max() < 1.5  # a token for each frame, rounding
    expected = recorded[f"kept_{percent}"]
    own = torch.bincount(expected // patches, minlength=len(scores))
    assert kept_of(method(tokens, frames, own, len(expected))) == expected.tolist()


def test_vidcom2_sees_each_video_alone():
    """The mean and the channels of a video are its own: the tokens of another one change nothing but the counts."""
    tokens, layouts = ragged(3)
    frames = FrameRows.of(layouts, tokens)
    scores, _ = VidCom2(0.5).rate(tokens, frames)
    tokens.hidden[0, layouts[1].tokens] *= -3
    again, _ = VidCom2(0.5).rate(tokens, frames)
    there = frames.present[:5]
    assert torch.equal(scores[:5][there], again[:5][there])


# ---- DyCoke


@pytest.mark.parametrize("percent", [70, 40])
def test_dycoke_keeps_what_the_authors_keep(percent):
    recorded = load_file(GOLDEN / "dycoke.safetensors")
    tokens, _, layouts = video(recorded["x"])
    theirs, third_of_last = recorded[f"kept_{percent}"], 10  # which they keep whole
    expected = theirs[theirs // 10 != third_of_last]
    total = 3 * 10 + 9 * round((100 - percent) / 10)
    left, _ = shorten(DyCoke(total / 120), tokens, layouts)
    kept = left.position[0]
    assert kept[kept // 10 != third_of_last].tolist() == expected.tolist()
    assert len(kept) == total


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 7])
def test_dycoke_by_hand(frames):
    x = torch.randn(frames, 6, 4, generator=torch.Generator().manual_seed(frames))
    tokens, _, layouts = video(x)
    firsts = -(-frames // 4)
    left, _ = shorten(DyCoke((6 * firsts + 2 * (frames - firsts)) / (6 * frames)), tokens, layouts)
    expected = []
    for frame in range(frames):
        partner = {0: None, 1: frame - 1, 2: frame - 2, 3: frame - 1}[frame % 4]
        best = range(6)
        if partner is not None:
            best = F.cosine_similarity(x[frame], x[partner], dim=-1).argsort()[:2].sort().values.tolist()
        expected += [6 * frame + patch for patch in best]
    assert kept_of(left) == expected


def test_dycoke_below_a_quarter_keeps_first_frames_only():
    tokens, _, layouts = video(torch.randn(8, 6, 4, generator=torch.Generator().manual_seed(0)))
    kept = torch.tensor(kept_of(shorten(DyCoke(6 / 48), tokens, layouts)[0]))
    assert torch.bincount(kept // 6, minlength=8).tolist() == [3, 0, 0, 0, 3, 0, 0, 0]


# ---- VisionZip


def test_visionzip_is_the_authors():
    recorded = load_file(GOLDEN / "visionzip.safetensors")
    x, patches = recorded["x"], recorded["x"].shape[1]
    tokens, _, layouts = video(x)
    method = VisionZip(14 / 30, lambda context: recorded["importance"], keys=lambda context: recorded["keys"])
    left, _ = shorten(method, tokens, layouts)
    for frame in range(len(x)):
        rows = recorded["rows"][frame]
        own = left.position[0] // patches == frame
        position, hidden = left.position[0, own] - patches * frame, left.hidden[0, own]
        dominant = recorded["dominant"][frame].sort().values
        important = torch.isin(position, dominant)
        assert torch.equal(position[important], dominant)
        assert torch.equal(hidden[important], rows[:12])
        roots = left.merge.roots[0, patches * frame : patches * (frame + 1)] - patches * frame
        sizes = torch.bincount(roots, minlength=patches)[position[~important]][:, None]  # theirs: x + mean of the rest
        first = x[frame, position[~important]]
        torch.testing.assert_close(hidden[~important] * sizes, first + (sizes - 1) * (rows[12:] - first))


def test_visionzip_by_hand():
    x = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [-1, 0], [0.1, 1], [0, 0.8], [0.7, 0]])[None]
    importance = torch.tensor([[0.0, 0, 9, 8, 0, 0, 0]])
    tokens, _, layouts = video(x)
    left, _ = shorten(VisionZip(4 / 7, lambda _: importance, contextual=0.5), tokens, layouts)
    assert kept_of(left) == [0, 2, 3, 4]  # of 0, 1, 4, 5, 6 every second one, two of them
    torch.testing.assert_close(
        left.hidden[0], torch.stack([x[0, [0, 1, 6]].mean(0), x[0, 2], x[0, 3], x[0, 4:6].mean(0)])
    )


def test_visionzip_counts_contextual_tokens_exactly():
    """25 * 0.28 is a little above 7 in floating point."""
    importance = torch.arange(32.0)[None]
    tokens, _, layouts = video(torch.randn(1, 32, 4, generator=torch.Generator().manual_seed(0)))
    left, _ = shorten(VisionZip(25 / 32, lambda _: importance, contextual=0.28), tokens, layouts)
    assert kept_of(left) == [0, 2, 4, 6, 8, 10, 12, *range(14, 32)]


def test_visionzip_merges_nothing_into_a_row_that_is_no_number():
    x = torch.ones(1, 8, 3)
    x[0, 0] = math.nan  # the first contextual token
    tokens, _, layouts = video(x)
    left, _ = shorten(VisionZip(4 / 8, lambda context: torch.arange(8.0)[None], contextual=0.5), tokens, layouts)
    assert kept_of(left) == [0, 3, 6, 7]
    assert left.hidden[0].isfinite().all(-1).tolist() == [False, True, True, True]
    assert left.merge.roots.tolist() == [[0, 3, 3, 3, 3, 3, 6, 7]]


def test_visionzip_merges_all_that_it_does_not_keep():
    tokens, layouts = ragged(4)
    left, _ = shorten(VisionZip(0.5), tokens, layouts)
    frames = FrameRows.of(layouts, tokens)
    frame = frames.spread(torch.arange(8)[:, None].expand_as(frames.rows), torch.full_like(tokens.position, -1))
    assert torch.equal(frame.gather(1, left.merge.roots), frame)  # within frames
    assert sorted(left.merge.roots.unique().tolist()) == kept_of(left)


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"contextual": 1.5}, ValueError, r"VisionZip: contextual must be in \[0.0, 1.0\], got 1.5"),
        ({"importance": "loudness"}, ValueError, "VisionZip: importance must be one of 'distinctness'"),
        ({"keys": "loudness"}, ValueError, "VisionZip: keys must be one of 'tokens'"),
    ],
)  # fmt: skip
def test_visionzip_parameters(parameters, error, message):
    with pytest.raises(error, match=message):
        VisionZip(0.3, **parameters)


def test_a_predictor_needs_kvtp():
    tokens, layouts = ragged()
    with pytest.raises(ValueError, match="VisionZip: importance='predictor' needs KVTP"):
        shorten(VisionZip(0.5, "predictor"), tokens, layouts)
    with pytest.raises(ValueError, match="KVTP: min_tokens must be at least 1 for VisionZip"):
        fftriton.KVTP(0.3, pruner=VisionZip(), min_tokens=0)
