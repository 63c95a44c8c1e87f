"""The base pruners against one frame after the other, written out."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from frame_samples import ragged, sequence
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fftriton
from fftriton import EVS, DyCoke, PruMerge, RandomPruner, ToMe, TopKPruner, VidCom2, VisionZip
from fftriton.methods.frames import FrameRows
from fftriton.methods.importances import distinctness, feature_norm
from fftriton.methods.segments import segment_starts

GOLDEN = Path(__file__).parent / "golden" / "kvtp"


def first_feature(context):
    return context.hidden[..., 0]


def three_features(context):
    return context.hidden[..., :3]


def named(pruner):
    """Without the addresses of its functions, which differ between the processes of a test run."""
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", str(pruner))


PRUNERS = [
    RandomPruner(), TopKPruner(), TopKPruner("norm"), TopKPruner(first_feature), PruMerge(neighbours=3),
    PruMerge("norm", 3, three_features, "importance", "all"), ToMe(), ToMe("plain"), ToMe("rescaled", three_features),
    EVS(), VidCom2(), DyCoke(), VisionZip(), VisionZip(0.3, "norm", 0.5, three_features),
]  # fmt: skip


def counts_for(frames, seed=0):
    """Any counts from 1 to the frame's size."""
    generator = torch.Generator().manual_seed(seed)
    return 1 + (torch.rand(len(frames.sizes), generator=generator) * frames.sizes).long()


def run(pruner, tokens, layouts, seed=0):
    frames = FrameRows.of(layouts, tokens)
    counts = counts_for(frames, seed)
    return pruner(tokens, frames, counts, int(counts.sum())), frames, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pruner", PRUNERS, ids=named)
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
        (first_feature, tokens.hidden[0, :, 0]),
    ):
        left, frames, counts = run(TopKPruner(importance), tokens, layouts, seed)
        assert left.position[left.patch >= 0].tolist() == keeps_best_by_hand(scores, frames, counts)
        assert torch.equal(left.hidden, tokens.hidden[:, left.position[0]])


