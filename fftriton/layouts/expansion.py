"""Where things stand once a model has put blocks of tokens in the place of placeholders.

A row of ids is divided by its placeholders into stretches of text; each placeholder becomes a block. The size of an
image's block may be unknown: it is found by the embeddings of the text around it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Section:
    """Frames at equal distances inside a block.

    Args:
        start: offset of the first patch from the block's first token.
        frames, patches: number of frames, and of tokens per frame.
        gap: number of other tokens between the last patch of a frame and the first of the next.
        columns: as in a VideoLayout.
    """

    start: int
    frames: int
    patches: int
    gap: int = 0
    columns: int | None = None

    def positions(self, first: int) -> Tensor:
        """[F, P] int64, in a block whose first token is at position `first`."""
        starts = first + self.start + torch.arange(self.frames) * (self.patches + self.gap)
        return starts[:, None] + torch.arange(self.patches)


@dataclass(frozen=True)
class Block:
    """What a placeholder becomes: `size` tokens, None if unknown, and the video in them, if any."""

    size: int | None
    sections: tuple[Section, ...] = ()


@dataclass(frozen=True)
class ExpandedRow:
    """One sample: text and blocks in turn, without padding.

    Args:
        text: lengths of the stretches of text before, between and after the blocks; one more than there are blocks.
        blocks: in the order of their placeholders.
    """

    text: Sequence[int]
    blocks: Sequence[Block]

    @property
    def starts(self) -> list[int]:
        """The position of each block's first token. No size may be unknown."""
        starts, position = [], 0
        for length, block in zip(self.text, self.blocks, strict=False):
            starts.append(position + length)
            position += length + _known(block)
        return starts

    @property
    def length(self) -> int:
        """The number of tokens. No size may be unknown."""
        return sum(self.text) + sum(map(_known, self.blocks))

    @property
    def text_positions(self) -> Tensor:
        """[t] int64: the positions of the text."""
        ends = [0, *(start + _known(block) for start, block in zip(self.starts, self.blocks, strict=True))]
        return torch.cat([end + torch.arange(length) for end, length in zip(ends, self.text, strict=True)])

    def videos(self, length: int | None = None) -> Iterator[tuple[Tensor, int | None]]:
        """[F, P] int64 positions of each video, and its columns.

        If the row is cut to `length` tokens, positions are -1 for those that are gone.
        """
        for start, block in zip(self.starts, self.blocks, strict=True):
            for section in block.sections:
                positions = section.positions(start)
                if length is not None:
                    positions = positions[positions[:, 0] < length]
                    positions = positions.where(positions < length, -1)
                if len(positions):
                    yield positions, section.columns

    def resolved(self, text: Tensor, rows: Tensor) -> ExpandedRow:
        """The row with all sizes known: the places of the text tell the unknown ones.

        Args:
            text: [t, D], the embeddings of the text.
            rows: [n, D], those of the whole row.

        Raises:
            ValueError: a size cannot be found.
        """
        row = self
        while any(block.size is None for block in row.blocks):
            at = next(index for index, block in enumerate(row.blocks) if block.size is None)
            blocks = list(row.blocks)
            blocks[at] = replace(blocks[at], size=row._size_of(at, text, rows))
            row = replace(row, blocks=blocks)
        return row

    def _size_of(self, at: int, text: Tensor, rows: Tensor) -> int:
        """The size of the block `at`, before which all are known."""
        before = ExpandedRow(self.text[: at + 1], self.blocks[:at])
        later = [index for index in range(at + 1, len(self.blocks)) if self.blocks[index].size is None]
        end = later[0] if later else len(self.blocks)
        after = ExpandedRow(self.text[at + 1 : end + 1], self.blocks[at + 1 : end])
        first = before.length
        if not later:  # the end of the row is known
            return max(0, len(rows) - first - after.length)
        wanted = text[sum(before.text) :][: sum(after.text)]
        if len(wanted) == 0:
            if after.blocks:
                raise ValueError("a video must not stand between images without any text")
            return 0  # the next block gets it all
        places = after.text_positions.to(rows.device)
        last = len(rows) - after.length
        same = (rows[first + int(places[0]) : last + int(places[0]) + 1] == wanted[0]).all(-1)
        for size in same.nonzero()[:, 0].tolist():
            if torch.equal(rows[first + size + places], wanted):
                return size
        raise ValueError("the text after an image was not found among the embeddings")


def _known(block: Block) -> int:
    if block.size is None:
        raise ValueError("the size of a block must be known")
    return block.size


def row_of(placeholder: Tensor, blocks: Sequence[Block]) -> ExpandedRow:
    """A row of ids, of which `placeholder` [n] bool marks those that become the blocks."""
    places = [-1, *placeholder.nonzero()[:, 0].tolist(), len(placeholder)]
    return ExpandedRow([after - before - 1 for before, after in itertools.pairwise(places)], blocks)
