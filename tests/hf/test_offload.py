"""Models that accelerate spreads over devices, memory and disk: cut between any two layers, results are the same."""

import copy

import pytest
import torch
import transformers
from models import QWEN_FAMILIES, qwen2, qwen2_vl

import fftriton

accelerate = pytest.importorskip("accelerate")

METHODS = {
    "keep-all": fftriton.KeepAll(),
    "merge": fftriton.FrameFusion(0.3, similarity_threshold=0.3),
    "merge-prune": fftriton.FrameFusion(0.4, similarity_threshold=0.98),
    "prune": fftriton.FastV(0.5, layer=2),
}
pytestmark = pytest.mark.feature("offload and device_map")


@torch.no_grad()
def results(model, inputs, layout, method):
    """What is kept in each layer, and the logits of four greedy steps."""
    with fftriton.reduce(model, method, layout) as reduction:
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return reduction.report.kept_positions, torch.cat(out.logits)


def assert_as_in_one_place(model, family):
    whole, inputs, layout = family()
    try:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    except RuntimeError as error:  # 4.57, from embeddings: it looks for the device of weights that are nowhere
        pytest.skip(f"transformers {transformers.__version__} fails without a reduction: {error}")
    for method in METHODS.values():
        (kept, logits), (expected_kept, expected) = (results(each, inputs, layout, method) for each in (model, whole))
        assert all(map(torch.equal, kept, expected_kept))
        assert torch.equal(logits, expected)


@QWEN_FAMILIES
def test_cpu_offload(family):
    model = accelerate.cpu_offload(copy.deepcopy(family()[0]), execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.get_decoder().layers.parameters())
    assert_as_in_one_place(model, family)
    assert all(weight.is_meta for weight in model.get_decoder().layers.parameters())


@QWEN_FAMILIES
@pytest.mark.parametrize("cut", range(6))
def test_cut_between_any_two_layers(family, cut, tmp_path):
    """The decoder's layers from `cut` on are on disk, all else is in memory."""
    model = copy.deepcopy(family()[0])
    decoder = model.get_decoder()
    names = {module: name for name, module in model.named_modules()}
    places = {name: "cpu" for module, name in names.items() if name and not list(module.children())}
    for index, layer in enumerate(decoder.layers):
        for name in [name for name in places if name.startswith(names[layer] + ".")]:
            del places[name]
        places[names[layer]] = "disk" if index >= cut else "cpu"
    model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    on_disk = [next(layer.parameters()).is_meta for layer in decoder.layers]
    assert on_disk == [index >= cut for index in range(len(decoder.layers))]
    assert_as_in_one_place(model, family)


def test_disk_offload(tmp_path):
    model = accelerate.disk_offload(copy.deepcopy(qwen2()[0]), tmp_path, execution_device=torch.device("cpu"))
    assert_as_in_one_place(model, qwen2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("cut", range(1, 5))
def test_two_gpus(cut):
    model, inputs, layout = qwen2_vl()
    inputs = {name: value.cuda() for name, value in inputs.items()}
    whole = copy.deepcopy(model).cuda()
    places = {"model.visual": 0, "model.language_model.embed_tokens": 0, "model.language_model.rotary_emb": 0}
    places |= {f"model.language_model.layers.{index}": int(index >= cut) for index in range(5)}
    split = accelerate.dispatch_model(copy.deepcopy(model), places | {"model.language_model.norm": 1, "lm_head": 1})
    for method in METHODS.values():
        (kept, logits), (expected_kept, expected) = (results(each, inputs, layout, method) for each in (split, whole))
        assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(kept, expected_kept, strict=True))
        assert (logits - expected).abs().max() < 1e-4
