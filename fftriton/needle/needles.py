"""Needles: handwritten digits on coloured boxes that appear for a few frames, and the styles that hide them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .digits import PATCH, write_digit
from .scenes import SIDE
from .vocabulary import COLOURS

_HALF = SIDE // 2
_RGB = dict(zip(COLOURS, ((0.9, 0.1, 0.1), (0.1, 0.8, 0.1), (0.15, 0.2, 0.95), (0.9, 0.85, 0.1)), strict=True))
_BLEND = (0.35, 0.65)  # opacity of a blended needle


@dataclass(frozen=True)
class Appearance:
    """When, where and how visibly a needle appears.

    Attributes:
        start: its first frame.
        corners: its top left pixel (row, column) in each of its frames.
        opacity: its opacity in each of its frames, in (0, 1]; 1 hides the background.
        side: pixels along its side, PATCH or half of it.
    """

    start: int
    corners: tuple[tuple[int, int], ...]
    opacity: tuple[float, ...]
    side: int = PATCH

    @property
    def frames(self) -> tuple[int, ...]:
        """The frames that show it."""
        return tuple(range(self.start, self.start + len(self.corners)))


@dataclass(frozen=True)
class Needle:
    """One digit on one coloured box."""

    digit: int
    colour: str
    appearance: Appearance


Style = Callable[[range, int, np.random.Generator], Appearance]  # (frames to stay inside, quadrant, rng)


def covered(span: range, quadrant: int, rng: np.random.Generator) -> Appearance:
    """Fill one patch for one or two frames."""
    return _in_one_patch(span, quadrant, (1.0,) * int(rng.integers(1, 3)), rng)


def blended(span: range, quadrant: int, rng: np.random.Generator) -> Appearance:
    """Blend into one patch for one or two frames, with the background visible behind."""
    return _in_one_patch(span, quadrant, (rng.uniform(*_BLEND),) * int(rng.integers(1, 3)), rng)


def faded_in(span: range, quadrant: int, rng: np.random.Generator) -> Appearance:
    """Fade into one patch over three or four frames, then vanish."""
    frames = min(int(rng.integers(3, 5)), len(span))
    return _in_one_patch(span, quadrant, tuple((i + 1) / frames for i in range(frames)), rng)


def moved(span: range, quadrant: int, rng: np.random.Generator) -> Appearance:
    """Slide from one patch to the next over three or four frames."""
    frames = min(int(rng.integers(3, 5)), len(span))
    cell, axis = rng.integers(0, 2, 2), rng.integers(2)
    corners = np.tile(cell * PATCH, (frames, 1))
    slide = np.linspace(0, PATCH, frames).round().astype(int)
    corners[:, axis] = slide if cell[axis] == 0 else PATCH - slide
    return _appearance(span, quadrant, corners, (1.0,) * frames, rng)


def brief(span: range, quadrant: int, rng: np.random.Generator) -> Appearance:
    """Fill one patch for one frame."""
    return _in_one_patch(span, quadrant, (1.0,), rng)


def small(span: range, quadrant: int, rng: np.random.Generator) -> Appearance:
    """Fill a quarter of one patch for one or two frames: a box of half its side."""
    whole = covered(span, quadrant, rng)
    down, right = rng.integers(0, 2, 2) * (PATCH // 2)
    corners = tuple((int(top + down), int(left + right)) for top, left in whole.corners)
    return replace(whole, corners=corners, side=PATCH // 2)


def draw_needles(count: int, styles: tuple[Style, ...], num_frames: int, rng: np.random.Generator) -> list[Needle]:
    """Draw needles of different digits and colours, each in its own quadrant and inside one quarter of the video.

    Args:
        count: number of needles, at most 4.
        styles: styles that hide the needles; each gets a random one.
        num_frames: number of frames of the video, a multiple of 4.
        rng: source of all random choices.
    """
    quarter = num_frames // 4
    kinds = zip(rng.permutation(10)[:count], rng.permutation(COLOURS)[:count], rng.permutation(4)[:count], strict=True)
    needles = []
    for digit, colour, quadrant in kinds:
        start = quarter * int(rng.integers(4))
        style = styles[rng.integers(len(styles))]
        appearance = style(range(start, start + quarter), int(quadrant), rng)
        needles.append(Needle(int(digit), str(colour), appearance))
    return needles


def add_needle(video: np.ndarray, needle: Needle, held_out: bool, rng: np.random.Generator) -> None:
    """Draw a needle into a video [F, 3, SIDE, SIDE] float32, in place; held_out selects the digit images."""
    sticker = _sticker(needle, held_out, rng)
    appearance = needle.appearance
    for frame, (top, left), opacity in zip(appearance.frames, appearance.corners, appearance.opacity, strict=True):
        patch = video[frame, :, top : top + appearance.side, left : left + appearance.side]
        patch += opacity * (sticker - patch)


def _sticker(needle: Needle, held_out: bool, rng: np.random.Generator) -> np.ndarray:
    """A white digit on a box of the needle's colour, slightly varied: [3, side, side] float32."""
    box = np.array(_RGB[needle.colour]) * rng.uniform(0.8, 1) + rng.uniform(-0.03, 0.03, 3)
    ink = write_digit(needle.digit, held_out, rng) * rng.uniform(0.85, 1)
    side, pooled = needle.appearance.side, PATCH // needle.appearance.side
    if pooled > 1:
        ink = ink.reshape(side, pooled, side, pooled).mean((1, 3))
    return (box[:, None, None] * (1 - ink) + ink).astype(np.float32)


def _in_one_patch(span: range, quadrant: int, opacity: tuple[float, ...], rng: np.random.Generator) -> Appearance:
    opacity = opacity[: len(span)]
    corners = np.tile(rng.integers(0, 2, 2) * PATCH, (len(opacity), 1))
    return _appearance(span, quadrant, corners, opacity, rng)


def _appearance(
    span: range, quadrant: int, corners: np.ndarray, opacity: tuple[float, ...], rng: np.random.Generator
) -> Appearance:
    """An appearance at a random time in the span; corners [F, 2] are relative to the quadrant."""
    start = span[rng.integers(len(span) - len(corners) + 1)]
    corners = corners + np.array(divmod(quadrant, 2)) * _HALF
    return Appearance(int(start), tuple((int(top), int(left)) for top, left in corners), opacity)
