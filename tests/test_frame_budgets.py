"""frame_budgets: the budget exactly, and fairly, whatever the scores."""

import math
import time
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fftriton import frame_budgets

CASES = settings(max_examples=600, deadline=None)
GRID = 64  # scores are multiples of 1/64, so that adding a constant rounds nothing


@st.composite
def cases(draw, ragged=False, longest=2000):
    """Scores [F] on a grid, patches, and a budget that leaves min_tokens to each frame."""
    frames = draw(st.one_of(st.integers(1, 12), st.integers(1, longest)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0, 1, 4, 40, 1000, 10**6]))
    scores = torch.randint(-spread * GRID, spread * GRID + 1, (frames,), generator=generator).double() / GRID
    if draw(st.booleans()):
        scores = scores.round()  # ties
    most = draw(st.integers(1, 700))
    patches = torch.randint(0, most + 1, (frames,), generator=generator) if ragged else most
    if ragged:
        patches[draw(st.integers(0, frames - 1))] = most
    min_tokens = draw(st.integers(0, most))
    total, floor = totals(patches, frames, min_tokens)
    count = draw(st.integers(max(1, floor), total))
    budget = count / total
    if not floor <= round(budget * total) <= total:
        budget = 1.0
    temperature = draw(st.sampled_from([1e-3, 0.5, 2.0, 30.0, math.inf]))
    return scores, patches, budget, temperature, min_tokens


def totals(patches, frames, min_tokens):
    """(tokens of the video, tokens that the floor takes)."""
    patches = torch.as_tensor(patches).expand(frames)
    return int(patches.sum()), int(patches.clamp_max(min_tokens).sum())


@CASES
@given(cases())
def test_exact_within_bounds_and_monotone(case):
    scores, patches, budget, temperature, min_tokens = case
    counts = frame_budgets(scores, patches, budget, temperature, min_tokens)
    assert counts.shape == scores.shape
    assert counts.dtype == torch.int64
    assert int(counts.sum()) == round(budget * len(scores) * patches)
    assert min_tokens <= int(counts.min())
    assert int(counts.max()) <= patches
    order = scores.argsort(descending=True, stable=True)  # ties to the earlier frame
    assert bool((counts[order].diff() <= 0).all())


@CASES
@given(cases(ragged=True))
def test_frames_of_different_sizes(case):
    scores, patches, budget, temperature, min_tokens = case
    counts = frame_budgets(scores, patches, budget, temperature, min_tokens)
    assert int(counts.sum()) == round(budget * int(patches.sum()))
    assert bool((counts >= patches.clamp_max(min_tokens)).all())
    assert bool((counts <= patches).all())
    size = int(patches.max())
    same = patches == size  # among frames of one size a higher score never has less
    order = scores[same].argsort(descending=True, stable=True)
    assert bool((counts[same][order].diff() <= 0).all())


@CASES
@given(cases(), st.integers(-(2**20), 2**20))
def test_a_constant_changes_nothing(case, constant):
    scores, *rest = case
    assert torch.equal(frame_budgets(scores + constant, *rest), frame_budgets(scores, *rest))


