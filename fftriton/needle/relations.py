"""Needles that appear one after the other, and questions about their order or what they have in common."""

from __future__ import annotations

import numpy as np

from .needles import Needle, Style
from .vocabulary import COLOURS

SPANS = 8  # parts of a video; at most one needle appears in each, and it stays inside

RELATIONS = ("after", "same")  # kinds of question about two needles


def draw_in_turn(
    count: int, styles: tuple[Style, ...], num_frames: int, same: bool, rng: np.random.Generator
) -> list[Needle]:
    """Draw needles of different colours in quadrants of their own, no two in the same frame.

    Args:
        count: number of needles, 2 to 4.
        styles: styles that hide the needles; each gets a random one.
        num_frames: number of frames of the video, a multiple of SPANS.
        same: whether the first two show the same digit; all others differ.
        rng: source of all random choices.

    Returns:
        The needles in no particular order, except that the first is not the last to appear.
    """
    digits = rng.permutation(10)[:count]
    if same:
        digits[1] = digits[0]
    length = num_frames // SPANS
    spans, quadrants = rng.choice(SPANS, count, replace=False), rng.permutation(4)
    if spans[0] == spans.max():
        spans[[0, 1]] = spans[[1, 0]]
    needles = []
    for digit, colour, span, quadrant in zip(digits, rng.permutation(COLOURS)[:count], spans, quadrants, strict=False):
        style = styles[rng.integers(len(styles))]
        appearance = style(range(span * length, (span + 1) * length), int(quadrant), rng)
        needles.append(Needle(int(digit), str(colour), appearance))
    return needles


def related(kind: str, needles: list[Needle]) -> list[Needle]:
    """The two needles that a question of this kind, one of RELATIONS, is about; the first is needles[0].

    Raises:
        ValueError: nothing appears after the first needle.
    """
    if kind == "same":
        return needles[:2]
    later = [needle for needle in needles if needle.appearance.start > needles[0].appearance.start]
    return [needles[0], min(later, key=lambda needle: needle.appearance.start)]


def ask_relation(kind: str, needles: list[Needle]) -> tuple[str, str]:
    """A question of this kind, one of RELATIONS, and its answer."""
    one, other = related(kind, needles)
    if kind == "after":
        return f"Which digit came after the one on the {one.colour} box?", str(other.digit)
    question = f"Did the {one.colour} and the {other.colour} box show the same digit?"
    return question, "yes" if one.digit == other.digit else "no"
