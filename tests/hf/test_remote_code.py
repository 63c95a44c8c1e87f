"""Models of remote code, whose videos are found without a layout: every way of calling them."""

import copy
import itertools
import threading
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

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
    """Rows with a video; text alone, which takes an image for nothing; two videos and images beside them, one of which
    has tiles and lost some of their tokens."""
    rows = [
        [*words(4), VIDEO, *words(9, 1)],
        words(20, 7),
        [*words(3, 2), VIDEO, *words(2, 3), VIDEO, *words(3, 4), VIDEO, *words(2, 5), VIDEO, *words(5, 6)],
    ]
    ids, mask = ids_of(rows, padding_side)
    images = [pixels(6, 5), pixels(1, 5, 5), pixels(1, 5, 1)[0], pixels(5, 5, 2), pixels(4, 5, 3), pixels(4, 5, 4)]
    return {
        "ids": ids, "attention_mask": mask, "images": images,
        "modalities": ["video", "image", "image", "video", "image", "video"],
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
    assert [len(sample.layouts) for sample in report.samples] == [1, 0, 2]
    images, modalities = prompt.pop("images"), prompt.pop("modalities")
    for sample, own in enumerate([slice(0, 1), slice(1, 2), slice(2, 6)]):
        alone = {name: part[sample : sample + 1] for name, part in prompt.items()}
        kinds = modalities[own]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # text alone is not reduced
            with torch.no_grad(), fftriton.reduce(model, FrameFusion(0.3)):
                single = way(model, images=images[own], modalities=kinds, **alone)()
        if way is llava_generate:
            if side == "right" and sample != 2:
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


def test_a_video_that_llava_takes_for_images_is_refused():
    model, ids = remote.llava_qwen(), torch.tensor([[*words(4), VIDEO, *words(6, 1)]])
    with fftriton.reduce(model, FrameFusion(0.3)):
        with pytest.raises(ValueError, match=r"must be a list of videos .* got a tensor of shape \[6, 3, 5, 5\]"):
            model(ids, images=pixels(6, 5), modalities=["video"])


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


def assert_ends_alike(alone, together, sample, side):
    """That a sample's logits are those that it has alone: of all steps of generate, or at the end of a forward."""
    if side == "left":
        assert (logits_of(alone)[0] - logits_of(together)[sample]).abs().max() < 1e-4
    else:
        assert (alone.logits[0, -1] - together.logits[sample, alone.logits.shape[1] - 1]).abs().max() < 1e-4


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


@pytest.mark.parametrize(("way", "side"), [("chat", "left"), ("forward", "left"), ("forward", "right")])
@torch.no_grad()
def test_minicpm_batch(way, side):
    """Two videos, one of them with slices; an image before a video, text alone, and an image alone."""
    first, second, third, image, wide = units(6), units(5, 3, 1), units(7, 1, 2), units(1, 1, 3), units(1, 4, 4)
    model, expected = minicpm_videos((0, first), (0, second), (1, third))
    messages = [
        [*words(2), *first, *words(7, 1), *second, *words(5, 2)],
        [*image, *words(6, 3), *third, *words(5, 4), *wide, *words(2, 5)],
        words(9, 6),
        [*image, *words(4, 7)],
    ]
    processor = remote.Processor(side=side)
    together, report = check(model, minicpm_way(way, model, messages, processor), expected)
    assert [len(sample.layouts) for sample in report.samples] == [2, 1, 0, 0]
    for sample, message in enumerate(messages):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fftriton.reduce(model, FrameFusion(0.3)):
                single = minicpm_way(way, model, message)()
        assert_ends_alike(single, together, sample, side)


# ---- InternVL2.5


CONTEXT, IMAGE = 151, 149


def internvl_way(kind, model, question, pixel_values, counts=None, side="left", **arguments):
    """question: ids; or a list of them for a batch, with counts for each. side: of the padding of forward."""

    def chat():
        return model.chat(CONTEXT, pixel_values, question, {**STEPS, **arguments}, counts)

    def batch_chat():
        return model.batch_chat(CONTEXT, pixel_values, question, {**STEPS, **arguments}, counts)

    def forward():
        model.img_context_token_id = CONTEXT
        rows = [question] if isinstance(question[0], int) else question
        each = [counts] if isinstance(question[0], int) else counts
        ids, mask = ids_of([model.query(row, own) for row, own in zip(rows, each, strict=True)], side)
        return model(pixel_values, ids, mask, image_flags=torch.ones(len(pixel_values), 1), **arguments)

    return {"chat": chat, "batch_chat": batch_chat, "forward": forward}[kind]


def numbered(count, seed=0):
    """The question to a video of frames: "Frame1: <image>" and so on."""
    frames = [[9, 30, *(20 + int(digit) for digit in str(number + 1)), 31, IMAGE] for number in range(count)]
    return [*itertools.chain(*frames), *words(7, seed)]


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


@pytest.mark.parametrize(("way", "side"), [("batch_chat", "left"), ("forward", "left"), ("forward", "right")])
@torch.no_grad()
def test_internvl_batch(way, side):
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
    together, report = check(model, internvl_way(way, model, questions, torch.cat(parts), counts, side), expected)
    assert [len(sample.layouts) for sample in report.samples] == [1, 2, 0, 0]
    for sample in range(2):
        with fftriton.reduce(model, FrameFusion(0.3)):
            alone = internvl_way(
                way, model, questions[sample : sample + 1], parts[sample], counts[sample : sample + 1]
            )()
        assert_ends_alike(alone, together, sample, side)


# ---- other calls, of any of them


def llava_case():
    model, ids = remote.llava_qwen(), torch.tensor([[*words(4), VIDEO, *words(6, 1)]])
    return model, {"inputs": ids, "images": [pixels(8, 5)], "modalities": "video"}


def nvila_case():
    model, ids = remote.nvila(), torch.tensor([[*words(4), 151, *words(6, 1)]])
    return model, {"input_ids": ids, "media": {"video": [pixels(8, 4)]}}


def minicpm_case():
    return remote.minicpm_v(), remote.Processor()([[*units(12), *words(6)]])


def internvl_case():
    model = remote.internvl_chat()
    model.img_context_token_id = CONTEXT
    ids = torch.tensor([model.query(numbered(12), [1] * 12)])
    return model, {"pixel_values": film(12, 4), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


CASES = pytest.mark.parametrize("case", [llava_case, nvila_case, minicpm_case, internvl_case])


def text_of(model, case):
    """The arguments of generate for a prompt without images."""
    ids = torch.tensor([words(9)])
    if case is minicpm_case:
        return {"input_ids": ids, "pixel_values": [[]], "image_bound": [torch.empty(0, 2, dtype=torch.int64)]}
    return {llava_case: {"inputs": ids}, nvila_case: {"input_ids": ids, "media": {}}}.get(case, {"input_ids": ids})


def image_of(model, case):
    """The arguments of generate for a prompt with one image."""
    if case is llava_case:
        return {"inputs": torch.tensor([[5, VIDEO, 6]]), "images": [pixels(1, 5)[0]], "modalities": ["image"]}
    if case is nvila_case:
        return {"input_ids": torch.tensor([[5, 150, 6]]), "media": {"image": [*pixels(1, 4)]}}
    if case is minicpm_case:
        return remote.Processor()([[*units(1), 7]])
    return {"pixel_values": film(1, 4), "input_ids": torch.tensor([model.query([5, IMAGE, 6], [1])])}


@CASES
@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}], ids=str
)
def test_generation(case, settings):
    """Beams, several sequences, and no cache: as many rows as asked for, each within its budget."""
    model, inputs = case()
    if "use_cache" in settings and case is internvl_case:
        pytest.skip("its generate insists on a cache")
    with fftriton.reduce(model, FrameFusion(0.3)) as reduction:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, **settings)
    for sample in reduction.report.samples:
        assert abs(sample.budget_achieved - 0.3) <= 1 / sample.num_video_tokens


