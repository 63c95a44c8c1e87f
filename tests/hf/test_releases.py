"""What fftriton relies on in transformers: whatever is renamed there is named by an error, and no answer changes."""

import functools
import inspect
import subprocess
import sys
import textwrap
import types
import warnings

import pytest
import torch
from by_hand import WORDS, ByHand, Scripted, decoder_of, patches, see_prompt
from families import FAMILIES
from models import CACHE, behind, tiny_qwen2, tiny_qwen2_vl, video_embeddings, video_prompt
from transformers import DynamicCache, masking_utils
from transformers.cache_utils import DynamicLayer

import fftriton
from fftriton.hf import compat

SCRIPT = Scripted()
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@EVERY_FAMILY
@pytest.mark.parametrize("name", compat.CACHE)
@torch.no_grad()
def test_a_loop_of_the_users_own(family, name):
    """With the KV cache under each name that the release accepts; the old ones with its warning."""
    model, inputs = family.model(), family.inputs()
    if name not in inspect.signature(model.forward).parameters and CACHE != "cache":
        pytest.skip("this release does not know the name")
    cache = DynamicCache(config=model.config.get_text_config())
    with warnings.catch_warnings(), fftriton.reduce(model, SCRIPT) as reduction:
        warnings.simplefilter("ignore", FutureWarning)
        logits = [model(**inputs, **{name: cache}).logits[0, -1]]
        later = []
        for _ in range(3):
            later.append({"input_ids": logits[-1][:WORDS].argmax()[None, None]})
            logits.append(model(**later[-1], **{name: cache}).logits[0, -1])
    by_hand = ByHand(model, patches(reduction.report.layouts, inputs["input_ids"].shape[1]))
    expected = by_hand.logits(see_prompt(model, inputs, *later), SCRIPT, last=4)
    assert (torch.stack(logits) - expected).abs().max() < 1e-4


@EVERY_FAMILY
@torch.no_grad()
def test_our_own_calls_cause_no_warning(family):
    model, inputs = family.model(), family.inputs()
    plain, reduced = [], []
    for caught, method in ((plain, None), (reduced, fftriton.FrameFusion(0.5, 0.9)), (reduced, fftriton.FastV(0.6))):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if method is None:
                model.generate(**inputs, max_new_tokens=3, do_sample=False)
            else:
                with fftriton.reduce(model, method):
                    model.generate(**inputs, max_new_tokens=3, do_sample=False)
        caught += [str(warning.message) for warning in seen]
    assert set(reduced) <= set(plain)


def renamed(function, old, new):
    """The same function with a parameter under another name, as a release would have it."""
    signature = inspect.signature(function)
    parameters = [part.replace(name=new) if part.name == old else part for part in signature.parameters.values()]

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if new in kwargs:
            kwargs[old] = kwargs.pop(new)
        return function(*args, **kwargs)

    del wrapper.__wrapped__
    wrapper.__signature__ = signature.replace(parameters=parameters)
    return wrapper


PARAMETERS = [
    ("decoder", CACHE),
    ("decoder", "attention_mask"),
    ("decoder", "input_ids"),
    ("decoder", "inputs_embeds"),
    ("decoder", "use_cache"),
    ("layer", "hidden_states"),
    ("layer", "attention_mask"),
    ("layer", "position_embeddings"),
]


@pytest.mark.parametrize(("owner", "name"), PARAMETERS, ids="-".join)
def test_a_parameter_that_is_renamed(owner, name, monkeypatch):
    model, inputs = tiny_qwen2_vl(), video_prompt()
    kind = type(decoder_of(model) if owner == "decoder" else decoder_of(model).layers[0])
    monkeypatch.setattr(kind, "forward", renamed(kind.forward, name, "renamed"))
    with pytest.raises(RuntimeError, match=rf"{kind.__name__}.forward must have a parameter .*'{name}'.*has .*renamed"):
        with fftriton.reduce(model, fftriton.FrameFusion(0.3)):
            model(**inputs)


