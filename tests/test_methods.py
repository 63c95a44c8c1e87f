"""Parameters of the methods, and the arithmetic that needs no model."""

import math

import pytest
import torch

import fftriton
from fftriton.layouts.layout import VideoLayout, patch_ids, previous_of_patch
from fftriton.methods.base import Prompt, VideoTokens, list_steps
from fftriton.methods.text import parse

METHODS = [
    fftriton.FrameFusion,
    fftriton.FastV,
    fftriton.StreamingLLM,
    fftriton.UniformFrames,
    fftriton.RandomTokens,
    fftriton.TemporalMerge,
    fftriton.EVS,
    fftriton.VidCom2,
    fftriton.DyCoke,
    fftriton.VisionZip,
    fftriton.FlashVID,
    fftriton.FastVID,
    fftriton.STSimDiff,
    fftriton.Anchors,
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [0, -1, 1.5, math.nan, math.inf])
def test_budget_out_of_range(method, budget):
    with pytest.raises(ValueError, match=rf"{method.__name__}: budget must be in \(0, 1\], got {budget}"):
        method(budget=budget)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["a", None, True, [0.3], torch.tensor(0.3)], ids=str)
def test_budget_of_another_type(method, budget):
    with pytest.raises(TypeError, match=rf"{method.__name__}: budget must be a number in \(0, 1\], got "):
        method(budget=budget)


@pytest.mark.parametrize("threshold", [-1.01, 1.01, math.nan])
def test_threshold_out_of_range(threshold):
    with pytest.raises(ValueError, match=r"similarity_threshold must be in \[-1.0, 1.0\], got "):
        fftriton.FrameFusion(similarity_threshold=threshold)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan])
def test_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"min_merge_ratio must be in \[0.0, 1.0\], got "):
        fftriton.FrameFusion(min_merge_ratio=ratio)


@pytest.mark.parametrize("method", [fftriton.FrameFusion, fftriton.FastV])
def test_queries_out_of_range(method):
    with pytest.raises(ValueError, match="importance_queries must be at least 1, got 0"):
        method(importance_queries=0)
    with pytest.raises(TypeError, match=r"importance_queries must be an integer of at least 1, got 1\.5"):
        method(importance_queries=1.5)


def test_fastv_layer_out_of_range():
    with pytest.raises(ValueError, match="FastV: layer must be at least 1, got 0"):
        fftriton.FastV(0.5, layer=0)


def test_stages_out_of_range():
    with pytest.raises(ValueError, match=r"stages must be one of \('merge', 'prune'\), .*, got \('prune', 'prune'\)"):
        fftriton.FrameFusion(stages=("prune", "prune"))
    with pytest.raises(ValueError, match="start_layer must be at least 0, got -1"):
        fftriton.FrameFusion(start_layer=-1)


def test_sinks_out_of_range():
    with pytest.raises(ValueError, match="StreamingLLM: sinks must be at least 0, got -1"):
        fftriton.StreamingLLM(0.3, sinks=-1)


def test_seed_out_of_range():
    with pytest.raises(TypeError, match=r"RandomTokens: seed must be an integer of at least 0, got 0\.5"):
        fftriton.RandomTokens(0.3, seed=0.5)

    for kind in (fftriton.RandomTokens, fftriton.RandomPruner):
        with pytest.raises(ValueError, match="seed must be below 2[*][*]63"):
            kind(seed=2**70)


def test_booleans_of_another_type():
    with pytest.raises(TypeError, match="FrameFusion: cascaded must be True or False, got 'False'"):
        fftriton.FrameFusion(cascaded="False")
    with pytest.raises(TypeError, match="KVTP: renumber must be True or False, got 1"):
        fftriton.KVTP(renumber=1)


@pytest.mark.parametrize(
    ("stages", "layers"),
    [(("merge", "prune"), range(5)), (("prune",), range(5)), (("merge",), range(0)), (("prune", "merge"), range(5))],
)
def test_framefusion_listens_only_where_it_may_prune(stages, layers):
    prompt = Prompt(6, 40, [VideoLayout(torch.arange(32).view(8, 4))])
    state = fftriton.FrameFusion(0.3, stages=stages).begin(prompt)
    assert [layer for layer in range(6) if state.wants_attention(layer)] == [*layers]


