"""Model inputs: ours equal Hugging Face's; the shipped tokenizer understands plain questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints import needs_torchvision, save_checkpoint
from families import FAMILIES
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.video_utils import VideoMetadata

import fftriton.runtime.processing as processing
from fftriton.runtime.processing import (
    HubProcessor,
    QwenPixels,
    QwenProcessor,
    load_processor,
    smart_resize,
    unknown_words,
)
from fftriton.runtime.sampling import Sampling, frame_rule, sample_indices
from fftriton.runtime.shipped import ASSETS, MODEL
from fftriton.runtime.video import Video, read_video

try:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as their_smart_resize
except ImportError:  # transformers 4
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as their_smart_resize


PROCESSOR_CLASSES = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}
QUESTION = "Which digit is on the red box?"


def random_video(num_frames: int, height: int, width: int, fps: float = 10.0) -> Video:
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    return Video(frames, list(range(0, 3 * num_frames, 3)), 3 * num_frames, fps)


def checkpoint_like_qwen(folder: Path, model_type: str) -> Path:
    """A folder with the files that Qwen's own checkpoints have (and the shipped tokenizer), but no weights."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": "<sys>" + (MODEL / "chat_template.jinja").read_text()})
    )
    config = {**json.loads((MODEL / "config.json").read_text()), "model_type": model_type}
    del config["vision_config"]
    config["text_config"]["model_type"] = f"{model_type}_text"
    (folder / "config.json").write_text(json.dumps(config))
    pixels = {
        "min_pixels": 3136, "max_pixels": 50000, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": PROCESSOR_CLASSES[model_type],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


@pytest.mark.parametrize(
    ("size", "factor", "bounds", "expected"),
    [
        ((256, 256), 16, (4096, 4096), (64, 64)),
        ((176, 320), 16, (4096, 56320), (176, 320)),
        ((720, 1280), 28, (3136, 602112), (560, 1008)),  # shrinks
        ((20, 40), 28, (3136, 602112), (56, 84)),  # grows
    ],
)
def test_smart_resize(size, factor, bounds, expected):
    assert smart_resize(*size, factor, *bounds) == expected


@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    factor=st.sampled_from([14, 16, 28, 32]),
    min_pixels=st.integers(1, 10**6),
    span=st.integers(0, 10**7),
)
def test_smart_resize_is_hugging_faces(height, width, factor, min_pixels, span):
    assume(max(height, width) <= 200 * min(height, width))
    bounds = (min_pixels, min_pixels + span)
    assert smart_resize(height, width, factor, *bounds) == their_smart_resize(height, width, factor, *bounds)


def test_smart_resize_refuses_slivers():
    with pytest.raises(ValueError, match="sides within a factor of 200, got frames of 2x402"):
        smart_resize(402, 2, 28, 3136, 12544)


@pytest.mark.parametrize(("temporal", "merge"), [(1, 1), (2, 2), (3, 1)])
def test_still_video_is_hugging_faces_image(temporal, merge):
    """Pillow resizes differently by a rounding, so the frame has its final size already."""
    pixels = QwenPixels(16, temporal, merge, min_pixels=4096, max_pixels=16384)
    frame = np.random.default_rng(1).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=16, temporal_patch_size=temporal, merge_size=merge, min_pixels=4096, max_pixels=16384
    )
    expected = image_processor(frame, return_tensors="pt")
    frames = torch.from_numpy(frame).permute(2, 0, 1).expand(temporal, -1, -1, -1)
    rows, grid = pixels.patchify(frames)
    assert grid.tolist() == expected["image_grid_thw"].tolist() == [[1, 4, 8]]
    torch.testing.assert_close(rows, expected["pixel_values"], rtol=0, atol=2e-6)


def test_resizing_is_pillows_to_two_steps_of_256():
    pixels = QwenPixels(16, 1, 1, min_pixels=4096, max_pixels=4096)
    frame = np.random.default_rng(1).integers(0, 256, (100, 130, 3), dtype=np.uint8)
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=16, temporal_patch_size=1, merge_size=1, min_pixels=4096, max_pixels=4096
    )
    expected = image_processor(frame, return_tensors="pt")["pixel_values"]
    rows, _ = pixels.patchify(torch.from_numpy(frame).permute(2, 0, 1)[None])
    torch.testing.assert_close(rows, expected, rtol=0, atol=2.01 / 255 / min(pixels.std))


