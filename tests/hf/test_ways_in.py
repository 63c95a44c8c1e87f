"""However the decoder is reached: reduced all the same, or an error, or one warning that nothing was."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from by_hand import SPECIAL, STEPS, Scripted, decoder_of, generate, see_prompt
from families import FAMILIES
from models import (
    behind,
    cache_of,
    snapshot,
    tiny_qwen2,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
    video_embeddings,
    video_prompt,
)
from torch import nn
from transformers import DynamicCache, Qwen2ForSequenceClassification

import fftriton

METHOD = fftriton.FrameFusion(0.4, 0.9)
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


class Delegating(nn.Module):
    """A user's module with arguments of its own."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, batch):
        return self.inner(**batch)

    def generate(self, batch, **arguments):
        return self.inner.generate(**batch, **arguments)


class Outer(nn.Module):
    """As remote code has it: encodes the video itself, and drives a language model by embeddings."""

    def __init__(self, model):
        super().__init__()
        self.llm = model

    def embed(self, frames):
        return torch.cat([self.llm.get_input_embeddings()(torch.tensor([[3, 4, 5]])), frames], 1)

    def forward(self, input_ids, frames):
        return self.llm(inputs_embeds=self.embed(frames))

    def generate(self, input_ids, frames, **arguments):
        return self.llm.generate(inputs_embeds=self.embed(frames), **arguments)


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft", reason="peft is in the test extra")

    def wrap(model):
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        torch.manual_seed(0)
        return peft.get_peft_model(copy.deepcopy(model), config).eval()

    return wrap


@contextmanager
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def of_the_model_itself(model, inputs):
    """Logits and tokens of the model that everything else wraps, and what the report says."""
    with fftriton.reduce(model, METHOD) as reduction:
        logits = model(**inputs).logits
        tokens, _ = generate(model, inputs)
        return logits, tokens, reduction.report.vision_tokens_per_layer


@EVERY_FAMILY
@torch.no_grad()
def test_peft(family, lora):
    model, inputs = lora(family.model()), family.inputs()
    generate(model, inputs)  # what transformers and peft note of a model is there
    model(**inputs, output_hidden_states=True)
    before = snapshot(model)
    logits, tokens, kept = of_the_model_itself(model.get_base_model(), inputs)
    with fftriton.reduce(model, METHOD) as reduction:
        assert torch.equal(model(**inputs).logits, logits)
        assert reduction.report.vision_tokens_per_layer == kept
        assert torch.equal(generate(model, inputs)[0], tokens)
        assert reduction.report.vision_tokens_per_layer == kept
    assert snapshot(model) == before


def test_training_with_peft(lora):
    """The labels count as they do without PEFT, and gradients reach the adapters."""
    model, inputs = lora(tiny_qwen2_vl()), video_prompt()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 150, -100)
    with fftriton.reduce(model.get_base_model(), METHOD):
        expected = model.get_base_model()(**inputs, labels=labels).loss
    with fftriton.reduce(model, METHOD) as reduction:
        loss = model(**inputs, labels=labels).loss
        loss.backward()
    assert torch.equal(loss, expected)
    assert reduction.report.budget_achieved < 0.5
    assert all(
        part.grad is not None for name, part in model.named_parameters() if "lora" in name and "visual" not in name
    )


@EVERY_FAMILY
@torch.no_grad()
def test_the_model_inside(family):
    """`m.model(...)`, without the head, whichever of the two is given."""
    model, inputs = family.model(), family.inputs()
    with fftriton.reduce(model, METHOD) as reduction:
        model(**inputs)
        kept = reduction.report.kept_positions
    known = set(transformers.Qwen2Config().to_dict())  # of no family's inputs
    assert not known & set(inputs)
    for given in (model, model.model):
        with fftriton.reduce(given, METHOD) as reduction:
            hidden = model.model(**inputs).last_hidden_state
            assert (model.lm_head(hidden[:, -1]) - model(**inputs).logits[:, -1]).abs().max() < 1e-5
        assert all(map(torch.equal, reduction.report.kept_positions, kept))


