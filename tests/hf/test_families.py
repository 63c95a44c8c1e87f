"""Every model family: where its videos stand, and that it is reduced as a computation by hand says."""

import copy
import inspect
from dataclasses import dataclass

import pytest
import torch
from attention_backends import BACKENDS, attention
from by_hand import check_by_hand, decoder_of, generate, see_prompt
from families import EXPERTS_OF_FAMILIES, FAMILIES, collate, qwen3_5
from models import Listening, seeded
from newer_families import NEWER_FAMILIES

import fftriton
from fftriton.layouts.families import RULES, encoder_of

ALL = FAMILIES | NEWER_FAMILIES
EVERY_FAMILY = pytest.mark.parametrize("family", ALL.values(), ids=ALL)
ONE_ENCODER = {"internvl": 2, "smolvlm": 3}
"""Families that do not tell videos from images, nor two videos apart, and the parts of the image of the prompt."""


@torch.no_grad()
def video_features(model, inputs):
    """[n, D] what the model's encoder makes of the videos, without what is no patch of a frame."""
    family, seen = model.config.model_type, []
    name = encoder_of(family)
    owner = model.model if hasattr(model.model, name) else model
    encode = getattr(owner, name)

    def spy(*args, **kwargs):
        seen.append(encode(*args, **kwargs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, spy)
        model(**inputs)
    features = getattr(seen[0], "pooler_output", seen[0])  # in 4.x it is the features, or they and the deepstack ones
    while isinstance(features, tuple) and not isinstance(features[-1], torch.Tensor):
        features = features[0]
    features = [features] if getattr(features, "ndim", 3) == 2 else features
    if family in ONE_ENCODER:
        features = torch.cat(list(features)).view(-1, 4, 64)[ONE_ENCODER[family] :]  # without those of the image
    if family == "llava_onevision":
        features = features[:, :16]  # the newline, where it is there already
    features = torch.cat([part.flatten(0, -2) for part in features])
    return features[inputs["video_compression_mask"]] if family == "video_llama_3" else features


@pytest.mark.feature("videos found")
@pytest.mark.parametrize(
    ("way", "family"),
    [("forward", family) for family in FAMILIES.values()] + [("generate", family) for family in ALL.values()],
    ids=lambda value: getattr(value, "name", value),
)
@torch.no_grad()
def test_the_layout_is_where_the_video_features_are(family, way):
    model, inputs = family.model(), family.inputs()
    with fftriton.reduce(model, fftriton.KeepAll()) as reduction:
        model(**inputs) if way == "forward" else generate(model, inputs)
    layouts = reduction.report.layouts
    places = torch.cat([layout.tokens for layout in layouts])
    assert torch.equal(see_prompt(model, inputs).embeddings[0, places], video_features(model, inputs))
    assert {len(layout.positions) for layout in layouts} == ({8} if family.name in ONE_ENCODER else {4})


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "video_llama_3", "minicpmv4_6", "kimi_k25", "glm4v_moe"])
@torch.no_grad()
def test_videos_of_one_sample_are_kept_apart(name):
    model, inputs = ALL[name].model(), ALL[name].inputs(videos=(3, 2, 4))
    layouts = RULES[name](model, inputs)
    assert [len(layout.positions) for layout in layouts] == [3, 2, 4]


