"""Every attention back end: the same tokens are kept, and the same answer comes out, as with sdpa."""

import pytest
import torch
from attention_backends import BACKENDS, attention
from families import FAMILIES as EVERY_FAMILY
from families import collate
from models import QWEN_FAMILIES, Listening, behind, cache_of, qwen2, tiny_qwen2, video_embeddings

import fftriton

STEPS = 6
METHODS = {
    "merge": fftriton.FrameFusion(0.3, similarity_threshold=0.3),
    "merge-prune": fftriton.FrameFusion(0.4, similarity_threshold=0.98),
    "prune": fftriton.FastV(0.5, layer=1),
}


ALL_BACKENDS = pytest.mark.parametrize("backend", BACKENDS)
pytestmark = pytest.mark.feature("attention back ends")


@torch.no_grad()
def generate(model, inputs):
    """Greedy tokens [STEPS] and logits [STEPS, V]."""
    out = generate_batch(model, inputs)
    return out.sequences[0, -STEPS:], torch.cat(out.logits)


def same_positions(first, second):
    return all(map(torch.equal, first.report.kept_positions, second.report.kept_positions))


@QWEN_FAMILIES
@ALL_BACKENDS
def test_keep_all_is_bit_identical(family, backend):
    model, inputs, layout = family()
    with attention(model, backend):
        plain_tokens, plain = generate(model, inputs)
        with fftriton.reduce(model, fftriton.KeepAll(), layout):
            tokens, logits = generate(model, inputs)
    assert torch.equal(tokens, plain_tokens)
    assert torch.equal(logits, plain)


@QWEN_FAMILIES
@ALL_BACKENDS
@pytest.mark.parametrize("method", METHODS)
def test_equals_sdpa(family, backend, method):
    model, inputs, layout = family()
    with fftriton.reduce(model, METHODS[method], layout) as expected:
        expected_tokens, expected_logits = generate(model, inputs)
    with attention(model, backend), fftriton.reduce(model, METHODS[method], layout) as reduction:
        tokens, logits = generate(model, inputs)
    assert same_positions(reduction, expected)
    assert torch.equal(tokens, expected_tokens)
    assert (logits - expected_logits).abs().max() < 1e-4
    assert reduction.report.tokens_per_layer[-1] < reduction.report.num_tokens
    assert (logits - generate(model, inputs)[1]).abs().max() > 1e-2  # the reduction does change the output


@QWEN_FAMILIES
@ALL_BACKENDS
@pytest.mark.parametrize("queries", [None, 1, 4])
def test_importance_equals_eager(family, backend, queries):
    listening = Listening(queries)
    model, inputs, layout = family()
    with torch.no_grad():
        with attention(model, backend), fftriton.reduce(model, listening, layout):
            model(**inputs)
        with attention(model, "eager"):
            weights = model(**inputs, output_attentions=True).attentions
    for scores, layer in zip(listening.received.values(), weights, strict=True):
        attended = layer[0].mean(0)  # [N, N]
        expected = attended.sum(0) if queries is None else attended[-queries:].sum(0)
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)


