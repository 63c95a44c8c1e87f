"""Clips: the questions about one video, which is decoded and encoded once."""

from __future__ import annotations

import gc
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import __version__
from ..runtime.processing import Processor
from ..runtime.target import Target
from ..runtime.video import Video, read_video
from .requests import Request

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Task:
    """A request with its key, a digest of everything that its answer depends on."""

    key: str
    request: Request


@dataclass
class Clip:
    """A video with the questions about it.

    Attributes:
        tasks: all questions about this video, in their order.
        video: the sampled frames; None before they are decoded, or if they cannot be.
        error: why they cannot be decoded.
    """

    tasks: list[Task]
    video: Video | None = None
    error: Exception | None = None


def make_tasks(requests: Sequence[Request], target: Target) -> list[Task]:
    """Give each request its key; equal requests get different ones."""
    device, dtype = target.torch_device().type, str(target.torch_dtype())
    settings = asdict(target) | {"device": device, "dtype": dtype, "fftriton": __version__}
    seen: Counter[str] = Counter()
    tasks = []
    for request in requests:
        text = json.dumps([settings, asdict(request)], sort_keys=True, default=str)
        seen[text] += 1
        digest = hashlib.sha256(f"{text} {seen[text]}".encode()).hexdigest()
        tasks.append(Task(digest[:20], request))
    return tasks


def batches(tasks: Sequence[Task], batch_size: int) -> list[list[Clip]]:
    """Clips that run together: the questions about one video are one clip, wherever they stand."""
    clips: dict[Any, Clip] = {}
    for task in tasks:
        request = task.request
        clips.setdefault((request.video, request.sampling, request.max_pixels), Clip([])).tasks.append(task)
    ordered = list(clips.values())
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


class Decoder:
    """Decodes clips, each as the processor of its requests wants.

    Args:
        target: the model that the frames are for.
    """

    def __init__(self, target: Target) -> None:
        self.processor: Callable[[int | None], Processor] = lru_cache(8)(target.load_processor)

    def decode(self, clips: list[Clip]) -> list[Clip]:
        """Decode the videos; what fails is remembered."""
        return [self._decode(clip) for clip in clips]

    def _decode(self, clip: Clip) -> Clip:
        request = clip.tasks[0].request
        try:
            rule = self.processor(request.max_pixels).frame_rule(request.sampling)
            part = request.sampling
            return replace(clip, video=read_video(request.video, rule=rule, start=part.start, end=part.end))
        except Exception as error:  # whatever a file does, the others go on
            return replace(clip, error=error)


def share_pixels(inputs: dict[str, Tensor], videos: Sequence[int], pixels: dict[Any, Tensor]) -> dict[str, Tensor]:
    """Replace pixels by the equal ones of an earlier prompt, so that the vision encoder runs once."""
    for name, value in inputs.items():
        if name.startswith("pixel"):
            known = pixels.setdefault((name, *videos), value)
            if known is not value and known.shape == value.shape and torch.equal(known, value):
                inputs[name] = known
    return inputs


@contextmanager
def quick_collection() -> Iterator[Callable[[], object]]:
    """Yield a function that frees unreachable objects, and does not look at those from before the block."""
    gc.collect()
    gc.freeze()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()


def ahead(function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """Results of a function, of which the next is computed while the last is used."""
    with ThreadPoolExecutor(1) as pool:
        following = None
        for item in items:
            current, following = following, pool.submit(function, item)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()
