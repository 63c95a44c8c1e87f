"""Assets that ship in the package: two small trained models and two clips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"
MODEL = ASSETS / "needle-qwen2vl"
HARDER_MODEL = ASSETS / "needle-harder-qwen2vl"
"""For the harder splits of the needle task."""

DEFAULT_QUESTION = "Describe this video."

MODEL_LIMITS = (
    "The shipped model was trained only on digits on coloured boxes: it cannot describe this video, and its answer "
    "means nothing here. The merged tokens and the time that they save are real."
)


@dataclass(frozen=True)
class Clip:
    """A shipped clip.

    Attributes:
        path: the video file.
        about: what the clip shows, in a few words.
        question: question for the shipped model.
        answer: right answer; None if the shipped model cannot know it.
        max_pixels: maximum pixels per frame for the shipped model; None for the size that it was trained with.
    """

    path: Path
    about: str
    question: str
    answer: str | None = None
    max_pixels: int | None = None


NEEDLE = Clip(
    ASSETS / "clips" / "needle.mp4",
    about="a digit on a red box shows for half a second",
    question="Which digit is on the red box?",
    answer="3",
)
BUNNY = Clip(
    ASSETS / "clips" / "bunny.mp4",
    about="real footage, from Big Buck Bunny (c) 2008 Blender Foundation, CC BY 3.0",
    question="How many boxes appear?",
    max_pixels=320 * 176,
)