@pytest.mark.parametrize("name", ["attention_mask", "position_embeddings"])
@torch.no_grad()
def test_an_argument_that_the_decoder_passes_under_another_name(name, monkeypatch):
    """A layer's signature may hide what happens: the call is looked at, too."""
    model, inputs = tiny_qwen2_vl(), video_prompt()
    layer = decoder_of(model).layers[0]
    call = type(layer).__call__

    def hiding(self, *args, **kwargs):
        kwargs["renamed"] = kwargs.pop(name)
        hooks = self._forward_pre_hooks.copy()
        self._forward_pre_hooks.clear()
        for hook in hooks.values():
            changed = hook(self, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
        kwargs[name] = kwargs.pop("renamed")
        try:
            return call(self, *args, **kwargs)
        finally:
            self._forward_pre_hooks.update(hooks)

    monkeypatch.setattr(type(layer), "__call__", hiding)
    with pytest.raises(RuntimeError, match=f"the decoder must call its layers with '{name}'"):
        with fftriton.reduce(model, SCRIPT):
            model(**inputs)


def test_an_encoder_that_is_renamed(monkeypatch):
    model = tiny_qwen2_vl()
    monkeypatch.delattr(type(model.model), "get_video_features")
    with pytest.raises(RuntimeError, match="Qwen2VLModel must have a method 'get_video_features'"):
        fftriton.reduce(model, fftriton.FrameFusion(0.3))


@pytest.mark.parametrize("missing", ["function", "inputs_embeds", "cache", "attention_mask"])
@torch.no_grad()
def test_a_mask_function_that_is_renamed(missing, monkeypatch):
    model, (video, layout) = tiny_qwen2(attention="eager"), video_embeddings(6, 8)
    make = masking_utils.create_causal_mask
    known = inspect.signature(make).parameters
    if missing == "function":
        monkeypatch.delattr(masking_utils, "create_causal_mask")
        name = "create_causal_mask"
    else:
        names = {"inputs_embeds": ("inputs_embeds", "input_embeds"), "cache": compat.CACHE}.get(missing, (missing,))
        name = next(name for name in names if name in known)
        monkeypatch.setattr(masking_utils, "create_causal_mask", renamed(make, name, "renamed"))
    with pytest.raises(RuntimeError, match=f"create_causal_mask|'{name}'") as error:
        with fftriton.reduce(model, SCRIPT, layout):
            model(inputs_embeds=video)
    assert name in str(error.value)


class RenamedConfig:
    """A config that names its attention under another name."""

    def __init__(self, original):
        self.original, self.attention_implementation = original, original._attn_implementation

    def __getattr__(self, name):
        if name == "_attn_implementation":
            raise AttributeError(name)
        return getattr(self.original, name)


@torch.no_grad()
def test_a_config_that_names_its_attention_differently(monkeypatch):
    # a new one: with transformers 4.57 recorded attentions leave every module a forward of its own
    model, (video, layout) = tiny_qwen2.__wrapped__(), video_embeddings(6, 8)
    with monkeypatch.context() as patch:
        patch.setattr(decoder_of(model), "config", RenamedConfig(model.config))
        with pytest.raises(RuntimeError, match="must have an attribute '_attn_implementation'"):
            fftriton.reduce(model, fftriton.FastV(0.6), layout)
    attend = type(decoder_of(model).layers[0].self_attn).forward

    def by_another_name(self, *args, **kwargs):
        """Does not ask the config that a reduction has put there."""
        config, self.config = self.config, getattr(self.config, "original", self.config)
        try:
            return attend(self, *args, **kwargs)
        finally:
            self.config = config

    monkeypatch.setattr(type(decoder_of(model).layers[0].self_attn), "forward", by_another_name)
    with pytest.raises(RuntimeError, match=r"FastV.* wants the attention scores of layer 1, .*_attn_implementation"):
        with fftriton.reduce(model, fftriton.FastV(0.6), layout):
            model(inputs_embeds=video)


@torch.no_grad()
def test_a_decoder_that_uses_another_cache_than_it_is_given(monkeypatch):
    """As 5.24 did to those who gave it one under the old name."""
    model, (video, layout) = tiny_qwen2(), video_embeddings(6, 8)
    forward = type(decoder_of(model)).forward

    @functools.wraps(forward)
    def forgetful(self, *args, **kwargs):
        if kwargs.get("use_cache") is not False:
            kwargs[CACHE] = DynamicCache(config=self.config)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(decoder_of(model)), "forward", forgetful)
    with pytest.raises(RuntimeError, match=r"layer 0 of the KV cache must stand for 55 tokens, but stands for \d+"):
        with fftriton.reduce(model, SCRIPT, layout):
            model(inputs_embeds=video)


