"""The model that is run on videos: its checkpoint, its device and the length of its answers."""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from ..checks import check_choice, check_count
from ..hf import reduce
from ..methods import KeepAll
from . import shipped
from .checkpoints import load_config, load_part
from .devices import choose_device
from .processing import Processor, load_processor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""The ways of spreading a model over devices that have a name; see accelerate."""

_DEFAULT_ANSWER_TOKENS = 64
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """A checkpoint, its device and the length of its answers; checked on construction, loaded on demand.

    Args:
        model: folder of a checkpoint, or its name on the Hugging Face hub; None for the shipped model.
        device: a torch device; None for the GPU if there is one.
        dtype: one of DTYPES; None for bfloat16 on a GPU and float32 elsewhere.
        attention: attention implementation ("sdpa", "eager", "flash_attention_2", ...); None for transformers' choice.
        max_new_tokens: maximum length of an answer, at least 1; None for the checkpoint's own.
        trust_remote_code: whether to run the checkpoint's own code if it has any.
        revision: branch, tag or commit of a checkpoint on the hub; None for its main branch.
        device_map: how to spread the model over devices, instead of `device`: one of DEVICE_MAPS, or a JSON object
            from names of modules to devices. Needs accelerate.

    Raises:
        ValueError, TypeError: an invalid parameter; the message names the parameter, the rule and the value.
    """

    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    attention: str | None = None
    max_new_tokens: int | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    device_map: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            check_count("fftriton", "max_new_tokens", self.max_new_tokens, 1)
        if self.dtype is not None:
            check_choice("fftriton", "dtype", self.dtype, tuple(DTYPES))
        if self.revision is not None and os.path.isdir(self.checkpoint):
            raise ValueError(f"revision must go with a name on the hub, got '{self.revision}' and '{self.checkpoint}'")
        if self.device_map is not None and self.device is not None:
            raise ValueError(f"device_map must go without device, got '{self.device_map}' and '{self.device}'")
        self._parsed_device_map()
        self.torch_device()

    @property
    def is_shipped(self) -> bool:
        """Whether the model is one of the small ones that ship in the package."""
        return self.model is None or Path(self.model).resolve() == shipped.HARDER_MODEL.resolve()

    @property
    def checkpoint(self) -> str:
        """Folder or hub name to load from."""
        return str(shipped.MODEL) if self.model is None else self.model

    @property
    def name(self) -> str:
        """Name to print."""
        return Path(self.checkpoint).resolve().name if self.is_shipped else self.checkpoint

    @property
    def threads(self) -> int:
        """Number of CPU threads: one for the shipped model unless OMP_NUM_THREADS is set, otherwise torch's.

        The shipped model is too small to gain from more threads, and its timings would depend on other load.
        """
        alone = self.is_shipped and "OMP_NUM_THREADS" not in os.environ
        return 1 if alone else torch.get_num_threads()

    def torch_device(self) -> torch.device:
        """The device to run on.

        Raises:
            ValueError: torch cannot use the device on this machine.
        """
        return choose_device(self.device)

    def torch_dtype(self) -> torch.dtype:
        """The dtype to load the weights in."""
        if self.dtype is not None:
            return DTYPES[self.dtype]
        return torch.bfloat16 if self.torch_device().type == "cuda" else torch.float32

    def load_config(self) -> Any:
        """Load the checkpoint's configuration, without its weights.

        Raises:
            ValueError: the checkpoint cannot be read, or needs code that is not trusted.
        """
        return load_config(self.checkpoint, self.trust_remote_code, self.revision)

    def load_processor(self, max_pixels: int | None = None) -> Processor:
        """Load the processor, which makes the model's inputs; see `processing.load_processor`."""
        processor = load_processor(self.checkpoint, max_pixels, self.trust_remote_code, self.revision)
        _LOG.info("%s: inputs are made by %s", self.name, type(processor).__name__)
        return processor

    def load_model(self, to_reduce: bool = True) -> Any:
        """Load the model on the device, ready to generate.

        Args:
            to_reduce: whether it is to be reduced.

        Raises:
            ValueError, TypeError: the checkpoint does not exist, is not a model for videos, or cannot be reduced, but
                is to be.
        """
        quieten_transformers()
        wishes = {"attn_implementation": self.attention, "device_map": self._parsed_device_map()}
        chosen = {name: value for name, value in wishes.items() if value is not None}
        model = load_part(
            AutoModelForImageTextToText, self.checkpoint, self.trust_remote_code, self.revision,
            config=self.load_config(), dtype=self.torch_dtype(), **chosen,
        )  # fmt: skip
        if to_reduce:
            reduce(model, KeepAll())  # raises if the model cannot be reduced
        if self.device_map is None:
            model.to(self.torch_device())
        config = model.config.get_text_config()
        described = (self.name, type(model).__name__, model.dtype, model.device, config._attn_implementation)
        _LOG.info("%s: %s in %s on %s with %s attention", *described)
        return model.eval()

    def _parsed_device_map(self) -> str | dict[str, Any] | None:
        """The device map as transformers takes it.

        Raises:
            ValueError: it is neither a known name nor a JSON object, or accelerate is not installed.
        """
        if self.device_map is None:
            return None
        if importlib.util.find_spec("accelerate") is None:
            raise ValueError(f"device_map needs accelerate (pip install accelerate), got '{self.device_map}'")
        if not self.device_map.lstrip().startswith("{"):
            check_choice("fftriton", "device_map", self.device_map, DEVICE_MAPS)
            return self.device_map
        try:
            return json.loads(self.device_map)
        except ValueError as error:
            raise ValueError(f"device_map must be a JSON object, got '{self.device_map}': {error}") from error

    def answer_length(self, model: Any) -> int:
        """Maximum number of new tokens: `max_new_tokens`, or else the checkpoint's own."""
        return self.max_new_tokens or model.generation_config.max_new_tokens or _DEFAULT_ANSWER_TOKENS

    @contextmanager
    def own_threads(self) -> Iterator[None]:
        """Set torch's number of CPU threads to `threads` inside the block."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def describe(self) -> dict[str, Any]:
        """Model, device and threads, for reports; revision and device map if they were chosen."""
        device = self.torch_device()
        on_gpu = device.type == "cuda"
        return {
            "model": self.name,
            "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
            "threads": None if on_gpu else self.threads,
        } | {name: value for name in ("revision", "device_map") if (value := getattr(self, name)) is not None}


def to_model(inputs: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Move inputs to the model's device, and pixels to its dtype; inputs that its forward does not take are dropped."""
    known = inspect.signature(model.forward).parameters
    moved = {name: value.to(model.device) for name, value in inputs.items() if name in known}
    return {name: value.to(model.dtype) if name.startswith("pixel") else value for name, value in moved.items()}


def quieten_transformers() -> None:
    """Turn off the progress bars and warnings of transformers."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
