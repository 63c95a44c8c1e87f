"""The samples of the needle task: a video, a question about it and the answer."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..checks import check_count
from ..runtime.shipped import BUNNY
from ..runtime.video import Video, write_video
from .needles import Needle, Style, add_needle, blended, brief, covered, draw_needles, faded_in, moved, small
from .relations import RELATIONS, SPANS, ask_relation, draw_in_turn, related
from .scenes import SIDE, add_flashes, real_scenes, textured_scenes
from .vocabulary import COUNTS, QUADRANTS, QUARTERS

KINDS = ("what", "when", "where", "how many", "which colour")
HARDER_KINDS = ("what", "when", *RELATIONS)
FPS = 4  # frames per second of a sample

_SENSOR_NOISE = 0.02  # standard deviation, for values in [0, 1]
_HOLD = 4  # frames in a video file per frame of a sample
_UPSCALE = 4  # pixels along a side in a video file per pixel of a sample


@dataclass(frozen=True)
class Recipe:
    """Parameters by which videos are drawn.

    Attributes:
        num_frames: possible lengths, multiples of 4.
        needles: minimum and maximum number of needles.
        styles: styles that hide a needle.
        speed: minimum and maximum pixels per frame that the camera moves along each axis.
        still: probability that the camera does not move.
        flashes: minimum and maximum number of patches of noise, each visible for one frame.
        real: whether to use real clips instead of textured scenes.
        pans: whether the camera moves at that speed over real clips, too.
        kinds: kinds of question that take turns.
    """

    num_frames: tuple[int, ...] = (16,)
    needles: tuple[int, int] = (1, 3)
    styles: tuple[Style, ...] = (covered,)
    speed: tuple[float, float] = (0.0, 1.2)
    still: float = 0.3
    flashes: tuple[int, int] = (0, 4)
    real: bool = False
    pans: bool = False
    kinds: tuple[str, ...] = KINDS

    @property
    def in_turn(self) -> bool:
        """Whether the needles appear one after the other, as relations need."""
        return bool({*RELATIONS} & {*self.kinds})

    @property
    def multiple(self) -> int:
        """What the number of frames must be a multiple of."""
        return SPANS if self.in_turn else 4


RECIPES = {
    "easy": Recipe(),
    "hard": Recipe(speed=(3.0, 8.0), still=0.0, flashes=(12, 24)),
    "blended": Recipe(styles=(blended, faded_in, moved)),
    "real": Recipe(real=True),
    "long": Recipe(num_frames=(32, 64)),
}
SPLITS = tuple(RECIPES)

_RELATIONS = Recipe(needles=(3, 4), kinds=HARDER_KINDS)
HARDER_RECIPES = {
    "relations": _RELATIONS,
    "small": replace(_RELATIONS, styles=(small,)),
    "brief": replace(_RELATIONS, styles=(brief,), speed=(3.0, 8.0), still=0.0, flashes=(12, 24)),
    "moving": replace(_RELATIONS, real=True, pans=True, speed=(1.0, 4.0)),
    "longer": replace(_RELATIONS, num_frames=(64, 128)),
}
HARDER_SPLITS = tuple(HARDER_RECIPES)


@dataclass(frozen=True)
class Sample:
    """One video and one question about it.

    Attributes:
        frames: [F, H, W, 3] uint8.
        kind: kind of the question, one of KINDS or HARDER_KINDS.
        question: the question, in natural language.
        answer: the only right answer.
        split: one of SPLITS or HARDER_SPLITS.
        index: index of the sample in the split.
        needle_frames: the frames that show the needles in question.
        needle_depth: the middle of these frames as a fraction of the video, from 0 for the first frame to 1 for the
            last; None if the question is about several needles.
        fps: frames per second.
    """

    frames: np.ndarray
    kind: str
    question: str
    answer: str
    split: str
    index: int
    needle_frames: tuple[int, ...]
    needle_depth: float | None
    fps: float = float(FPS)

    @property
    def depth(self) -> float | None:
        """`needle_depth`, under the name that the samples of all tasks use."""
        return self.needle_depth

    @property
    def video(self) -> Video:
        """The video, as a processor takes it."""
        return Video(self.frames, list(range(len(self.frames))), len(self.frames), self.fps)

    def write(self, path: Path) -> None:
        """Write the video to a file with frames repeated and enlarged, so that sampling and resizing restore it."""
        write_clip(path, self.frames)


def generate_sample(
    split: str,
    seed: int,
    index: int,
    held_out: bool = True,
    num_frames: int | None = None,
    clips: tuple[Path, ...] = (BUNNY.path,),
) -> Sample:
    """Generate sample `index` of a split: always the same for the same arguments.

    The kind of question changes from index to index in turn, and so does the length in a split that has several.

    Args:
        split: one of SPLITS or HARDER_SPLITS.
        seed: selects another set of samples.
        index: index of the sample, from 0.
        held_out: whether to use the digit images that training never sees. The videos differ as well.
        num_frames: length of the video, a multiple of 4, in a harder split of 8; None for the split's own.
        clips: video files for the splits of real backgrounds; by default the shipped ones.

    Raises:
        ValueError: an argument is out of range, or a clip cannot be read.
        ImportError: scikit-learn is not installed.
    """
    _check(split, seed, index, num_frames)
    recipe = recipe_of(split)
    turn, kind_index = divmod(index, len(recipe.kinds))
    kind = recipe.kinds[kind_index]
    if num_frames is None:
        num_frames = recipe.num_frames[turn % len(recipe.num_frames)]
    rng = np.random.default_rng([seed, index, zlib.crc32(split.encode()), held_out])
    needles = draw(recipe, num_frames, rng)
    frames = draw_video(recipe, num_frames, needles, held_out, rng, clips)
    question, answer = ask(kind, needles, num_frames)
    about = needles if kind == "how many" else related(kind, needles) if kind in RELATIONS else needles[:1]
    shown = tuple(sorted({frame for needle in about for frame in needle.appearance.frames}))
    depth = None if kind in ("how many", *RELATIONS) else (shown[0] + shown[-1]) / 2 / (num_frames - 1)
    return Sample(frames, kind, question, answer, split, index, shown, depth)


def recipe_of(split: str) -> Recipe:
    """The recipe of one of SPLITS or HARDER_SPLITS."""
    return RECIPES[split] if split in RECIPES else HARDER_RECIPES[split]


def draw(recipe: Recipe, num_frames: int, rng: np.random.Generator) -> list[Needle]:
    """Draw the needles of a video, the one to ask about first."""
    count = int(rng.integers(*recipe.needles, endpoint=True))
    if recipe.in_turn:
        return draw_in_turn(count, recipe.styles, num_frames, bool(rng.random() < 0.5), rng)
    return draw_needles(count, recipe.styles, num_frames, rng)


def draw_video(
    recipe: Recipe,
    num_frames: int,
    needles: list[Needle],
    held_out: bool,
    rng: np.random.Generator,
    clips: tuple[Path, ...] = (BUNNY.path,),
) -> np.ndarray:
    """Draw a video with these needles: [F, SIDE, SIDE, 3] uint8."""
    if recipe.real:
        video = real_scenes(num_frames, clips, rng, recipe.speed if recipe.pans else None)
    else:
        video = textured_scenes(num_frames, recipe.speed, recipe.still, rng)
    add_flashes(video, int(rng.integers(*recipe.flashes, endpoint=True)), rng)
    for needle in needles:
        add_needle(video, needle, held_out, rng)
    return finish(video, rng)


def finish(video: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add sensor noise and round: [F, 3, H, W] float32 in [0, 1] -> [F, H, W, 3] uint8."""
    video = video + _SENSOR_NOISE * rng.standard_normal(video.shape, dtype=np.float32)
    return np.ascontiguousarray((video.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1))


