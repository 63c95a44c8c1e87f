"""A batch: each sample comes out as it does alone."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from by_hand import SPECIAL, Scripted
from families import FAMILIES, collate
from models import behind, cache_of, tiny_qwen2, video_embeddings
from newer_families import NEWER_FAMILIES

import fftriton

METHODS = {
    "scripted": Scripted(),
    "framefusion": fftriton.FrameFusion(0.5, 0.9, importance_queries=3),
    "streamingllm": fftriton.StreamingLLM(0.4, sinks=2),
}
WAYS = [  # method, padding, attention back end, length of the sample without a video
    ("scripted", "left", "sdpa", "shortest"),
    ("scripted", "right", "eager", "longest"),
    ("framefusion", "left", "eager", "longest"),
    ("framefusion", "right", "sdpa", "shortest"),
    ("streamingllm", "left", "sdpa", "longest"),
    ("streamingllm", "right", "eager", "shortest"),
]


WAY = ("family", "method", "side", "attention", "text")
CASES = [(family, *way) for family in FAMILIES.values() for way in WAYS]
CASES += [(family, *WAYS[3 * (number % 2)]) for number, family in enumerate(NEWER_FAMILIES.values())]


def three_samples(family, text):
    """Two videos and an image; no video; one video. All of different lengths."""
    frames = 4 if "llava" in family.name else 6  # whose batches cannot mix numbers of frames
    words = family.inputs((), image=False, seed=1)
    if text == "longest":
        words = {name: torch.cat([part] * 15, 1) for name, part in words.items()}
    return [family.inputs(), words, family.inputs((frames,), image=False, seed=2)]


def length_of(sample):
    return sample.get("inputs_embeds", sample.get("input_ids")).shape[1]


def offsets(samples, side):
    """Where each sample begins in its padded row."""
    longest = max(map(length_of, samples))
    return [longest - length_of(sample) if side == "left" else 0 for sample in samples]


@pytest.mark.parametrize(WAY, CASES, ids=["-".join((row[0].name, *row[1:])) for row in CASES])
@pytest.mark.feature("batches")
@torch.no_grad()
def test_equals_its_samples(family, method, side, attention, text):
    model, samples, method = family.model(attention), three_samples(family, text), METHODS[method]
    dense = [model(**sample).logits for sample in samples]
    with fftriton.reduce(model, method) as reduction:
        logits = model(**collate(samples, side)).logits
        report = reduction.report
        for row, (sample, start) in enumerate(zip(samples, offsets(samples, side), strict=True)):
            alone = model(**sample).logits
            here = logits[row, start : start + length_of(sample)]
            assert (here - alone[0]).abs().max() < 1e-4
            if row == 1:
                assert (dense[row] - alone).abs().max() == 0
                assert report.samples[row].num_video_tokens == 0
                continue
            assert (dense[row] - alone)[:, -1].abs().max() > 1e-2  # the reduction does change the output
            single = reduction.report
            assert single.vision_tokens_per_layer == report.samples[row].vision_tokens_per_layer
            assert single.budget_achieved == report.samples[row].budget_achieved
            for kept, expected in zip(report.samples[row].kept_positions, single.kept_positions, strict=True):
                assert torch.equal(kept - start, expected)


@dataclass(frozen=True)
class MiddleFrame(fftriton.Method):
    """A user's method that looks at frames: keeps all but the tokens of one."""

    seen: list = field(default_factory=list, compare=False)

    def begin(self, prompt):
        return _MiddleFrameState(self, prompt)


class _MiddleFrameState(fftriton.methods.MethodState):
    def before_attention(self, layer, tokens):
        if layer != 1:
            return []
        assert self.prompt.length == len(self.prompt.frame) == tokens.length
        assert torch.equal(self.prompt.frame >= 0, tokens.patch[0] >= 0)
        self.method.seen.append(self.prompt.frame.tolist())
        return [tokens.keep_top((self.prompt.frame != 1).float()[None], int((self.prompt.frame >= 0).sum()) - 2)]


FRAME_METHODS = [
    fftriton.UniformFrames(0.5), fftriton.UniformFrames(0.5) + fftriton.FastV(0.4, layer=1), MiddleFrame(),
    fftriton.TemporalMerge(0.7) + fftriton.UniformFrames(0.5), fftriton.KVTP(0.5), fftriton.RandomTokens(0.5),
    fftriton.EVS(0.4), fftriton.VidCom2(0.4), fftriton.DyCoke(0.4), fftriton.VisionZip(0.4), fftriton.Anchors(0.4),
    fftriton.FlashVID(0.4, similarity_threshold=0.3, min_segments=1), fftriton.FastVID(0.4, min_segments=2, stride=2),
    fftriton.KVTP(0.4, "attention", "visionzip"), fftriton.STSimDiff(0.4, 0.1, -1.0),
]  # fmt: skip