def test_frames_of_two_sizes_in_one_video():
    """MiniCPM-V stacks the frames between two frames into one of another size."""
    model = FAMILIES["minicpmv4_6"].model()
    unit = {4: [152, *[151] * 4, 153], 8: [152, *[151] * 8, 153]}
    arguments = {
        "input_ids": torch.tensor([[5, *unit[4], *unit[8], *unit[4], *unit[8], 6]]),
        "target_sizes_videos": torch.tensor([[8, 8], [8, 16], [8, 8], [8, 16]]),
    }
    small, large = RULES["minicpmv4_6"](model, arguments)
    assert small.positions.tolist() == [[2, 3, 4, 5], [18, 19, 20, 21]]
    assert large.positions.tolist() == [list(range(8, 16)), list(range(24, 32))]


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_layouts_know_how_many_patches_stand_in_a_row_of_a_frame(name):
    layouts = RULES[name](ALL[name].model(), ALL[name].inputs())
    if name == "video_llava" or "minicpm" in name:  # a class token, slices
        assert {layout.columns for layout in layouts} == {None}
        return
    assert {layout.positions.shape[1] // layout.columns for layout in layouts} == {2}


@pytest.mark.filterwarnings("ignore:fftriton. the budget")
@torch.no_grad()
def test_rows_of_a_frame_stay_known_in_chains_padded_batches_and_beams():
    family, columns = FAMILIES["qwen2_vl"], []

    @dataclass(frozen=True)
    class Spy(fftriton.Method):
        budget: float = 0.6

        def begin(self, prompt):
            columns.append([layout.columns for layout in prompt.layouts])
            return super().begin(prompt)

    with fftriton.reduce(family.model(), fftriton.UniformFrames(0.6) + Spy()):
        family.model()(**family.inputs())
    samples = [family.inputs(), family.inputs((4,), image=False)]
    with fftriton.reduce(family.model(), Spy()):
        family.model()(**collate(samples, "left"))
        family.model().generate(**family.inputs(), max_new_tokens=2, num_beams=2, do_sample=False)
    assert columns == [[3, 2], [3, 2], [3], [3, 2], [3, 2]]


@torch.no_grad()
def test_patches_that_are_compressed_away_are_holes():
    model, inputs = FAMILIES["video_llama_3"].model(), FAMILIES["video_llama_3"].inputs()
    with fftriton.reduce(model, fftriton.KeepAll()) as reduction:
        model(**inputs)
    there = torch.cat([layout.positions >= 0 for layout in reduction.report.layouts])
    assert torch.equal(there.flatten(), inputs["video_compression_mask"])


@pytest.mark.feature("equals computation by hand")
@EVERY_FAMILY
def test_equals_a_recomputation_by_hand(family):
    check_by_hand(family.model(), family.inputs())


@pytest.mark.feature("equals computation by hand")
@pytest.mark.parametrize("family", EXPERTS_OF_FAMILIES.values(), ids=EXPERTS_OF_FAMILIES)
def test_mixtures_of_experts_equal_a_recomputation_by_hand(family):
    check_by_hand(family.model(), family.inputs())


@pytest.mark.feature("keep-all bit-identical")
@EVERY_FAMILY
def test_keep_all_is_bit_identical(family):
    model, inputs = family.model(), family.inputs()
    tokens, logits = generate(model, inputs)
    with fftriton.reduce(model, fftriton.KeepAll()) as reduction:
        kept_tokens, kept_logits = generate(model, inputs)
    assert torch.equal(kept_tokens, tokens)
    assert torch.equal(kept_logits, logits)
    assert reduction.report.budget_achieved == 1.0


@pytest.mark.feature("attention scores")
@pytest.mark.parametrize(
    ("queries", "family"),
    [(4, family) for family in FAMILIES.values()] + [(None, family) for family in ALL.values()],
    ids=lambda value: getattr(value, "name", value),
)
@torch.no_grad()
def test_attention_is_what_eager_computes(family, queries):
    listening = Listening(queries)
    model, eager, inputs = family.model(), family.model("eager"), family.inputs()
    with fftriton.reduce(model, listening):
        model(**inputs)
    weights = eager(**inputs, output_attentions=True).attentions
    layers = [index for index, layer in enumerate(decoder_of(model).layers) if hasattr(layer, "self_attn")]
    assert sorted(listening.received) == layers
    for scores, weight in zip(listening.received.values(), weights, strict=True):
        expected = weight[0].mean(0)[-(queries or 0) :].sum(0)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.feature("budgets")
@EVERY_FAMILY
@pytest.mark.parametrize(
    "method", [fftriton.FrameFusion(0.5), fftriton.FastV(0.6, layer=1), fftriton.STSimDiff(0.6, 0.2)], ids=str
)
@pytest.mark.filterwarnings("ignore:STSimDiff. the layout")
@torch.no_grad()
def test_methods_meet_their_budgets(family, method):
    model, inputs = family.model(), family.inputs()
    with fftriton.reduce(model, method) as reduction:
        model(**inputs)
    report = reduction.report
    assert abs(report.budget_achieved - method.budget) <= 1 / report.num_video_tokens


@torch.no_grad()
def test_framefusion_prunes_before_a_stretch_without_attention_that_it_cannot_pay():
    inputs = FAMILIES["qwen3_5"].inputs()
    FAMILIES["qwen3_5"].model()  # skips where this release has none
    stretch = ["full_attention", "linear_attention", "linear_attention", "linear_attention"]
    model = seeded(qwen3_5("sdpa", layer_types=stretch * 3, num_hidden_layers=12))
    with fftriton.reduce(model, fftriton.FrameFusion(0.3, 0.98, min_merge_ratio=0)) as reduction:
        model(**inputs)
    report = reduction.report
    assert report.prune_layer == 0
    assert abs(report.budget_achieved - 0.3) <= 1 / report.num_video_tokens


@pytest.mark.feature("attention back ends")
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS[1:])
@torch.no_grad()
def test_every_attention_back_end_equals_sdpa(family, backend):
    model, inputs, method = family.model(), family.inputs(), fftriton.FrameFusion(0.5, similarity_threshold=0.98)
    with fftriton.reduce(model, method) as expected:
        expected_logits = model(**inputs).logits
    with attention(model, backend), fftriton.reduce(model, method) as reduction:
        logits = model(**inputs).logits
    assert all(map(torch.equal, reduction.report.kept_positions, expected.report.kept_positions))
    assert (logits - expected_logits).abs().max() < 1e-4


