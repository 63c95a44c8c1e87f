"""Small SigLIP models with random weights, and a tokenizer of whole words: to train from scratch, and for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from fftriton.relevance import ContextFusion, SiglipRelevance

LOGIT_SCALE, LOGIT_BIAS = 2.3, 0.0  # exp(2.3) = 10, where SigLIP's own training starts


def word_tokenizer(words: Sequence[str], longest: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are words in lower case, and the end of the text."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *sorted(set(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", vocabulary["<eos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=longest
    )


def small_siglip(
    words: Sequence[str],
    side: int = 32,
    patch: int = 8,
    width: int = 64,
    depth: int = 2,
    longest: int = 16,
    naflex: bool = False,
    head: ContextFusion | None = None,
    seed: int = 0,
) -> SiglipRelevance:
    """A SigLIP with random weights.

    Args:
        words: that it is to know.
        side: pixels along a picture's side.
        patch: pixels along a patch's side.
        width, depth: of both towers.
        longest: tokens of a text.
        naflex: SigLIP 2 as it takes pictures of any shape.
        head: the context fusion head.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(words, longest)
    tower = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth, "num_attention_heads": 4,
    }  # fmt: skip
    text = tower | {
        "vocab_size": len(tokenizer), "max_position_embeddings": longest, "projection_size": width,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    vision = tower | {"patch_size": patch}
    if naflex:
        patches = (side // patch) ** 2
        config = Siglip2Config(text_config=text, vision_config=vision | {"num_patches": patches})
        model, processor = Siglip2Model(config), Siglip2ImageProcessor(patch_size=patch, max_num_patches=patches)
    else:
        config = SiglipConfig(text_config=text, vision_config=vision | {"image_size": side})
        model, processor = SiglipModel(config), SiglipImageProcessor(size={"height": side, "width": side})
    with torch.no_grad():
        model.logit_scale.fill_(LOGIT_SCALE)
        model.logit_bias.fill_(LOGIT_BIAS)
    return SiglipRelevance(model.eval(), tokenizer, processor, head)
