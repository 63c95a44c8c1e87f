"""ST-SimDiff, against the authors' code and against loops over communities."""

import itertools
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from frame_samples import ragged, sequence
from safetensors.torch import load_file

from fftriton import STSimDiff, VideoLayout
from fftriton.methods.base import Prompt
from fftriton.methods.frames import FrameRows

RECORDED = load_file(Path(__file__).parent / "golden" / "methods" / "st_simdiff.safetensors")
COLUMNS = 5


def begin(method, tokens, layouts, layers=28):
    """The state after the first step, and what that left."""
    state = method.begin(Prompt(layers, tokens.length, layouts))
    return state, state.before_attention(0, tokens)


def with_columns(layouts):
    """The layouts of a ragged sample: 7 patches in a row, and 2 rows of 2."""
    return [replace(layout, columns=columns) for layout, columns in zip(layouts, (7, 2), strict=True)]


@pytest.mark.parametrize("percent", [50, 75])
def test_the_first_step_leaves_what_the_authors_leaves(percent):
    tokens, frames = sequence(RECORDED["x"])
    layouts = [VideoLayout(frames.rows, columns=COLUMNS)]
    _, left = begin(STSimDiff(percent / 100), tokens, layouts)
    assert torch.equal(left.position[0], RECORDED[f"kept_{percent}"].long())
    _, without_events = begin(STSimDiff(percent / 100, difference_threshold=-1.0), tokens, layouts)
    assert not torch.equal(without_events.position, left.position)
    _, in_rows = begin(STSimDiff(percent / 100), tokens, [VideoLayout(frames.rows, columns=RECORDED["x"].shape[1])])
    assert not torch.equal(in_rows.position, left.position)


def by_hand(tokens, layouts, budget, threshold, difference):
    """The rows that the first step leaves."""
    x = tokens.hidden[0].double()
    cosine = F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).T
    links, events = [], set()
    for layout in layouts:
        last = {}
        for rows in layout.positions.tolist():
            for patch, row in enumerate(rows):
                if row < 0:
                    continue
                if patch in last:
                    links.append((row, last[patch]))
                    if cosine[row, last[patch]] < difference:
                        events.add(row)
                last[patch] = row
                if patch % layout.columns and rows[patch - 1] >= 0:
                    links.append((row, rows[patch - 1]))
                if patch >= layout.columns and rows[patch - layout.columns] >= 0:
                    links.append((row, rows[patch - layout.columns]))
    community = {row: {row} for row in range(tokens.length)}
    for one, other in links:
        if cosine[one, other] >= threshold:
            both = community[one] | community[other]
            community.update(dict.fromkeys(both, both))
    communities = {frozenset(one) for one in community.values() if len(one) > 1}

    def within(members):
        pairs = list(itertools.combinations(members, 2))
        return sum(float(cosine[i, j]) for i, j in pairs) / len(pairs)

    limit, gone = tokens.num_video - round(budget * tokens.num_video), set()
    for members in sorted(communities, key=lambda one: (-within(one), min(one))):
        quota = min(math.ceil((1 - budget) * len(members) - 1e-9), len(members) - 1, limit)
        if len(gone) + quota > limit:
            break
        total = {i: sum(float(cosine[i, j]) for j in members) for i in members}
        typical = sorted(members, key=lambda i: (-round(total[i], 9), i))
        gone |= set(typical[len(members) - quota :]) - events
    return [row for row in range(tokens.length) if row not in gone]


@pytest.mark.parametrize("seed", range(6))
def test_the_first_step_by_hand(seed):
    tokens, layouts = ragged(seed)
    layouts, changed = with_columns(layouts), 0
    for budget, threshold, difference in itertools.product((0.2, 0.5, 0.8), (0.3, 0.6), (-1.0, 0.4, 0.8)):
        _, left = begin(STSimDiff(budget, threshold, difference), tokens, layouts)
        assert left.position[0].tolist() == by_hand(tokens, layouts, budget, threshold, difference)
        changed += left.length < tokens.length
    assert changed > 6


@pytest.mark.parametrize(("budget", "size", "gone"), [(0.4, 25, 15), (0.7, 50, 15), (0.7, 100, 30)])
def test_a_share_of_a_community_is_rounded_up_but_for_rounding(budget, size, gone):
    generator = torch.Generator().manual_seed(size)
    x = torch.ones(1, size, 8) + 0.01 * torch.randn(1, size, 8, generator=generator)  # one community
    tokens, frames = sequence(x)
    _, left = begin(STSimDiff(budget, difference_threshold=-1.0), tokens, [VideoLayout(frames.rows, columns=size)])
    assert tokens.length - left.length == gone


def test_no_community_has_its_turn_after_one_that_would_exceed_the_budget():
    """Five communities of three, then one of nine events, which asks for too many, then one that would still fit."""
    group = torch.tensor([0, 1, 2, 3, 4, 6]).repeat_interleave(3).tolist() + [5] * 9
    noise = torch.randn(27, 16, generator=torch.Generator().manual_seed(0))
    x = torch.stack([10 * F.one_hot(torch.tensor(one), 16) + 0.02 * one**2 * noise[i] for i, one in enumerate(group)])
    layout = VideoLayout(torch.cat([torch.arange(27), torch.full((9,), -1)]).view(2, 18), columns=18)
    tokens, _ = sequence(x[:, None])
    tokens = replace(tokens, patch=torch.arange(27)[None] % 18)
    _, left = begin(STSimDiff(0.5), tokens, [layout])
    kept = left.position[0].tolist()
    assert kept == by_hand(tokens, [layout], 0.5, 0.8, 0.2)
    assert torch.bincount(torch.tensor(group)[kept]).tolist() == [1, 1, 1, 1, 1, 9, 3]


