"""What a reduction tells its user besides reports: one warning of each kind, and whether nothing was reduced at all."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..methods import KeepAll
from ..methods.base import Method
from .report import Report

_MANY_IMAGES = 4


class Notices:
    """The warnings of one Reduction.

    Args:
        method: what is at work.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        self._warned: set[str] = set()
        self.start()

    def start(self) -> None:
        """A new block begins, in which nothing has been reduced yet."""
        self._has_reduced = False
        self._ran_dense: bool | Tensor = False  # whether something with vision did

    def note_dense(self, has_vision: bool | Tensor) -> None:
        """A prompt runs as it is. has_vision: a bool, maybe on a device, which is not waited for."""
        if has_vision is False or self._has_reduced:
            return
        seen = self._ran_dense
        self._ran_dense = has_vision if seen is False else torch.as_tensor(seen) | torch.as_tensor(has_vision)

    def note_reduced(self, report: Report) -> None:
        """A prompt has been reduced: warn if the budget could not be met."""
        self._has_reduced = True
        for sample in report.samples:
            if sample.window is None and sample.budget_achieved > sample.budget + 1 / max(sample.num_video_tokens, 1):
                self._warn_once(
                    "budget",
                    f"fftriton: the budget {sample.budget:g} cannot be reached on this prompt; the least possible is "
                    f"{sample.least_budget:.4g}, and {sample.budget_achieved:.4g} of the video tokens were kept",
                )

    @property
    def may_warn_of_images(self) -> bool:
        """Whether `note_images` could warn."""
        return "images" not in self._warned and not isinstance(self._method, KeepAll)

    def note_images(self, count: int) -> None:
        """A prompt without a video has `count` images of one size: warn if there are enough to make a difference."""
        if count >= _MANY_IMAGES:
            self._warn_once(
                "images",
                f"fftriton: nothing is reduced: the prompt has no video, but {count} images of one size; "
                "reduce(..., images=True) takes each image for a video of one frame",
            )

    def warn_unreduced(self, reason: str) -> None:
        """A prompt with a video runs without reduction."""
        self._warn_once("unreduced", f"fftriton: running without reduction, because {reason}")

    def warn_if_idle(self) -> None:
        """Warn if nothing was reduced although something could have been."""
        if self._has_reduced or self._warned & {"unreduced", "images"} or isinstance(self._method, KeepAll):
            return
        if bool(self._ran_dense):
            self._warn_once(
                "idle",
                f"fftriton: nothing was reduced, though the model ran on images, videos or embeddings: no call showed "
                f"{self._method} a video. Call the model that was given to reduce, or give a layout",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=4)