@torch.no_grad()
def test_the_decoder_alone():
    """With a layout it is all that is needed."""
    model, (video, layout) = tiny_qwen2(), video_embeddings(6, 8)
    with fftriton.reduce(model, METHOD, layout) as reduction:
        expected = model(inputs_embeds=video, output_hidden_states=True).hidden_states[-1]
        kept = reduction.report.kept_positions
        hidden = model.model(inputs_embeds=video).last_hidden_state
        assert reduction.report.kept_positions is not kept
        assert torch.equal(hidden, expected)
        assert torch.equal(model.model(None, None, None, None, video).last_hidden_state, expected)  # by place
    with fftriton.reduce(model.model, METHOD, layout):
        assert torch.equal(model.model(inputs_embeds=video).last_hidden_state, expected)


@EVERY_FAMILY
@torch.no_grad()
def test_a_module_that_delegates(family):
    model, inputs = family.model(), family.inputs()
    logits, tokens, kept = of_the_model_itself(model, inputs)
    outer = Delegating(model)
    with fftriton.reduce(outer, METHOD) as reduction:
        assert torch.equal(outer(inputs).logits, logits)
        assert reduction.report.vision_tokens_per_layer == kept
        arguments = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": SPECIAL}
        assert torch.equal(outer.generate(inputs, **arguments)[0, -STEPS:], tokens)
        assert reduction.report.vision_tokens_per_layer == kept


@pytest.mark.parametrize("listed", [True, False], ids=["a list", "a function"])
@torch.no_grad()
def test_an_outer_model_whose_inner_one_generates(listed):
    model, (video, (layout,)) = tiny_qwen2(), video_embeddings(6, 8, before=0)
    outer, layout = Outer(model), [fftriton.VideoLayout(layout.positions + 3)]
    rule = layout if listed else lambda _, given: layout if given.get("inputs_embeds") is not None else []
    ids = torch.tensor([[3, 150, 9]])  # one stands for the video
    with fftriton.reduce(model, METHOD, layout):
        expected = model(inputs_embeds=outer.embed(video)).logits
        tokens = model.generate(inputs_embeds=outer.embed(video), max_new_tokens=4, do_sample=False)
    with fftriton.reduce(outer, METHOD, rule) as reduction:
        assert torch.equal(outer(ids, video).logits, expected)
        assert reduction.report.budget_achieved < 0.5
        assert torch.equal(outer.generate(ids, video, max_new_tokens=4, do_sample=False), tokens)
        assert reduction.report.budget_achieved < 0.5


@torch.no_grad()
def test_data_parallel():
    model, inputs = tiny_qwen2_vl(), video_prompt()
    logits, _, kept = of_the_model_itself(model, inputs)
    outer = nn.DataParallel(model)  # without a GPU it calls the model
    with fftriton.reduce(outer, METHOD) as reduction:
        assert torch.equal(outer(**inputs).logits, logits)
    assert reduction.report.vision_tokens_per_layer == kept
    outer.device_ids = [0, 1]
    with pytest.raises(TypeError, match="must not be a DataParallel over 2 devices"):
        fftriton.reduce(outer, METHOD)


def test_distributed_data_parallel(tmp_path):
    model, inputs = copy.deepcopy(tiny_qwen2_vl()), video_prompt()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 150, -100)
    with fftriton.reduce(model, METHOD):
        expected = model(**inputs, labels=labels).loss
    with one_process(tmp_path):
        outer = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        with fftriton.reduce(outer, METHOD) as reduction:
            loss = outer(**inputs, labels=labels).loss
            loss.backward()
    assert torch.equal(loss, expected)
    assert reduction.report.budget_achieved < 0.5


@torch.no_grad()
def test_a_head_of_another_kind():
    """It passes its embeddings by place."""
    config = copy.deepcopy(tiny_qwen2().config)
    config.num_labels, config.pad_token_id = 3, 0
    model = Qwen2ForSequenceClassification(config).eval()
    model.model.load_state_dict(tiny_qwen2().model.state_dict())
    video, layout = video_embeddings(6, 8)
    dense = model(inputs_embeds=video).logits
    with fftriton.reduce(model, METHOD, layout) as reduction:
        reduced = model(inputs_embeds=video).logits
    assert reduction.report.budget_achieved < 0.5
    assert (reduced - dense).abs().max() > 1e-3
    with fftriton.reduce(tiny_qwen2(), METHOD, layout):
        states = tiny_qwen2().model(inputs_embeds=video).last_hidden_state
    assert torch.equal(model.score(states)[0, -1], reduced[0])


