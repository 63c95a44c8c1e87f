"""Models of remote code, whose videos are found without a layout: every way of calling them."""

import warnings

import pytest
import remote_models as remote
import torch
from remote_prompts import STEPS, film, ids_of, listening, logits_of, pixels, state, units, words

import fftriton
from fftriton import FrameFusion, KeepAll

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
            if side == "right" and sample != 1:
                continue  # the model goes on from padding, unless the row is the longest
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


# ---- NVILA


def nvila_way(kind, model, ids, **arguments):
    def forward():
        return model(ids, **arguments)

    def generate():
        return model.generate(ids, **arguments, **STEPS)

    return {"forward": forward, "generate": generate}[kind]


WAYS = pytest.mark.parametrize("way", ["forward", "generate"])
ENCODERS = pytest.mark.parametrize(
    ("encoder", "settings", "shapes"),
    [
        (remote.BasicVideoEncoder, {}, [(8, 16)]),
        (remote.BasicVideoEncoder, {"start_tokens": "<a>"}, [(8, 16)]),
        (remote.BasicVideoEncoder, {"end_tokens": None}, [(8, 16)]),
        (remote.TSPVideoEncoder, {"pool_sizes": [[2, 1, 1]]}, [(4, 16)]),
        (remote.TSPVideoEncoder, {"pool_sizes": [[1, 2, 2]], "sep_tokens": "<sep>"}, [(8, 4)]),
        (remote.TSPVideoEncoder, {"pool_sizes": [[2, 1, 1], [4, 2, 2]], "sep_tokens": "<sep>"}, [(4, 16), (2, 4)]),
    ],
    ids=str,
)


@WAYS
@ENCODERS
def test_nvila_encoders(encoder, settings, shapes, way):
    model = remote.nvila(encoder=encoder, **settings)
    ids = torch.tensor([[*words(4), 151, *words(6, 1)]])
    _, report = check(model, nvila_way(way, model, ids, media={"video": [pixels(8, 4)]}))
    assert [tuple(layout.positions.shape) for layout in report.layouts] == shapes


@WAYS
@pytest.mark.parametrize("side", ["right", "left"])
def test_nvila_batch(side, way):
    """A video; two of them, one beside an image; text alone."""
    model = remote.nvila(padding_side=side)
    rows = [
        [*words(4), 151, *words(9, 1)],
        [*words(3, 2), 150, *words(2, 3), 151, 151, *words(3, 4), 150, *words(5, 6)],
        words(20, 7),
    ]
    ids, mask = ids_of(rows)
    videos, images = [pixels(6, 4), pixels(5, 4, 1), pixels(3, 4, 2)], [*pixels(2, 4, 3)]
    media = {"video": videos, "image": images}
    together, report = check(model, nvila_way(way, model, ids, media=media, attention_mask=mask.bool()))
    assert [len(sample.layouts) for sample in report.samples] == [1, 2, 0]
    own = [{"video": videos[:1]}, {"video": videos[1:], "image": images}, {}]
    for sample, row in enumerate(rows):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.no_grad(), fftriton.reduce(model, FrameFusion(0.3)):
                single = nvila_way(way, model, torch.tensor([row]), media=own[sample])()
        if way == "generate":
            if side == "right" and sample != 1:
                continue  # the model goes on from padding, unless the row is the longest
            assert (logits_of(single)[0] - logits_of(together)[sample]).abs().max() < 1e-4
        else:
            last = -1 if side == "left" else single.logits.shape[1] - 1
            assert (single.logits[0, -1] - together.logits[sample, last]).abs().max() < 1e-4


# ---- MiniCPM-V 2.6


def minicpm_way(kind, model, message, processor=None, **arguments):
    """message: one, or a list of messages for a batch."""
    processor = processor or remote.Processor()

    def chat():
        return model.chat(msgs=message, processor=processor, **arguments, **STEPS)

    def forward():
        inputs = processor(message if isinstance(message[0], list) else [message])
        mask = inputs["attention_mask"]
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return model(inputs, attention_mask=mask, **arguments)

    return {"chat": chat, "forward": forward}[kind]


def minicpm_videos(*videos):
    """(sample, list of [count, 4, 3]) each -> what is to be found, of one model."""
    model = remote.minicpm_v()
    return model, [
        (sample, torch.stack([model.resampler(frame).flatten(0, 1) for frame in frames])) for sample, frames in videos
    ]


