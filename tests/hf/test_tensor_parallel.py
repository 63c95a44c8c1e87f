"""transformers' tensor parallelism: every rank keeps the same tokens, and the answer is that of one process.

torchrun starts this file again, in two processes that talk over gloo.
"""

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import launch
from models import Listening, tiny_qwen2, tiny_qwen2_vl, video_embeddings, video_prompt

import fftriton

MODELS = {"qwen2": tiny_qwen2, "qwen2_vl": tiny_qwen2_vl}
METHODS = {
    "keep-all": fftriton.KeepAll(),
    "merge": fftriton.FrameFusion(0.3, similarity_threshold=0.3),
    "merge-prune": fftriton.FrameFusion(0.4, similarity_threshold=0.98),
    "merge-sizes": fftriton.FrameFusion(0.3, similarity_threshold=0.3, proportional=True),
    "prune": fftriton.FastV(0.5, layer=1),
}
RANKS = 2


def inputs_of(name):
    if name == "qwen2":
        embeddings, layout = video_embeddings(6, 8)
        return {"inputs_embeds": embeddings}, layout
    return video_prompt(), None


@torch.no_grad()
def run(name, model):
    """What each method keeps and answers, and the attention received in each layer."""
    inputs, layout = inputs_of(name)
    results = {}
    for method_name, method in METHODS.items():
        with fftriton.reduce(model, method, layout) as reduction:
            out = model.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        results[method_name] = {
            "kept": reduction.report.kept_positions,
            "tokens": out.sequences[:, -4:],
            "logits": torch.cat(out.logits),
        }
    listening = Listening()
    with fftriton.reduce(model, listening, layout):
        model(**inputs)
    return results | {"received": torch.stack(list(listening.received.values()))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, and what each rank got from them."""
    pytest.importorskip("accelerate")  # transformers loads a tp_plan with it
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for name, build in MODELS.items():
        build().save_pretrained(folder / name)
    launch(["torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"], __file__, folder)
    return folder


@functools.cache
def in_one_process(name):
    return run(name, MODELS[name]())


def load(folder, name, rank):
    return torch.load(folder / f"{name}-{rank}.pt")


@pytest.mark.feature("tensor parallelism")
@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("family", MODELS)
def test_as_in_one_process(folder, family, rank):
    expected, found = in_one_process(family), load(folder, family, rank)
    assert found["heads"] == MODELS[family]().get_decoder().config.num_attention_heads // RANKS
    torch.testing.assert_close(found["received"], expected["received"], rtol=1e-6, atol=1e-6)
    for method in METHODS:
        for kept, expected_kept in zip(found[method]["kept"], expected[method]["kept"], strict=True):
            assert torch.equal(kept, expected_kept)
        assert torch.equal(found[method]["tokens"], expected[method]["tokens"])
        assert (found[method]["logits"] - expected[method]["logits"]).abs().max() < 1e-4
    assert len(expected["prune"]["kept"][-1]) < len(expected["keep-all"]["kept"][-1])


@pytest.mark.parametrize("family", MODELS)
def test_ranks_agree_to_the_bit(folder, family):
    first, second = (load(folder, family, rank) for rank in range(RANKS))
    assert torch.equal(first["received"], second["received"])
    assert all(torch.equal(first[method]["logits"], second[method]["logits"]) for method in METHODS)


def main(folder):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.set_num_threads(1)
    for name in MODELS:
        auto = AutoModelForCausalLM if name == "qwen2" else AutoModelForImageTextToText
        model = auto.from_pretrained(folder / name, tp_plan="auto", dtype=torch.float32).eval()
        attention = model.get_decoder().layers[0].self_attn
        heads = attention.q_proj.weight.to_local().shape[0] // attention.head_dim
        torch.save(run(name, model) | {"heads": heads}, folder / f"{name}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