def test_random_is_reproducible_and_another_seed_is_another_draw():
    tokens, layouts = ragged(1)
    one, again, other = (run(RandomPruner(seed), tokens, layouts)[0].position for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("adds", ["dropped", "all"])
@pytest.mark.parametrize("weights", ["softmax", "importance"])
@pytest.mark.parametrize("keys", ["tokens", three_features], ids=["tokens", "others"])
@pytest.mark.parametrize("neighbours", [1, 3, 32])
def test_prumerge_adds_what_is_around_a_token(neighbours, keys, weights, adds):
    tokens, layouts = ragged(neighbours)
    left, frames, counts = run(PruMerge("norm", neighbours, keys, weights, adds), tokens, layouts, 1)
    x = tokens.hidden[0].double()
    norm, key = x.norm(dim=-1), x if keys == "tokens" else x[:, :3]
    kept = keeps_best_by_hand(norm, frames, counts)
    assert left.position[left.patch >= 0].tolist() == kept
    for rows in frames.rows:
        rows = rows[rows >= 0].tolist()
        weight = dict(zip(rows, (norm[rows].softmax(0) if weights == "softmax" else norm[rows]).tolist(), strict=True))
        for row in set(rows) & set(kept):
            others = [other for other in rows if other != row]
            near = sorted(others, key=lambda other: -float(F.cosine_similarity(key[row], key[other], dim=0)))
            added = [other for other in near[:neighbours] if adds == "all" or other not in kept]
            expected = x[row] + sum((weight[other] * x[other] for other in added), torch.zeros(16))
            place = int((left.position[0] == row).nonzero())
            torch.testing.assert_close(left.hidden[0, place].double(), expected, rtol=0, atol=3e-5)


def tome_by_hand(x, keys, rows, count, means):
    """The groups of one frame and what they become: the 2nd, 4th, ... propose to the others, round after round."""
    groups = [([row], x[row].double(), keys[row].double()) for row in rows]
    while len(groups) > count:
        receivers, proposers = groups[::2], groups[1::2]
        direction = [F.normalize(torch.stack([key for *_, key in part]), dim=-1) for part in (proposers, receivers)]
        best, partner = (direction[0] @ direction[1].T).max(1)
        number = min(len(groups) - count, len(proposers))
        accepted = sorted(range(len(best)), key=lambda i: -float(best[i]))[:number]
        merged = []
        for place, receiver in enumerate(receivers):
            members = [receiver, *(proposers[i] for i in accepted if int(partner[i]) == place)]
            row = [row for rows, *_ in members for row in rows]
            mean, key = (torch.stack([part[i] for part in members]).mean(0) for i in (1, 2))
            if means == "weighted":
                mean, key = x[row].double().mean(0), keys[row].double().mean(0)
            if means == "rescaled":
                mean = F.normalize(mean, dim=-1) * max(float(value.norm()) for _, value, _ in members)
            merged.append((row, mean, mean if keys is x else key))
        groups = merged + [proposer for i, proposer in enumerate(proposers) if i not in accepted]
    return groups


@pytest.mark.parametrize("keys", ["tokens", three_features], ids=["tokens", "others"])
@pytest.mark.parametrize("means", ["weighted", "plain", "rescaled"])
@pytest.mark.parametrize("seed", range(4))
def test_tome_by_hand(seed, means, keys):
    tokens, layouts = ragged(seed)
    tokens = replace(tokens, additions=(tokens.hidden * 2 + 1,))
    left, frames, counts = run(ToMe(means, keys), tokens, layouts, seed)
    x = tokens.hidden[0]
    root = torch.arange(tokens.length)
    root[left.merge.merged] = left.merge.into
    for rows, count in zip(frames.rows, counts.tolist(), strict=True):
        rows = rows[rows >= 0].tolist()
        for group, mean, _ in tome_by_hand(x, x if keys == "tokens" else x[:, :3], rows, count, means):
            place = (left.position[0] == group[0]).nonzero()
            assert len(place) == 1
            assert set(root[group].tolist()) == {group[0]}
            torch.testing.assert_close(left.hidden[0, int(place)].double(), mean, rtol=0, atol=1e-5)
            if means == "weighted":
                expected = tokens.additions[0][0, group].mean(0)
                torch.testing.assert_close(left.additions[0][0, int(place)], expected, rtol=0, atol=1e-5)


def check_recorded(pruner, recorded, prefix=""):
    tokens, frames = sequence(recorded["x"])
    kept = [recorded[f"{prefix}kept_{frame}"] for frame in range(3)]
    counts = torch.tensor([len(rows) for rows in kept])
    left = pruner(tokens, frames, counts, int(counts.sum()))
    patches = recorded["x"].shape[1]
    assert left.position[0].tolist() == torch.cat([rows + patches * i for i, rows in enumerate(kept)]).tolist()
    rows = torch.cat([recorded[f"{prefix}rows_{frame}"] for frame in range(3)])
    torch.testing.assert_close(left.hidden[0], rows, rtol=0, atol=1e-5)


def test_prumerge_is_the_authors():
    recorded = load_file(GOLDEN / "prumerge.safetensors")
    values, vectors = torch.linalg.eigh(recorded["cosine"].double())
    keys = (vectors * values.clamp_min(0).sqrt()[:, None]).float()  # with these cosines
    pruner = PruMerge(lambda context: recorded["importance"], 32, lambda context: keys, "importance", "all")
    check_recorded(pruner, recorded)


@pytest.mark.parametrize("means", ["plain", "rescaled"])
def test_tome_is_the_authors(means):
    check_recorded(ToMe(means), load_file(GOLDEN / "tome.safetensors"), f"{means}_")


def test_tome_with_rows_that_are_zero_or_not_finite():
    tokens, layouts = ragged(2)
    frames = FrameRows.of(layouts, tokens)
    tokens.hidden[0, frames.rows[0, 0]] = 0
    tokens.hidden[0, frames.rows[1, 0]] = math.nan
    tokens.hidden[0, frames.rows[2, 0]] = math.inf
    for means in ("weighted", "plain", "rescaled"):
        left, frames, counts = run(ToMe(means), tokens, layouts)
        assert left.num_video == int(counts.sum())
        assert int(left.hidden.isfinite().all(-1).logical_not().sum()) <= 2  # the rows that hold them, and no others


def test_many_frames_are_compared_in_parts(monkeypatch):
    tokens, layouts = ragged(3)
    for pruner in PRUNERS:
        monkeypatch.setattr("fftriton.methods.frames._PART_BYTES", 2**30)
        whole = run(pruner, tokens, layouts)[0]
        monkeypatch.setattr("fftriton.methods.frames._PART_BYTES", 3 * 7 * 16 * 4)  # three frames
        parts = run(pruner, tokens, layouts)[0]
        assert torch.equal(whole.position, parts.position)
        torch.testing.assert_close(whole.hidden, parts.hidden, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pruner", [one for one in PRUNERS if one.may_drop], ids=named)
def test_frames_of_a_part_may_all_be_left_out(pruner, monkeypatch):
    monkeypatch.setattr("fftriton.methods.frames._PART_BYTES", 2 * 6 * 16 * 4)  # two frames
    tokens, frames = sequence(torch.randn(6, 6, 16, generator=torch.Generator().manual_seed(0)))
    left = pruner(tokens, frames, torch.tensor([2, 1, 0, 0, 0, 3]), 6)
    assert (left.position[0] // 6).tolist() == [0, 0, 1, 5, 5, 5]


class HostWaits(TorchDispatchMode):
    """Counts what would wait for a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.__name__.partition(".")[0]
        masks = [part for part in args[1] if part is not None and part.dtype == torch.bool] if name == "index" else []
        self.count += name in self.NAMES or bool(masks)
        return function(*args, **kwargs)


@pytest.mark.parametrize("pruner", PRUNERS, ids=named)
def test_no_round_waits_for_the_device(pruner, monkeypatch):
    """As many waits for three rounds as for one, and none that grows with the frames."""
    lists, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(1) or tolist(tensor))

    def waits(frames, patches, count):
        x = torch.randn(frames, patches, 16, generator=torch.Generator().manual_seed(0))
        tokens, rows = sequence(x)
        counts = torch.full((frames,), count)
        lists.clear()
        with HostWaits() as mode:
            pruner(tokens, rows, counts, frames * count)
        return mode.count + len(lists)

    assert waits(4, 16, 8) == waits(4, 16, 2) == waits(40, 16, 2)


class NewTensors(TorchDispatchMode):
    """Counts the elements of the tensors that calls make, and the largest; views and writing in place make none."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {
            one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)
        }
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in given:
                self.total += one.numel()
                self.largest = max(self.largest, one.numel())
        return out


@pytest.mark.parametrize("pruner", PRUNERS, ids=named)
def test_work_and_memory_are_linear_in_the_frames(pruner, monkeypatch):
    """Nothing is copied once per part, and no tensor is larger than a part, the kept rows or a number per token."""
    monkeypatch.setattr("fftriton.methods.frames._PART_BYTES", 4 * 16 * 16 * 64)  # four frames
    made = []
    for count in (16, 64):
        x = torch.randn(count, 16, 64, generator=torch.Generator().manual_seed(0))
        tokens, rows = sequence(x)
        with NewTensors() as mode:
            pruner(tokens, rows, torch.full((count,), 3), 3 * count)
        of_functions = x.numel() if callable(getattr(pruner, "importance", None)) else 0  # they see the whole video
        of_functions = max(of_functions, x.numel() if callable(getattr(pruner, "keys", None)) else 0)
        assert mode.largest <= max(3 * count * 64, 16 * 16 * 64, of_functions)
        made.append(mode.total)
    assert made[1] / made[0] < 4**1.1


def test_a_token_that_is_not_finite_spoils_no_other():
    x, present = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)), torch.ones(3, 5, dtype=torch.bool)
    spoiled, without = x.clone(), present.clone()
    spoiled[1, 2, 3], spoiled[2, 0] = math.nan, math.inf
    without[1, 2] = without[2, 0] = False
    expected = distinctness(x, without).masked_fill(~without, -1.0)
    torch.testing.assert_close(distinctness(spoiled, present), expected, rtol=0, atol=1e-6)
    tokens, frames = sequence(torch.cat([spoiled, x.flip(0)]))
    (video,) = frames.contexts(tokens)
    plain, holes = sequence(torch.cat([x, x.flip(0)]))
    (other,) = replace(holes, rows=holes.rows.where(torch.cat([without, present]), -1)).contexts(plain)
    for threshold in (-0.2, 0.0, 0.5):
        assert segment_starts(video, threshold, 2).tolist() == segment_starts(other, threshold, 2).tolist()


