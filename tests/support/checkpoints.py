"""Checkpoint folders of the tiny models: weights, a tokenizer of words, and the family's own processor."""

import pytest
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fftriton.runtime.unusable import torchvision_works

needs_torchvision = pytest.mark.skipif(
    not torchvision_works(), reason="needs torchvision, as Hugging Face's video processors do"
)

QWEN = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}  # fmt: skip
LLAVA = {"image_token": "<image>", "video_token": "<video>"}
INTERNVL = {
    "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>", "start_image_token": "<img>",
    "end_image_token": "</img>",
}  # fmt: skip
MINICPM = {
    "image_token": "<image_pad>", "video_token": "<video_pad>", "image_start_token": "<image>",
    "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
}  # fmt: skip
SPECIAL = {"llava_onevision": LLAVA, "llava_next_video": LLAVA, "internvl": INTERNVL, "minicpmv4_6": MINICPM}

GRID = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
BOUNDS = {"size": {"shortest_edge": 256, "longest_edge": 8192}}
SQUARE = {"size": {"height": 16, "width": 16}}
FULL = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
CLIP = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
MINICPM_PIXELS = {"patch_size": 4, "scale_resolution": 32, "slice_mode": False}
PARTS = {  # family: prefix of its classes, of the image processor, and what they are made with
    "qwen3_vl": ("Qwen3VL", "Qwen2VL", GRID | BOUNDS, {}),
    "qwen3_5": ("Qwen3VL", "Qwen2VL", GRID | BOUNDS, {}),
    "llava_onevision": ("LlavaOnevision", "LlavaOnevision", SQUARE, FULL),
    "llava_next_video": ("LlavaNextVideo", "LlavaNext", SQUARE | {"do_center_crop": False}, CLIP),
    "internvl": ("InternVL", "GotOcr2", SQUARE, {"image_seq_length": 4}),
    "video_llama_3": ("VideoLlama3", "VideoLlama3", {"patch_size": 4, "merge_size": 2} | BOUNDS, {}),
    "minicpmv4_6": ("MiniCPMV4_6", "MiniCPMV4_6", MINICPM_PIXELS, {}),
}  # fmt: skip


def tokenizer_for(family):
    """Words of its own, and the family's special tokens from id 150 on."""
    special = SPECIAL.get(family, QWEN)
    words = ["<unk>", "<pad>"] + [f"word{number}" for number in range(148)]
    vocabulary = {word: index for index, word in enumerate([*words, *special.values()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", extra_special_tokens=special
    )


def template_for(family):
    """A chat template: the video's placeholder, then the question."""
    special = SPECIAL.get(family, QWEN)
    video = special["video_token"]
    if family in ("qwen3_vl", "qwen3_5"):
        video = special["vision_start_token"] + video + special["vision_end_token"]
    return (
        "word1 {% for part in messages[0]['content'] %}{% if part['type'] == 'video' %}" + video + "\n"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %} word2"
    )


def save_checkpoint(family, folder):
    """Write a folder that `fftriton run --model` takes."""
    prefix, image_prefix, settings, of_processor = PARTS[family.name]
    family.model().save_pretrained(folder)
    processor = getattr(transformers, f"{prefix}Processor")(
        image_processor=getattr(transformers, f"{image_prefix}ImageProcessor")(**settings),
        video_processor=getattr(transformers, f"{prefix}VideoProcessor")(**settings),
        tokenizer=tokenizer_for(family.name), chat_template=template_for(family.name), **of_processor,
    )  # fmt: skip
    processor.save_pretrained(folder)
