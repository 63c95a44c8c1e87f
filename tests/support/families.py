"""A tiny random model of every family, prompts for it with videos and an image, and how prompts make a batch."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import TEXT, TOKENS, VISION, rope, seeded, tiny_qwen2_5_vl, tiny_qwen2_vl
from packaging import version
from torch.nn.utils.rnn import pad_sequence

IMAGE, VIDEO, START, END = TOKENS.values()
QWEN2 = TEXT | {"model_type": "qwen2", "num_hidden_layers": 5, **rope(rope_theta=1e4)}
SQUARE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
LAYER_TYPES = ["linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"]
QWEN3_5 = TEXT | rope(rope_theta=1e4, mrope_section=[1, 1, 0], mrope_interleaved=True, partial_rotary_factor=0.25) | {
    "model_type": "qwen3_5_text", "num_hidden_layers": 5, "head_dim": 16, "layer_types": LAYER_TYPES,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip

QWEN3_VISION = VISION | {
    "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64, "num_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


class Writer:
    """The ids of one sample, written from left to right, and the encoder's arguments."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.ids: list[int] = []
        self.inputs: dict[str, torch.Tensor] = {}

    def text(self, count):
        self.ids += torch.randint(2, 140, (count,), generator=self.generator).tolist()

    def write(self, *tokens):
        self.ids += tokens

    def pixels(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def add(self, **inputs):
        """Append to the encoder's arguments, along the dimension of images or videos."""
        for name, value in inputs.items():
            known = self.inputs.get(name)
            self.inputs[name] = value if known is None else joined(name, [known, value])

    def finish(self, types=False):
        self.text(6)
        ids = torch.tensor([self.ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self.inputs
        if types:
            inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        return inputs


def joined(name, values):
    """Arguments of several samples or videos as one: MiniCPM-V packs its patches along the last dimension."""
    packed = name.startswith("pixel_values") and values[0].shape[0] == 1 and values[0].ndim == 4
    if values[0].ndim == 5:  # [samples, images, 3, height, width]: SmolVLM takes images of zeros for padding
        most = max(value.shape[1] for value in values)
        values = [F.pad(value, (0, 0) * 3 + (0, most - value.shape[1])) for value in values]
    return torch.cat(values, -1 if packed else 0)


def collate(samples, side):
    """One batch of several samples' inputs, the shorter ones padded on one side."""
    batch = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        parts = [sample[name] for sample in samples if name in sample]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids", "inputs_embeds"):
            batch[name] = pad_sequence([part[0] for part in parts], batch_first=True, padding_side=side)
        else:
            batch[name] = joined(name, parts)
    return batch


def qwen_prompt(videos, image, seed, timestamps=False):
    """The Qwen-VL models: t frames of 4 x 6 or 4 x 4 patches, four to a token."""
    writer = Writer(seed)
    writer.text(5)
    if image:
        writer.write(START, *[IMAGE] * 4, END)
        writer.text(3)
        writer.add(image_grid_thw=torch.tensor([[1, 4, 4]]), pixel_values=writer.pixels(16, 96))
    for number, frames in enumerate(videos):
        height, width = (4, 6) if number % 2 == 0 else (4, 4)
        tokens = height * width // 4
        for frame in range(frames if timestamps else 1):
            writer.text(2 + frame % 2 if timestamps else 0)
            writer.write(START, *[VIDEO] * (tokens if timestamps else tokens * frames), END)
        writer.text(4)
        grid = torch.tensor([[frames, height, width]])
        writer.add(video_grid_thw=grid, pixel_values_videos=writer.pixels(frames * height * width, 96))
    known = inspect.signature(transformers.Qwen2VLForConditionalGeneration.forward).parameters
    return writer.finish(types="mm_token_type_ids" in known)  # from 5.x on


def llava_prompt(videos, image, seed, newline):
    """LLaVA-OneVision and LLaVA-NeXT-Video: frames of 4 x 4 patches pooled to 2 x 2; an image of 36 tokens."""
    writer = Writer(seed)
    writer.text(5)
    if image:
        writer.write(*[IMAGE] * 36)
        writer.text(3)
        writer.add(pixel_values=writer.pixels(1, 2, 3, 16, 16), image_sizes=torch.tensor([[16, 16]]))
    for frames in videos:  # one behind the other
        writer.write(*[VIDEO] * (frames * 4 + newline))
        writer.add(pixel_values_videos=writer.pixels(1, frames, 3, 16, 16))
    return writer.finish()


def internvl_prompt(videos, image, seed):
    """InternVL: frames and tiles of 4 tokens; an image of two tiles."""
    writer = Writer(seed)
    writer.text(5)
    if image:
        writer.write(START, *[IMAGE] * 8, END)
        writer.text(3)
        writer.add(pixel_values=writer.pixels(2, 3, 16, 16))
    for frames in videos:
        for frame in range(frames):
            writer.text(2 + frame % 2)
            writer.write(START, *[IMAGE] * 4, END)
        writer.add(pixel_values=writer.pixels(frames, 3, 16, 16))
        writer.text(4)
    return writer.finish()


def video_llama_3_prompt(videos, image, seed):
    """VideoLLaMA3: frames of 4 x 8 patches, four to a token, of which about a third is left out already."""
    writer = Writer(seed)
    writer.text(5)
    if image:
        writer.write(*[IMAGE] * 4)
        writer.text(3)
        writer.add(
            image_grid_thw=torch.tensor([[1, 4, 4]]),
            image_merge_sizes=torch.tensor([2]),
            pixel_values=writer.pixels(16, 48),
        )
    for frames in videos:
        there = torch.rand(frames, 8, generator=writer.generator) > 0.3
        there[0] = True
        for frame in there:
            writer.text(2)
            writer.write(*[VIDEO] * int(frame.sum()))
        writer.add(
            video_grid_thw=torch.tensor([[frames, 4, 8]]), video_merge_sizes=torch.tensor([2]),
            video_compression_mask=there.flatten(), pixel_values_videos=writer.pixels(frames * 32, 48),
        )  # fmt: skip
    return writer.finish()


def minicpm_prompt(videos, image, seed):
    """MiniCPM-V 4.6: frames of 8 x 8 patches, sixteen to a token, in the second video with two slices."""
    writer = Writer(seed)
    writer.text(5)
    slice_start, slice_end, name = 154, 155, 156
    if image:
        writer.write(name, START, *[IMAGE] * 4, END)
        writer.text(3)
        writer.add(target_sizes=torch.tensor([[8, 8]]), pixel_values=writer.pixels(1, 3, 4, 256))
    for number, frames in enumerate(videos):
        slices = 2 * (number % 2)
        writer.write(name, 7, name)
        for _ in range(frames):
            writer.write(START, *[VIDEO] * 4, END)
            writer.write(*[slice_start, *[VIDEO] * 4, slice_end] * slices)
        units = (1 + slices) * frames
        sizes = torch.tensor([[8, 8]] * units)
        writer.add(target_sizes_videos=sizes, pixel_values_videos=writer.pixels(1, 3, 4, units * 64 * 4))
    return writer.finish()


def qwen3_vl(attention, kind="Qwen3VL", **text):
    text |= TEXT | rope(rope_theta=1e4, mrope_section=[2, 3, 3], mrope_interleaved=True)
    vision = QWEN3_VISION | {"depth": 4, "deepstack_visual_indexes": [0, 1, 2]}
    return qwen3(attention, kind, text | {"num_hidden_layers": 5, "head_dim": 16}, vision)


def qwen3_5(attention, kind="Qwen3_5", **text):
    return qwen3(attention, kind, QWEN3_5 | text, QWEN3_VISION)


def qwen3(attention, kind, text, vision):
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **TOKENS)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")
    return model._from_config(config, attn_implementation=attention)


def qwen3_vl_moe(attention):
    return qwen3_vl(attention, "Qwen3VLMoe", **EXPERTS)


def qwen3_5_moe(attention):
    return qwen3_5(
        attention, "Qwen3_5Moe", **EXPERTS, model_type="qwen3_5_moe_text", shared_expert_intermediate_size=32
    )


def llava_onevision(attention):
    vision = SQUARE | {"model_type": "siglip_vision_model", "vision_use_head": False}
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision, text_config=QWEN2, image_token_id=IMAGE, video_token_id=VIDEO, image_token_index=IMAGE,
        video_token_index=VIDEO, image_grid_pinpoints=[[16, 16]],
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation=attention)


def llava_next_video(attention):
    vision = SQUARE | {"model_type": "clip_vision_model"}
    config = transformers.LlavaNextVideoConfig(
        vision_config=vision, text_config=QWEN2, image_token_id=IMAGE, video_token_id=VIDEO, image_token_index=IMAGE,
        video_token_index=VIDEO, image_grid_pinpoints=[[16, 16]], spatial_pool_stride=2, image_seq_length=16,
        video_seq_length=4,
    )  # fmt: skip
    return transformers.LlavaNextVideoForConditionalGeneration._from_config(config, attn_implementation=attention)


def internvl(attention):
    vision = SQUARE | {"image_size": [16, 16], "patch_size": [4, 4]}
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=QWEN2, image_token_id=IMAGE, image_seq_length=4, downsample_ratio=0.5
    )
    return transformers.InternVLForConditionalGeneration._from_config(config, attn_implementation=attention)