@torch.no_grad()
def test_inputs_that_do_not_fit_the_prompt():
    model, inputs = FAMILIES["qwen2_vl"].model(), FAMILIES["qwen2_vl"].inputs()
    tall = inputs | {"video_grid_thw": torch.tensor([[4, 4, 6], [4, 4, 8]])}
    two_rows = {name: value.view(2, -1) for name, value in inputs.items() if value.shape == inputs["input_ids"].shape}
    for wrong, message in [
        (tall, r"video_grid_thw .* must describe the 40 video tokens of the prompt, but makes 56"),
        (inputs | two_rows, "must not spread a video over two samples"),
    ]:
        with fftriton.reduce(model, fftriton.KeepAll()), pytest.raises(ValueError, match=message):
            model(**wrong)


@torch.no_grad()
def test_a_compression_mask_that_does_not_fit():
    family = FAMILIES["video_llama_3"]
    model, inputs = family.model(), family.inputs()
    short = inputs | {"video_compression_mask": inputs["video_compression_mask"][:-1]}
    with fftriton.reduce(model, fftriton.KeepAll()):
        with pytest.raises(ValueError, match="video_compression_mask: must have 64 entries, .* got 63"):
            model(**short)


@torch.no_grad()
def test_a_video_encoded_outside():
    model, inputs = FAMILIES["qwen2_vl"].model(), FAMILIES["qwen2_vl"].inputs(image=False)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this release of transformers takes no encoded video")
    pixels, grids = inputs.pop("pixel_values_videos"), inputs.pop("video_grid_thw")
    encoded = {"video": model.get_video_features(pixels, grids)}
    with fftriton.reduce(model, fftriton.FrameFusion(0.5)) as reduction:
        with pytest.raises(ValueError, match="video_grid_thw: must be known, but the video was encoded outside"):
            model(**inputs, mm_encoder_outputs=encoded)
        model(**inputs, mm_encoder_outputs=encoded, video_grid_thw=grids)
    assert reduction.report.budget_achieved == 0.5


def test_models_of_no_known_family():
    model = copy.copy(FAMILIES["qwen2_vl"].model())
    model.config = copy.copy(model.config)
    model.config.model_type = "qwen9_vl"
    with pytest.raises(TypeError, match="layout must be given for Qwen2VL.*found without for .* got 'qwen9_vl'"):
        fftriton.reduce(model, fftriton.KeepAll())
