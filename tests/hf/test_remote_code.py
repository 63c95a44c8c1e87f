"""Models of remote code, whose videos are found without a layout: every way of calling them."""

import warnings
from contextlib import contextmanager

import pytest
import remote_models as remote
import torch
from models import snapshot, tiny_qwen2

import fftriton
from fftriton import FrameFusion, KeepAll

STEPS = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def words(count, seed=0):
    return torch.randint(20, 130, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def film(frames, patches, seed=0, width=3):
    """[frames, patches, width] that change slowly."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(1, patches, width, generator=generator)
    return first + 0.2 * torch.randn(frames, patches, width, generator=generator)


def pixels(frames, side, seed=0):
    """[frames, 3, side, side] of one pixel per patch."""
    return film(frames, side * side, seed).transpose(1, 2).unflatten(2, (side, side))


def ids_of(rows, padding_side="right"):
    """Rows of ids of any length -> [B, n] and a mask."""
    length = max(map(len, rows))
    fill = [[0] * (length - len(row)) for row in rows]
    pairs = [(pad, row) if padding_side == "left" else (row, pad) for pad, row in zip(fill, rows, strict=True)]
    mask = [
        [0] * len(pad) + [1] * len(row) if padding_side == "left" else [1] * len(row) + [0] * len(pad)
        for pad, row in zip(fill, rows, strict=True)
    ]
    return torch.tensor([[*a, *b] for a, b in pairs]), torch.tensor(mask)


def decoder_of(model):
    part = getattr(model, "llm", None) or getattr(model, "language_model", None) or model
    return part.model


@contextmanager
def listening(model):
    """The embeddings [B, N, D] of the first prompt that reaches the decoder."""
    seen = []
    decoder = decoder_of(model)

    def note(module, args, kwargs):
        if kwargs.get("inputs_embeds") is not None and kwargs["inputs_embeds"].shape[1] > 1:
            seen.append(kwargs["inputs_embeds"])

    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def state(model):
    """All that a reduction touches, without what a stand-in notes."""
    return {key: value for key, value in snapshot(model).items() if key[-1] not in ("videos", "projected")}


def logits_of(output):
    if isinstance(output, torch.Tensor):
        return output.float()
    logits = output.logits
    return torch.stack(logits, 1) if isinstance(logits, tuple) else logits[:, -1:]


@torch.no_grad()
def check(model, call, expected=None, budget=0.3):
    """That a call is reduced where the features are, keeps every bit if nothing is to go, and leaves nothing behind.

    expected: of the videos, or None for those that the stand-in has noted: (sample, [F, P, D]) each.
    """
    before, dense = state(model), call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with listening(model) as seen, fftriton.reduce(model, KeepAll()) as reduction:
            kept = call()
        videos = model.videos if expected is None else expected
        assert torch.equal(logits_of(dense), logits_of(kept))
        layouts = [layout for sample in reduction.report.samples for layout in sample.layouts]
        assert [layout.sample for layout in layouts] == [sample for sample, _ in videos]
        for layout, (_, features) in zip(layouts, videos, strict=True):
            assert torch.equal(seen[0][layout.sample, layout.positions], features)
        with fftriton.reduce(model, FrameFusion(budget)) as reduction:
            reduced = call()
    assert not torch.equal(logits_of(dense), logits_of(reduced))
    for sample in reduction.report.samples:
        if sample.num_video_tokens:
            assert abs(sample.budget_achieved - budget) <= 1 / sample.num_video_tokens
    assert state(model) == before
    return reduced, reduction.report


# ---- LLaVA-Video


VIDEO = remote.PLACEHOLDER


def llava_prompt(padding_side="right"):
    """Rows with a video; two videos and images beside them; text alone. The second image has tiles of unknown use."""
    rows = [
        [*words(4), VIDEO, *words(9, 1)],
        [*words(3, 2), VIDEO, *words(2, 3), VIDEO, *words(3, 4), VIDEO, *words(2, 5), VIDEO, *words(5, 6)],
        words(20, 7),
    ]
    ids, mask = ids_of(rows, padding_side)
    images = [pixels(6, 5), pixels(1, 5, 1)[0], pixels(5, 5, 2), pixels(4, 5, 3), pixels(4, 5, 4), pixels(1, 5, 5)]
    return {
        "ids": ids, "attention_mask": mask, "images": images,
        "modalities": ["video", "image", "video", "image", "video", "image"],
    }  # fmt: skip


def llava_forward(model, ids, **arguments):
    return lambda: model(ids, **arguments)


def llava_generate(model, ids, **arguments):
    return lambda: model.generate(ids, **arguments, **STEPS)


LLAVA_WAYS = pytest.mark.parametrize("way", [llava_forward, llava_generate])


@LLAVA_WAYS
@pytest.mark.parametrize(
    ("settings", "patches"),
    [
        ({}, 12),
        ({"mm_spatial_pool_mode": "average"}, 6),
        ({"mm_newline_position": "frame"}, 10),
        ({"mm_newline_position": "one_token"}, 9),
        ({"mm_newline_position": "one_token", "mm_patch_merge_type": "spatial"}, 9),
        ({"mm_newline_position": "no_token"}, 9),
        ({"mm_patch_merge_type": "flat"}, 9),
    ],
    ids=str,
)
def test_llava_arrangements(settings, patches, way):
    model = remote.llava_qwen(**settings)
    ids = torch.tensor([[*words(4), VIDEO, *words(6, 1)]])
    _, report = check(model, way(model, ids, images=[pixels(6, 5)], modalities="video"))
    assert report.layouts[0].positions.shape == (6, patches)


@LLAVA_WAYS
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("newlines", ["grid", "one_token"])
def test_llava_batch(side, newlines, way):
    """Videos, images and text alone; each sample comes out as it does alone."""
    model = remote.llava_qwen(tokenizer_padding_side=side, mm_newline_position=newlines)
    prompt = llava_prompt(side)
    together, report = check(model, way(model, **prompt))
    assert [len(sample.layouts) for sample in report.samples] == [1, 2, 0]
    images, modalities = prompt.pop("images"), prompt.pop("modalities")
    for sample, own in enumerate([slice(0, 1), slice(1, 5), slice(5, 6)]):
        alone = {name: part[sample : sample + 1] for name, part in prompt.items()}
        kinds = modalities[own]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # text alone is not reduced
            with torch.no_grad(), fftriton.reduce(model, FrameFusion(0.3)):
                single = way(model, images=images[own], modalities=kinds, **alone)()
        if way is llava_generate:
            assert (logits_of(single)[0] - logits_of(together)[sample]).abs().max() < 1e-4
        else:
            last = -1 if side == "left" else single.logits.shape[1] - 1
            assert (single.logits[0, -1] - together.logits[sample, last]).abs().max() < 1e-4


@LLAVA_WAYS
def test_llava_without_a_mask(way):
    model = remote.llava_qwen()
    ids = torch.tensor([[*words(4), VIDEO, *words(6, 1)], [*words(2), VIDEO, *words(8, 2)]])
    arguments = {"images": [pixels(6, 5), pixels(4, 5, 1)], "modalities": ["video", "video"]}
    check(model, way(model, ids, **arguments))
    stacked = torch.stack([pixels(6, 5), pixels(6, 5, 1)])
    check(model, way(model, ids, images=stacked, modalities=["video", "video"]))


def test_llava_cut_to_its_longest():
    model = remote.llava_qwen(tokenizer_model_max_length=50)
    ids = torch.tensor([[*words(4), VIDEO, *words(6, 1)]])
    with torch.no_grad(), fftriton.reduce(model, KeepAll()) as reduction:
        model(ids, images=[pixels(6, 5)], modalities="video")
    positions = reduction.report.layouts[0].positions
    assert positions.shape == (4, 12)  # 50 = 4 + 3 * 12 + 10
    assert positions.flatten().tolist() == [*range(4, 50), -1, -1]
