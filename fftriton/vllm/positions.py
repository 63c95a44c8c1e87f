"""M-RoPE positions of videos that are shorter than their grids.

Which tokens stay is known only behind the vision tower, so what their embeddings are goes along with them, in further
columns: the place of each, its number in the video's part of the prompt, and the number of the first video token there.
Numbers are written as two digits of base 256, which bfloat16 holds exactly (a whole number is rounded above 256).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

COLUMNS = 10
"""Columns that are added to an embedding: two each for time, height, width, and the two numbers."""

_BASE = 256
LARGEST = _BASE**2 - 1
"""The largest place or number that columns can hold."""


class Media(NamedTuple):
    """One image or video of a prompt.

    Args:
        offset: where its part begins.
        length: tokens of this part.
        grid: t, h, w in tokens.
        speed: positions from one frame of tokens to the next, not necessarily a whole number.
        texts: for videos with text before each frame, how many tokens of it: before the frame's video tokens, and
            behind those of the last one.
    """

    offset: int
    length: int
    grid: tuple[int, int, int]
    speed: float = 1.0
    texts: Sequence[int] = ()


def places(index: Tensor, media: Media) -> Tensor:
    """[K] int64, places in the grid in raster order -> [K, 3] int64: positions behind the one before the video."""
    _, h, w = media.grid
    frame = index // (h * w)
    if not media.texts:
        return torch.stack([(frame.double() * media.speed).long(), index // w % h, index % w], 1)
    begin = _begins(media).to(index.device)[frame]
    return torch.stack([begin, begin + index // w % h, begin + index % w], 1)


def all_places(index: Tensor, media: Media) -> Tensor:
    """[K] int64 -> [N, 3] int64: as `places`, with those of the text before and between frames, in the prompt's order.

    Every frame's text stays, whether or not any of its video tokens do.
    """
    _, h, w = media.grid
    frame, place = index // (h * w), places(index, media)
    parts, text = [], 0
    begins = _begins(media).tolist()
    for number, count in enumerate(media.texts):
        first = begins[number] - count if number < len(begins) else text
        parts.append((torch.arange(count, device=index.device) + first)[:, None].expand(-1, 3))
        if number < len(begins):
            parts.append(place[frame == number])
            text = begins[number] + max(h, w)
    return torch.cat(parts)


def _begins(media: Media) -> Tensor:
    """[t] int64: the position of each frame's first video token, where text stands between frames."""
    t, h, w = media.grid
    texts = torch.tensor(media.texts[:t])
    return texts.cumsum(0) + torch.arange(t) * max(h, w)


def extent(media: Media) -> int:
    """Positions from the first one of a video, whole, to the first one behind it."""
    t, h, w = media.grid
    if media.texts:
        return sum(media.texts) + t * max(h, w)
    return max(int((t - 1) * media.speed), h - 1, w - 1) + 1


def add_columns(hidden: Tensor, place: Tensor, anchor: int = 0) -> Tensor:
    """What the embeddings of a video, all of its part of the prompt, carry along.

    Args:
        hidden: [N, D].
        place: [N, 3] int64, from `places` or `all_places`.
        anchor: number of the first token in the prompt that is a video token.

    Returns:
        [N, D + COLUMNS].

    Raises:
        ValueError: a number is larger than LARGEST.
    """
    own = torch.arange(len(hidden), device=hidden.device)
    numbers = torch.cat([place, own[:, None], torch.full_like(own, anchor)[:, None]], 1)
    if len(numbers) and int(numbers.max()) > LARGEST:
        raise ValueError(f"fftriton: positions in a video must be at most {LARGEST}, got {int(numbers.max())}")
    digits = torch.stack([numbers // _BASE, numbers % _BASE], 2).flatten(1)
    return torch.cat([hidden, digits.to(hidden.dtype)], 1)


def _read_columns(columns: Tensor) -> tuple[Tensor, int, int]:
    """[K, COLUMNS] -> places [K, 3], the number of the first token, and the anchor."""
    digits = columns.long()
    numbers = digits[:, 0::2] * _BASE + digits[:, 1::2]
    return numbers[:, :3], int(numbers[0, 3]), int(numbers[0, 4])


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
        total = one.grid[0] * one.grid[1] * one.grid[2]
        if one.length == total + sum(one.texts):
            index = torch.arange(total)
            place = all_places(index, one) if one.texts else places(index, one)
            parts.append(place.T.numpy() + following)
        else:
            parts.append(np.full((3, one.length), following))
        following += extent(one)
        done = one.offset + one.length
    text = length - done
    parts.append(np.broadcast_to(np.arange(text), (3, text)) + following)
    return torch.from_numpy(np.concatenate(parts, 1)), following + text - length


def fill_in(
    positions: Tensor, ids: Tensor, tokens: tuple[int, int], embeddings: Sequence[Tensor], width: int, first: int
) -> tuple[list[Tensor], Tensor]:
    """Take the columns off the embeddings of a part of the prompt, and put what they say at the videos' tokens.

    Doing it again changes nothing.

    Args:
        positions: [3, N] int64 of the prompt, from `lay_out`.
        ids: [N] int64 of the prompt.
        tokens: the ids of image tokens and of video tokens.
        embeddings: those of the images and videos in this part, in order; the first may begin in the middle.
        width: of an embedding without columns.
        first: where this part begins.

    Returns:
        The embeddings without columns, and a copy of the positions.
    """
    positions, cleaned, cursor = positions.clone(), [], first
    found = [(ids == token).nonzero()[:, 0] for token in tokens]
    for one in embeddings:
        cleaned.append(one[:, :width])
        if not len(one):
            continue
        if one.shape[1] == width:
            cursor = _from(found[0], cursor) + len(one)
            continue
        place, number, anchor = _read_columns(one[:, width:])
        offset = cursor - number if number else _from(found[1], cursor) - anchor
        cursor = offset + number + len(one)
        before = int(positions[0, offset - 1])  # `check_gaps` saw to a token of text there
        positions[:, offset + number : cursor] = place.T.to(positions) + before + 1
    return cleaned, positions


def _from(rows: Tensor, least: int) -> int:
    """The first of ascending numbers that is not below `least`."""
    return int(rows[rows >= least][0])


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