class Silent(nn.Module):
    """Keeps what comes out, and returns nothing."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        self.out = self.inner(**inputs)


@torch.no_grad()
def test_a_module_that_returns_nothing():
    model, inputs = tiny_qwen2_vl(), video_prompt()
    outer, cache = Silent(model), DynamicCache(config=decoder_of(model).config)
    with fftriton.reduce(outer, METHOD) as reduction:
        try:
            raise KeyError
        except KeyError:  # an exception that is being handled is not one of the call
            outer(**inputs, **behind(cache))
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        assert reduction.report.budget_achieved < 0.5


class SoftPrompt(nn.Module):
    """Puts tokens before the prompt's."""

    def __init__(self, model, hides):
        super().__init__()
        self.inner, self.hides = model, hides

    def forward(self, input_ids, **inputs):
        embeddings = self.inner.get_input_embeddings()(input_ids)
        embeddings = torch.cat([torch.ones(1, 7, embeddings.shape[-1]), embeddings], 1)
        if self.hides:  # the placeholders are filled here
            embeddings[:, 7:] += 0.01
        inputs = {name: part for name, part in inputs.items() if not name.startswith(("attention", "mm_"))}
        return self.inner(inputs_embeds=embeddings, **({} if self.hides else inputs))


@torch.no_grad()
def test_tokens_that_a_module_puts_before_the_prompt():
    model, inputs = tiny_qwen2_vl(), video_prompt(image=False)
    with fftriton.reduce(model, METHOD) as reduction:
        model(**inputs)
        first = reduction.report.layouts[0].tokens[0]
    outer = SoftPrompt(model, hides=False)
    try:
        outer(**inputs)
    except (AttributeError, TypeError, ValueError) as error:
        pytest.skip(f"transformers {transformers.__version__} fails without a reduction: {error}")
    with fftriton.reduce(outer, METHOD) as reduction:
        outer(**inputs)
        assert reduction.report.layouts[0].tokens[0] == first + 7
    outer = SoftPrompt(model, hides=True)
    with (
        fftriton.reduce(outer, METHOD),
        pytest.raises(ValueError, match="layout: must be given if a module"),
    ):
        outer(**inputs)


def test_labels_that_are_not_of_tokens():
    config = copy.deepcopy(tiny_qwen2().config)
    config.num_labels, config.pad_token_id = 3, 0
    model, (video, layout) = Qwen2ForSequenceClassification(config).eval(), video_embeddings(6, 8)
    with fftriton.reduce(model, METHOD, layout) as reduction:
        assert model(inputs_embeds=video, labels=torch.tensor([1])).loss.isfinite()
    assert reduction.report.budget_achieved < 0.5


# ---- the video in embeddings


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video"])
@torch.no_grad()
def test_embeddings_that_hold_the_video_already(family):
    family = FAMILIES[family]
    model, inputs = family.model(), family.inputs(image=False)
    prompt = see_prompt(model, inputs)
    with fftriton.reduce(model, METHOD) as reduction:
        model(**inputs)
        layouts = reduction.report.layouts
    given = {name: part for name, part in inputs.items() if not name.startswith(("input_ids", "pixel_", "mm_"))}
    with fftriton.reduce(model, METHOD, layouts) as reduction:
        model(inputs_embeds=prompt.embeddings, attention_mask=inputs["attention_mask"])
    assert reduction.report.budget_achieved < 0.5
    if "video_grid_thw" in given:
        with (
            fftriton.reduce(model, METHOD),
            pytest.raises(ValueError, match="layout: must be given if inputs_embeds"),
        ):
            model(inputs_embeds=prompt.embeddings, **given)
        return
    with pytest.warns(UserWarning, match="nothing was reduced"), fftriton.reduce(model, METHOD):
        model(inputs_embeds=prompt.embeddings)


