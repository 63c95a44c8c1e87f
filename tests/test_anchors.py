"""Anchors: the rule, against one written out with loops, and what holds for any video."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fftriton import Anchors, VideoLayout
from fftriton.methods import Prompt, VideoTokens, anchors

TEXT = 3


def prompt_of(*videos, holes=(), seed=0):
    """Tokens of videos [frames, patches] with text before each, and the prompt; holes are places of the first."""
    generator, rows, patch, layouts, first = torch.Generator().manual_seed(seed), [], [], [], 0
    for number, (frames, patches) in enumerate(videos):
        background, place = torch.randn(patches, 8, generator=generator), len(rows) + TEXT
        rows += torch.randn(TEXT, 8, generator=generator)
        patch += [-1] * TEXT
        positions = torch.full((frames, patches), -1)
        for frame in range(frames):
            for column in range(patches):
                if number == 0 and (frame, column) in holes:
                    continue
                noise = 3.0 if torch.rand((), generator=generator) < 0.1 else 0.1
                rows.append(background[column] + noise * torch.randn(8, generator=generator))
                patch.append(first + column)
                positions[frame, column], place = place, place + 1
        layouts.append(VideoLayout(positions))
        first += patches
    patch = torch.tensor([patch])
    tokens = VideoTokens(torch.stack(rows)[None], torch.arange(len(rows))[None], patch, int((patch >= 0).sum()))
    return tokens, Prompt(4, len(rows), layouts)


def novelty_of(tokens, prompt):
    """By the formula, one token after the other."""
    hidden, found = tokens.hidden[0], torch.full((tokens.length,), -1.0)
    for layout in prompt.layouts:
        for column in layout.positions.T:
            places = [int(place) for place in column if place >= 0]
            if places:
                usual = hidden[places].mean(0)
                for place in places:
                    found[place] = 1 - F.cosine_similarity(hidden[place], usual, dim=0)
    return found


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.24, 0.26, 0.35, 0.6])
@pytest.mark.parametrize("holes", [(), ((0, 1), (2, 3), (2, 4))])
def test_the_rule(budget, holes):
    tokens, prompt = prompt_of((10, 6), holes=holes)
    left = Anchors(budget).shorten(tokens, prompt)
    video, kept = tokens.num_video, round(budget * tokens.num_video)
    of_frame = 2 * kept // 30
    outliers = kept - 10 * of_frame if of_frame else kept - round(kept / 3)
    found = novelty_of(tokens, prompt)
    expected = set(found.argsort(descending=True, stable=True)[:outliers].tolist())
    is_outlier = torch.tensor([int(place) in expected for place in left.position[0]])
    anchors = left.position[0][~is_outlier & (left.patch[0] >= 0)]
    assert int(is_outlier.sum()) == outliers
    per_frame = [int(torch.isin(anchors, frame).sum()) for frame in prompt.layouts[0].positions]
    if of_frame:
        assert set(per_frame) == {of_frame}
    assert max(per_frame) - min(per_frame) <= 1
    sizes = torch.where(torch.isin(left.position, anchors), (video - outliers) / len(anchors), 1.0)
    torch.testing.assert_close(left.sizes, sizes)


@given(st.integers(1, 9), st.integers(1, 7), st.floats(0.01, 0.99), st.floats(0, 1), st.booleans(), st.integers(0, 99))
def test_what_holds_for_any_video(frames, patches, budget, share, two, seed):
    tokens, prompt = prompt_of((frames, patches), *([(2, 3)] if two else []), seed=seed)
    left = Anchors(budget, share).shorten(tokens, prompt)
    assert left.num_video == max(1, round(budget * tokens.num_video))
    assert (left.position.diff() > 0).all()
    assert left.sizes.min() >= 1
    assert (left.sizes[left.patch < 0] == 1).all()
    every, kept = frames + 2 * two, left.num_video
    anchors = int(share * kept / every + 1e-9) * every or round(share * kept / 2)
    anchors = kept - max(1, kept - anchors)
    assert int((left.sizes > 1).sum()) in ({anchors} if kept < tokens.num_video else {0})
    assert left.sizes[left.patch >= 0].sum().item() == pytest.approx(tokens.num_video if anchors else kept)
    again = Anchors(budget, share, proportional=False).shorten(tokens, prompt)
    assert again.sizes is None
    assert torch.equal(again.position, left.position)


def test_a_share_that_is_exact_but_for_rounding_pays_for_every_frame():
    tokens, prompt = prompt_of((29, 8))
    left = Anchors(100 / 232, share=0.29).shorten(tokens, prompt)  # 0.29 * 100 is a little below 29
    assert int((left.sizes > 1).sum()) == 29


def test_anchors_turn_from_frame_to_frame():
    tokens, prompt = prompt_of((16, 8))
    left = Anchors(0.13, share=1.0).shorten(tokens, prompt)
    assert len(set(left.patch[left.patch >= 0].tolist())) >= 7


def test_tokens_that_are_not_finite_are_outliers():
    tokens, prompt = prompt_of((6, 5))
    tokens.hidden[0, TEXT + 7] = torch.nan
    left = Anchors(0.3).shorten(tokens, prompt)
    assert left.sizes[left.position == TEXT + 7].tolist() == [1]  # an anchor would have more
    assert left.sizes.isfinite().all()
    tokens.hidden[0, TEXT + 7] = tokens.hidden[0, TEXT + 2]  # of the same patch: what else stays does not change
    usual = Anchors(0.3).shorten(tokens, prompt)
    assert len(set(left.position[0].tolist()) ^ set(usual.position[0].tolist())) <= 4


def test_of_an_image_the_most_unusual_patches_stay():
    tokens, prompt = prompt_of((1, 40))
    plain = torch.randn(8, generator=torch.Generator().manual_seed(1))
    tokens.hidden[0, TEXT:] = plain + 0.1 * tokens.hidden[0, TEXT:].sign()
    unusual = [TEXT + 5, TEXT + 17, TEXT + 30]
    tokens.hidden[0, unusual] = -plain
    left = Anchors(0.3).shorten(tokens, prompt)
    assert left.sizes[0, torch.isin(left.position[0], torch.tensor(unusual))].tolist() == [1, 1, 1]
    assert left.num_video == 12


def test_bad_parameters_are_named():
    with pytest.raises(ValueError, match="share must be"):
        Anchors(0.3, share=1.5)
    with pytest.raises(TypeError, match="proportional must be True or False"):
        Anchors(0.3, proportional=1)


def test_patches_are_taken_a_few_at_a_time(monkeypatch):
    tokens, prompt = prompt_of((6, 10))
    whole = Anchors(0.4).shorten(tokens, prompt)
    monkeypatch.setattr(anchors, "_ELEMENTS", 3 * 6 * 8)
    some = Anchors(0.4).shorten(tokens, prompt)
    assert torch.equal(some.position, whole.position)
    assert torch.equal(some.sizes, whole.sizes)


def test_the_sizes_of_an_earlier_step_are_kept():
    tokens, prompt = prompt_of((6, 10))
    sizes = torch.where(tokens.patch >= 0, 2.0, 1.0)
    left = Anchors(0.4).shorten(replace(tokens, sizes=sizes), prompt)
    alone = Anchors(0.4).shorten(tokens, prompt)
    video = left.patch >= 0
    assert left.sizes[video].sum() == pytest.approx(120, rel=1e-5)
    torch.testing.assert_close(left.sizes[video], 2 * alone.sizes[video])
    assert (left.sizes[~video] == 1).all()
