"""Tiny random models of the families that came to transformers later, or are seldom used, and prompts for them.

They share their decoders and most of their rules with those in families.py.
"""

import functools
import inspect

import pytest
import torch
import transformers
from families import (
    END,
    EXPERTS,
    IMAGE,
    LAYER_TYPES,
    QWEN2,
    QWEN3_5,
    QWEN3_VISION,
    SQUARE,
    START,
    VIDEO,
    Writer,
    _families,
    minicpm_prompt,
    qwen3_prompt,
    qwen_prompt,
)  # fmt: skip
from models import TEXT, TOKENS, VISION, rope, seeded

import fftriton

AUDIO = {
    "num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16,
    "n_window": 4, "output_dim": 64,
}  # fmt: skip
DEEPSTACK = QWEN3_VISION | {"depth": 4, "deepstack_visual_indexes": [0, 1, 2]}
FIVE = {"num_hidden_layers": 5, "head_dim": 16}
INTERLEAVED = rope(rope_theta=1e4, mrope_section=[2, 3, 3], mrope_interleaved=True)
BEGIN_VIDEO, END_VIDEO, THUMBNAIL = 154, 155, 156


def make(kind, attention, **arguments):
    """A model whose config has these arguments."""
    config = getattr(transformers, f"{kind}Config")(**arguments)
    return getattr(transformers, f"{kind}ForConditionalGeneration")._from_config(config, attn_implementation=attention)


