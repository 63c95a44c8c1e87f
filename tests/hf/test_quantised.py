"""Weights that torchao or bitsandbytes has quantised, where these are installed and run on a CPU."""

import copy

import pytest
import torch
from by_hand import decoder_of, generate
from models import tiny_qwen2_vl, video_prompt
from torch import nn
from transformers import BitsAndBytesConfig, Qwen2VLForConditionalGeneration

import fftriton


def torchao(config):
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    model = copy.deepcopy(tiny_qwen2_vl())
    quantization.quantize_(decoder_of(model), getattr(quantization, config)())
    assert type(decoder_of(model).layers[0].mlp.up_proj.weight) is not nn.Parameter
    return model


def bitsandbytes(folder, **bits):
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    pytest.importorskip("accelerate")
    tiny_qwen2_vl().save_pretrained(folder)
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**bits), device_map="cpu"
    )
    assert type(decoder_of(model).layers[0].mlp.up_proj) is not nn.Linear
    return model


WAYS = {
    "int8": lambda folder: torchao("Int8WeightOnlyConfig"),
    "int8-dynamic": lambda folder: torchao("Int8DynamicActivationInt8WeightConfig"),
    "8bit": lambda folder: bitsandbytes(folder, load_in_8bit=True),
    "4bit": lambda folder: bitsandbytes(folder, load_in_4bit=True),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_quantised_weights(way, tmp_path):
    model, inputs = WAYS[way](tmp_path), video_prompt()
    tokens, logits = generate(model, inputs)
    with fftriton.reduce(model, fftriton.KeepAll()):
        kept_tokens, kept_logits = generate(model, inputs)
    assert torch.equal(kept_tokens, tokens)
    assert torch.equal(kept_logits, logits)
    method = fftriton.FrameFusion(0.3, similarity_threshold=0.5)
    with fftriton.reduce(model, method) as reduction:
        reduced, _ = generate(model, inputs)
    report = reduction.report
    assert report.budget_achieved <= 0.3 + 1 / report.num_video_tokens
    assert len(reduced) == len(tokens)
