"""Every family of the installed transformers that takes videos is supported, or listed with the reason why not."""

import functools
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from feature_table import PAGE
from models import seeded, video_embeddings
from newer_families import ernie4_5_vl_moe, instructblipvideo, minimax_m3_vl, molmo2
from packaging import version
from transformers.models.auto import modeling_auto

import fftriton
from fftriton.layouts.families import RULES

MODELS = Path(transformers.__file__).parent / "models"
TAKES_TEXT = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")


def video_families():
    """{config.model_type: model} of the models that write text about videos, as far as transformers shows it."""
    found = {}
    for mapping in TAKES_TEXT:
        for name, model in getattr(modeling_auto, mapping, {}).items():
            model = getattr(transformers, model if isinstance(model, str) else model[0])
            inner = getattr(transformers, model.__name__.replace("ForConditionalGeneration", "Model"), None)
            encodes = any(hasattr(part, "get_video_features") for part in (model, inner))
            takes = "pixel_values_videos" in inspect.signature(model.forward).parameters
            reads = any((MODELS / name).glob("video_processing_*.py"))
            if encodes or takes or reads:
                found[name] = model
    return found


def listed_families():
    """The families in docs/models.md that are not supported: {config.model_type: what the page says}."""
    section = PAGE.read_text(encoding="utf-8").split("## Families that are not supported")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| (.+) \|$", section, re.MULTILINE)
    return {name: reason for names, reason in rows for name in re.findall("`(.+?)`", names)}


def test_every_family_is_supported_or_listed():
    found, listed = video_families(), listed_families()
    assert {"qwen2_vl", "smolvlm", "llava_onevision"} <= found.keys()
    missing = found.keys() - RULES.keys() - listed.keys()
    assert not missing, f"neither in RULES nor in the list of docs/models.md: {sorted(missing)}"
    assert not listed.keys() & RULES.keys()


OF_THE_NEWEST = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.24"), reason="the list is about the newest release"
)
SMALL = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 512, "global_head_dim": 16,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8, "n_group": 1,
    "topk_group": 1, "shared_expert_intermediate_size": 32, "shared_experts_intermediate_size": 32,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "index_head_dim": 16, "index_n_heads": 2, "index_topk": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 160, "num_kv_shared_layers": 0,
    "first_k_dense_replace": 1,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
NO_DECODER = "must have a Qwen2-style decoder"
OTHER_SUM = "must be built as norm, attention, residual, norm, feed-forward, residual"
DECODERS = {  # by the name of its config's class without Config: what it needs besides, and what is to be said
    "CohereCompassText": ({
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    }, NO_DECODER),
    "Dots3NoteText": ({"num_key_value_heads": 4, "per_layer_config": {}}, "only a plain DynamicCache"),
    "Exaone4": ({}, NO_DECODER),
    "Gemma4Text": ({}, OTHER_SUM),
    "Gemma4UnifiedText": ({}, OTHER_SUM),
    "Glm4vText": ({"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}, OTHER_SUM),
    "GlmOcrText": ({"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}, OTHER_SUM),
    "Glm5NextText": ({"num_key_value_heads": 4, "qk_rope_head_dim": 0}, OTHER_SUM),
    "HYV4VLText": ({"num_key_value_heads": 4, "rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}, OTHER_SUM),
    "HyperCLOVAX": ({}, OTHER_SUM),
    "Lfm3": ({}, NO_DECODER),
    "MuseGlimmerText": ({}, OTHER_SUM),
    "MuseSparkText": ({}, OTHER_SUM),
    "NemotronH": ({}, NO_DECODER),
    "Qwen4ExpText": ({
        "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 100, "split_ngram_parts": 2,
    }, NO_DECODER),
    "OPT": ({"ffn_dim": 64, "word_embed_proj_dim": 64}, NO_DECODER),
}  # fmt: skip


def tiny_decoder(name, options):
    """A random decoder of that class, as small as its config allows."""
    config = getattr(transformers, f"{name}Config", None)
    if config is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}Config")
    known = inspect.signature(config).parameters
    return getattr(transformers, f"{name}Model")(config(**{k: v for k, v in SMALL.items() if k in known} | options))


@pytest.mark.parametrize("name", DECODERS)
@OF_THE_NEWEST
@torch.no_grad()
def test_these_decoders_cannot_be_reduced(name):
    """Their families are listed because of this, and a layout by hand does not help."""
    options, message = DECODERS[name]
    model, (embeddings, layout) = seeded(tiny_decoder(name, options)), video_embeddings(6, 8)
    if message in (NO_DECODER, OTHER_SUM):
        with pytest.raises(TypeError, match=message):
            fftriton.reduce(model, fftriton.FastV(0.6, layer=1), layout)
        return
    dense = model(inputs_embeds=embeddings).last_hidden_state
    with pytest.warns(UserWarning, match=f"running without reduction, because {message}"):
        with fftriton.reduce(model, fftriton.FastV(0.6, layer=1), layout):
            assert torch.equal(model(inputs_embeds=embeddings).last_hidden_state, dense)


WHOLE = {
    "ernie4_5_vl_moe": (ernie4_5_vl_moe, TypeError, "only hidden states, masks .* gets 'moe_mm_token_type_ids'"),
    "minimax_m3_vl": (minimax_m3_vl, UserWarning, "only a plain DynamicCache .* MiniMaxM3VLSparseCacheLayer"),
    "molmo2": (molmo2, UserWarning, "attention_mask is not the two-dimensional padding mask"),
}


@torch.no_grad()
def test_instructblipvideo_needs_a_layout():
    model, inputs, layout = instructblipvideo()
    with pytest.raises(TypeError, match="layout must be given"):
        fftriton.reduce(model, fftriton.FastV(0.5, layer=1))
    with fftriton.reduce(model, fftriton.FastV(0.5, layer=1), layout) as reduction:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert reduction.report.vision_tokens_per_layer == [16, 6, 6, 6, 6]


@pytest.mark.parametrize("name", WHOLE)
@OF_THE_NEWEST
@torch.no_grad()
def test_these_models_cannot_be_reduced(name):
    make, kind, message = WHOLE[name]
    model, inputs, layout = make()
    dense = model(**inputs).logits
    with pytest.raises(TypeError, match="layout must be given"):
        fftriton.reduce(model, fftriton.FastV(0.6, layer=1))
    refuse = functools.partial(pytest.warns if kind is UserWarning else pytest.raises, kind, match=message)
    with refuse(), fftriton.reduce(model, fftriton.FastV(0.6, layer=1), layout):
        assert torch.equal(model(**inputs).logits, dense)