def qwen2_5_omni(attention):
    vision = VISION | {
        "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64, "window_size": 16,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    text = TEXT | {"num_hidden_layers": 5} | rope(rope_theta=1e4, mrope_section=[2, 3, 3])
    return make(
        "Qwen2_5OmniThinker", attention, text_config=text, vision_config=vision, audio_config=AUDIO,
        image_token_index=IMAGE, video_token_index=VIDEO, audio_token_index=154, vision_start_token_id=START,
        vision_end_token_id=END, audio_start_token_id=155, audio_end_token_id=156,
    )  # fmt: skip


def qwen3_omni(attention):
    return make(
        "Qwen3OmniMoeThinker", attention, text_config=TEXT | EXPERTS | INTERLEAVED | FIVE, vision_config=DEEPSTACK,
        audio_config=AUDIO | {"downsample_hidden_size": 8, "n_window_infer": 8}, audio_token_id=154,
        audio_start_token_id=155, **TOKENS,
    )  # fmt: skip


def cosmos3_omni(attention):
    text = TEXT | INTERLEAVED | FIVE | {"model_type": "qwen3_vl_text"}
    vision = DEEPSTACK | {"model_type": "qwen3_vl_vision"}
    return make("Cosmos3Omni", attention, text_config=text, vision_config=vision, **TOKENS)


def cosmos3_edge(attention):
    text = TEXT | FIVE | rope(rope_theta=1e4, mrope_section=[2, 3, 3])
    vision = {name: value for name, value in SQUARE.items() if name != "image_size"}
    vision |= {"num_patches": 64, "spatial_merge_size": 2}
    return make("Cosmos3Edge", attention, text_config=text, vision_config=vision, projector_hidden_size=64, **TOKENS)


def glm4v_moe(attention):
    text = TEXT | FIVE | rope(rope_theta=1e4, mrope_section=[2, 1, 1], partial_rotary_factor=0.5)
    text |= {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
    vision = VISION | {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64, "image_size": 32}
    return make(
        "Glm4vMoe", attention, text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        image_start_token_id=START, image_end_token_id=END, video_start_token_id=BEGIN_VIDEO,
        video_end_token_id=END_VIDEO,
    )  # fmt: skip


def kimi_k25(attention):
    text = TEXT | rope(rope_theta=1e4) | {
        "model_type": "deepseek_v3", "num_hidden_layers": 5, "num_key_value_heads": 4, "kv_lora_rank": 16,
        "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8, "moe_intermediate_size": 32,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    }  # fmt: skip
    vision = {
        "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
        "hidden_size": 32, "intermediate_size": 32,
    }  # fmt: skip
    return make("Kimi_K25", attention, text_config=text, vision_config=vision, projection_hidden_size=32, **TOKENS)


def minicpm(kind, attention, **tokens):
    return make(
        kind, attention, text_config=QWEN3_5 | {"layer_types": LAYER_TYPES}, vision_config=SQUARE | {"image_size": 64},
        image_token_id=IMAGE, video_token_id=VIDEO, insert_layer_id=0, downsample_mode="16x", **tokens,
    )  # fmt: skip


MARKS = {
    "image_start_id": START, "image_end_id": END, "slice_start_id": 154, "slice_end_id": 155, "newline_id": 157,
}  # fmt: skip


def smolvlm(attention):
    text = QWEN2 | {"pad_token_id": 0}
    return make(
        "SmolVLM", attention, text_config=text, vision_config=dict(SQUARE), image_token_id=IMAGE, scale_factor=2
    )


def video_llava(attention):
    vision = SQUARE | {"model_type": "clip_vision_model"}
    return make(
        "VideoLlava", attention, text_config=QWEN2, vision_config=vision, image_token_index=IMAGE,
        video_token_index=VIDEO,
    )  # fmt: skip


def omni_prompt(videos, image, seed):
    """The Omni models: as Qwen2-VL, and the seconds between two frames."""
    inputs = qwen_prompt(videos, image, seed)
    inputs.pop("mm_token_type_ids", None)
    return inputs | ({"video_second_per_grid": torch.ones(len(videos))} if videos else {})


def edge_prompt(videos, image, seed):
    """Cosmos 3 Edge: as Qwen3-VL, with patches of a single frame."""
    inputs = qwen3_prompt(videos, image, seed)
    return {name: part[:, :48] if name.startswith("pixel_values") else part for name, part in inputs.items()}


def glm4v_moe_prompt(videos, image, seed):
    """GLM-4.5V: frames of image tokens between timestamps; images can only be in prompts without videos."""
    writer = Writer(seed)
    writer.text(5)
    for number, frames in enumerate(videos):
        height, width = (4, 6) if number % 2 == 0 else (4, 4)
        writer.write(BEGIN_VIDEO)
        for frame in range(frames):
            writer.write(START, *[IMAGE] * (height * width // 4), END)
            writer.text(1 + frame % 2)
        writer.write(END_VIDEO)
        writer.text(4)
        grid = torch.tensor([[frames, height, width]])
        writer.add(video_grid_thw=grid, pixel_values_videos=writer.pixels(frames * height * width, 96))
    inputs = writer.finish()
    if "mm_token_type_ids" in inspect.signature(transformers.Glm4vMoeForConditionalGeneration.forward).parameters:
        inputs["mm_token_type_ids"] = 2 * (inputs["input_ids"] == IMAGE).int()
    return inputs


def kimi_prompt(videos, image, seed):
    """Kimi K2.5: chunks of two frames, each of 4 x 4 or 4 x 6 patches, four to a token, after a timestamp."""
    writer = Writer(seed)
    writer.text(5)
    if image:
        writer.write(START, *[IMAGE] * 4, END)
        writer.text(3)
        writer.add(image_grid_thw=torch.tensor([[1, 4, 4]]), pixel_values=writer.pixels(16, 3, 4, 4))
    for number, chunks in enumerate(videos):
        height, width = (4, 6) if number % 2 == 0 else (4, 4)
        for _ in range(chunks):
            writer.text(2)
            writer.write(START, *[VIDEO] * (height * width // 4), END)
            grid, pixels = torch.tensor([[2, height, width]]), writer.pixels(2 * height * width, 3, 4, 4)
            writer.add(video_grid_thw=grid, pixel_values_videos=pixels)
        writer.text(3)
    return writer.finish()


def minicpm4_7_prompt(videos, image, seed):
    """MiniCPM-V 4.7: as 4.6, and what each token shows."""
    inputs = minicpm_prompt(videos, image, seed)
    ids = inputs["input_ids"]
    return inputs | {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def smolvlm_prompt(videos, image, seed):
    """SmolVLM2: frames after their times; an image of two tiles and a whole."""
    writer, pixels = Writer(seed), []
    writer.text(5)
    if image:
        for opener in (147, 148, THUMBNAIL):
            writer.write(START, opener, *[IMAGE] * 4, START)
        writer.text(3)
        pixels.append(writer.pixels(1, 3, 3, 16, 16))
    for frames in videos:
        for frame in range(frames):
            writer.text(2 + frame % 2)
            writer.write(START, THUMBNAIL, *[IMAGE] * 4, START)
        pixels.append(writer.pixels(1, frames, 3, 16, 16))
        writer.text(4)
    return writer.finish() | ({"pixel_values": torch.cat(pixels, 1)} if pixels else {})


def video_llava_prompt(videos, image, seed):
    """Video-LLaVA: frames of 4 x 4 patches and a class token."""
    writer = Writer(seed)
    writer.text(5)
    if image:
        writer.write(*[IMAGE] * 16)
        writer.text(3)
        writer.add(pixel_values_images=writer.pixels(1, 3, 16, 16))
    for frames in videos:
        writer.write(*[VIDEO] * (frames * 17))
        writer.text(2)
        writer.add(pixel_values_videos=writer.pixels(1, frames, 3, 16, 16))
    return writer.finish()


NEWER_FAMILIES = _families(
    ("qwen2_5_omni_thinker", "Qwen2_5OmniThinker", qwen2_5_omni, omni_prompt),
    ("qwen3_omni_moe_thinker", "Qwen3OmniMoeThinker", qwen3_omni, omni_prompt, "5.0"),  # with an image and a video
    ("cosmos3_omni", "Cosmos3Omni", cosmos3_omni, qwen3_prompt),
    ("cosmos3_edge", "Cosmos3Edge", cosmos3_edge, edge_prompt),
    ("glm4v_moe", "Glm4vMoe", glm4v_moe, glm4v_moe_prompt),
    ("kimi_k25", "Kimi_K25", kimi_k25, kimi_prompt, "5.24"),  # with chunks of several frames
    ("minicpm_ocr", "MiniCPMOcr", functools.partial(minicpm, "MiniCPMOcr"), minicpm_prompt),
    ("minicpmv4_7", "MiniCPMV4_7", functools.partial(minicpm, "MiniCPMV4_7", **MARKS), minicpm4_7_prompt),
    ("smolvlm", "SmolVLM", smolvlm, smolvlm_prompt),
    ("video_llava", "VideoLlava", video_llava, video_llava_prompt),
)
"""Those of these families whose layout is found."""


def with_layout(model, prompt, token):
    """What cannot be reduced: a model, inputs with a video of 4 frames, and the video's layout."""
    inputs = prompt((4,), image=False, seed=0)
    tokens = (inputs["input_ids"][0] == token).nonzero()[:, 0]
    return seeded(model), inputs, [fftriton.VideoLayout(tokens.view(4, -1))]


def need(name):
    """Skip where this release has no such class."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")


def ernie4_5_vl_moe():
    """Its experts depend on what a token shows."""
    need("Ernie4_5_VLMoeConfig")
    text = TEXT | {"num_hidden_layers": 5} | rope(rope_theta=1e4, mrope_section=[3, 3, 2])
    text |= {"moe_intermediate_size": [32, 32], "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    vision = {
        "depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "hidden_size": 32,
        "intermediate_size": 32,
    }  # fmt: skip
    model = make(
        "Ernie4_5_VLMoe", "sdpa", text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        image_start_token_id=START, image_end_token_id=END, video_start_token_id=BEGIN_VIDEO,
        video_end_token_id=END_VIDEO,
    )  # fmt: skip

    def prompt(videos, image, seed):
        writer = Writer(seed)
        writer.text(5)
        for frames in videos:
            writer.write(BEGIN_VIDEO, *[VIDEO] * (frames * 4), END_VIDEO)
            grid, pixels = torch.tensor([[2 * frames, 4, 4]]), writer.pixels(2 * frames * 16, 48)
            writer.add(video_grid_thw=grid, pixel_values_videos=pixels)
        inputs = writer.finish()
        is_video = (inputs["input_ids"] == VIDEO).int()
        return inputs | {"mm_token_type_ids": 2 * is_video, "moe_mm_token_type_ids": is_video}

    return with_layout(model, prompt, VIDEO)


def minimax_m3_vl():
    """Its attention looks at some blocks of keys only."""
    need("MiniMaxM3VLConfig")
    text = TEXT | FIVE | rope(rope_theta=1e4, partial_rotary_factor=0.5) | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8, "dense_intermediate_size": 64,
        "shared_intermediate_size": 32, "intermediate_size": 32, "layer_types": ["minimax_m3_sparse"] * 5,
        "index_head_dim": 16, "index_block_size": 4, "index_n_heads": 2,
    }  # fmt: skip
    vision = SQUARE | {"image_size": 64, "temporal_patch_size": 2, "spatial_merge_size": 2}
    config = transformers.MiniMaxM3VLConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, video_token_index=VIDEO,
        projector_hidden_size=64,
    )  # fmt: skip
    model = transformers.MiniMaxM3SparseForConditionalGeneration._from_config(config, attn_implementation="sdpa")

    def prompt(videos, image, seed):
        inputs = qwen_prompt(videos, image, seed)
        inputs.pop("mm_token_type_ids", None)
        return inputs

    return with_layout(model, prompt, VIDEO)


def molmo2():
    """The tokens of its videos attend to each other in both directions."""
    need("Molmo2Config")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    vision = heads | {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": [16, 16], "patch_size": 4,
        "num_position_embeddings": 16,
    }  # fmt: skip
    adapter = heads | {
        "vision_feature_layer": [1, 0],
        "hidden_size": 32,
        "intermediate_size": 32,
        "text_hidden_size": 64,
    }
    model = make(
        "Molmo2", "sdpa", text_config=TEXT | FIVE | {"additional_vocab_size": 4} | rope(rope_theta=1e4),
        vision_config=vision, adapter_config=adapter, image_patch_id=IMAGE, image_start_token_id=START,
        image_end_token_id=END, frame_start_token_id=BEGIN_VIDEO, frame_end_token_id=END_VIDEO,
        low_res_image_start_token_id=THUMBNAIL,
    )  # fmt: skip

    def prompt(videos, image, seed):
        writer, (frames,) = Writer(seed), videos
        writer.text(5)
        writer.write(*[BEGIN_VIDEO, *[IMAGE] * 4, END_VIDEO] * frames)
        writer.add(
            pixel_values_videos=writer.pixels(frames, 16, 48), video_grids=torch.tensor([[frames, 2, 2]]),
            video_token_pooling=torch.arange(frames * 16).view(-1, 4),
        )  # fmt: skip
        inputs = writer.finish()
        return inputs | {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}

    return with_layout(model, prompt, IMAGE)


def instructblipvideo():
    """Its generate calls that of its language model with embeddings."""
    vision = SQUARE | {"num_hidden_layers": 1}
    former = {name: value for name, value in vision.items() if "size" not in name or "ate" in name}
    model = make(
        "InstructBlipVideo", "eager", text_config=QWEN2 | {"model_type": "llama"}, vision_config=vision,
        qformer_config=former | {"vocab_size": 160, "hidden_size": 32, "encoder_hidden_size": 32},
        num_query_tokens=4, video_token_index=VIDEO,
    )  # fmt: skip

    def prompt(videos, image, seed):
        writer, (frames,) = Writer(seed), videos
        writer.write(*[VIDEO] * (4 * frames))
        writer.add(pixel_values=writer.pixels(1, frames, 3, 16, 16), qformer_input_ids=torch.tensor([[5, 6]]))
        return writer.finish() | {"qformer_attention_mask": torch.ones(1, 2, dtype=torch.int64)}

    return with_layout(model, prompt, VIDEO)
