"""Keys of records: digests of everything that an answer depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
import transformers

from .. import __version__
from ..methods import Method
from .digests import digest_of_method, digest_of_weights
from .plan import Setting


def origin_of_answers(model: Any, longest: int) -> dict[str, Any]:
    """Everything about a model and this library that an answer depends on.

    Args:
        model: a Hugging Face generation model.
        longest: maximum number of tokens of an answer.
    """
    kind = type(model)  # a checkpoint's own code may answer differently with the same weights
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "weights": digest_of_weights(model),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "attention": model.config.get_text_config()._attn_implementation,
        "longest answer": longest,
        "fftriton": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def record_key(origin: dict[str, Any], setting: Setting, method: Method | None = None) -> str:
    """A digest of everything that the answers of a setting depend on, including the source code of the method.

    Args:
        origin: of the answers, with what tells the samples.
        setting: the setting.
        method: its method, if it is not made from the setting.
    """
    relevances = setting.relevances if method is None else []
    method = method or setting.method()
    everything = origin | {
        "name": setting.name, "budget": setting.budget, "code": digest_of_method(method)
    }  # fmt: skip
    if relevances:
        everything["relevance"] = " ".join(relevance.digest for relevance in relevances)
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]