@CASES
def test_beams_are_those_of_a_listed_layout(case):
    """What is found is what a list of the same layouts gives, to the language model and to the whole."""
    model, inputs = case()
    arguments = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    with fftriton.reduce(model, FrameFusion(0.3)) as reduction:
        expected = model.generate(**inputs, **arguments)
    listed = reduction.report.samples[0].layouts
    with fftriton.reduce(model, FrameFusion(0.3), listed) as reduction:
        assert torch.equal(model.generate(**inputs, **arguments), expected)
    assert reduction.report is not None


@CASES
def test_text_is_left_alone(case):
    model, _ = case()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fftriton.reduce(model, FrameFusion(0.3)) as reduction:
            model.generate(**text_of(model, case), max_new_tokens=2)
    assert reduction.report is None


@CASES
def test_an_image_alone_is_warned_about(case):
    model, _ = case()
    with pytest.warns(UserWarning, match="nothing was reduced"):
        with fftriton.reduce(model, FrameFusion(0.3)) as reduction:
            model.generate(**image_of(model, case), max_new_tokens=2)
    assert reduction.report is None


@CASES
def test_embeddings_of_unknown_origin_are_refused(case):
    model, inputs = case()
    language_model = getattr(model, "llm", None) or getattr(model, "language_model", None) or model
    embeddings = torch.randn(1, 9, 64)
    with fftriton.reduce(model, FrameFusion(0.3)):
        with pytest.raises(ValueError, match=r"layout: must be given if .* gets embeddings of shape \[1, 9, 64\]"):
            language_model(inputs_embeds=embeddings)
        with listening(model) as seen:
            model.generate(**inputs, max_new_tokens=2)  # works after that
        with pytest.raises(ValueError, match="layout: must be given if"):  # of the same shape, after the call
            language_model(inputs_embeds=torch.randn(seen[0].shape))