# ---- the warning that nothing was reduced


@contextmanager
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def run_twice(model, inputs):
    with fftriton.reduce(model, METHOD):
        model(**inputs)
        model(**inputs)


@EVERY_FAMILY
@torch.no_grad()
def test_what_is_worth_a_warning(family):
    model, inputs = family.model(), family.inputs((), image=True)
    words = torch.tensor([[3, 4, 5]])
    with silence():
        with fftriton.reduce(model, METHOD):
            pass  # no call
        with fftriton.reduce(model, METHOD):
            model(input_ids=words)  # text
            generate(model, {"input_ids": words})
        with fftriton.reduce(model, fftriton.KeepAll()):
            model(**inputs)
        with fftriton.reduce(model, METHOD) as reduction:
            model(**inputs)  # an image
            model(**family.inputs())  # and a video
    assert reduction.report is not None
    with pytest.warns(UserWarning, match="nothing was reduced, though the model ran on images") as caught:
        run_twice(model, inputs)
    assert len([one for one in caught if "nothing was reduced" in str(one.message)]) == 1


@torch.no_grad()
def test_placeholders_without_pixels():
    model, inputs = tiny_qwen2_vl(), video_prompt()
    with pytest.warns(UserWarning, match="nothing was reduced"), fftriton.reduce(model, METHOD):
        model(input_ids=inputs["input_ids"])
    handle = fftriton.apply(model, METHOD)
    model(input_ids=inputs["input_ids"])
    with pytest.warns(UserWarning, match="nothing was reduced"):
        handle.remove()


def test_an_error_that_leaves_the_block_comes_alone():
    model, inputs = tiny_qwen2_vl(), video_prompt()
    with silence(), pytest.raises(KeyError), fftriton.reduce(model, METHOD):
        model(input_ids=inputs["input_ids"])
        raise KeyError


# ---- reports, and what is left behind


@EVERY_FAMILY
@torch.no_grad()
def test_a_report_is_never_of_an_earlier_prompt(family):
    model, inputs, words = family.model(), family.inputs(), {"input_ids": torch.tensor([[3, 4, 5]])}
    with fftriton.reduce(model, METHOD) as reduction:
        for ask in (lambda given: model(**given), lambda given: generate(model, given)):
            ask(inputs)
            report = reduction.report
            assert report.num_tokens == inputs["input_ids"].shape[1]
            ask(words)
            assert reduction.report is None
            ask(inputs)
            assert reduction.report is not None
            model(input_ids=torch.tensor([[7]]))  # a prompt of one token
            assert reduction.report is None


@torch.no_grad()
def test_what_follows_a_prompt_leaves_its_report():
    model, (video, layout) = tiny_qwen2(), video_embeddings(6, 8)
    with fftriton.reduce(model, METHOD, lambda _, given: layout if "inputs_embeds" in given else []) as reduction:
        cache = cache_of(model(inputs_embeds=video))
        report = reduction.report
        for tokens in ([[3]], [[4, 5]]):
            model(input_ids=torch.tensor(tokens), **behind(cache))
            assert reduction.report is report


@torch.no_grad()
def test_generate_from_before_the_block():
    model, inputs, words = tiny_qwen2_vl(), video_prompt(), {"input_ids": torch.tensor([[3, 4, 5, 6] * 20])}
    bound, dense = model.generate, model(**words).logits
    with fftriton.reduce(model, METHOD) as reduction:
        with pytest.raises(RuntimeError, match="generate must be looked up while the model is being reduced"):
            bound(**inputs, max_new_tokens=2)
        assert torch.equal(model(**words).logits, dense)
        model.generate(**inputs, max_new_tokens=2)
        assert reduction.report.budget_achieved < 0.5
        assert torch.equal(model(**words).logits, dense)
    if hasattr(model, "generate_batch"):
        with fftriton.reduce(model, METHOD), pytest.raises(ValueError, match="generate_batch must not be called"):
            model.generate_batch([[3, 4, 5]])