@torch.no_grad()
def test_cache_layers_of_another_class():
    class NewLayer(DynamicLayer):
        pass

    model, (video, layout) = tiny_qwen2(), video_embeddings(6, 8)
    cache = DynamicCache(config=model.config)
    cache.layers = [NewLayer() for _ in range(5)]
    with fftriton.reduce(model, SCRIPT, layout):
        with pytest.raises(RuntimeError, match="layer 0 of a DynamicCache must be a DynamicLayer, but is a NewLayer"):
            model(inputs_embeds=video, **behind(cache))


@pytest.mark.parametrize("name", compat._LAYER_METHODS)
def test_a_method_of_cache_layers_that_is_renamed(name, monkeypatch):
    for kind in DynamicLayer.__mro__:
        if name in vars(kind):
            monkeypatch.delattr(kind, name)
    with pytest.raises(RuntimeError, match=f"DynamicLayer must have a method '{name}'"):
        fftriton.reduce(tiny_qwen2_vl(), SCRIPT)


@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds"])
def test_a_parameter_of_the_model_that_is_renamed(name, monkeypatch):
    model, inputs = tiny_qwen2_vl(), video_prompt()
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", renamed(forward, name, "renamed"))
    with pytest.raises(RuntimeError, match=rf"ForConditionalGeneration.forward must have a parameter '{name}'"):
        fftriton.reduce(model, SCRIPT)
    if name == "inputs_embeds":
        return

    @functools.wraps(forward)  # its signature does not tell
    def hidden(self, tokens=None, **kwargs):
        return self.model(tokens=tokens, **kwargs)

    inner = type(model.model).forward

    @functools.wraps(inner)
    def hidden_inner(self, *args, tokens=None, **kwargs):
        return inner(self, *args, **({} if tokens is None else {"input_ids": tokens}), **kwargs)

    monkeypatch.setattr(type(model), "forward", hidden)
    monkeypatch.setattr(type(model.model), "forward", hidden_inner)
    tokens = inputs.pop("input_ids")
    with torch.no_grad(), fftriton.reduce(model, SCRIPT):
        with pytest.raises(RuntimeError, match="must pass 'input_ids' or 'inputs_embeds' to a module around"):
            model(tokens=tokens, **inputs)


@pytest.mark.parametrize("name", ["cache_utils.DynamicLayer", "cache_utils.DynamicCache", "masking_utils"])
def test_what_is_gone_is_named_at_import(name):
    module, _, attribute = f"transformers.{name}".rpartition(".")
    code = f"""
        import importlib, sys
        module = importlib.import_module("{module}")
        importlib.import_module("transformers.modeling_utils")
        vars(module).pop("{attribute}", None)
        if "{attribute}" == "masking_utils":
            sys.modules["{module}.{attribute}"] = None
        import fftriton.hf
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode != 0
    assert attribute in done.stderr.splitlines()[-1]


def test_a_module_with_other_names_for_the_same():
    """The alias of a parameter is found in the order of the releases, newest first."""
    assert compat.parameter(lambda cache, past_key_values: None, "f", *compat.CACHE) == "cache"
    assert compat.parameter(lambda past_key_values: None, "f", *compat.CACHE) == "past_key_values"
    given = types.SimpleNamespace(get=lambda name: {"cache": None, "past_key_values": 3}.get(name))
    assert compat.cache_in(given) == 3