def kept_before_the_first_layer(method, layouts, length):
    """Positions that stay, of a prompt whose rows tell nothing apart."""
    patch = patch_ids(layouts, 1, length, torch.device("cpu"))
    position = torch.arange(length)[None]
    tokens = VideoTokens(torch.zeros(1, length, 2), position, patch, int((patch >= 0).sum()))
    steps = list_steps(method.begin(Prompt(6, length, layouts)).before_attention(0, tokens))
    return [tokens, *steps][-1].position[0].tolist()


def test_uniform_frames_by_hand():
    layouts = [VideoLayout(torch.arange(2, 26).view(8, 3))]  # 8 frames of 3, text around
    keep = {1: [14], 3: [14, 15, 16], 6: [*range(8, 11), *range(20, 23)], 7: [*range(5, 8), *range(14, 17), 20]}
    for count, video in keep.items():
        kept = kept_before_the_first_layer(fftriton.UniformFrames(count / 24), layouts, 28)
        assert kept == [0, 1, *video, 26, 27]


def test_temporal_merge_by_hand():
    angle = torch.tensor([0.0, 0.0, 0.5, 3.0, 0.6, 3.2])  # three frames of two patches
    hidden = torch.stack((angle.cos(), angle.sin()), 1)[None]
    position = torch.arange(6)[None]
    tokens = VideoTokens(hidden, position, position % 2, 6)
    layouts = [VideoLayout(position.view(3, 2))]
    kept = {6: [0, 1, 2, 3, 4, 5], 5: [0, 1, 2, 3, 5], 4: [0, 1, 2, 3], 3: [0, 1, 3], 2: [0, 1], 1: [0, 1]}
    for count, expected in kept.items():
        state = fftriton.TemporalMerge(count / 6).begin(Prompt(4, 6, layouts))
        steps = list_steps(state.before_attention(0, tokens))
        assert [tokens, *steps][-1].position[0].tolist() == expected
        assert len(steps) == (count < 6)
        assert not steps or state.least_budget == 2 / 6
        assert state.before_attention(1, tokens) == []
    merged = fftriton.TemporalMerge(3 / 6).begin(Prompt(4, 6, layouts)).before_attention(0, tokens)
    torch.testing.assert_close(merged.hidden[0, 0], hidden[0, [0, 2, 4]].mean(0))


def test_uniform_frames_counts_only_frames_with_tokens():
    layouts = [VideoLayout(torch.arange(32).view(16, 2))]
    chain = fftriton.UniformFrames(0.5) + fftriton.UniformFrames(0.25)  # of the odd frames every second one
    assert kept_before_the_first_layer(chain, layouts, 32) == [2 * f + p for f in (3, 7, 11, 15) for p in (0, 1)]


def test_uniform_frames_with_holes_in_two_videos():
    layouts = [VideoLayout(torch.tensor([[0, 1], [2, -1]])), VideoLayout(torch.tensor([[4, 5], [-1, 7]]))]
    assert kept_before_the_first_layer(fftriton.UniformFrames(0.5), layouts, 8) == [0, 1, 3, 4, 6]
    assert kept_before_the_first_layer(fftriton.UniformFrames(1.0), layouts, 8) == list(range(8))


def test_random_tokens_are_drawn_evenly_and_again_from_the_same_seed():
    layouts = [VideoLayout(torch.arange(1, 41).view(4, 10))]
    draws = [kept_before_the_first_layer(fftriton.RandomTokens(0.25, seed), layouts, 42) for seed in range(400)]
    assert draws[3] == kept_before_the_first_layer(fftriton.RandomTokens(0.25, 3), layouts, 42)
    assert draws[3] != draws[4]
    counts = torch.bincount(torch.tensor(draws).flatten())
    assert counts[0] == counts[41] == 400  # text
    chi_square = ((counts[1:41] - 100) ** 2 / 75).sum() * 39 / 40  # each kept with probability 1/4, 10 a draw
    assert 15 < chi_square < 80  # 39 degrees of freedom: 2e-4 of all seeds lie outside


def test_methods_are_values():
    assert fftriton.FrameFusion(0.3) == fftriton.FrameFusion()
    assert "budget=0.3" in str(fftriton.FrameFusion())


def test_previous_of_patch_by_hand():
    patch = torch.tensor([[-1, 0, 1, 2, -1, 1, 0, 0, -1], [-1, -1, 5, -1, 5, 5, -1, 3, 3]])
    expected = [[-1, -1, -1, -1, -1, 2, 1, 6, -1], [-1, -1, -1, -1, 2, 4, -1, -1, 7]]
    assert previous_of_patch(patch).tolist() == expected


