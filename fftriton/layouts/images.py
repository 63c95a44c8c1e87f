"""Images as videos of one frame, found by the token that stands for them in the prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .families import LayoutRule, find_tokens
from .layout import VideoLayout
from .remote_code import runs_of


def with_images(rule: LayoutRule) -> LayoutRule:
    """A rule that finds the images of a prompt, too, each as a video of one frame; all in the order of the prompt.

    Every run of image tokens that belongs to no video is an image. Images without a token between them are one.
    """
    return partial(_videos_and_images, rule)


def count_alike(model: Any, arguments: Mapping[str, Any]) -> int:
    """The most images of one size that a sample of the batch has."""
    counts = [Counter(map(len, runs)) for runs in _image_runs(model, arguments, ())]
    return max((number for count in counts for number in count.values()), default=0)


def _videos_and_images(rule: LayoutRule, model: Any, arguments: Mapping[str, Any]) -> list[VideoLayout]:
    videos = rule(model, arguments)
    runs = _image_runs(model, arguments, videos)
    images = [VideoLayout(run[None], sample) for sample, row in enumerate(runs) for run in row]
    return sorted([*videos, *images], key=lambda layout: (layout.sample, layout.span))


def _image_runs(model: Any, arguments: Mapping[str, Any], videos: Sequence[VideoLayout]) -> list[list[Tensor]]:
    """For each sample the positions [n] of each of its images. videos: what is no image, though it has its tokens."""
    found = find_tokens(model, arguments, model.config.image_token_id)
    if found is None:
        return []
    found = torch.clone(found)
    for video in videos:
        found[video.sample, video.tokens.cpu()] = False
    return [runs_of(row) for row in found]