def test_patch_order():
    """A token's square of patches lies in a run, and a patch is laid out channel, frame, row, column."""
    pixels = QwenPixels(patch_size=1, temporal_patch_size=2, merge_size=2, min_pixels=1, max_pixels=10**6)
    frames = torch.arange(3 * 3 * 4 * 4, dtype=torch.uint8).view(3, 3, 4, 4)
    rows, grid = pixels.patchify(frames)
    assert grid.tolist() == [[2, 4, 4]]
    mean, std = torch.tensor(pixels.mean)[:, None], torch.tensor(pixels.std)[:, None]
    values = (rows.view(-1, 3, 2) * std + mean).mul(255).round().long()  # [t * h * w, channel, frame of the pair]
    assert values[:4, 0, 0].tolist() == [0, 1, 4, 5]  # the top left square
    assert values[4:8, 0, 0].tolist() == [2, 3, 6, 7]  # the one to its right
    assert values[0].tolist() == [[0, 48], [16, 64], [32, 80]]
    assert torch.equal(values[16:, :, 0], values[16:, :, 1])  # the third frame, repeated
    assert values[16, 0, 0] == 96


def test_shipped_processor_gives_the_prompt_of_the_training():
    pytest.importorskip("av")
    video = read_video(ASSETS / "clips" / "needle.mp4", 16)
    inputs = QwenProcessor(MODEL)(video, QUESTION)
    bos, system, start, end, question, token = 1, 2, 3, 4, 5, 8
    what, red = 36, 19
    assert inputs["input_ids"].tolist() == [[bos, system, system, start, *[token] * 256, end, question, what, red]]
    assert inputs["mm_token_type_ids"].tolist() == [[0] * 4 + [2] * 256 + [0] * 4]
    assert inputs["attention_mask"].all()
    assert inputs["video_grid_thw"].tolist() == [[16, 4, 4]]
    assert inputs["pixel_values_videos"].shape == (256, 768)


def test_max_pixels_bounds_the_frames():
    video = random_video(2, 176, 320)
    assert QwenProcessor(MODEL)(video, QUESTION)["video_grid_thw"].tolist() == [[2, 2, 5]]
    assert QwenProcessor(MODEL, 56320)(video, QUESTION)["video_grid_thw"].tolist() == [[2, 11, 20]]
    assert QwenProcessor(MODEL, 1024)(video, QUESTION)["video_grid_thw"].tolist() == [[2, 1, 2]]


def test_configuration_of_a_qwen25_checkpoint(tmp_path):
    processor = QwenProcessor(checkpoint_like_qwen(tmp_path, "qwen2_5_vl"))
    inputs = processor(random_video(5, 100, 80, fps=12.0), QUESTION)
    assert inputs["video_grid_thw"].tolist() == [[3, 8, 6]]
    assert (inputs["input_ids"] == 8).sum() == 3 * 4 * 3
    assert inputs["input_ids"][0, :4].tolist() == [2, 1, 2, 2]  # the processor's template, not the tokenizer's
    assert inputs["second_per_grid_ts"].tolist() == [0.5]  # two frames at 4 frames a second


@needs_torchvision
@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "shipped"])
@pytest.mark.parametrize("shape", [(4, 176, 320), (5, 37, 90), (1, 256, 256)], ids=str)
@pytest.mark.parametrize("max_pixels", [None, 30000])
def test_equals_hugging_face(tmp_path, model_type, shape, max_pixels):
    checkpoint = MODEL if model_type == "shipped" else checkpoint_like_qwen(tmp_path, model_type)
    video = random_video(*shape)
    ours = QwenProcessor(checkpoint, max_pixels)(video, QUESTION)
    hub = HubProcessor(checkpoint, max_pixels)
    before = dict(hub._processor.video_processor.size)
    theirs = hub(video, QUESTION)
    assert dict(hub._processor.video_processor.size) == before  # other threads may use it
    assert ours.keys() >= theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], torch.as_tensor(value).to(ours[name].dtype)), name


