"""What ships in the package: a small trained model, and two clips to run it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"
MODEL = ASSETS / "needle-qwen2vl"

MODEL_LIMITS = (
    "The shipped model was trained on digits on coloured boxes and on nothing else: it cannot describe this video, and "
    "its answer means nothing here. What is real are the tokens that merge and the time they save."
)


@dataclass(frozen=True)
class Clip:
    """A shipped clip.

    Attributes:
        path: the video file.
        about: what is to be seen, in a few words.
        question: what to ask the shipped model.
        answer: the right answer; None where the shipped model has no way to know.
        max_pixels: a frame's pixels for the shipped model; None for those it was trained with.
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