@torch.no_grad()
def test_a_cache_that_is_no_cache():
    class Paged:
        def get_seq_length(self, *_):
            return 0

    model, (video, layout) = tiny_qwen2(), video_embeddings(6, 8)
    with fftriton.reduce(model, METHOD, layout), pytest.raises(ValueError, match="transformers.Cache, got Paged"):
        model(inputs_embeds=video, **behind(Paged()))


# ---- a model that is copied


@pytest.mark.parametrize("part", ["model", "inner", "decoder"])
def test_copies_are_refused_inside(part, tmp_path):
    model, inputs = copy.deepcopy(tiny_qwen2_vl()), video_prompt()
    taken = {"model": model, "inner": model.model, "decoder": decoder_of(model)}[part]
    before = snapshot(model)
    with fftriton.reduce(model, METHOD) as reduction:
        for copying in (copy.copy, copy.deepcopy, lambda it: torch.save(it, tmp_path / "model.pt")):
            with pytest.raises(RuntimeError, match="cannot be copied or pickled while it is being reduced"):
                copying(taken)
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        with torch.no_grad():
            model(**inputs)
        assert reduction.report.budget_achieved < 0.5
    assert snapshot(model) == before
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


# ---- memory


@torch.no_grad()
def test_nothing_of_the_last_request_is_held():
    import gc
    import weakref

    model, inputs = tiny_qwen2_vl(), video_prompt()
    with fftriton.reduce(model, METHOD) as reduction:
        for ask in (lambda **given: model(**given), lambda **given: model.generate(**given, max_new_tokens=3)):
            own = {name: part.clone() for name, part in inputs.items()}
            cache = DynamicCache(config=decoder_of(model).config)
            held = {name: weakref.ref(part) for name, part in own.items()} | {"cache": weakref.ref(cache)}
            ask(**own, **behind(cache))
            held["keys"] = weakref.ref(cache.layers[-1].keys)
            del own, cache
            gc.collect()
            assert [name for name, part in held.items() if part() is not None] == []
    assert reduction.report is not None


# ---- hooks of the user's


def steering(vector, seen):
    def steer(layer, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden.clone())
        steered = hidden + vector
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    return steer


@pytest.mark.parametrize("method", [fftriton.FastV(0.6), Scripted()], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("build", [tiny_qwen2_vl, tiny_qwen2_5_vl])
@torch.no_grad()
def test_hooks_see_and_change_what_they_would(method, build):
    """In a layer that shortens: its output for the rows that are left, and a vector that is added to it."""
    model, inputs = build(), video_prompt()
    vector, seen, plain = torch.randn(64, generator=torch.Generator().manual_seed(3)), [], []
    with fftriton.reduce(model, method) as reduction:
        states = model(**inputs, output_hidden_states=True).hidden_states
        expected = model(**inputs).logits[0, -1]
        layer = reduction.report.prune_layer
        hook = decoder_of(model).layers[layer].register_forward_hook(steering(0, seen))
        assert torch.equal(model(**inputs).logits[0, -1], expected)
        hook.remove()
        assert torch.equal(seen[0], states[layer + 1])  # with its feed-forward part, and as short as the rows left
        by_hand = (
            decoder_of(model)
            .layers[layer + 1]
            .register_forward_pre_hook(
                lambda _, args, kwargs: ((args[0] + vector, *args[1:]), kwargs) if args else (args, kwargs),
                with_kwargs=True,
            )
        )
        moved = model(**inputs).logits[0, -1]
        by_hand.remove()
        hook = decoder_of(model).layers[layer].register_forward_hook(steering(vector, plain))
        steered = model(**inputs).logits[0, -1]
        hook.remove()
    assert (steered - expected).abs().max() > 1e-2
    if isinstance(method, fftriton.FastV):  # which decides nothing after that layer
        assert (steered - moved).abs().max() < 1e-4


@torch.no_grad()
def test_hooks_of_norm_and_feed_forward():
    """What they change counts as it does without a reduction: with KeepAll bit by bit, and where rows leave, too."""
    model, (video, layout) = tiny_qwen2(), video_embeddings(6, 8)
    layer = model.model.layers[1]
    handles = [
        layer.mlp.register_forward_hook(lambda _, args, output: output * 1.5),
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: (args[0] * 0.5 + 0.1,)),
        layer.self_attn.register_forward_hook(lambda _, args, output: (output[0] * 0.7, *output[1:])),
    ]
    dense = model(inputs_embeds=video).logits
    with fftriton.reduce(model, fftriton.KeepAll(), layout):
        assert torch.equal(model(inputs_embeds=video).logits, dense)
    with fftriton.reduce(model, Scripted((), (), (1,)), layout) as reduction:
        reduced = model(inputs_embeds=video, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    kept = reduction.report.kept_positions[2]
    hidden = model(inputs_embeds=video, output_hidden_states=True).hidden_states[1]
    rotary = model.model.rotary_emb(hidden, torch.arange(video.shape[1])[None])
    mask = torch.full((1, 1, video.shape[1], video.shape[1]), torch.finfo(torch.float32).min).triu(1)
    attended = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden), attention_mask=mask, position_embeddings=rotary
    )[0]
    residual = (hidden + attended * 0.7)[:, kept]
    expected = residual + layer.mlp(layer.post_attention_layernorm(residual * 0.5 + 0.1)) * 1.5
    assert (reduced.hidden_states[2] - expected).abs().max() < 1e-5