@needs_torchvision
@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen3VL", "Glm4v", "VideoLlama3"])
def test_max_pixels_bounds_each_frame_of_every_family(monkeypatch, name):
    """Though `size` bounds the pixels of a whole video in some."""
    kind = getattr(transformers, f"{name}VideoProcessor", None)
    if kind is None:
        pytest.skip("not in this release")
    own = HubProcessor(MODEL)._processor
    monkeypatch.setattr(own, "video_processor", kind(size={"shortest_edge": 32 * 32, "longest_edge": 2**24}))
    monkeypatch.setattr(processing, "load_part", lambda *given: own)
    bounded, areas = HubProcessor("any", 200**2), []
    for frames in (2, 4, 5, 16, 16):
        side = 320 if len(areas) < 4 else 210  # a little more than is allowed
        video = random_video(frames, side, side)
        own.video_processor.size = bounded._bounds(200**2, frames)
        cut = own.video_processor(
            videos=[video.frames], video_metadata=[processing._metadata(video)], do_sample_frames=False
        )
        areas.append(int(torch.as_tensor(cut["video_grid_thw"])[0, 1:].prod()) * own.video_processor.patch_size**2)
    assert areas[0] == areas[1] == areas[3]
    assert all(0.6 * 200**2 < area <= 200**2 for area in areas)


@needs_torchvision
def test_hugging_faces_processor_is_taken_where_it_works():
    assert isinstance(load_processor(MODEL), HubProcessor)


def test_ours_is_taken_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(processing, "torchvision_works", lambda: False)
    assert isinstance(load_processor(MODEL), QwenProcessor)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_onevision"}))
    with pytest.raises(ValueError, match=r"model must be one of qwen2_vl, .* got llava_onevision"):
        load_processor(tmp_path)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("Which digit is on the red box?", "what red"),
        ("What digit is shown on the yellow box", "what yellow"),
        ("When does the red box appear?", "when red"),
        ("In which quarter does the green box appear?", "when green"),
        ("Where is the blue box?", "where blue"),
        ("How many boxes appear?", "count all"),
        ("HOW MANY?!", "count all"),
        ("Which colour is the box with the digit 3?", "whichcolour 3"),
        ("which color is the box with digit three?", "whichcolour 3"),
        ("what red", "what red"),
        ("Which llama is on the red box?", "<unk> <unk> red"),
    ],
)
def test_tokenizer_understands_plain_questions(question, words):
    tokenizer = QwenProcessor(MODEL).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer(question).input_ids) == words.split()


def test_answers_decode_to_plain_words():
    tokenizer = QwenProcessor(MODEL).tokenizer
    answers = {12: "3", 19: "red", 23: "first quarter", 27: "top left", 33: "two"}
    assert {token: tokenizer.decode([token], skip_special_tokens=True) for token in answers} == answers
    assert tokenizer.unk_token_id < 64  # the model's vocabulary


def test_unknown_words_are_named():
    tokenizer = QwenProcessor(MODEL).tokenizer
    assert unknown_words(tokenizer, "Which llama is on the red box?") == ["Which", "llama"]
    assert unknown_words(tokenizer, QUESTION) == []


@needs_torchvision
@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(("total", "fps"), [(250, 25.0), (7, 25.0), (1000, 30000 / 1001), (3, 1.0), (100000, 25.0)])
def test_frames_per_second_are_hugging_faces(tmp_path, model_type, total, fps):
    theirs = HubProcessor(checkpoint_like_qwen(tmp_path, model_type))._processor.video_processor
    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    for rate in (0.5, 2, 3.7):
        expected = theirs.sample_frames(metadata=metadata, fps=rate).tolist()
        expected = [index for index in expected if index < total]  # torch.arange may round past the end
        for kind in (HubProcessor, QwenProcessor):
            assert kind(tmp_path).frame_rule(Sampling(fps=rate))(total, fps) == expected


