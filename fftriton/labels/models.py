"""Captioners and readers from text: a checkpoint, MODULE:FUNCTION, or MODEL@URL of an OpenAI-compatible endpoint."""

from __future__ import annotations

import base64
import hashlib
import inspect
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..methods.registry import load
from ..runtime.answers import TokenClock, generate
from ..runtime.checkpoints import load_part
from ..runtime.processing import chat_template
from ..runtime.target import Target, quieten_transformers, to_model
from ..runtime.video import Video
from .endpoint import Endpoint

_CAPTION_TOKENS, _READ_TOKENS = 256, 2048  # of an answer, unless the checkpoint says otherwise
_LONGEST_SIDE = 768  # pixels of a picture that is sent to an endpoint


@dataclass(frozen=True)
class Model:
    """A captioner, which is called with frames [T, H, W, 3] uint8 and a prompt, or a reader, called with a prompt.

    Attributes:
        identity: all that its replies depend on besides the arguments, as JSON can hold it.
        call: returns the reply.
        is_concurrent: whether several threads may call it at once.
    """

    identity: Any
    call: Callable[..., str]
    is_concurrent: bool = False


@dataclass(frozen=True)
class Settings:
    """How checkpoints are loaded, and endpoints called.

    Attributes:
        device, dtype: of checkpoints, as for a `Target`.
        trust_remote_code: whether checkpoints may run code of their own.
        key: API key of endpoints.
        parameters: fields of requests to endpoints besides model and messages.
        pause: seconds before an endpoint is asked again.
    """

    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    key: str | None = field(default=None, repr=False)
    parameters: tuple[tuple[str, Any], ...] = (("temperature", 0),)
    pause: float = 1.0

    def target(self, checkpoint: str) -> Target:
        """A checkpoint with these settings."""
        return Target(checkpoint, self.device, self.dtype, trust_remote_code=self.trust_remote_code)


def make_captioner(text: str, settings: Settings) -> Model:
    """The captioner of this text.

    Raises:
        ValueError: it cannot be loaded.
    """
    return _make("captioner", text, settings, _endpoint_captioner, _checkpoint_captioner)


def make_reader(name: str, text: str, settings: Settings) -> Model:
    """The scorer or rewriter of this text.

    Args:
        name: "scorer" or "rewriter", for messages.
        text, settings: as for a captioner.

    Raises:
        ValueError: it cannot be loaded.
    """
    return _make(name, text, settings, lambda endpoint: endpoint, _checkpoint_reader)


def _make(
    name: str,
    text: str,
    settings: Settings,
    of_endpoint: Callable[[Endpoint], Callable[..., str]],
    of_checkpoint: Callable[[Target], Callable[..., str]],
) -> Model:
    if "://" in text:
        model, _, url = text.partition("@")
        if not model or not url.startswith(("http://", "https://")):
            raise ValueError(f"labels: {name} must be MODEL@URL for an endpoint, got '{text}'")
        endpoint = Endpoint(url, model, settings.key, settings.parameters, pause=settings.pause)
        return Model([url, model, dict(settings.parameters)], of_endpoint(endpoint), is_concurrent=True)
    if ":" in text and not Path(text).exists():
        function = load(text, f"labels: {name}", text)
        if not callable(function):
            raise ValueError(f"labels: {name} must be a function, got '{text}', {function!r}")
        return Model([text, _digest_of_source(function)], _checked(name, function))
    return Model([text, settings.dtype, _digest_of_folder(Path(text))], of_checkpoint(settings.target(text)))


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., str]:
    def call(*arguments: Any) -> str:
        reply = function(*arguments)
        if not isinstance(reply, str):
            raise TypeError(f"labels: {name} must return a text, got {reply!r}")
        return reply

    return call


def _endpoint_captioner(endpoint: Endpoint) -> Callable[..., str]:
    def call(frames: np.ndarray, prompt: str) -> str:
        pictures = [{"type": "image_url", "image_url": {"url": _data_url(frame)}} for frame in frames]
        return endpoint([*pictures, {"type": "text", "text": prompt}])

    return call


def _data_url(frame: np.ndarray) -> str:
    """A frame as JPEG in a URL, not longer than 768 pixels."""
    image, data = Image.fromarray(frame), io.BytesIO()
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    image.save(data, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _checkpoint_captioner(target: Target) -> Callable[..., str]:
    processor, model = target.load_processor(), _load_model(target)

    @torch.no_grad()
    def call(frames: np.ndarray, prompt: str) -> str:
        video = Video(frames, list(range(len(frames))), len(frames), fps=1.0)
        inputs = to_model(processor(video, prompt), model)
        return _generate(model, inputs, processor.tokenizer, _CAPTION_TOKENS)

    return call


def _checkpoint_reader(target: Target) -> Callable[..., str]:
    model = _load_model(target)
    tokenizer: Any = load_part(AutoTokenizer, target.checkpoint, target.trust_remote_code)
    template = tokenizer.chat_template or chat_template(target.checkpoint)
    if template is None:
        raise ValueError(f"labels: a checkpoint that reads must have a chat template, got '{target.checkpoint}'")

    @torch.no_grad()
    def call(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        return _generate(model, to_model(dict(inputs), model), tokenizer, _READ_TOKENS)

    return call


def _generate(model: Any, inputs: dict[str, torch.Tensor], tokenizer: Any, longest: int) -> str:
    most = model.generation_config.max_new_tokens or longest
    return str(tokenizer.decode(generate(model, inputs, TokenClock(), most), skip_special_tokens=True)).strip()


@lru_cache
def _load_model(target: Target) -> Any:
    """The model of a checkpoint, loaded once if it is captioner and reader: one for videos or, else, for text."""
    config = load_part(AutoConfig, target.checkpoint, target.trust_remote_code)
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return target.load_model(to_reduce=False)
    quieten_transformers()
    model = load_part(
        AutoModelForCausalLM, target.checkpoint, target.trust_remote_code, config=config, dtype=target.torch_dtype()
    )
    return model.to(target.torch_device()).eval()


def _digest_of_source(function: Any) -> str:
    """Digest of the module that defines a function; of its name alone if there is no source."""
    try:
        source = inspect.getsource(inspect.getmodule(function) or function)
    except (OSError, TypeError):
        source = ""
    return hashlib.sha256(source.encode()).hexdigest()


def _digest_of_folder(folder: Path) -> str:
    """Digest of the names, sizes and dates of a checkpoint's files; the same for all names on the hub."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    states = [(file.name, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()