# ---- labels


@pytest.mark.parametrize(
    "method", [fftriton.FastV(0.6), fftriton.FrameFusion(0.4, 0.9)], ids=lambda it: type(it).__name__
)
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@torch.no_grad()
def test_an_answer_has_no_say_in_what_stays(method, name):
    """However it is given: by labels, shifted or not, or by logits_to_keep."""
    model, inputs = tiny_qwen2_vl(), video_prompt()
    ids, answer = inputs["input_ids"], 4
    labels = ids.clone()
    labels[:, :-answer] = -100
    shifted = torch.cat([labels[:, 1:], torch.full((1, 1), -100)], 1)
    arguments = {"labels": labels} if name == "labels" else {"labels": labels, "shift_labels": shifted}
    other = dict(inputs, input_ids=torch.cat([ids[:, :-answer], ids[:, -answer:] % 100 + 20], 1))
    with fftriton.reduce(model, method) as reduction:
        logits = model(**inputs, logits_to_keep=answer + 1).logits[0, -answer - 1 : -1]
        kept = reduction.report.kept_positions
        loss = model(**inputs, **arguments).loss
        assert all(map(torch.equal, reduction.report.kept_positions, kept))
        model(**other, **arguments)
        assert all(map(torch.equal, reduction.report.kept_positions, kept))
    assert (loss - F.cross_entropy(logits, ids[0, -answer:])).abs() < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_answers_of_a_batch(side):
    from families import collate

    model, samples = tiny_qwen2_vl(), [video_prompt(), video_prompt(((5, 4, 4),), image=False, seed=1)]
    method, lengths = fftriton.FastV(0.6), [4, 2]
    for sample, answer in zip(samples, lengths, strict=True):
        sample["labels"] = sample["input_ids"].clone()
        sample["labels"][:, :-answer] = -100
    batch = collate([{k: v for k, v in sample.items() if k != "labels"} for sample in samples], side)
    rows, width = [], batch["input_ids"].shape[1]
    for sample in samples:
        pad = torch.full((1, width - sample["labels"].shape[1]), -100)
        rows.append(torch.cat([pad, sample["labels"]] if side == "left" else [sample["labels"], pad], 1))
    with fftriton.reduce(model, method) as reduction:
        alone = []
        for sample in samples:
            model(**sample)
            alone.append(reduction.report.vision_tokens_per_layer), alone.append(reduction.report.kept_positions)
        model(**batch, labels=torch.cat(rows))
        for row, (sample, report) in enumerate(zip(samples, reduction.report.samples, strict=True)):
            start = width - sample["labels"].shape[1] if side == "left" else 0
            for kept, expected in zip(report.kept_positions, alone[2 * row + 1], strict=True):
                assert torch.equal(kept - start, expected)
