"""StreamingLLM against the plain model under a mask written out: the prompt, each new token, and what comes behind."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from attention_backends import attention
from by_hand import SPECIAL, STEPS, decoder_of, generate
from models import behind, tiny_qwen2, tiny_qwen2_vl, video_embeddings, video_prompt
from transformers import DynamicCache

import fftriton
from fftriton.hf.window import Windows
from fftriton.methods import Window


def qwen2():
    embeddings, layout = video_embeddings(6, 8, before=5, after=6)
    return tiny_qwen2(), {"inputs_embeds": embeddings}, layout


def qwen2_vl():
    return tiny_qwen2_vl(), video_prompt(), None


FAMILIES = pytest.mark.parametrize("family", [qwen2, qwen2_vl])


def length_of(inputs):
    return inputs.get("inputs_embeds", inputs.get("input_ids")).shape[1]


def mask_by_hand(length, sinks, recent):
    """[1, 1, length, length]: 0 where a query sees a key, a large negative number elsewhere."""
    mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min)
    for query in range(length):
        for key in range(query + 1):
            if key < sinks or key > query - recent:
                mask[0, 0, query, key] = 0
    return mask


@contextmanager
def masked(model, mask):
    """The decoder of the plain model attends under this mask."""
    hook = decoder_of(model).register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
    )
    yield
    hook.remove()


@torch.no_grad()
def logits_by_hand(model, inputs, tokens, sinks, recent):
    """[1, N + n, V]: the plain model on the prompt and these tokens [n] behind it, all at once."""
    count = len(tokens)
    with masked(model, mask_by_hand(length_of(inputs) + count, sinks, recent)):
        if "inputs_embeds" in inputs:
            behind = model.get_input_embeddings()(tokens)[None]
            return model(inputs_embeds=torch.cat([inputs["inputs_embeds"], behind], 1), use_cache=False).logits
        more = {"input_ids": tokens[None], "attention_mask": torch.ones(1, count, dtype=torch.int64)}
        more["mm_token_type_ids"] = torch.zeros(1, count, dtype=torch.int32)
        longer = {name: torch.cat([inputs[name], more[name]], 1) for name in more if name in inputs}
        return model(**{**inputs, **longer}, use_cache=False).logits


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention", "registered"])
@FAMILIES
@torch.no_grad()
def test_equals_a_mask_by_hand(family, backend):
    model, inputs, layout = family()
    length = length_of(inputs)
    recent = round(0.4 * length) - 8
    with attention(model, backend), fftriton.reduce(model, fftriton.StreamingLLM(0.4), layout) as reduction:
        prompt = model(**inputs).logits
        tokens, logits = generate(model, inputs)
    expected = logits_by_hand(model, inputs, tokens, 8, recent)
    assert (prompt - expected[:, :length]).abs().max() < 1e-4
    assert (logits - expected[0, length - 1 : -1]).abs().max() < 1e-4
    assert (prompt - model(**inputs).logits).abs().max() > 1e-2  # the window does change the output
    report = reduction.report
    assert report.window == Window(8, recent)
    seen = [*range(8), *range(length - recent, length)]
    assert [kept.tolist() for kept in report.kept_positions] == [seen] * 5
    video = torch.cat([layout.tokens for layout in report.layouts]).tolist()
    assert report.vision_tokens_per_layer == [len({*seen} & {*video})] * 5
    assert (report.tokens_per_layer, report.rows_per_layer) == ([round(0.4 * length)] * 5, [length] * 5)


@pytest.mark.parametrize(("budget", "sinks"), [(0.05, 8), (0.3, 0), (0.9, 3), (1.0, 8)])
@torch.no_grad()
def test_any_window(budget, sinks):
    model, inputs, layout = qwen2()
    length = length_of(inputs)
    with fftriton.reduce(model, fftriton.StreamingLLM(budget, sinks), layout) as reduction:
        tokens, logits = generate(model, inputs)
    recent = length + STEPS if budget == 1 else max(1, round(budget * length) - sinks)
    expected = logits_by_hand(model, inputs, tokens, sinks, recent)
    assert (logits - expected[0, length - 1 : -1]).abs().max() < 1e-4
    if budget == 1:
        assert reduction.report.window is None
        assert torch.equal(generate(model, inputs)[1], logits)


@torch.no_grad()
def test_the_cache_holds_sinks_and_window():
    model, inputs, layout = qwen2()
    length, cache = length_of(inputs), DynamicCache()
    with fftriton.reduce(model, fftriton.StreamingLLM(0.4), layout):
        full = []
        for step in range(4):
            inputs = inputs if step == 0 else {"input_ids": torch.tensor([[step]])}
            model(**inputs, **behind(cache))
            assert [layer.get_seq_length() for layer in cache.layers] == [length + step] * 5
            full.append([layer.keys.shape[2] for layer in cache.layers])
        with pytest.raises(ValueError, match=f"crop: length must be at least {length + 3}"):
            cache.crop(length + 1)
    held = round(0.4 * length) - 1  # the next token is one of its window
    assert full == [[held] * 5] * 4


@pytest.mark.parametrize("turn", [1, 5, 40])
@torch.no_grad()
def test_a_second_turn(turn):
    """Tokens behind the prompt come one by one, several at once, and more than the window holds."""
    model, inputs, layout = qwen2()
    length, cache = length_of(inputs), DynamicCache()
    tokens = torch.arange(3 + turn) % 50
    expected = logits_by_hand(model, inputs, tokens, 8, round(0.4 * length) - 8)
    with fftriton.reduce(model, fftriton.StreamingLLM(0.4), layout):
        model(**inputs, **behind(cache))
        for token in tokens[:3]:
            model(input_ids=token[None, None], **behind(cache))
        logits = model(input_ids=tokens[None, 3:], **behind(cache)).logits
    assert (logits - expected[:, length + 3 :]).abs().max() < 1e-4


@torch.no_grad()
def test_samples_picked_from_a_batch_keep_their_windows():
    model = tiny_qwen2()
    samples = [video_embeddings(frames, 8, seed=frames) for frames in (6, 3)]
    layout = [
        fftriton.VideoLayout(samples[0][1][0].positions),
        fftriton.VideoLayout(samples[1][1][0].positions + 24, 1),
    ]
    padded = torch.nn.functional.pad(samples[1][0], (0, 0, 24, 0))
    mask = torch.ones(2, padded.shape[1], dtype=torch.int64)
    mask[1, :24] = 0
    token, method = torch.tensor([[7]]), fftriton.StreamingLLM(0.4, sinks=2)

    def next_logits(embeddings, mask, layout, pick):
        cache = DynamicCache()
        with fftriton.reduce(model, method, layout):
            model(inputs_embeds=embeddings, attention_mask=mask, **behind(cache))
            pick(cache)
            for _ in range(2):
                mask = torch.nn.functional.pad(mask[-1:], (0, 1), value=1)
                logits = model(input_ids=token, attention_mask=mask, **behind(cache)).logits
        return logits

    alone = next_logits(samples[1][0], mask[1:, 24:], samples[1][1], lambda cache: None)
    for pick in (
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([2]))),
        lambda cache: (cache.reorder_cache(torch.tensor([1, 0])), cache.batch_select_indices(torch.tensor([0]))),
    ):
        picked = next_logits(torch.cat([samples[0][0], padded]), mask, layout, pick)
        assert (picked - alone).abs().max() < 1e-4


@torch.no_grad()
def test_padded_samples_of_a_batch_and_beams():
    model, inputs, _ = qwen2_vl()
    short = video_prompt(grids=((2, 4, 4),), image=False)
    method = fftriton.StreamingLLM(0.3, sinks=3)
    padding = length_of(inputs) - length_of(short)
    batch = {"pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"]}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            batch[name] = torch.cat([inputs[name], torch.nn.functional.pad(short[name], (padding, 0))])
    for name in ("video_grid_thw", "pixel_values_videos"):
        batch[name] = torch.cat([inputs[name], short[name]])
    with fftriton.reduce(model, method):
        alone = [generate(model, sample) for sample in (inputs, short)]
        beams = [model.generate(**sample, max_new_tokens=STEPS, num_beams=3) for sample in (inputs, short)]
        together = model.generate(
            **batch, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True,
            suppress_tokens=SPECIAL,
        )  # fmt: skip
        searched = model.generate(**batch, max_new_tokens=STEPS, num_beams=3)
    for row, (tokens, logits) in enumerate(alone):
        assert together.sequences[row, -STEPS:].tolist() == tokens.tolist()
        assert (torch.stack(together.logits)[:, row] - logits).abs().max() < 1e-4
        assert searched[row, -STEPS:].tolist() == beams[row][0, -STEPS:].tolist()


@torch.no_grad()
def test_padding_of_earlier_tokens_is_no_part_of_the_window():
    """A batch whose text before the videos is padded on the left."""
    model, (embeddings, (video,)) = tiny_qwen2(), video_embeddings(6, 8)
    text = torch.randn(2, 7, embeddings.shape[2])

    def run(rows, padding):
        mask = torch.ones(len(rows), 7 - padding + embeddings.shape[1], dtype=torch.int64)
        mask[-1, : 4 - padding] = 0
        layout = [replace(video, positions=video.positions + 7 - padding, sample=row) for row in range(len(rows))]
        cache = DynamicCache()
        with fftriton.reduce(model, fftriton.StreamingLLM(0.4), layout) as reduction:
            model(inputs_embeds=text[rows, padding:], attention_mask=mask[:, : 7 - padding], **behind(cache))
            model(inputs_embeds=embeddings.repeat(len(rows), 1, 1), attention_mask=mask, **behind(cache))
        return reduction.report.samples[-1]

    together, alone = run([0, 1], 0), run([1], 4)
    assert together.window == alone.window
    assert together.vision_tokens_per_layer == alone.vision_tokens_per_layer
    assert [len(kept) for kept in together.kept_positions] == [len(kept) for kept in alone.kept_positions]


@torch.no_grad()
def test_assisted_decoding_says_why_it_cannot_be():
    model, inputs, _ = qwen2_vl()
    with (
        fftriton.reduce(model, fftriton.StreamingLLM(0.3)),
        pytest.raises(ValueError, match=r"for a method with a window .* Prompt lookup and assistants"),
    ):
        model.generate(**inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)


@torch.no_grad()
def test_without_a_cache():
    model, inputs, layout = qwen2()
    with fftriton.reduce(model, fftriton.StreamingLLM(0.4), layout):
        cached = model(**inputs).logits
        assert torch.equal(model(**inputs, use_cache=False).logits, cached)


@torch.no_grad()
def test_behind_a_method_that_shortens_the_prompt():
    model, inputs, layout = qwen2()
    chain = fftriton.UniformFrames(0.5) + fftriton.StreamingLLM(0.25, sinks=4)
    with fftriton.reduce(model, chain, layout) as reduction:
        logits = model(**inputs).logits[0, -1]
    kept = reduction.report.pruned
    left = [place for place in range(length_of(inputs)) if place not in kept.tolist()]
    recent = round(0.5 * len(left)) - 4
    assert reduction.report.rows_per_layer == [len(left)] * 5
    with masked(model, mask_by_hand(len(left), 4, recent)):
        position_ids = torch.tensor([left])
        expected = model(inputs_embeds=inputs["inputs_embeds"][:, left], position_ids=position_ids, use_cache=False)
    assert (logits - expected.logits[0, -1]).abs().max() < 1e-4


@pytest.mark.parametrize("backend", ["flash_attention_2", "registered_without_mask"])
@torch.no_grad()
def test_back_ends_without_masks_are_refused(backend):
    model, inputs, layout = qwen2()
    cache = DynamicCache()
    with attention(model, backend), fftriton.reduce(model, fftriton.StreamingLLM(0.4), layout):
        with pytest.raises(ValueError, match=f"attn_implementation must be one that takes a mask .* got '{backend}'"):
            model(**inputs, **behind(cache))
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_a_failed_forward_is_taken_back():
    model, inputs, layout = qwen2()
    cache, fail = DynamicCache(), RuntimeError("broken off")
    turn = {"input_ids": torch.arange(4)[None], **behind(cache)}

    def broken(*_):
        raise fail

    with fftriton.reduce(model, fftriton.StreamingLLM(0.4), layout):
        model(**inputs, **behind(cache))
        before = [(layer.keys.clone(), layer.get_seq_length()) for layer in cache.layers]
        hook = decoder_of(model).layers[3].register_forward_pre_hook(broken)
        with pytest.raises(RuntimeError, match="broken off"):
            model(**turn)
        hook.remove()
        for layer, (keys, length) in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert layer.get_seq_length() == length


def test_what_is_kept_by_hand():
    windows = Windows.of([Window(2, 3), Window(1, 5), None])
    assert Windows.of([None, None]) is None
    assert windows.kept(None, 8) is None  # one sample sees everything
    windows = windows[torch.tensor([0, 1])]
    valid = torch.tensor([[False, True, True, True, True, True, True, True], [True] * 8])
    index, flags = windows.kept(valid, 8)
    assert index[0, -4:].tolist() == [1, 2, 6, 7]
    assert index[1].tolist() == [0, 4, 5, 6, 7]
    assert flags.tolist() == [[False] + [True] * 4, [True] * 5]
    only, no_flags = windows[torch.tensor([0, 0])].kept(None, 6)
    assert (only.tolist(), no_flags) == ([[0, 1, 4, 5]] * 2, None)
    assert windows[torch.tensor([0])].kept(None, 4) is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", [0.1, 0.35, 0.6, 0.95])
@FAMILIES
@torch.no_grad()
def test_without_a_cache_as_with_one(family, budget, attention):
    """The window is that of the prompt, however much has been generated: token by token the same."""
    model, inputs, layout = family()
    if attention == "eager":
        model = {qwen2: tiny_qwen2, qwen2_vl: tiny_qwen2_vl}[family](attention="eager")
    with fftriton.reduce(model, fftriton.StreamingLLM(budget, sinks=3), layout):
        tokens, logits = generate(model, inputs)
        again, slow = generate(model, inputs, use_cache=False)
    assert torch.equal(again, tokens)
    assert (slow - logits).abs().max() < 1e-4