def ask(kind: str, needles: list[Needle], num_frames: int) -> tuple[str, str]:
    """A question of this kind, about the first needle, its relation to another or their number, and its answer."""
    if kind in RELATIONS:
        return ask_relation(kind, needles)
    needle = needles[0]
    top, left = needle.appearance.corners[0]
    half = SIDE // 2
    questions = {
        "what": (f"Which digit is on the {needle.colour} box?", str(needle.digit)),
        "when": (f"When does the {needle.colour} box appear?", QUARTERS[needle.appearance.start * 4 // num_frames]),
        "where": (f"Where is the {needle.colour} box?", QUADRANTS[top // half * 2 + left // half]),
        "how many": ("How many boxes appear?", COUNTS[len(needles)]),
        "which colour": (f"Which colour is the box with the digit {needle.digit}?", needle.colour),
    }
    return questions[kind]


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Write frames [F, H, W, 3] uint8 to a video file, repeated and enlarged."""
    enlarged = frames.repeat(_HOLD, axis=0).repeat(_UPSCALE, axis=1).repeat(_UPSCALE, axis=2)
    write_video(path, enlarged, Fraction(FPS * _HOLD), crf=18)


def _check(split: str, seed: int, index: int, num_frames: int | None) -> None:
    if split not in (*SPLITS, *HARDER_SPLITS):
        raise ValueError(f"generate_sample: split must be one of {', '.join((*SPLITS, *HARDER_SPLITS))}, got {split!r}")
    check_count("generate_sample", "seed", seed, 0)
    check_count("generate_sample", "index", index, 0)
    if num_frames is not None:
        multiple = recipe_of(split).multiple
        check_count("generate_sample", "num_frames", num_frames, multiple)
        if num_frames % multiple:
            raise ValueError(f"generate_sample: num_frames must be a multiple of {multiple}, got {num_frames}")