@pytest.mark.parametrize("way", ["chat", "forward"])
@pytest.mark.parametrize("image_id", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_minicpm_slices(count, image_id, way):
    frames = units(12, count)
    model, expected = minicpm_videos((0, frames))
    message = [*frames, *words(6)]
    _, report = check(model, minicpm_way(way, model, message, remote.Processor(image_id)), expected)
    assert report.layouts[0].positions.shape == (12, 4 * count)


@pytest.mark.parametrize("way", ["chat", "forward"])
@torch.no_grad()
def test_minicpm_batch(way):
    """Two videos, one of them with slices; an image before a video, text alone, and an image alone."""
    first, second, third, image, wide = units(6), units(5, 3, 1), units(7, 1, 2), units(1, 1, 3), units(1, 4, 4)
    model, expected = minicpm_videos((0, first), (0, second), (1, third))
    messages = [
        [*words(2), *first, *words(7, 1), *second, *words(5, 2)],
        [*image, *words(6, 3), *third, *words(5, 4), *wide, *words(2, 5)],
        words(9, 6),
        [*image, *words(4, 7)],
    ]
    together, report = check(model, minicpm_way(way, model, messages), expected)
    assert [len(sample.layouts) for sample in report.samples] == [2, 1, 0, 0]
    for sample, message in enumerate(messages):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fftriton.reduce(model, FrameFusion(0.3)):
                single = minicpm_way(way, model, message)()
        assert (logits_of(single)[0] - logits_of(together)[sample]).abs().max() < 1e-4


# ---- InternVL2.5


CONTEXT, IMAGE = 151, 149


def internvl_way(kind, model, question, pixel_values, counts=None, **arguments):
    """question: ids; or a list of them for a batch, with counts for each."""

    def chat():
        return model.chat(CONTEXT, pixel_values, question, {**STEPS, **arguments}, counts)

    def batch_chat():
        return model.batch_chat(CONTEXT, pixel_values, question, {**STEPS, **arguments}, counts)

    def forward():
        model.img_context_token_id = CONTEXT
        rows = [question] if isinstance(question[0], int) else question
        each = [counts] if isinstance(question[0], int) else counts
        ids, mask = ids_of([model.query(row, own) for row, own in zip(rows, each, strict=True)], "left")
        return model(pixel_values, ids, mask, image_flags=torch.ones(len(pixel_values), 1), **arguments)

    return {"chat": chat, "batch_chat": batch_chat, "forward": forward}[kind]


def numbered(count, seed=0):
    """The question to a video of frames: "Frame1: <image>" and so on."""
    frames = [[9, 30, *(20 + int(digit) for digit in str(number + 1)), 31, IMAGE] for number in range(count)]
    return [*sum(frames, []), *words(7, seed)]


@pytest.mark.parametrize("way", ["chat", "forward"])
@pytest.mark.parametrize("tiles", [1, 3])
@torch.no_grad()
def test_internvl_tiles(tiles, way):
    model = remote.internvl_chat()
    tile_pixels = film(12, 4 * tiles).unflatten(1, (tiles, 4)).flatten(0, 1)
    expected = [(0, model.extract_feature(tile_pixels).view(12, 4 * tiles, -1))]
    model.img_context_token_id = CONTEXT
    _, report = check(model, internvl_way(way, model, numbered(12), tile_pixels, [tiles] * 12), expected)
    assert report.layouts[0].positions.shape == (12, 4 * tiles)


@pytest.mark.parametrize("way", ["batch_chat", "forward"])
@torch.no_grad()
def test_internvl_batch(way):
    """A video; an image of several tiles and two videos; text alone; an image alone."""
    model = remote.internvl_chat()
    model.img_context_token_id = CONTEXT
    first, image, second, third = film(6, 4), film(5, 4, 1), film(5, 4, 2), film(10, 4, 3)
    single = film(1, 4, 4)
    questions = [
        numbered(6),
        [5, IMAGE, *words(6, 1), *numbered(5, 2), *numbered(5, 3)],
        words(11, 4),
        [IMAGE, *words(3, 5)],
    ]
    counts = [[1] * 6, [5] + [1] * 5 + [2] * 5, [], [1]]
    parts = [first, torch.cat([image, second, third]), film(0, 4), single]
    expected = [
        (0, model.extract_feature(first)),
        (1, model.extract_feature(second)),
        (1, model.extract_feature(third).view(5, 8, -1)),
    ]
    together, report = check(model, internvl_way(way, model, questions, torch.cat(parts), counts), expected)
    assert [len(sample.layouts) for sample in report.samples] == [1, 2, 0, 0]
    for sample in range(2):
        with fftriton.reduce(model, FrameFusion(0.3)):
            alone = internvl_way(way, model, questions[sample : sample + 1], parts[sample], counts[sample : sample + 1])()
        assert (logits_of(alone)[0] - logits_of(together)[sample]).abs().max() < 1e-4