@CASES
def test_an_exception_leaves_the_model_as_it_was(case):
    model, inputs = case()
    before = state(model)

    def fail(*args):
        raise KeyboardInterrupt

    handle = decoder_of(model).layers[2].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        with fftriton.reduce(model, FrameFusion(0.3)):
            model.generate(**inputs, max_new_tokens=2)
    handle.remove()
    assert state(model) == before


def decoder_of(model):
    return (getattr(model, "llm", None) or getattr(model, "language_model", None) or model).model


@CASES
def test_copies_are_refused(case):
    model, inputs = case()
    with fftriton.reduce(model, KeepAll()):
        with pytest.raises(RuntimeError, match="cannot be copied"):
            copy.deepcopy(model)
        model.generate(**inputs, max_new_tokens=2)
    copy.deepcopy(model)


@CASES
def test_threads(case):
    model, inputs = case()
    found = []

    def run():
        for _ in range(2):
            model.generate(**inputs, max_new_tokens=3)
            found.append(reduction.report.samples[0].budget_achieved)

    with fftriton.reduce(model, FrameFusion(0.3)) as reduction:
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1


@CASES
def test_wrapped_by_peft(case):
    peft = pytest.importorskip("peft")
    model, inputs = case()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    with fftriton.reduce(wrapped, FrameFusion(0.3)) as reduction:
        wrapped.base_model.model.generate(**inputs, max_new_tokens=2)
    assert abs(reduction.report.budget_achieved - 0.3) <= 1 / reduction.report.num_video_tokens


def forward_of(case):
    """A model, and the arguments of its forward."""
    model, inputs = case()
    if case is minicpm_case:
        return model, {"data": inputs | {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]}}
    if case is internvl_case:
        inputs["image_flags"] = torch.ones(12, 1)
    return model, {"input_ids" if name == "inputs" else name: value for name, value in inputs.items()}


@CASES
@torch.no_grad()
def test_compiled_as_a_whole(case):
    """The compiled code of a module around the language model would know nothing of the reduction."""
    model, inputs = forward_of(case)
    model.compile(backend="eager")
    with fftriton.reduce(model, FrameFusion(0.3)) as reduction:
        model(**inputs)
    assert abs(reduction.report.budget_achieved - 0.3) <= 1 / reduction.report.num_video_tokens


@pytest.mark.parametrize("case", [llava_case, nvila_case, internvl_case])
@torch.no_grad()
def test_labels_of_an_answer(case):
    """Its loss is that of a model without a reduction if all stays; it has no influence on what goes."""
    model, inputs = forward_of(case)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    given = labels.clone()
    dense = model(**inputs, labels=labels).loss
    with fftriton.reduce(model, KeepAll()):
        assert model(**inputs, labels=labels).loss == dense
    with fftriton.reduce(model, fftriton.FastV(0.5, 1)) as reduction:
        assert model(**inputs, labels=labels).loss != dense
        answered = reduction.report.kept_positions
        prompt = {name: inputs[name][:, :-3] for name in ("input_ids", "attention_mask") if name in inputs}
        model(**inputs | prompt)
        asked = reduction.report.kept_positions
    assert torch.equal(labels, given)
    assert [layer.tolist() for layer in asked] == [layer[:-3].tolist() for layer in answered]


