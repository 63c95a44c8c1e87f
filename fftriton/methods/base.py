"""What every method is made of: the tokens it sees at one point of a prefill, and the calls it may answer.

A method never sees Hugging Face; whoever drives it (fftriton.hf) never decides what to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fftriton_kernels import gather_rows, merge_mean, topk_keep

from ..checks import check_count
from ..layouts.layout import VideoLayout, frame_ids, previous_of_patch


@dataclass(frozen=True)
class Prompt:
    """What is known of a sample before the first layer.

    Args:
        num_layers: decoder layers.
        length: tokens of the prompt, text included and padding not.
        layouts: where its videos stand among them.
        attends: for each layer, whether it has attention scores to give; empty where all have.
        first_video: how many videos the samples before it in the batch hold.
    """

    num_layers: int
    length: int
    layouts: Sequence[VideoLayout]
    attends: Sequence[bool] = ()
    first_video: int = 0

    @cached_property
    def num_video_tokens(self) -> int:
        """Video tokens in the prompt, all videos together."""
        return sum(len(layout.tokens) for layout in self.layouts)

    def next_attention(self, layer: int) -> int:
        """The first layer from `layer` on that has attention scores; num_layers where none has."""
        return next((i for i in range(layer, self.num_layers) if not self.attends or self.attends[i]), self.num_layers)

    @cached_property
    def frame(self) -> Tensor:
        """[length] int64 on the CPU: the frame of each position, counted across videos; -1 for other tokens."""
        layouts = [replace(layout, sample=0) for layout in self.layouts]
        return frame_ids(layouts, 1, self.length, torch.device("cpu"))[0]


@dataclass(frozen=True)
class Window:
    """Which tokens of its past a token may attend to.

    Args:
        sinks: so many of the first.
        recent: so many of the most recent ones, itself included, at least 1.
    """

    sinks: int
    recent: int

    def __post_init__(self) -> None:
        check_count("Window", "sinks", self.sinks, 0)
        check_count("Window", "recent", self.recent, 1)


@dataclass(frozen=True)
class Merge:
    """Which tokens one merge took together, in positions of the prompt."""

    roots: Tensor  # [B, N] int64: the row of each row's root, before compaction
    position: Tensor  # [B, N] int64: the prompt's position of each row

    @cached_property
    def merged(self) -> Tensor:
        """[m] int64: positions that left the sequence."""
        return self.position[self._leaves]

    @cached_property
    def into(self) -> Tensor:
        """[m] int64: the position of the group root that each of `merged` joined."""
        return self.position.gather(1, self.roots)[self._leaves]

    @cached_property
    def _leaves(self) -> Tensor:
        return self.roots != torch.arange(self.roots.shape[1], device=self.roots.device)


@dataclass(frozen=True)
class VideoTokens:
    """The sequence at one point of a prefill, text included, and the ways to shorten it.

    Args:
        hidden: [B, N, D] hidden states.
        position: [B, N] int64, the place of each row in the prompt, padding not counted.
        patch: [B, N] int64, which patch of which video a row is, the same number in every frame; -1 for other tokens.
        num_video: rows whose patch is not -1.
        companions: tensors [B, N, ...] that follow their rows (rotary embeddings, say).
        additions: tensors [B, N, D] that later layers add to the hidden states (Qwen3-VL's deepstack features): they
            follow their rows, and rows that merge have their mean.
        attention: after attention, `attention(n)` is the attention that each row received in this layer [B, N] fp32:
            summed over the last n queries (None: over all), averaged over the heads. None before attention.
        merge: how these tokens came out of a merge; None otherwise.
        between: what came between the tokens that a method was given and these, where it took two steps.
    """

    hidden: Tensor
    position: Tensor
    patch: Tensor
    num_video: int
    companions: tuple[Tensor, ...] = ()
    attention: Callable[[int | None], Tensor] | None = None
    merge: Merge | None = None
    between: VideoTokens | None = None
    additions: tuple[Tensor, ...] = ()
    _links: Tensor | None = None

    @property
    def length(self) -> int:
        """Rows of the sequence, text included."""
        return self.position.shape[1]

    @cached_property
    def predecessor(self) -> Tensor:
        """[B, N] int64: the nearest earlier surviving token of the same patch of the same video, -1 for none."""
        return previous_of_patch(self.patch) if self._links is None else self._links

    def merge_groups(self, roots: Tensor) -> VideoTokens:
        """Put the mean of each group at its root and take the other members out. roots: [B, N] int64."""
        rows = torch.cat([self.hidden, *self.additions], -1) if self.additions else self.hidden
        merged = merge_mean(rows, roots, (self.position, self.patch, *self.companions), predecessor=self.predecessor)
        position, patch, *companions = merged.companions
        hidden, *additions = merged.x.split(self.hidden.shape[-1], -1)
        hidden = hidden if hidden.shape[1] < self.length else self.hidden  # nothing merged: nothing new
        return VideoTokens(
            hidden, position, patch, self.num_video - (self.length - hidden.shape[1]), tuple(companions),
            merge=Merge(roots, self.position), additions=tuple(additions), _links=merged.predecessor,
        )  # fmt: skip

    def keep_top(self, scores: Tensor, count: int) -> VideoTokens:
        """Keep the `count` video tokens of the highest scores [B, N], in order, and all other tokens."""
        count = min(count, self.num_video)
        rows = self.length - self.num_video + count  # known beforehand: a GPU is not waited for
        kept, _ = topk_keep(scores, count, candidates=self.patch >= 0, capacity=rows)
        return self.keep(kept, count)

    def keep(self, rows: Tensor, num_video: int) -> VideoTokens:
        """Keep these rows [B, K] int64, ascending, `num_video` of them video tokens."""
        hidden, position, patch, *others = gather_rows(
            rows, self.hidden, self.position, self.patch, *self.companions, *self.additions
        )
        companions, additions = others[: len(self.companions)], others[len(self.companions) :]
        return VideoTokens(hidden, position, patch, num_video, tuple(companions), additions=tuple(additions))

    def at(self, hidden: Tensor, attention: Callable[[int | None], Tensor] | None) -> VideoTokens:
        """The same tokens at a later point, where only their hidden states have changed, and maybe the device."""
        links = self.__dict__.get("predecessor", self._links)
        there = replace(self, hidden=hidden, attention=attention, merge=None, between=None, _links=links)
        return there if self.position.device == hidden.device else there._follow()

    def _follow(self) -> VideoTokens:
        """Everything on the device of the hidden states: the next layer may be on another one."""

        def move(part: Tensor) -> Tensor:
            return part.to(self.hidden.device)

        return replace(
            self, position=move(self.position), patch=move(self.patch),
            companions=tuple(map(move, self.companions)), additions=tuple(map(move, self.additions)),
            _links=None if self._links is None else move(self._links),
        )  # fmt: skip


class Method:
    """What to keep. Subclasses are small frozen dataclasses; one that needs memory within a prefill overrides `begin`.

    Attributes:
        budget: the mean over layers of the video tokens in a layer's attention, as a fraction of the prompt's.
    """

    budget: float = 1.0

    @property
    def renumbers(self) -> bool:
        """Whether it gives the tokens that stay other positions, which has to be a single number for each."""
        return False

    def check(self, num_layers: int) -> None:
        """Raise a ValueError when the method cannot work on a decoder of `num_layers` layers."""

    def about(self, frames: Any, question: str) -> Method:
        """The method for one video, [T, H, W, 3] uint8 as the model gets it, and one question: itself unless it looks
        at them before the model does."""
        return self

    def begin(self, prompt: Prompt) -> Method:
        """What answers the calls of one prefill: the method itself unless it needs memory."""
        return self

    @property
    def least_budget(self) -> float:
        """The lowest budget that the prefill could have met; of what `begin` returned, after the prefill."""
        return self.budget

    def window(self, length: int) -> Window | None:
        """Which of `length` tokens, those of the prompt and all before it, a token may attend to; None: to all.

        Asked behind `before_attention` of layer 0. It holds in every layer, and for what comes behind the prompt.
        """
        return None

    def wants_attention(self, layer: int) -> bool:
        """Whether `after_attention` of this layer may ask for attention scores; a layer without attention has none."""
        return False

    def before_attention(self, layer: int, tokens: VideoTokens) -> VideoTokens | None:
        """Called before each layer's attention, from layer 0 on. None: leave everything as it is."""
        return None

    def after_attention(self, layer: int, tokens: VideoTokens) -> VideoTokens | None:
        """Called between each layer's attention and its feed-forward block. None: leave everything as it is."""
        return None
