"""M-RoPE positions of videos that are shorter than their grids.

Which tokens stay is known only behind the vision tower, so their places ride on their embeddings as further columns:
two digits of base 256 a coordinate, which bfloat16 holds exactly (a whole number would be rounded above 256).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

COLUMNS = 6
"""Columns that are added to an embedding: two each for time, height and width."""

_BASE = 256


class Media(NamedTuple):
    """One image or video of a prompt.

    Args:
        offset: where its tokens begin.
        length: how many there are, at most t * h * w.
        grid: t, h, w in tokens.
        speed: positions from one frame of tokens to the next, not necessarily a whole number.
    """

    offset: int
    length: int
    grid: tuple[int, int, int]
    speed: float = 1.0


def places(index: Tensor, media: Media) -> Tensor:
    """[K] int64, places in the grid in raster order -> [K, 3] int64: their time, height and width."""
    _, h, w = media.grid
    time = ((index // (h * w)).double() * media.speed).long()
    return torch.stack([time, index // w % h, index % w], 1)


def add_columns(hidden: Tensor, place: Tensor) -> Tensor:
    """hidden [K, D] and places [K, 3] below 65536 -> [K, D + COLUMNS]."""
    digits = torch.stack([place // _BASE, place % _BASE], 2).flatten(1)
    return torch.cat([hidden, digits.to(hidden.dtype)], 1)


def take_columns(embeddings: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """What `add_columns` joined: hidden [K, D] and places [K, 3] int64; None if there are no further columns."""
    if embeddings.shape[1] == width:
        return embeddings, None
    digits = embeddings[:, width:].long()
    return embeddings[:, :width], digits[:, 0::2] * _BASE + digits[:, 1::2]


def lay_out(length: int, media: Sequence[Media]) -> tuple[Tensor, int]:
    """The positions of a prompt, in which only those inside of shortened videos are still open.

    What follows a video goes on behind the whole of it, so that it is right whether or not the video's tokens are ever
    seen: with a prefix cache they may not be.

    Args:
        length: N, tokens of the prompt.
        media: its images and videos, in order.

    Returns:
        [3, N] int64, where the tokens of a shortened video have its first position; and how much higher the position
        of the next token is than its number.
    """
    parts, done, following = [], 0, 0
    for one in media:
        text = one.offset - done
        parts.append(np.broadcast_to(np.arange(text), (3, text)) + following)
        following += text
        grid = np.indices(one.grid).reshape(3, -1)
        grid[0] = (grid[0] * one.speed).astype(np.int64)
        whole = one.length == grid.shape[1]
        parts.append((grid if whole else np.zeros((3, one.length), np.int64)) + following)
        following += int(grid.max()) + 1
        done = one.offset + one.length
    text = length - done
    parts.append(np.broadcast_to(np.arange(text), (3, text)) + following)
    return torch.from_numpy(np.concatenate(parts, 1)), following + text - length


def fill_in(
    positions: Tensor, is_media: Tensor, embeddings: Sequence[Tensor], width: int, first: int
) -> tuple[list[Tensor], Tensor]:
    """Take the columns off the embeddings of a part of the prompt, and put what they say at the videos' tokens.

    Doing it again changes nothing.

    Args:
        positions: [3, N] int64 of the prompt, from `lay_out`.
        is_media: [N] bool, the tokens of images and videos.
        embeddings: those of the images and videos in this part, in order; the first may begin in the middle.
        width: D of the decoder.
        first: where this part begins.

    Returns:
        The embeddings without columns, and a copy of the positions.
    """
    positions, cleaned = positions.clone(), []
    rows = is_media.nonzero()[:, 0]
    rows = rows[rows >= first]
    begins = (is_media & ~is_media.roll(1)).nonzero()[
        :, 0
    ]  # a token of text stands before each; `check_gaps` saw to it
    for one in embeddings:
        here, rows = rows[: len(one)], rows[len(one) :]
        hidden, place = take_columns(one, width)
        if place is not None and len(here):
            begin = int(begins[begins <= here[0]].max())
            base = int(positions[0, begin - 1]) + 1
            positions[:, here] = place.T.to(positions) + base
        cleaned.append(hidden)
    return cleaned, positions


def check_gaps(ranges: Sequence[tuple[int, int]]) -> None:
    """Raise a ValueError unless a token of text stands before every image and video.

    Args:
        ranges: offset and length of each, in order.
    """
    done = 0
    for offset, length in ranges:
        if offset == done:
            raise ValueError(
                f"fftriton: a token of text must stand before every image and video, such as <|vision_start|>, got "
                f"none before token {offset}"
            )
        done = offset + length