def test_generation_in_another_thread():
    """As MiniCPM-V streams: the embeddings are made in one thread, and generate runs in another."""
    model, inputs = minicpm_case()
    with fftriton.reduce(model, FrameFusion(0.3)) as reduction:
        with torch.inference_mode():
            embeddings, _ = model.get_vllm_embedding(inputs)
        thread = threading.Thread(
            target=model.llm.generate, kwargs={"inputs_embeds": embeddings, "pad_token_id": 0, "max_new_tokens": 3}
        )
        thread.start()
        thread.join()
    assert abs(reduction.report.budget_achieved - 0.3) <= 1 / reduction.report.num_video_tokens


@torch.no_grad()
def test_more_turns_on_one_cache():
    """A prompt, text, and a second video, by forward; and the whole conversation again, by generate."""
    from models import behind, cache_of

    model, inputs = llava_case()
    ids, arguments = inputs.pop("inputs"), inputs
    with fftriton.reduce(model, FrameFusion(0.3)) as reduction:
        cache = cache_of(model.generate(ids, **arguments, max_new_tokens=1, return_dict_in_generate=True))
        length = cache.get_seq_length()
        conversation = torch.cat([ids, torch.tensor([[*words(3, 5), VIDEO, *words(5, 6)]])], 1)
        both = {"images": [*arguments["images"], pixels(5, 5, 9)], "modalities": ["video", "video"]}
        model.generate(conversation, **both, max_new_tokens=2, **behind(cache))
        (layout,) = reduction.report.layouts
    assert layout.positions.shape == (5, 12)
    assert int(layout.positions[0, 0]) + length == ids.shape[1] - 1 + 8 * 12 + 3


@CASES
def test_listed_layouts_must_fit(case):
    """A layout that was made for a prompt of another length would run on other tokens."""
    model, inputs = case()
    with fftriton.reduce(model, KeepAll()) as reduction:
        model.generate(**inputs, max_new_tokens=2)
    (layout,), length = reduction.report.layouts, reduction.report.tokens_per_layer[0]
    for stated, message in [(length, None), (length + 1, rf"prompt of {length + 1} tokens, got {length}")]:
        with fftriton.reduce(model, FrameFusion(0.3), [fftriton.VideoLayout(layout.positions, 0, stated)]):
            with nullcontext() if message is None else pytest.raises(ValueError, match=message):
                model.generate(**inputs, max_new_tokens=2)


# ---- what is refused


def test_packed_sequences_are_refused():
    model, inputs = nvila_case()
    with fftriton.reduce(model, FrameFusion(0.3)):
        with pytest.raises(ValueError, match="that are not just as _embed made them in this block"):
            model(**inputs, force_packing=True)


def test_an_embedding_that_is_changed_is_refused():
    class Timed(remote.LlavaLlamaModel):
        def forward(self, input_ids, media):
            embeddings, _, mask = self._embed(input_ids, media, {"video": {}}, None, None)
            return self.llm(inputs_embeds=embeddings + 0.1, attention_mask=mask)

    model, inputs = nvila_case()
    model.__class__ = Timed
    with fftriton.reduce(model, FrameFusion(0.3)):
        with pytest.raises(ValueError, match="that are not just as _embed made them in this block"):
            model(**inputs)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([*range(106), 105], "107 tokens instead of 106 in sample 0"),
        ([*range(1, 106), 0], "another order of text and videos in sample 0"),
    ],
    ids=["one more", "turned"],
)
@pytest.mark.parametrize("case", [llava_case, nvila_case])
def test_another_arrangement_is_refused(case, order, message, monkeypatch):
    """A class that puts a token more, or in another order, among the text."""
    pad = remote.padded
    model, inputs = case()
    if case is nvila_case:
        order = [*order[:-1], *range(106, 146), order[-1]] if order[-1] == 0 else [*range(146), 145]
        message = message.replace("107", "147").replace("106", "146")

    def changed(rows, labels, side):
        return pad([row[order] for row in rows], [row[order] for row in labels], side)

    monkeypatch.setattr(remote, "padded", changed)
    with fftriton.reduce(model, FrameFusion(0.3)):
        with pytest.raises(ValueError, match=f"layout: must be given if a model puts .* got {message}"):
            model.generate(**inputs, max_new_tokens=2)


