"""Every way of calling `generate` and the forward comes out as a computation without cache says."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from by_hand import SPECIAL, STEPS, WORDS, ByHand, Scripted, generate, patches, see_prompt
from families import FAMILIES
from models import behind, cache_of, tiny_qwen2, tiny_qwen2_vl, video_embeddings, video_prompt
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

import fftriton

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
SCRIPT = Scripted()


def of_prompt(model, inputs, report):
    """The prompt as the decoder gets it, and the reduction of it by hand."""
    prompt = see_prompt(model, inputs)
    return prompt, ByHand(model, patches(report.layouts, prompt.embeddings.shape[1]))


# ---- decoding


@EVERY_FAMILY
@pytest.mark.feature("beams")
@torch.no_grad()
def test_beams(family):
    model, inputs = family.model(), family.inputs()
    skip_where_it_fails_anyway(model, inputs, num_beams=3)
    with fftriton.reduce(model, SCRIPT) as reduction:
        out = model.generate(
            **inputs, max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert len(reduction.report.samples) == 3
    prompt, by_hand = of_prompt(model, inputs, reduction.report.samples[0])
    for sequence, score in zip(out.sequences[:, -6:], out.sequences_scores, strict=True):
        chosen = by_hand.logits(prompt, SCRIPT, sequence[:-1]).log_softmax(-1).gather(1, sequence[:, None])
        assert abs(chosen.sum() / 6 - score) < 1e-4
        dense = ByHand(model, []).logits(prompt, SCRIPT, sequence[:-1])
        assert abs(dense.log_softmax(-1).gather(1, sequence[:, None]).sum() / 6 - score) > 1e-3


@torch.no_grad()
def skip_where_it_fails_anyway(model, inputs, **arguments):
    """What transformers itself cannot do with a family is no matter of a reduction."""
    release = f"transformers {transformers.__version__}"
    try:
        out = model.generate(
            **inputs, max_new_tokens=2, output_logits=True, return_dict_in_generate=True, suppress_tokens=SPECIAL,
            **arguments,
        )  # fmt: skip
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        pytest.skip(f"{release} fails without a reduction: {error}")
    if (out.logits[0] - model(**inputs).logits[:, -1]).abs().max() > 1e-3:
        pytest.skip(f"{release} comes out wrong without a reduction")


@EVERY_FAMILY
@pytest.mark.feature("sampling, several sequences")
@torch.no_grad()
def test_sampling(family):
    model, inputs = family.model(), family.inputs()
    skip_where_it_fails_anyway(model, inputs, num_return_sequences=3, do_sample=True)
    torch.manual_seed(0)
    with fftriton.reduce(model, SCRIPT) as reduction:
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=True, temperature=2.0, num_return_sequences=3, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    prompt, by_hand = of_prompt(model, inputs, reduction.report.samples[0])
    sequences, logits = out.sequences[:, -6:], torch.stack(out.logits, 1)
    assert len({tuple(sequence.tolist()) for sequence in sequences}) == 3
    for sequence, row in zip(sequences, logits, strict=True):
        assert (by_hand.logits(prompt, SCRIPT, sequence[:-1]) - row).abs().max() < 1e-4


def test_beams_of_a_batch_with_listed_layouts():
    """Two samples of which one has a video: beams repeat the layouts with the rows."""
    model = tiny_qwen2()
    video, layout = video_embeddings(4, 5)
    text = torch.randn(1, video.shape[1], 64, generator=torch.Generator().manual_seed(3))
    layout = [fftriton.VideoLayout(layout[0].positions, sample=1)]
    arguments = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    with fftriton.reduce(model, SCRIPT, layout) as reduction:
        both = model.generate(inputs_embeds=torch.cat([text, video]), **arguments)
        assert [len(report.layouts) for report in reduction.report.samples] == [0] * 3 + [1] * 3
    with fftriton.reduce(model, SCRIPT, [fftriton.VideoLayout(layout[0].positions)]):
        assert torch.equal(both[1:], model.generate(inputs_embeds=video, **arguments))
    assert torch.equal(both[:1], model.generate(inputs_embeds=text, **arguments))


ASSISTED = {
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "the model itself": lambda model: {"assistant_model": model},
    "another model": lambda model: {"assistant_model": tiny_qwen2_vl(num_layers=2)},
}


@pytest.mark.parametrize("way", ASSISTED)
@pytest.mark.parametrize("method", [SCRIPT, fftriton.FastV(0.5), fftriton.FrameFusion(0.5, 0.95)], ids=str)
@pytest.mark.feature("assisted decoding")
@torch.no_grad()
def test_assisted_decoding(way, method, monkeypatch):
    """The candidates that come with the prompt do not count: what is kept, and what comes out, is as without them."""
    model, inputs = tiny_qwen2_vl(), video_prompt()
    inputs["input_ids"][0, -2:] = inputs["input_ids"][0, :2]  # something to look up
    lengths, arguments = [], ASSISTED[way](model) | {"eos_token_id": SPECIAL[-1]}
    helper = arguments.get("assistant_model", model)
    monkeypatch.setattr(helper.generation_config, "assistant_confidence_threshold", 0.0)
    skip_where_it_fails_anyway(model, inputs, **arguments)
    if not torch.equal(generate(model, inputs, **arguments)[0], generate(model, inputs)[0]):
        pytest.skip(f"transformers {transformers.__version__} comes out wrong without a reduction")
    with fftriton.reduce(model, method) as reduction:
        tokens, logits = generate(model, inputs)
        kept = reduction.report.kept_positions
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        assisted, _ = generate(model, inputs, **arguments)
        hook.remove()
    assert torch.equal(assisted, tokens)
    length = inputs["input_ids"].shape[1]
    assert max(lengths) > length  # candidates came with the prompt
    assert any(1 < many < length for many in lengths) or max(lengths) >= length + STEPS - 1  # and later, or all at once
    for now, expected in zip(reduction.report.kept_positions, kept, strict=True):
        assert torch.equal(now[now < length], expected)
    if method is SCRIPT:
        prompt, by_hand = of_prompt(model, inputs, reduction.report)
        by_hand.check(prompt, SCRIPT, tokens, logits)


# ---- turns


@EVERY_FAMILY
@pytest.mark.parametrize("video", [True, False], ids=["with a video", "of text"])
@pytest.mark.feature("second turn")
@torch.no_grad()
def test_second_turn(family, video):
    model = family.model()
    first, second = family.inputs((4,)), family.inputs((4,) if video else (), image=False, seed=5)
    length = first["input_ids"].shape[1]
    del second["attention_mask"]  # the Qwen-VL models take positions from one, of all turns
    if not video:
        second = {"input_ids": second["input_ids"]}
    cache = DynamicCache(config=model.config.get_text_config())
    with fftriton.reduce(model, SCRIPT) as reduction:
        model(**first, **behind(cache))
        patch = patches(reduction.report.layouts, length)
        logits = [model(**second, **behind(cache)).logits[0, -1]]
        if video:
            patch += patches(reduction.report.layouts, second["input_ids"].shape[1])
        later = []
        for _ in range(3):
            later.append({"input_ids": logits[-1][:WORDS].argmax()[None, None]})
            logits.append(model(**later[-1], **behind(cache)).logits[0, -1])
    prompt = see_prompt(model, first, second, *later)
    by_hand = ByHand(model, patch, starts=(0, length))
    assert (torch.stack(logits) - by_hand.logits(prompt, SCRIPT, last=4)).abs().max() < 1e-4
    dense = ByHand(model, []).logits(prompt, SCRIPT, last=4)
    assert (torch.stack(logits) - dense).abs().max() > 1e-2  # the reduction does change the output


@EVERY_FAMILY
@pytest.mark.feature("second turn")
@torch.no_grad()
def test_second_turn_of_generate(family):
    model, inputs = family.model(), family.inputs()
    question = torch.randint(2, 140, (1, 5), generator=torch.Generator().manual_seed(4))
    with fftriton.reduce(model, SCRIPT) as reduction:
        arguments = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        answer = model.generate(**inputs, **arguments)
        ids = torch.cat([answer.sequences, question], 1)
        again = model.generate(input_ids=ids, **behind(cache_of(answer)), **arguments)
    prompt, by_hand = of_prompt(model, inputs, reduction.report)
    later = again.sequences[0, inputs["input_ids"].shape[1] :]
    expected = by_hand.logits(prompt, SCRIPT, later[:-1])[-4:]
    assert (torch.cat(again.logits) - expected).abs().max() < 1e-4
    assert torch.equal(expected.argmax(-1), later[-4:])


@pytest.mark.parametrize("family", ["llava_onevision", "internvl"])  # the others' generate takes no later video
@pytest.mark.parametrize("ids", ["all", "new"])
@torch.no_grad()
def test_second_turn_of_generate_with_a_video(family, ids):
    family = FAMILIES[family]
    model, first, second = family.model(), family.inputs((4,)), family.inputs((4,), image=False, seed=5)
    with fftriton.reduce(model, SCRIPT) as reduction:
        arguments = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
        cache = cache_of(model.generate(**first, **arguments))
        cache.crop(-2)
        every = torch.cat([first["input_ids"], second["input_ids"]], 1)
        if ids == "new" and transformers.__version__ < "5":
            pytest.skip("from 5.0 on")
        second |= {"attention_mask": torch.ones_like(every)} | ({"input_ids": every} if ids == "all" else {})
        model.generate(**second, **behind(cache), **arguments)
    assert reduction.report.num_tokens == every.shape[1] - first["input_ids"].shape[1]
    assert reduction.report.num_video_tokens == 16


def test_a_copy_of_a_cache_goes_its_own_way():
    """What several questions on one prompt share can be computed once."""
    model, (video, layout) = tiny_qwen2(), video_embeddings(4, 5)
    questions = [torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])]
    with torch.no_grad(), fftriton.reduce(model, SCRIPT, layout):
        cache = cache_of(model(inputs_embeds=video))
        shared = [model(input_ids=ids, **behind(copy.deepcopy(cache))).logits for ids in questions]
        for ids, logits in zip(questions, shared, strict=True):
            alone = cache_of(model(inputs_embeds=video))
            assert torch.equal(model(input_ids=ids, **behind(alone)).logits, logits)


# ---- chunks


def words_with_videos():
    """Ids of 34 tokens, of which two videos are."""
    videos = torch.arange(1, 13).view(3, 4), torch.arange(22, 30).view(2, 4)
    ids = torch.randint(2, 140, (1, 34), generator=torch.Generator().manual_seed(0))
    return ids, [fftriton.VideoLayout(positions) for positions in videos]


@torch.no_grad()
def greedy_in_chunks(model, chunks):
    """As `by_hand.generate`, of chunks of ids that a user feeds to the forward."""
    cache, logits, tokens = DynamicCache(config=model.config), [], []
    for chunk in chunks:
        out = model(input_ids=chunk, **behind(cache)).logits[0, -1]
    for _ in range(STEPS):
        logits.append(out)
        tokens.append(int(out[:WORDS].argmax()))
        out = model(input_ids=torch.tensor([tokens[-1:]]), **behind(cache)).logits[0, -1]
    return torch.tensor(tokens), torch.stack(logits)


@pytest.mark.parametrize("way", ["generate", "by the user"])
@torch.no_grad()
def test_chunked_prefill(way):
    """A chunk is a prompt of its own behind the ones before it."""
    model, (ids, layout) = tiny_qwen2(), words_with_videos()
    if way == "generate":
        skip_where_it_fails_anyway(model, {"input_ids": ids}, prefill_chunk_size=15)
    if way == "generate" and transformers.__version__ < "5":
        with pytest.raises(ValueError, match="prefill_chunk_size must not"), fftriton.reduce(model, SCRIPT, layout):
            generate(model, {"input_ids": ids}, prefill_chunk_size=15)
        return
    with fftriton.reduce(model, SCRIPT, layout) as reduction:
        if way == "generate":
            tokens, logits = generate(model, {"input_ids": ids}, prefill_chunk_size=15)
        else:
            tokens, logits = greedy_in_chunks(model, ids.split(15, 1))
    assert reduction.report.layouts[0].span == (22 - 15, 29 - 15)
    prompt = see_prompt(model, {"input_ids": ids})
    ByHand(model, patches(layout, 34), starts=(0, 15, 30)).check(prompt, SCRIPT, tokens, logits)
    at_once = ByHand(model, patches(layout, 34)).logits(prompt, SCRIPT, tokens[:-1])
    assert (at_once - logits).abs().max() > 1e-2


@pytest.mark.skipif(transformers.__version__ < "5", reason="prefill_chunk_size is refused")
@torch.no_grad()
def test_scores_of_every_video_fit_prompts_in_chunks():
    """A chunk holds one of the two videos."""
    model, (ids, layout) = tiny_qwen2(), words_with_videos()
    skip_where_it_fails_anyway(model, {"input_ids": ids}, prefill_chunk_size=15)
    scores = [torch.arange(float(one.positions.shape[0])) for one in layout]
    with fftriton.reduce(model, fftriton.KVTP(0.5, scores), layout):
        generate(model, {"input_ids": ids}, prefill_chunk_size=15)
    one = fftriton.KVTP(0.5, scores[:1])
    with (
        fftriton.reduce(model, one, layout),
        pytest.raises(ValueError, match="for each video of the batch, got 1 for 2"),
    ):
        generate(model, {"input_ids": ids}, prefill_chunk_size=15)


@torch.no_grad()
def test_another_prompt_within_generate_has_no_video():
    """As a logits processor of classifier-free guidance sends one through the model: here one as long as the prompt."""
    model, inputs = tiny_qwen2_vl(), video_prompt()
    other = torch.full_like(inputs["input_ids"], 7)
    dense = model(input_ids=other).logits
    seen = []

    def guide(ids, scores):
        seen.append(model(input_ids=other).logits)
        return scores

    def answers():
        options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": SPECIAL}
        seen.clear()
        return [model.generate(**inputs, **options, logits_processor=guides) for guides in (None, [guide])]

    if not torch.equal(*answers()):
        pytest.skip("the model keeps what a generate needs (until transformers 5)")
    with fftriton.reduce(model, SCRIPT):
        assert torch.equal(*answers())
    assert len(seen) == 3
    assert all(torch.equal(logits, dense) for logits in seen)


@EVERY_FAMILY
@pytest.mark.feature("chunked prefill")
@torch.no_grad()
def test_chunked_prefill_of_pixels(family):
    model, inputs = family.model(), family.inputs()
    skip_where_it_fails_anyway(model, inputs, prefill_chunk_size=40)
    with fftriton.reduce(model, fftriton.KeepAll()) as reduction:
        model(**inputs)
    length, layouts = inputs["input_ids"].shape[1], reduction.report.layouts
    ends = [layout.span[1] + 1 for layout in layouts]
    chunk = ends[0] if ends[-1] <= 2 * ends[0] else ends[-1]  # one video each, where that can be
    with fftriton.reduce(model, SCRIPT):
        tokens, logits = generate(model, inputs, prefill_chunk_size=chunk)
        with pytest.raises(ValueError, match="a video must lie within one forward.* use a prefill_chunk_size"):
            generate(model, inputs, prefill_chunk_size=ends[0] - 1)
    by_hand = ByHand(model, patches(layouts, length), starts=range(0, length, chunk))
    by_hand.check(see_prompt(model, inputs), SCRIPT, tokens, logits)


# ---- caches


def test_the_users_own_cache():
    model, (video, layout) = tiny_qwen2(), video_embeddings(4, 5)
    with fftriton.reduce(model, SCRIPT, layout):
        expected = generate(model, {"inputs_embeds": video})[1]
        for cache in (DynamicCache(), DynamicCache(config=model.config)):
            assert torch.equal(generate(model, {"inputs_embeds": video}, **behind(cache))[1], expected)
            assert cache.layers[-1].keys.shape[-2] < cache.get_seq_length()


@EVERY_FAMILY
@pytest.mark.feature("without cache")
@torch.no_grad()
def test_without_cache(family):
    model, inputs = family.model(), family.inputs()
    with fftriton.reduce(model, SCRIPT) as reduction:
        tokens, logits = generate(model, inputs, use_cache=False)
    prompt, by_hand = of_prompt(model, inputs, reduction.report)
    by_hand.check(prompt, SCRIPT, tokens, logits)
    with fftriton.reduce(model, fftriton.FastV(0.7)):  # what is generated has no say in what stays
        _, logits = generate(model, inputs, use_cache=False)
        assert (logits - generate(model, inputs)[1]).abs().max() < 1e-4


class RoundedLayer(DynamicLayer):
    """Stands in for the layers of quantised caches, whose libraries are not everywhere."""

    def update(self, key, value, *args, **kwargs):
        return super().update(key.half().float(), value.half().float(), *args, **kwargs)


def other_caches(model):
    return {
        "static": lambda: transformers.StaticCache(model.config.get_text_config(), max_cache_len=200),
        "quantised": lambda: Cache(layer_class_to_replicate=RoundedLayer),
        "offloaded": offloaded,
    }


def offloaded():
    cache = DynamicCache(offloading=True)
    cache.prefetch_stream = torch.cuda.default_stream()  # up to transformers 5.23 its own does not wait for the copies
    return cache


@pytest.mark.parametrize("kind", ["static", "quantised", pytest.param("offloaded", marks=pytest.mark.gpu)])
@EVERY_FAMILY
@pytest.mark.feature("other caches: unreduced")
def test_other_caches_run_unreduced_with_one_warning(kind, family):
    model, inputs = family.model(), family.inputs()
    if kind == "offloaded":
        model, inputs = copy.deepcopy(model).cuda(), {name: value.cuda() for name, value in inputs.items()}
    new_cache = other_caches(model)[kind]
    skip_where_it_fails_anyway(model, inputs, **behind(new_cache()))
    dense = generate(model, inputs, **behind(new_cache()))
    with warnings.catch_warnings(record=True) as caught, fftriton.reduce(model, fftriton.FrameFusion(0.3)) as reduction:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(generate(model, inputs, **behind(new_cache()))[1], dense[1])
    ours = [str(warning.message) for warning in caught if "fftriton" in str(warning.message)]
    assert len(ours) == 1
    assert "running without reduction, because only a plain DynamicCache" in ours[0]
    assert reduction.report is None


@torch.no_grad()
def test_sliding_windows_run_unreduced_with_one_warning():
    windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "layer_types": None}
    config = transformers.Qwen2Config(**tiny_qwen2().config.to_dict() | windows)
    model = transformers.Qwen2ForCausalLM(config).eval()
    video, layout = video_embeddings(4, 5)
    dense = model(inputs_embeds=video).logits
    without_cache = model(inputs_embeds=video, use_cache=False).logits
    with fftriton.reduce(model, SCRIPT, layout):
        with pytest.warns(UserWarning, match="running without reduction"):
            assert torch.equal(model(inputs_embeds=video).logits, dense)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(model(inputs_embeds=video, use_cache=False).logits, without_cache)


# ---- what a forward gives back


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@EVERY_FAMILY
@pytest.mark.feature("hidden states, attentions")
@torch.no_grad()
def test_hidden_states_and_attentions(family, attention):
    model, inputs = family.model(attention), family.inputs()
    with fftriton.reduce(model, SCRIPT) as reduction:
        out = model(**inputs, output_hidden_states=True, output_attentions=attention == "eager")
    prompt, by_hand = of_prompt(model, inputs, reduction.report)
    states, position = by_hand(prompt.embeddings, prompt.position_ids, SCRIPT, prompt.additions)
    assert len(out.hidden_states) == len(states)
    for state, expected in zip(out.hidden_states[:-1], states[:-1], strict=True):
        torch.testing.assert_close(state, expected, atol=1e-4, rtol=0)
    dense = model(**inputs, output_hidden_states=True)
    is_normed = torch.allclose(model.lm_head(dense.hidden_states[-1]), dense.logits, atol=1e-4)  # 4.57: not all
    last = by_hand.decoder.norm(states[-1]) if is_normed else states[-1]
    torch.testing.assert_close(out.hidden_states[-1][:, position], last, atol=1e-4, rtol=0)
    if attention == "eager":
        layers = [index for index, layer in enumerate(by_hand.decoder.layers) if hasattr(layer, "self_attn")]
        for weights, index in zip(out.attentions, layers, strict=True):
            rows = reduction.report.tokens_per_layer[index]
            assert weights.shape[-2:] == (rows, rows)
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@torch.no_grad()
def test_hidden_states_of_a_model_that_was_asked_for_attentions_before():
    """transformers 4.57 leaves something on the layers: they are checked before the forward all the same."""
    model, inputs = copy.deepcopy(FAMILIES["qwen3_vl"].model("eager")), FAMILIES["qwen3_vl"].inputs()
    model(**inputs, output_attentions=True)
    with fftriton.reduce(model, SCRIPT) as reduction:
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    rows = reduction.report.tokens_per_layer
    assert len(out.hidden_states) == len(rows) + 1
    assert [weights.shape[-1] for weights in out.attentions] == list(rows)


@EVERY_FAMILY
@pytest.mark.feature("loss")
@torch.no_grad()
def test_labels_of_tokens_that_left_do_not_count(family):
    model, inputs = family.model(), family.inputs()
    labels = inputs["input_ids"].clone()
    given = labels.clone()
    with fftriton.reduce(model, SCRIPT) as reduction:
        out = model(**inputs, labels=labels)
    assert torch.equal(labels, given)  # the caller's tensor is not written to
    prompt, by_hand = of_prompt(model, inputs, reduction.report)
    states, position = by_hand(prompt.embeddings, prompt.position_ids, SCRIPT, prompt.additions)
    logits = model.lm_head(by_hand.decoder.norm(states[-1][0]))
    left = set(position)
    pairs = [(row, place + 1) for row, place in enumerate(position) if place + 1 in left]
    rows, places = map(list, zip(*pairs, strict=True))
    expected = F.cross_entropy(logits[rows], labels[0, places])
    assert abs(out.loss - expected) < 1e-4
    assert abs(model(**inputs, labels=labels).loss - expected) > 1e-3


@EVERY_FAMILY
@pytest.mark.feature("logits_to_keep")
@torch.no_grad()
def test_logits_to_keep(family):
    model, inputs = family.model(), family.inputs()
    if not model._supports_logits_to_keep():
        pytest.skip(f"{type(model).__name__} has no logits_to_keep")
    chosen = torch.tensor([0, 3, inputs["input_ids"].shape[1] - 1])
    with fftriton.reduce(model, fftriton.FastV(0.6)):
        logits = model(**inputs).logits
        for keep, places in {1: slice(-1, None), chosen: chosen}.items():
            kept = model(**inputs, logits_to_keep=keep).logits
            torch.testing.assert_close(kept, logits[:, places], atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_follows_the_prompt_does_not_say_what_is_kept():
    """logits_to_keep = n + 1 scores n tokens of an answer behind the prompt that they answer."""
    model, prompt = tiny_qwen2_vl(), video_prompt()
    answer = torch.tensor([[7, 8, 9]])
    more = {"input_ids": answer, "attention_mask": torch.ones_like(answer), "mm_token_type_ids": 0 * answer.int()}
    longer = prompt | {name: torch.cat([prompt[name], part], 1) for name, part in more.items() if name in prompt}
    length = longer["input_ids"].shape[1]
    kept = {}
    with fftriton.reduce(model, fftriton.FastV(0.6)) as reduction:
        for name, arguments in {
            "prompt": prompt, "scored": longer | {"logits_to_keep": 4}, "all": longer,
            "whole": longer | {"logits_to_keep": length},
        }.items():  # fmt: skip
            model(**arguments)
            kept[name] = reduction.report.kept_positions[-1]
    assert torch.equal(kept["scored"][:-3], kept["prompt"])
    assert torch.equal(kept["all"], kept["whole"])
    assert not torch.equal(kept["all"], kept["scored"])