def test_prumerge_adds_up_what_the_decoder_adds_later():
    tokens, layouts = ragged(2)
    twice = replace(tokens, additions=(tokens.hidden, 3 * tokens.hidden))
    left = run(PruMerge(neighbours=3), twice, layouts)[0]
    assert not torch.equal(left.hidden, tokens.hidden[:, left.position[0]])
    torch.testing.assert_close(left.additions[0], left.hidden)
    torch.testing.assert_close(left.additions[1], 3 * left.hidden)


def test_importances_do_not_see_holes():
    x, present = torch.randn(2, 4, 8), torch.tensor([[True] * 4, [True, True, False, True]])
    other = x.clone()
    other[1, 2] = 50.0
    for importance in (distinctness, feature_norm):
        assert torch.equal(importance(x, present)[present], importance(other, present)[present])


def test_a_function_knows_its_frames():
    seen = []

    def by_frame(context):
        seen.append((context.video, context.num_frames, tuple(context.hidden.shape), tuple(context.text.shape)))
        return torch.arange(context.num_frames)[:, None] * 10.0 + torch.arange(context.present.shape[1])

    tokens, layouts = ragged(1)
    frames = FrameRows.of(layouts, tokens, [4, 7])
    counts = counts_for(frames)
    TopKPruner(by_frame)(tokens, frames, counts, int(counts.sum()))
    text = (tokens.length - tokens.num_video, 16)
    assert seen == [(4, 5, (5, 7, 16), text), (7, 3, (3, 4, 16), text)]