def test_frames_of_different_sizes_are_refused():
    class Ragged(remote.BasicVideoEncoder):
        def forward(self, videos, config):
            self.parent.projected.append([])
            return [torch.cat(self.parent.encode_images(torch.cat(videos)))]

    class Uneven(remote.LlavaLlamaModel):
        def encode_images(self, images, block_sizes=None):
            return [row[: 4 + at] for at, row in enumerate(super().encode_images(images))]

    model, inputs = nvila_case()
    model.__class__, model.encoders["video"] = Uneven, Ragged(model)
    with fftriton.reduce(model, FrameFusion(0.3)):
        with pytest.raises(ValueError, match="encode_images of Uneven does not make the same number"):
            model.generate(**inputs, max_new_tokens=2)


def test_a_language_model_that_is_not_called_is_noticed():
    class Elsewhere(remote.InternVLChatModel):
        def generate(self, pixel_values=None, input_ids=None, **arguments):
            return input_ids

    model, inputs = internvl_case()
    model.__class__ = Elsewhere
    with fftriton.reduce(model, FrameFusion(0.3)):
        with pytest.raises(RuntimeError, match="must give the embeddings of a video to its language model"):
            model.generate(**inputs)


def test_images_before_the_token_is_known_are_refused():
    model, inputs = internvl_case()
    model.img_context_token_id = None
    with fftriton.reduce(model, FrameFusion(0.3)):
        with pytest.raises(ValueError, match="img_context_token_id of InternVLChatModel must be set"):
            model.generate(**inputs)


@torch.no_grad()
def test_features_without_pixels_are_noticed():
    """InternVL2.5 ignores features that come without pixels; whoever gives them hears that nothing was reduced."""
    model, inputs = internvl_case()
    features = model.extract_feature(inputs.pop("pixel_values"))
    with pytest.warns(UserWarning, match="nothing was reduced"):
        with fftriton.reduce(model, FrameFusion(0.3)):
            model.generate(**inputs, visual_features=features, max_new_tokens=2)


def test_a_class_of_another_structure_needs_a_layout():
    """`llava_llama` is the model_type of LLaVA-1.5, too, which has none of NVILA's methods."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM(remote.text_config(remote.LlavaLlamaConfig))
    lacking = "'llava_llama', but Qwen2ForCausalLM lacks a method '_embed', a method 'encode_images', an attribute"
    with pytest.raises(TypeError, match=f"layout must be given for Qwen2ForCausalLM; .* got {lacking}"):
        fftriton.reduce(model, FrameFusion(0.3))

    class Renamed(remote.MiniCPMV):
        def get_vllm_embedding(self, batch):
            return super().get_vllm_embedding(batch)

    with pytest.raises(TypeError, match="Renamed lacks a parameter 'data' of 'get_vllm_embedding'"):
        fftriton.reduce(Renamed(remote.text_config(remote.MiniCPMVConfig)), FrameFusion(0.3))


@pytest.mark.parametrize("named", ["by its class", "by the configuration"])
def test_internlm2_is_refused_by_name(named):
    class InternLM2DecoderLayer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.feed_forward = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.attention_norm, self.ffn_norm = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)

    class InternLM2ForCausalLM(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(model_type="internlm2")
            self.model = torch.nn.Module()
            self.model.layers = torch.nn.ModuleList([InternLM2DecoderLayer()])

    model = remote.internvl_chat()
    model.language_model = InternLM2ForCausalLM()
    if named == "by the configuration":
        InternLM2ForCausalLM.__name__ = InternLM2DecoderLayer.__name__ = "Renamed"
        model.language_model.config.model_type = "of_its_own"
        model.config.llm_config = SimpleNamespace(architectures=["InternLM2ForCausalLM"])
    for refused in (model, model.language_model)[: 2 if named == "by its class" else 1]:
        for apply in (lambda model: fftriton.reduce(model, FrameFusion(0.3)), fftriton.apply_framefusion):
            with pytest.raises(TypeError, match="model must not be built on InternLM2, as Intern.* is: its layers"):
                apply(refused)