@CASES
@given(cases())
def test_equal_scores_and_infinite_temperature_are_uniform(case):
    scores, patches, budget, temperature, min_tokens = case
    total = round(budget * len(scores) * patches)
    even = torch.full((len(scores),), total // len(scores))
    even[: total % len(scores)] += 1
    same = torch.full_like(scores, scores[0].item())
    assert torch.equal(frame_budgets(same, patches, budget, temperature, min_tokens), even)
    counts = frame_budgets(scores, patches, budget, math.inf, min_tokens)
    assert torch.equal(counts.sort(descending=True).values, even)


def by_hand(scores, patches, budget, temperature, min_tokens):
    """The rule as the paper's text has it, in exact fractions: share, cap, share again; then largest remainders."""
    frames = len(scores)
    total = round(budget * sum(patches))
    peak = max(scores)
    weights = [Fraction(math.exp((score - peak) / temperature)) for score in scores]
    floor = [min(min_tokens, size) for size in patches]
    share = [Fraction(0)] * frames
    open_frames = set(range(frames))
    rest = Fraction(total - sum(floor))
    while open_frames:
        weight = sum(weights[f] for f in open_frames)
        full = {f for f in open_frames if rest * weights[f] >= (patches[f] - floor[f]) * weight}
        for f in full or open_frames:
            share[f] = Fraction(patches[f] - floor[f]) if full else rest * weights[f] / weight
        rest -= sum(share[f] for f in full)
        open_frames = open_frames - full if full else set()
    counts = [low + int(part) for low, part in zip(floor, share, strict=True)]
    remainders = sorted(range(frames), key=lambda f: (int(share[f]) - share[f], -scores[f], f))
    for f in remainders[: total - sum(counts)]:
        counts[f] += 1
    return counts


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_equals_the_rule_in_fractions(data):
    frames = data.draw(st.integers(1, 9))
    patches = data.draw(st.lists(st.integers(1, 9), min_size=frames, max_size=frames))
    scores = data.draw(st.lists(st.integers(-40, 40), min_size=frames, max_size=frames))
    budget = data.draw(st.sampled_from([0.5, 0.7, 0.9, 1.0]))
    temperature = data.draw(st.sampled_from([0.7, 2.0, 5.0]))
    if round(budget * sum(patches)) < frames:
        budget = 1.0
    counts = frame_budgets(torch.tensor(scores) / 8, torch.tensor(patches), budget, temperature)
    assert counts.tolist() == by_hand([score / 8 for score in scores], patches, budget, temperature, 1)


@settings(max_examples=100, deadline=None)
@given(cases(ragged=True, longest=50), cases(ragged=True, longest=50))
def test_a_batch_is_its_samples(one, other):
    frames = min(len(one[0]), len(other[0]))
    scores, patches = (torch.stack([a[:frames], b[:frames]]) for a, b in zip(one[:2], other[:2], strict=True))
    patches += 2  # so that half of them is enough for a token a frame
    counts = frame_budgets(scores, patches, 0.5, temperature=5.0)
    for sample in range(2):
        assert torch.equal(counts[sample], frame_budgets(scores[sample], patches[sample], 0.5, temperature=5.0))


def test_by_hand():
    scores = torch.tensor([0.0, 8.0, 0.0, 0.0])
    assert frame_budgets(scores, 10, 0.5).tolist() == [4, 10, 3, 3]  # the second is full, the rest is shared
    assert frame_budgets(scores, 10, 0.5, temperature=math.inf).tolist() == [5, 5, 5, 5]
    assert frame_budgets(scores, 10, 0.5, min_tokens=3).tolist() == [4, 10, 3, 3]
    assert frame_budgets(scores, 10, 0.1).tolist() == [1, 1, 1, 1]
    assert frame_budgets(scores, 10, 1.0).tolist() == [10, 10, 10, 10]
    assert frame_budgets(scores, torch.tensor([0, 4, 8, 8]), 0.5).tolist() == [0, 4, 3, 3]


def test_hard_key_frames():
    scores = torch.tensor([0.0, 3, 1, 0, 0, 2, 9, 1, 1, 1])
    counts = frame_budgets(scores, 7, 0.33, temperature=1e-6, min_tokens=0)
    assert counts.tolist() == [0, 7, 1, 0, 0, 7, 7, 1, 0, 0]  # 2 are left for four frames of one score


def test_the_total_is_rounded_as_python_does():
    for frames, patches in ((299, 235), (7, 5), (3, 5), (9, 25), (11, 15)):
        for tenths in range(3, 11):
            counts = frame_budgets(torch.zeros(frames), patches, tenths / 10)
            assert int(counts.sum()) == round(tenths / 10 * frames * patches)


def test_a_low_temperature_fills_frame_after_frame():
    """Far apart, scores rank frames, and no frame is out of reach however far it is below the first."""
    scores = torch.tensor([3e12, 0.0, 1e12, -2e12])
    assert frame_budgets(scores, 10, 0.6, temperature=1e-6).tolist() == [10, 3, 10, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_other_dtypes_and_strides(dtype):
    scores = torch.arange(12).view(4, 3).to(dtype)
    assert torch.equal(frame_budgets(scores.T, 7, 0.4), frame_budgets(scores.T.double().contiguous(), 7, 0.4))


def test_is_fast_on_long_videos():
    scores = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    frame_budgets(scores, 196, 0.2)
    assert time.perf_counter() - start < 0.5  # a loop over 8000 frames in Python takes longer


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, r"scores must be a tensor of real numbers, got list"),
        ((torch.ones(2, dtype=torch.bool),), TypeError, r"scores must be a tensor of real numbers, got torch.bool"),
        ((torch.ones(()),), ValueError, r"scores must have shape \[F\] or \[B, F\], F >= 1, got \[\]"),
        ((torch.ones(0),), ValueError, r"scores must have shape .* got \[0\]"),
        ((torch.ones(1, 2, 3),), ValueError, r"scores must have shape .* got \[1, 2, 3\]"),
        ((torch.tensor([1.0, math.nan]),), ValueError, r"scores must be finite, got nan"),
        ((torch.tensor([1.0, -math.inf]),), ValueError, r"scores must be finite, got -inf"),
        ((torch.ones(4), 0), ValueError, r"patches must be at least 1, got 0"),
        ((torch.ones(4), 2.0), TypeError, r"patches must be an integer of at least 1, got 2.0"),
        ((torch.ones(4), torch.ones(4)), TypeError, r"patches must be integers, got torch.float32"),
        ((torch.ones(4), torch.ones(3).long()), ValueError, r"one number for each of the scores \[4\], got \[3\]"),
        ((torch.ones(2), torch.tensor([2, -1])), ValueError, r"patches must not be negative, got -1"),
        ((torch.ones(4), 8, 0.0), ValueError, r"budget must be in \(0, 1\], got 0.0"),
        ((torch.ones(4), 8, math.nan), ValueError, r"budget must be in \(0, 1\], got nan"),
        ((torch.ones(4), 8, 0.5, 0), ValueError, r"temperature must be above 0, got 0"),
        ((torch.ones(4), 8, 0.5, math.nan), ValueError, r"temperature must be above 0, got nan"),
        ((torch.ones(4), 8, 0.5, "2"), TypeError, r"temperature must be a number above 0, got '2'"),
        ((torch.ones(4), 8, 0.5, 2.0, -1), ValueError, r"min_tokens must be at least 0, got -1"),
        (
            (torch.ones(4), 8, 0.2, 2.0, 2), ValueError,
            r"budget must leave min_tokens = 2 to each of 4 frames, so at least 8 of 32 tokens, got 0.2, which is 6",
        ),
        (
            (torch.ones(2, 4), torch.tensor([[9, 9, 9, 9], [8, 0, 1, 1]]), 0.25), ValueError,
            r"at least 3 of 10 tokens, got 0.25, which is 2",
        ),
    ],
)  # fmt: skip
def test_errors(arguments, error, message):
    with pytest.raises(error, match="frame_budgets: .*" + message):
        frame_budgets(*arguments, *(8, 0.5)[len(arguments) - 1 :])