@pytest.mark.parametrize(
    ("pruner", "error", "message"),
    [
        (TopKPruner(lambda context: context.hidden), ValueError, r"importance must return \[5, 7\] for video 0"),
        (PruMerge(lambda context: [1.0]), TypeError, "importance must return a tensor of real numbers, got list"),
        (PruMerge(lambda context: context.hidden[..., 0] * math.nan), ValueError, "importance must be finite"),
        (PruMerge(keys=lambda context: context.hidden[..., 0]), ValueError, r"keys must return \[5, 7, 'E'\]"),
        (ToMe(keys=lambda context: context.hidden * math.inf), ValueError, "keys must be finite, .* for video 0"),
        (ToMe(keys=lambda context: context.hidden[..., : 1 + context.video]), ValueError, "keys must be of one width"),
    ],
)
def test_functions_that_return_something_else(pruner, error, message):
    with pytest.raises(error, match=f"{type(pruner).__name__}: {message}"):
        run(pruner, *ragged(1))


def test_an_importance_of_an_earlier_release_still_works():
    with pytest.warns(DeprecationWarning, match="importance of .tokens, present. is deprecated"):
        pruner = TopKPruner(lambda x, present: x[..., 0])
    left, *_ = run(pruner, *ragged(1))
    assert torch.equal(left.position, run(TopKPruner(first_feature), *ragged(1))[0].position)


@pytest.mark.parametrize("pruner", [TopKPruner, PruMerge])
def test_unknown_importance(pruner):
    with pytest.raises(ValueError, match="importance must be one of 'distinctness', 'norm', 'predictor', got 'size'"):
        pruner("size")


def test_parameters_out_of_range():
    with pytest.raises(ValueError, match="PruMerge: neighbours must be at least 1, got 0"):
        PruMerge(neighbours=0)
    for pruner, name in (
        (PruMerge, "keys"),
        (ToMe, "keys"),
        (PruMerge, "weights"),
        (PruMerge, "adds"),
        (ToMe, "means"),
    ):
        with pytest.raises(ValueError, match=f"{pruner.__name__}: {name} must be one of .* got 'x'"):
            pruner(**{name: "x"})
    with pytest.raises(ValueError, match="RandomPruner: seed must be at least 0, got -1"):
        RandomPruner(-1)
    with pytest.raises(ValueError, match="KVTP: pruner must be one of 'random', 'topk', .*'visionzip', got 'x'"):
        fftriton.KVTP(pruner="x")