@QWEN_FAMILIES
@ALL_BACKENDS
def test_several_tokens_behind_a_reduced_prompt(family, backend):
    model, inputs, layout = family()
    more = torch.randint(2, 140, (1, 5), generator=torch.Generator().manual_seed(3))

    @torch.no_grad()
    def second_turn():
        with fftriton.reduce(model, METHODS["merge-prune"], layout):
            cache = cache_of(model(**inputs, use_cache=True))
            parts = [model(input_ids=part, **behind(cache)).logits for part in more.split([3, 1, 1], 1)]
        return torch.cat(parts, 1)

    expected = second_turn()
    with attention(model, backend):
        assert (second_turn() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "registered_without_mask"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_a_padded_batch_equals_its_samples(family, side, backend):
    family = EVERY_FAMILY[family]
    model, method = family.model(), METHODS["merge-prune"]
    samples = [family.inputs(videos=(4,)), family.inputs(videos=(4, 4), seed=1), family.inputs(videos=(), seed=2)]
    expected = []
    for sample in samples:
        with torch.no_grad(), fftriton.reduce(model, method):
            expected.append(model(**sample).logits[0, -1])
    batch = collate(samples, side)
    with torch.no_grad(), attention(model, backend) as flash, fftriton.reduce(model, method) as reduction:
        logits = model(**batch).logits
        if side == "left":
            answers = generate_batch(model, batch)
    last = [row.nonzero()[-1, 0] for row in batch["attention_mask"]]
    for row, alone in enumerate(expected):
        assert (logits[row, last[row]] - alone).abs().max() < 1e-4
    assert len({report.tokens_per_layer[-1] for report in reduction.report.samples}) == len(samples)
    if flash is not None:  # transformers has unpadded the rows of each layer
        assert flash.calls[0] == ("varlen", *[batch["attention_mask"].sum(1).tolist()] * 2)
    if side == "left":
        with fftriton.reduce(model, method):
            for row, sample in enumerate(samples):
                tokens, alone = generate(model, sample)
                assert torch.equal(answers.sequences[row, -STEPS:], tokens)
                assert (torch.stack(answers.logits, 1)[row] - alone).abs().max() < 1e-4


def generate_batch(model, batch):
    return model.generate(
        **batch, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )


@QWEN_FAMILIES
def test_flash_attention_sees_one_sequence(family):
    """Positions with gaps look like packed sequences to transformers: they must not reach flash attention."""
    model, inputs, layout = family()
    with attention(model, "flash_attention_2") as flash:
        with fftriton.reduce(model, METHODS["merge-prune"], layout) as reduction:
            generate(model, inputs)
    rows = reduction.report.tokens_per_layer
    assert flash.calls[: len(rows)] == [("dense", [n], [n]) for n in rows]
    steps = [flash.calls[at : at + len(rows)] for at in range(len(rows), len(flash.calls), len(rows))]
    assert steps == [[("dense", [1], [n + step]) for n in rows] for step in range(1, STEPS)]


def test_the_stand_in_is_sent_packed_sequences_where_positions_have_gaps():
    """What the test above excludes does happen where a model is called so."""
    model, inputs, _ = qwen2()
    positions = torch.arange(inputs["inputs_embeds"].shape[1])[None]
    positions[:, 20:] -= 20
    with attention(model, "flash_attention_2") as flash, torch.no_grad():
        model(**inputs, position_ids=positions, use_cache=False)
    assert flash.calls[0] == ("varlen", [20, positions.shape[1] - 20], [20, positions.shape[1] - 20])


@ALL_BACKENDS
def test_layers_have_hooks_in_decode_only_where_they_need_masks(backend):
    model, inputs, layout = qwen2()
    with attention(model, backend), fftriton.reduce(model, METHODS["merge"], layout), torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
        hooks = []
        watch = model.model.norm.register_forward_pre_hook(
            lambda *_: hooks.extend(len(layer._forward_pre_hooks) for layer in model.model.layers)
        )
        model(input_ids=torch.tensor([[3]]), **behind(cache))
        watch.remove()
        assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    needs_masks = backend in ("flex_attention", "registered")  # eager does with one mask for all layers
    assert hooks == [int(needs_masks)] * len(model.model.layers)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_flash_attention_on_a_gpu(method):
    pytest.importorskip("flash_attn")
    from transformers import Qwen2ForCausalLM

    embeddings, layout = video_embeddings(6, 8)
    inputs = {"inputs_embeds": embeddings.to("cuda", torch.float16)}
    model = Qwen2ForCausalLM(tiny_qwen2().config).to("cuda", torch.float16).eval()
    model.load_state_dict(tiny_qwen2().state_dict())
    model.set_attn_implementation("flash_attention_2")
    plain = generate(model, inputs)[1]
    with fftriton.reduce(model, fftriton.KeepAll(), layout):
        assert torch.equal(generate(model, inputs)[1], plain)
    outputs = {}
    for backend in ("sdpa", "flash_attention_2"):
        model.set_attn_implementation(backend)
        with fftriton.reduce(model, METHODS[method], layout):
            outputs[backend] = generate(model, inputs)[1].float()
    worst = (outputs["sdpa"] - outputs["flash_attention_2"]).abs().max()
    assert worst < 1e-2 * outputs["sdpa"].abs().max()