def test_frames_of_a_prompt_by_hand():
    first = VideoLayout(torch.tensor([[1, 2], [4, -1]]), sample=1)  # two frames, the second with a hole
    second = VideoLayout(torch.tensor([[6], [7]]), sample=1)
    prompt = Prompt(num_layers=3, length=9, layouts=[first, second])
    assert prompt.num_video_tokens == 5
    assert prompt.frame.tolist() == [-1, 0, 0, -1, 1, -1, 2, 3, -1]


def test_tokens_follow_their_hidden_states_to_another_device():
    """The meta device stands in for the next layer's GPU."""
    patch = torch.tensor([[-1, 0, 1, 0, 1]])
    rows, rotary = torch.zeros(1, 5, 2), torch.zeros(1, 5, 4)
    here = VideoTokens(rows, torch.arange(5)[None], patch, 4, (rotary,), additions=(rows,))
    assert here.predecessor.tolist() == [[-1, -1, -1, 1, 2]]
    assert here.at(rows, None).position is here.position
    there = here.at(rows.to("meta"), None)
    parts = (there.position, there.patch, there.predecessor, *there.companions, *there.additions)
    assert {part.device.type for part in parts} == {"meta"}


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.3, 0.37, 1.0])
@pytest.mark.parametrize(
    "text",
    ["keep-all", "uniformframes", "randomtokens", "temporalmerge", "kvtp", "kvtp:min_tokens=3", "kvtp:min_tokens=0",
     "kvtp:pruner=tome", "evs", "vidcom2", "dycoke", "visionzip", "flashvid", "fastvid",
     "kvtp:pruner=visionzip:min_tokens=2", "anchors:proportional=False"],
)  # fmt: skip
def test_the_count_is_what_is_left(text, budget):
    for frames, patches in [(1, 1), (1, 9), (2, 2), (7, 5), (16, 16), (3, 35), (3, 15)]:
        method, total = parse(text, budget), frames * patches
        layout = VideoLayout(torch.arange(3, 3 + total).view(frames, patches))
        prompt = Prompt(4, total + 5, [layout])
        position = torch.arange(prompt.length)[None]
        patch = patch_ids([layout], 1, prompt.length, position.device)
        tokens = VideoTokens(torch.randn(1, prompt.length, 8), position, patch, total)
        left = [tokens, *list_steps(method.begin(prompt).before_attention(0, tokens))][-1]
        assert method.count(frames, patches) == left.num_video == int((left.patch >= 0).sum())


@pytest.mark.parametrize(
    "text",
    ["anchors", "flashvid", "fastvid", "dycoke", "evs", "vidcom2", "visionzip", "temporalmerge", "st-simdiff"],
)  # fmt: skip
def test_frames_of_which_nothing_is_left_are_as_if_they_had_never_been(text):
    """As UniformFrames and KVTP leave them to the method that follows."""
    frames, patches, width = 6, 7, 16
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(2, 2 + frames * patches).view(frames, patches)
    spaced = torch.full((2 * frames + 1, patches), -1)
    spaced[1::2] = positions
    x = torch.randn(1, patches, width, generator=generator).repeat(frames, 1, 1)
    x = (x + 0.3 * torch.randn(x.shape, generator=generator)).view(1, -1, width)
    hidden = torch.cat([torch.zeros(1, 2, width), x, torch.ones(1, 3, width)], 1)
    lefts = []
    for places in (positions, spaced):
        layout, length = VideoLayout(places), hidden.shape[1]
        patch = patch_ids([layout], 1, length, hidden.device)
        tokens = VideoTokens(hidden, torch.arange(length)[None], patch, frames * patches)
        state = parse(text, 0.4).begin(Prompt(8, length, [layout]))
        lefts.append([tokens, *list_steps(state.before_attention(0, tokens))][-1])
    assert lefts[0].num_video < frames * patches
    assert torch.equal(lefts[0].position, lefts[1].position)
    assert torch.equal(lefts[0].hidden, lefts[1].hidden)
    assert lefts[0].sizes is lefts[1].sizes is None or torch.equal(lefts[0].sizes, lefts[1].sizes)


@pytest.mark.parametrize(
    "text", ["framefusion", "fastv", "st-simdiff", "streamingllm", "temporalmerge + fastv:layer=1"]
)
def test_a_method_inside_of_the_decoder_has_no_count(text):
    assert parse(text, 0.3).count(4, 9) is None