def test_a_static_video_needs_no_second_step():
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)) * 0.1 + 1
    tokens, frames = sequence(x.expand(8, 6, 8))
    for budget in (0.1, 0.3, 0.55):
        state, left = begin(STSimDiff(budget), tokens, [VideoLayout(frames.rows, columns=3)])
        assert left.num_video == round(budget * 48)
        assert not any(state.wants_attention(layer) for layer in range(28))


def test_a_community_keeps_its_most_typical_token():
    angle = torch.tensor([0.0, 0.3, 0.6, 3.0])  # of one patch in four frames
    tokens, frames = sequence(torch.stack((angle.cos(), angle.sin()), 1)[:, None])
    _, left = begin(STSimDiff(0.25, difference_threshold=-1.0), tokens, [VideoLayout(frames.rows, columns=1)])
    assert left.position.tolist() == [[1, 3]]
    pair, frames = sequence(torch.ones(2, 1, 2))
    _, left = begin(STSimDiff(0.01), pair, [VideoLayout(frames.rows, columns=1)])
    assert left.position.tolist() == [[0]]  # two are equally typical: the earlier stays


@pytest.mark.parametrize(("budget", "layer"), [(0.25, 1), (0.2, 0), (0.1, 0), (0.05, 0)])
def test_the_second_step_comes_early_if_the_budget_demands_it(budget, layer):
    x = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(0))  # nothing is similar
    tokens, frames = sequence(x)
    state, left = begin(STSimDiff(budget, difference_threshold=-1.0), tokens, [VideoLayout(frames.rows, columns=5)], 12)
    assert left.num_video == 20
    assert [at for at in range(12) if state.wants_attention(at)] == [layer]
    held = []
    for at in range(12):
        held.append(left.num_video)
        scores = torch.arange(left.length).float()[None]
        left = state.after_attention(at, left.at(left.hidden, lambda _, scores=scores: scores)) or left
    assert held[0] == 20
    assert sum(held) / 20 / 12 == pytest.approx(max(budget, state.least_budget), abs=0.5 / 20)
    assert left.position[0, -1] == 19


def test_rows_that_are_zero_or_not_finite_are_no_community():
    for value in (0.0, math.nan, math.inf):
        tokens, layouts = ragged(2)
        row = int(layouts[0].tokens[3])
        tokens.hidden[0, row] = value
        _, left = begin(STSimDiff(0.3, 0.3), tokens, with_columns(layouts))
        assert row in left.position[0]
        assert left.length < tokens.length


def test_frames_without_known_rows_warn():
    tokens, layouts = ragged(2)
    with pytest.warns(UserWarning, match=r"STSimDiff: .*\(columns\)"):
        _, left = begin(STSimDiff(0.5, 0.3), tokens, layouts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_rows = [replace(layout, columns=layout.positions.shape[1]) for layout in layouts]
        _, same = begin(STSimDiff(0.5, 0.3), tokens, in_rows)
    assert torch.equal(left.position, same.position)


def test_a_full_budget_changes_nothing():
    tokens, layouts = ragged()
    state, left = begin(STSimDiff(1.0), tokens, layouts)
    assert left == []
    assert not any(state.wants_attention(layer) for layer in range(28))


def test_what_is_left_by_a_chain_has_its_rows():
    """Frames that another method has thinned out have holes, but the same rows."""
    tokens, layouts = ragged(3)
    layouts = with_columns(layouts)
    stays = torch.arange(tokens.length)[torch.arange(tokens.length) % 3 != 1]
    left = tokens.keep(stays[None], int((tokens.patch[0, stays] >= 0).sum()))
    thinned = [replace(one, positions=one.positions.where(torch.isin(one.positions, stays), -1)) for one in layouts]
    _, found = begin(STSimDiff(0.4, 0.3), left, thinned)
    compact = [
        replace(one, positions=torch.searchsorted(stays, one.positions.clamp_min(0)).where(one.positions >= 0, -1))
        for one in thinned
    ]
    alone = replace(left, position=torch.arange(left.length)[None])
    assert found.position[0].tolist() == stays[by_hand(alone, compact, 0.4, 0.3, 0.2)].tolist()
    assert FrameRows.of(thinned, left).rows.shape == (8, 7)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"similarity_threshold": 2}, "STSimDiff: similarity_threshold must be in"),
        ({"difference_threshold": -2}, "STSimDiff: difference_threshold must be in"),
        ({"importance_queries": 0}, "STSimDiff: importance_queries must be at least 1, got 0"),
    ],
)
def test_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        STSimDiff(**parameters)


@pytest.mark.parametrize("columns", [4, 0])
def test_columns_divide_the_patches_of_a_frame(columns):
    with pytest.raises(ValueError, match="VideoLayout: columns must"):
        VideoLayout(torch.arange(12).view(2, 6), columns=columns)