def video_llama_3(attention):
    vision = {key: value for key, value in SQUARE.items() if key != "image_size"}
    config = transformers.VideoLlama3Config(
        vision_config=vision, text_config=QWEN2, image_token_id=IMAGE, video_token_id=VIDEO
    )
    return transformers.VideoLlama3ForConditionalGeneration._from_config(config, attn_implementation=attention)


def minicpm_v(attention):
    vision = SQUARE | {"image_size": 64}
    config = transformers.MiniCPMV4_6Config(
        vision_config=vision, text_config=QWEN3_5, image_token_id=IMAGE, video_token_id=VIDEO, insert_layer_id=0,
        image_size=64,
    )  # fmt: skip
    return transformers.MiniCPMV4_6ForConditionalGeneration._from_config(config, attn_implementation=attention)


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        name: its config's model_type.
        of_transformers: the model's class there.
        build: attention back end -> model.
        prompt: (videos, image, seed) -> the inputs of one sample; videos are given by their frames.
        since: the oldest release in which it takes such prompts.
    """

    name: str
    of_transformers: str
    build: Callable
    prompt: Callable
    since: str = "4.57"

    def model(self, attention="sdpa"):
        if not hasattr(transformers, self.of_transformers):
            pytest.skip(f"transformers {transformers.__version__} has no {self.of_transformers}")
        if version.parse(transformers.__version__) < version.parse(self.since):
            pytest.skip(
                f"{self.of_transformers} of transformers {transformers.__version__} does not take such a prompt"
            )
        return _built(self, attention)

    def inputs(self, videos=(4, 4), image=True, seed=0):
        return self.prompt(videos, image, seed)


@functools.cache
def _built(family, attention):
    return seeded(family.build(attention))


def _tiny(build):
    return lambda attention: build(attention=attention)


qwen3_prompt = functools.partial(qwen_prompt, timestamps=True)
onevision_prompt = functools.partial(llava_prompt, newline=1)
next_video_prompt = functools.partial(llava_prompt, newline=0)


def _families(*rows):
    return {name: Family(name, f"{prefix}ForConditionalGeneration", *others) for name, prefix, *others in rows}


FAMILIES = _families(
    ("qwen2_vl", "Qwen2VL", _tiny(tiny_qwen2_vl), qwen_prompt),
    ("qwen2_5_vl", "Qwen2_5_VL", _tiny(tiny_qwen2_5_vl), qwen_prompt),
    ("qwen3_vl", "Qwen3VL", qwen3_vl, qwen3_prompt),
    ("qwen3_5", "Qwen3_5", qwen3_5, qwen3_prompt),
    ("llava_onevision", "LlavaOnevision", llava_onevision, onevision_prompt),
    ("llava_next_video", "LlavaNextVideo", llava_next_video, next_video_prompt),
    ("internvl", "InternVL", internvl, internvl_prompt),
    ("video_llama_3", "VideoLlama3", video_llama_3, video_llama_3_prompt),
    ("minicpmv4_6", "MiniCPMV4_6", minicpm_v, minicpm_prompt),
)
"""Every family whose layout is found."""

EXPERTS_OF_FAMILIES = _families(
    ("qwen3_vl_moe", "Qwen3VLMoe", qwen3_vl_moe, qwen3_prompt),
    ("qwen3_5_moe", "Qwen3_5Moe", qwen3_5_moe, qwen3_prompt),
)
"""The same with mixtures of experts."""