@pytest.mark.parametrize("method", FRAME_METHODS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen2_vl", "internvl", "qwen3_vl"])
@torch.no_grad()
def test_methods_that_count_frames(method, side, family):
    """A method sees each sample without its padding."""
    family = FAMILIES[family]
    model, samples = family.model(), three_samples(family, "longest")
    with fftriton.reduce(model, method) as reduction:
        logits = model(**collate(samples, side)).logits
        report = reduction.report
        seen = list(getattr(method, "seen", ()))
        for row, (sample, start) in enumerate(zip(samples, offsets(samples, side), strict=True)):
            alone = model(**sample).logits
            assert (logits[row, start : start + length_of(sample)] - alone[0]).abs().max() < 1e-4
            if row != 1:
                own = report.samples[row].kept_positions
                for kept, expected in zip(own, reduction.report.kept_positions, strict=True):
                    assert torch.equal(kept - start, expected)
    if isinstance(method, MiddleFrame):
        assert method.seen[len(seen) :] == seen
        method.seen.clear()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.feature("batches")
@torch.no_grad()
def test_generates_what_its_samples_do(family):
    model, samples = family.model(), three_samples(family, "longest")
    batch = collate(samples, "left")
    arguments = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": SPECIAL}
    with fftriton.reduce(model, METHODS["framefusion"]):
        together = model.generate(**batch, **arguments)[:, -5:]
        alone = [model.generate(**sample, **arguments)[0, -5:] for sample in samples]
    assert torch.equal(together, torch.stack(alone))


@torch.no_grad()
def test_beams_of_a_batch():
    family = FAMILIES["qwen2_vl"]
    model, samples = family.model(), three_samples(family, "longest")
    arguments = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": SPECIAL, "num_beams": 3}
    with fftriton.reduce(model, METHODS["scripted"]):
        together = model.generate(**collate(samples, "left"), **arguments)[:, -5:]
        alone = [model.generate(**sample, **arguments)[0, -5:] for sample in samples]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("turn", [1, 3])
@torch.no_grad()
def test_what_follows_right_padding(turn):
    """Tokens, one or several, behind samples of different lengths that are padded on the right."""
    model, prompts = tiny_qwen2(), [video_embeddings(5, 4), video_embeddings(3, 6, seed=1)]
    layouts = [fftriton.VideoLayout(layout[0].positions, sample) for sample, (_, layout) in enumerate(prompts)]
    samples = [{"inputs_embeds": video, "attention_mask": torch.ones(1, video.shape[1])} for video, _ in prompts]
    batch, later = collate(samples, "right"), torch.tensor([[3, 4, 5], [6, 7, 8]])[:, :turn]
    lengths = batch["attention_mask"].sum(1, keepdim=True).long()
    assert lengths[0] != lengths[1]
    with fftriton.reduce(model, METHODS["scripted"], layouts) as reduction:
        cache = cache_of(model(**batch))
        mask = torch.cat([batch["attention_mask"], torch.ones_like(later)], 1)
        positions = lengths + torch.arange(turn)
        logits = model(input_ids=later, **behind(cache), attention_mask=mask, position_ids=positions).logits
        kept = [own.kept_positions for own in reduction.report.samples]
    for row, (sample, (_, layout)) in enumerate(zip(samples, prompts, strict=True)):
        with fftriton.reduce(model, METHODS["scripted"], layout) as reduction:
            cache = cache_of(model(**sample))
            alone = model(input_ids=later[row : row + 1], **behind(cache)).logits[0]
        assert (logits[row] - alone).abs().max() < 1e-4
        assert all(
            torch.equal(layer, own) for layer, own in zip(kept[row], reduction.report.kept_positions, strict=True)
        )


@torch.no_grad()
def test_a_report_of_a_batch():
    """Each sample has its own, as alone; the forward has the method, its budget and the seconds."""
    family = FAMILIES["qwen2_vl"]
    model, samples = family.model(), three_samples(family, "shortest")
    with fftriton.reduce(model, fftriton.FastV(0.6)) as reduction:
        model(**collate(samples, "left"))
        report, alone = reduction.report, []
        for sample in samples[::2]:
            model(**sample)
            alone.append(reduction.report)
    first, text, last = report.samples
    assert [sample.num_tokens for sample in report.samples] == [length_of(sample) for sample in samples]
    assert text.num_video_tokens == 0
    for own, one in zip((first, last), alone, strict=True):
        assert own.num_video_tokens == one.num_video_tokens > 0
        assert own.vision_tokens_per_layer == one.vision_tokens_per_layer
        assert own.tokens_per_layer == one.tokens_per_layer
        assert own.least_budget == one.least_budget
        assert len(own.pruned) == len(one.pruned) > 0
        assert own.budget_achieved == pytest.approx(0.6, abs=1 / own.num_video_tokens)
    assert text.tokens_per_layer == [text.num_tokens] * len(first.tokens_per_layer)
    assert [sample.prune_layer for sample in report.samples] == [1, None, 1]
    assert len(text.pruned) == 0
    assert [[layout.sample for layout in sample.layouts] for sample in report.samples] == [[0, 0], [], [2]]
    assert [sample.merge_steps for sample in report.samples] == [[], [], []]
    assert report.budget == 0.6
    assert report.method == str(fftriton.FastV(0.6))
    assert report.seconds["prefill"] > 0


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_loss_of_a_batch(side):
    """The mean over all labels of all samples that stay."""
    family = FAMILIES["qwen2_vl"]
    model, samples = family.model(), three_samples(family, "shortest")
    batch = collate(samples, side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with fftriton.reduce(model, METHODS["scripted"]) as reduction:
        loss = model(**batch, labels=labels).loss
        total = count = 0
        for sample in samples:
            out = model(**sample)
            kept = torch.arange(length_of(sample))
            if "video_grid_thw" in sample:
                kept = positions_left(reduction.report)
            before = kept[torch.isin(kept + 1, kept)]  # those whose next token stays
            targets = sample["input_ids"][0, before + 1]
            total += F.cross_entropy(out.logits[0, before], targets, reduction="sum")
            count += len(targets)
    assert abs(loss - total / count) < 1e-4


def positions_left(report):
    """The positions behind the last layer, whose own reduction no layer's attention shows."""
    left = report.kept_positions[-1]
    gone = [step.merged for step in report.merge_steps] + [report.pruned]
    return left[~torch.isin(left, torch.cat(gone))]
