"""Images as videos of one frame, and the warning about those that nothing reduces."""

import warnings

import pytest
import torch
from by_hand import SPECIAL
from families import END, FAMILIES, IMAGE, START, Writer, collate
from models import tiny_qwen2, video_embeddings
from newer_families import NEWER_FAMILIES

import fftriton
from fftriton import VideoLayout

ALL = FAMILIES | NEWER_FAMILIES


def images_prompt(sides, seed=0, texts=2):
    """A prompt of Qwen2-VL with images of these heights and widths in patches, four to a token."""
    writer = Writer(seed)
    writer.text(5)
    for height, width in sides:
        writer.write(START, *[IMAGE] * (height * width // 4), END)
        writer.text(texts)
        grid = torch.tensor([[1, height, width]])
        writer.add(image_grid_thw=grid, pixel_values=writer.pixels(height * width, 96))
    types = "mm_token_type_ids" in FAMILIES["qwen2_vl"].inputs()
    return writer.finish(types)


def image_layouts(ids):
    places = (ids[0] == IMAGE).nonzero()[:, 0]
    return [VideoLayout(run[None]) for run in places.tensor_split((places.diff() > 1).nonzero()[:, 0] + 1)]


@pytest.mark.parametrize("family", ALL.values(), ids=ALL)
@torch.no_grad()
def test_images_and_videos_share_the_budget(family):
    model, inputs = family.model(), family.inputs()
    with fftriton.reduce(model, fftriton.KeepAll()) as reduction:
        dense = model(**inputs).logits
    videos = torch.cat([layout.tokens for layout in reduction.report.layouts])
    with fftriton.reduce(model, fftriton.KeepAll(), images=True) as reduction:
        assert torch.equal(model(**inputs).logits, dense)
    layouts = reduction.report.layouts
    places = torch.cat([layout.tokens for layout in layouts])
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    assert places.sort().values.tolist() == torch.cat([videos, image]).unique().tolist()
    assert len(places) == reduction.report.num_video_tokens
    assert [layout.span for layout in layouts] == sorted(layout.span for layout in layouts)
    with fftriton.reduce(model, fftriton.EVS(0.5), images=True) as reduction:
        logits = model(**inputs).logits
    assert set(reduction.report.vision_tokens_per_layer) == {round(0.5 * len(places))}
    assert bool(logits[0, reduction.report.kept_positions[-1]].isfinite().all())


@pytest.mark.parametrize("method", [fftriton.FrameFusion(0.5), fftriton.FastV(0.6), fftriton.VisionZip(0.4)], ids=str)
@torch.no_grad()
def test_it_is_as_if_they_were_listed(method):
    model, inputs = FAMILIES["qwen2_vl"].model(), images_prompt([(4, 4), (4, 6), (4, 4), (6, 6)])
    with fftriton.reduce(model, method, image_layouts(inputs["input_ids"])) as listed:
        expected = model(**inputs).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fftriton.reduce(model, method, images=True) as reduction:
            assert torch.equal(model(**inputs).logits, expected)
            answer = model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=SPECIAL)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 4
    assert reduction.report.num_video_tokens == listed.report.num_video_tokens == 4 + 6 + 4 + 9
    assert reduction.report.budget_achieved < 0.65


@torch.no_grad()
def test_a_batch_equals_its_samples():
    family = FAMILIES["qwen2_vl"]
    model, method = family.model(), fftriton.VisionZip(0.4)
    samples = [images_prompt([(4, 4)] * 5), family.inputs((), image=False, seed=1), family.inputs((4,), seed=2)]
    with fftriton.reduce(model, method, images=True):
        together = model(**collate(samples, "left")).logits
        for row, sample in enumerate(samples):
            alone = model(**sample).logits
            assert (together[row, -alone.shape[1] :] - alone[0]).abs().max() < 1e-4


@pytest.mark.parametrize("call", ["forward", "generate"])
@torch.no_grad()
def test_many_images_without_a_video_warn_once(call):
    model, inputs = FAMILIES["qwen2_vl"].model(), images_prompt([(4, 4)] * 4 + [(4, 6)])

    def run():
        model(**inputs) if call == "forward" else model.generate(**inputs, max_new_tokens=2, do_sample=False)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with fftriton.reduce(model, fftriton.FrameFusion(0.3)) as reduction:
            run()
            run()
    messages = [str(warning.message) for warning in seen if "fftriton" in str(warning.message)]
    assert len(messages) == 1
    assert "nothing is reduced: the prompt has no video, but 4 images of one size" in messages[0]
    assert reduction.report is None


@pytest.mark.parametrize(
    ("method", "sides"),
    [(fftriton.KeepAll(), [(4, 4)] * 5), (fftriton.FastV(0.6), [(4, 4)] * 3 + [(4, 6), (6, 4), (8, 4)])],
    ids=["nothing to reduce", "three of one size"],
)
@torch.no_grad()
def test_few_images_and_keep_all_do_not_warn_of_images(method, sides):
    model, inputs = FAMILIES["qwen2_vl"].model(), images_prompt(sides)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fftriton: nothing is reduced")
        warnings.filterwarnings("ignore", "fftriton: nothing was reduced")
        with fftriton.reduce(model, method):
            model(**inputs)


@torch.no_grad()
def test_images_beside_a_video_do_not_warn():
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.model(), family.inputs((4,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fftriton.reduce(model, fftriton.FastV(0.6)):
            model(**inputs)


def test_where_images_cannot_be_found():
    model, (_, layout) = tiny_qwen2(), video_embeddings(2, 3)
    with pytest.raises(ValueError, match="images must be False with a layout"):
        fftriton.reduce(model, fftriton.FastV(0.6), layout, images=True)
    family = FAMILIES["qwen2_vl"].model()
    with pytest.raises(TypeError, match="images must be True or False, got 1"):
        fftriton.reduce(family, fftriton.FastV(0.6), images=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(family.config), "image_token_id", None)
        with pytest.raises(ValueError, match="images must be False for Qwen2VL.*no image_token_id"):
            fftriton.reduce(family, fftriton.FastV(0.6), images=True)
