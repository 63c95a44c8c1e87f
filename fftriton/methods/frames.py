"""The frames of a sample's videos: where their tokens stand, and what a function about a video gets to see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layouts.layout import VideoLayout
from .base import Prompt, VideoTokens

_PART_BYTES = 2**23  # tokens that are compared with each other at a time, in fp32


@dataclass(frozen=True)
class FrameRows:
    """Where the tokens of each frame stand in a sequence.

    Args:
        rows: [F, P] int64, ascending; -1 for a hole. The frames of several videos follow one another.
        shapes: frames and patches of each video; empty for a single video.
        numbers: number of each video in the batch; empty if they are 0, 1, ...
        sample: the row of the batch.
    """

    rows: Tensor
    shapes: Sequence[tuple[int, int]] = ()
    numbers: Sequence[int] = ()
    sample: int = 0

    @classmethod
    def of(
        cls, layouts: Sequence[VideoLayout], tokens: VideoTokens, numbers: Sequence[int] = (), *, empty: bool = True
    ) -> FrameRows:
        """The frames of one sample's videos, whose tokens are all in the sequence.

        empty: also those of which no token is left, in a video that has others.
        """
        videos = [layout.positions if empty else _not_empty(layout.positions) for layout in layouts]
        widest = max(positions.shape[1] for positions in videos)
        padded = [F.pad(positions, (0, widest - positions.shape[1]), value=-1) for positions in videos]
        positions = torch.cat(padded).to(tokens.position.device)
        rows = torch.searchsorted(tokens.position[0].contiguous(), positions)
        shapes = [(positions.shape[0], positions.shape[1]) for positions in videos]
        return cls(rows.where(positions >= 0, -1), shapes, numbers, layouts[0].sample)

    @classmethod
    def of_prompt(cls, prompt: Prompt, tokens: VideoTokens, *, empty: bool = True) -> FrameRows:
        """The frames of all videos of a sample, as `of` gives them."""
        numbers = [prompt.number_of(video) for video in range(len(prompt.layouts))]
        return cls.of(prompt.layouts, tokens, numbers, empty=empty)

    @property
    def present(self) -> Tensor:
        """[F, P] bool: False for holes."""
        return self.rows >= 0

    @property
    def sizes(self) -> Tensor:
        """[F] int64: the number of tokens of each frame."""
        return self.present.sum(1)

    def take(self, x: Tensor) -> Tensor:
        """[1, N, ...] -> [F, P, ...]; the values at holes are arbitrary."""
        return x[0].index_select(0, self.rows.clamp_min(0).flatten()).view(*self.rows.shape, *x.shape[2:])

    def spread(self, values: Tensor, onto: Tensor) -> Tensor:
        """A copy of `onto` [1, N] with the values [F, P] at their tokens."""
        spread = F.pad(onto[0], (0, 1))  # holes go behind the end
        places = self.rows.where(self.present, onto.shape[1]).flatten()
        return spread.scatter_(0, places, values.to(onto.dtype).flatten())[None, :-1]

    def roots(self, column: Tensor, length: int) -> Tensor:
        """[1, N] int64: for each of N rows the one that it merges into.

        Args:
            column: [F, P] int64, the column in its frame of the token that each token merges into.
            length: N.
        """
        alone = torch.arange(length, device=column.device)[None]
        return self.spread(self.rows.gather(1, column), alone)

    def after(self, roots: Tensor) -> FrameRows:
        """The same frames once the rows have merged, with holes in place of what is no root: roots [1, N] int64."""
        stays = roots[0] == torch.arange(roots.shape[1], device=roots.device)
        rows = (stays.cumsum(0) - 1).where(stays, -1)
        return replace(self, rows=rows[self.rows.clamp_min(0)].where(self.present, -1))

    def parts(self, width: int) -> list[FrameRows]:
        """The frames in parts that are small enough to compare all their tokens, of this width, with each other."""
        patches = self.rows.shape[1]
        size = max(1, _PART_BYTES // (4 * max(1, patches * max(width, patches))))
        return [FrameRows(rows) for rows in self.rows.split(size)]

    def contexts(self, tokens: VideoTokens) -> Iterator[FrameContext]:
        """Each video, in order."""
        shapes = self.shapes or [(self.rows.shape[0], self.rows.shape[1])]
        parts = self.rows.split([frames for frames, _ in shapes])
        for video, (rows, (_, patches)) in enumerate(zip(parts, shapes, strict=True)):
            number = self.numbers[video] if self.numbers else video
            yield FrameContext(self.sample, number, FrameRows(rows[:, :patches]), tokens)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """What functions returned for each video, [F_v, P_v, ...], as [F, P, ...]; zeros at holes."""
        widest = self.rows.shape[1]
        padded = [F.pad(part, (0, 0) * (part.ndim - 2) + (0, widest - part.shape[1])) for part in parts]
        return torch.cat(padded)


def _not_empty(positions: Tensor) -> Tensor:
    """The rows of positions [F, P] that are not all holes; the first one, if all are."""
    filled = (positions >= 0).any(1)
    return positions[filled] if bool(filled.any()) else positions[:1]


@dataclass(frozen=True)
class FrameContext:
    """One video of a prompt, as it is passed to functions that score its frames or tokens.

    Args:
        sample: the row of the batch.
        video: number of the video in the batch, counted sample by sample.
        frames: where its F frames of P tokens stand among the sample's tokens.
        tokens: all tokens of the sample, as the first layer would get them.
    """

    sample: int
    video: int
    frames: FrameRows = field(repr=False)
    tokens: VideoTokens = field(repr=False)

    @property
    def num_frames(self) -> int:
        """F: frames of tokens. In Qwen2-VL each of them stands for two frames of the video."""
        return self.frames.rows.shape[0]

    @property
    def present(self) -> Tensor:
        """[F, P] bool: False at holes."""
        return self.frames.present

    @cached_property
    def hidden(self) -> Tensor:
        """[F, P, D]: the video's tokens; arbitrary at holes."""
        return self.frames.take(self.tokens.hidden)

    @property
    def text(self) -> Tensor:
        """[n, D]: the sample's tokens that are in no video."""
        return self.tokens.hidden[0, self.tokens.patch[0] < 0]
