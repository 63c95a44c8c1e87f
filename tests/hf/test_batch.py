"""A batch: each sample comes out as it does alone."""

import pytest
import torch
from by_hand import Scripted
from families import FAMILIES, collate

import fftriton

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
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


def three_samples(family, text):
    """Two videos and an image; no video; one video. All of different lengths."""
    frames = 4 if family.name.startswith("llava") else 6  # whose batches cannot mix numbers of frames
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


@EVERY_FAMILY
@pytest.mark.parametrize(("method", "side", "attention", "text"), WAYS, ids="-".join)
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
            for kept, expected in zip(report.kept_positions, single.kept_positions, strict=True):
                assert torch.equal(kept[row] - start, expected)