def test_a_checkpoint_of_qwen_takes_two_frames_per_second(tmp_path):
    rule = QwenProcessor(checkpoint_like_qwen(tmp_path, "qwen2_vl")).frame_rule
    assert rule(Sampling())(250, 25.0) == [25 * i // 2 for i in range(20)]
    assert len(rule(Sampling())(100000, 25.0)) == 768
    assert len(rule(Sampling(max_frames=8))(250, 25.0)) == 8
    assert len(rule(Sampling(min_frames=40))(250, 25.0)) == 40
    assert Sampling(min_frames=32).bounded(16) == 32  # of a rule that says how many
    assert Sampling(min_frames=3, max_frames=8).bounded(16) == 8
    assert rule(Sampling(max_frames=2))(250, 25.0) == [0, 125]  # below the checkpoint's minimum of 4
    assert rule(Sampling(frames=5))(250, 25.0) == [25, 75, 125, 175, 225]
    assert rule(Sampling())(1, 25.0) == [0]
    assert rule(Sampling())(3, 25.0) == [0, 1]  # pairs of frames


def test_the_shipped_model_takes_sixteen_frames():
    rule = load_processor(MODEL).frame_rule
    assert rule(Sampling())(64, 10.0) == sample_indices(64, 16)
    assert rule(Sampling(max_frames=4))(64, 10.0) == sample_indices(64, 4)
    assert len(rule(Sampling(fps=1.0))(64, 10.0)) == 6


class Samples:
    """A processor that samples frames by itself."""

    do_sample_frames, fps = True, 2.0

    def __init__(self, indices):
        self.indices = indices

    def sample_frames(self, metadata, fps=None):
        if metadata.total_num_frames < 3:
            raise ValueError("too few")
        return torch.tensor(self.indices(metadata, fps or self.fps))


def test_a_processor_that_samples_frames_decides():
    own = Samples(lambda metadata, fps: [0, int(metadata.fps / fps), metadata.total_num_frames - 1])
    assert frame_rule(Sampling(), own)(100, 10.0) == [0, 5, 99]
    assert frame_rule(Sampling(fps=5.0), own)(100, 10.0) == [0, 2, 99]
    assert frame_rule(Sampling(frames=2), own)(100, 10.0) == [25, 75]
    assert frame_rule(Sampling(max_frames=2), own)(100, 10.0) == [25, 75]
    assert frame_rule(Sampling(), own)(2, 10.0) == [0, 1]
    assert frame_rule(Sampling(), Samples(lambda metadata, fps: [0, 5, 100]))(100, 10.0) == [0, 5]
    with pytest.raises(ValueError, match=r"samples frames 0 to 99, got Samples: \[0, 5, 101\]"):
        frame_rule(Sampling(), Samples(lambda metadata, fps: [0, 5, 101]))(100, 10.0)


def test_a_processor_that_says_nothing_gets_sixteen_frames():
    assert frame_rule(Sampling(), object())(100, 10.0) == sample_indices(100, 16)
    assert frame_rule(Sampling(fps=1.0), object())(100, 10.0) == list(range(0, 100, 10))


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"frames": 4, "fps": 2.0}, "frames must go without fps, got 4 and 2.0"),
        ({"frames": 4, "max_frames": 8}, "frames must go without max_frames, got 4 and 8"),
        ({"fps": 0.0}, "fps must be above 0, got 0"),
        ({"fps": float("nan")}, "fps must be in"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames must be at most max_frames, got 9 and 8"),
        ({"start": 5.0, "end": 5.0}, "end must be after start, got 5.0 and 5.0"),
        ({"start": -1.0}, "start must be in"),
    ],
)
def test_wishes_that_cannot_be(wishes, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wishes)


def test_real_times_reach_the_model(tmp_path):
    """Qwen2.5-VL counts seconds: two frames of 8 in 19 seconds are 4.75 s apart, whatever the rate of the file is."""
    video = Video(np.zeros((8, 56, 56, 3), np.uint8), list(range(8)), 48, 48 / 19, list(range(0, 16, 2)), 19.0)
    inputs = QwenProcessor(checkpoint_like_qwen(tmp_path, "qwen2_5_vl"))(video, QUESTION)
    assert inputs["second_per_grid_ts"].tolist() == [4.75]


@needs_torchvision
def test_real_times_reach_hugging_faces_processor(tmp_path):
    times = [0.0, 0.1, 0.2, 10.0, 20.0, 30.0]  # nothing like the frames' numbers
    video = Video(np.zeros((6, 32, 32, 3), np.uint8), [0, 1, 2, 3, 4, 5], 6, 0.2, times, 31.0)
    save_checkpoint(FAMILIES["qwen3_vl"], tmp_path)
    processor = HubProcessor(tmp_path)
    seen = []
    calculate = type(processor._processor)._calculate_timestamps
    processor._processor._calculate_timestamps = lambda *args, **kwargs: (
        seen.append(calculate(processor._processor, *args, **kwargs)) or seen[-1]
    )
    processor(video, "word5")
    np.testing.assert_allclose(seen[0], [0.05, 5.1, 25.0])
