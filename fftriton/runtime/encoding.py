"""Encoding a video once for several prompts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def encoded_once(model: Any) -> Iterator[None]:
    """Inside the block, the vision encoder of `model` runs once per video; later calls return the same features."""
    inner = getattr(model, "base_model", model)
    encode = getattr(inner, "get_video_features", None)
    if encode is None:
        yield
        return
    signature = inspect.signature(encode)
    seen: list[tuple[Tensor, Any]] = []

    @functools.wraps(encode)  # generate reads the signature
    def once(*args: Any, **kwargs: Any) -> Any:
        pixels = signature.bind(*args, **kwargs).arguments["pixel_values_videos"]
        for known, features in seen:
            if known is pixels:
                return features
        seen.append((pixels, encode(*args, **kwargs)))
        return seen[-1][1]

    inner.__dict__["get_video_features"] = once
    try:
        yield
    finally:
        del inner.__dict__["get_video_features"]
