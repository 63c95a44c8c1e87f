"""torch.compile: reduced prompts run eagerly, all else in the compiled code, which never breaks or changes for it."""

import copy

import pytest
import torch
from models import behind, cache_of, tiny_qwen2, video_embeddings
from torch._dynamo.utils import counters

import fftriton

METHOD = fftriton.FrameFusion(0.5, similarity_threshold=0.9)
pytestmark = pytest.mark.feature("torch.compile", "qwen2")


class Backend:
    """Counts how often compiled code runs."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, examples):
        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


def model_forward(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)


def model_compile(model, backend):
    model.compile(backend=backend)


def decoder_forward(model, backend):
    model.model.forward = torch.compile(model.model.forward, backend=backend)


def decoder_compile(model, backend):
    model.model.compile(backend=backend)


def layer_by_layer(model, backend):
    for layer in model.model.layers:
        layer.compile(backend=backend)


WAYS = pytest.mark.parametrize("compile", [model_forward, model_compile, decoder_forward, decoder_compile])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def logits_of(model, inputs, steps):
    """[steps, V]: each step's logits."""
    out = model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.cat(out.logits)


def case(seed=0):
    embeddings, layout = video_embeddings(6, 8, seed=seed)
    return {"inputs_embeds": embeddings}, lambda model, given: layout if given.get("inputs_embeds") is not None else []


@WAYS
def test_compiled_before_it_is_reduced(compile):
    plain, backend = tiny_qwen2(2), Backend()
    (inputs, layout), (other, _) = case(), case(seed=1)
    dense = logits_of(plain, inputs, 6)
    with fftriton.reduce(plain, METHOD, layout) as expected:
        reduced, other_reduced = logits_of(plain, inputs, 6), logits_of(plain, other, 6)
    assert (reduced - dense).abs().max() > 1e-2
    model = copy.deepcopy(plain)
    compile(model, backend)
    forwards = [vars(module).get("forward") for module in model.modules()]
    assert (logits_of(model, inputs, 6) - dense).abs().max() < 1e-4
    assert backend.runs == 6

    with fftriton.reduce(model, METHOD, layout) as reduction:
        assert (logits_of(model, inputs, 6) - reduced).abs().max() < 1e-4
        assert backend.runs == 6 + 5  # the prompt ran eagerly, the steps behind it in compiled code
        assert (logits_of(model, other, 6) - other_reduced).abs().max() < 1e-4
        assert reduction.report.tokens_per_layer == expected.report.tokens_per_layer
    graphs = counters["stats"]["unique_graphs"]
    assert (logits_of(model, inputs, 6) - dense).abs().max() < 1e-4
    assert backend.runs == 6 + 5 + 5 + 6
    assert counters["stats"]["unique_graphs"] == graphs  # what was compiled before still serves
    assert counters["graph_break"] == {}
    assert [vars(module).get("forward") for module in model.modules()] == forwards


def test_layers_compiled_one_by_one():
    plain, backend = tiny_qwen2(2), Backend()
    inputs, layout = case()
    with fftriton.reduce(plain, METHOD, layout):
        reduced = logits_of(plain, inputs, 4)
    model = copy.deepcopy(plain)
    layer_by_layer(model, backend)
    with fftriton.reduce(model, METHOD, layout):
        assert (logits_of(model, inputs, 4) - reduced).abs().max() < 1e-4
    assert backend.runs == 2 * 3
    assert counters["graph_break"] == {}


def test_what_torch_compile_returns_can_be_reduced():
    plain, backend = tiny_qwen2(2), Backend()
    inputs, layout = case()
    with torch.no_grad(), fftriton.reduce(plain, METHOD, layout):
        reduced = plain(**inputs).logits
    model = torch.compile(copy.deepcopy(plain), backend=backend)
    with torch.no_grad(), fftriton.reduce(model, METHOD, layout) as reduction:
        assert (model(**inputs).logits - reduced).abs().max() < 1e-4
        assert reduction.report.tokens_per_layer[-1] < reduction.report.num_tokens
        assert backend.runs == 0
        model(input_ids=torch.arange(2, 40)[None])  # no video
        assert backend.runs == 1
        assert reduction.report is None
    assert counters["graph_break"] == {}


def test_a_step_with_the_mask_of_the_whole_sequence():
    plain, backend = tiny_qwen2(2), Backend()
    inputs, layout = case()
    model = copy.deepcopy(plain)
    decoder_forward(model, backend)
    mask = torch.ones(1, inputs["inputs_embeds"].shape[1] + 1, dtype=torch.int64)

    @torch.no_grad()
    def step(model):
        with fftriton.reduce(model, METHOD, layout):
            cache = cache_of(model(**inputs, use_cache=True))
            return model(input_ids=torch.tensor([[3]]), **behind(cache), attention_mask=mask).logits

    assert (step(model) - step(plain)).abs().max() < 1e-4
    assert backend.runs == 1


@pytest.mark.parametrize("compile", [model_forward, decoder_compile, layer_by_layer])
def test_compiling_a_model_that_is_being_reduced_is_refused(compile):
    model = copy.deepcopy(tiny_qwen2(2))
    inputs, layout = case()
    with torch.no_grad(), fftriton.reduce(model, METHOD, layout):
        model(**inputs)
        compile(model, Backend())
        with pytest.raises(RuntimeError, match="has been compiled while it is being reduced; compile it before"):
            model(**inputs)
