"""The methods by the names that commands and tables give them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..checks import check_budget, check_choice
from .base import Method
from .fastv import FastV
from .framefusion import FrameFusion
from .keep_all import KeepAll
from .kvtp import KVTP
from .random_tokens import RandomTokens
from .streaming_llm import StreamingLLM
from .temporal_merge import TemporalMerge
from .uniform_frames import UniformFrames

NAMES: dict[str, Callable[..., Method]] = {
    "keep-all": KeepAll,
    "framefusion": FrameFusion,
    "fastv": FastV,
    "streamingllm": StreamingLLM,
    "kvtp": KVTP,
    "uniformframes": UniformFrames,
    "temporalmerge": TemporalMerge,
    "randomtokens": RandomTokens,
    "merge-only": partial(FrameFusion, stages=("merge",)),
    "prune-only": partial(FrameFusion, stages=("prune",)),
    "prune-merge": partial(FrameFusion, stages=("prune", "merge")),
}


def make_method(name: str, budget: float, **parameters: Any) -> Method:
    """The method of this name at this budget; KeepAll has no use for one, but a bad one is refused all the same.

    Args:
        name: a key of NAMES.
        budget: fraction of the video tokens to keep, in (0, 1].
        parameters: the method's others.

    Raises:
        TypeError, ValueError: an unknown name, or a parameter out of range.
    """
    check_choice("fftriton", "method", name, tuple(NAMES))
    check_budget("fftriton", "budget", budget)
    return KeepAll() if name == "keep-all" else NAMES[name](budget=budget, **parameters)
