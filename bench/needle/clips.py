"""Videos with a digit hidden in them: the data of the needle model.

A video is a panned noise texture with rectangles and a moving disc, cut into one to three scenes, under sensor noise.
A needle is a handwritten digit on a coloured box that fills one patch for one or two frames. What can be asked about
it, and the answer, follow from where it stands. Digits: scikit-learn's, every fourth image held out from training.

Needs torch and scikit-learn, not transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Generator, Tensor
from vocabulary import COLOURS, COUNTS, QUADRANTS, QUARTERS

GRID = 4  # patches along a side
PATCH = 16  # pixels along a patch's side
SIDE = GRID * PATCH

_CANVAS = 128  # pixels along the texture's side, over which the camera pans
_RGB = dict(zip(COLOURS, ((0.9, 0.1, 0.1), (0.1, 0.8, 0.1), (0.15, 0.2, 0.95), (0.9, 0.85, 0.1)), strict=True))


@dataclass(frozen=True)
class Needle:
    """One digit on one coloured box: where and when.

    Attributes:
        digit: 0 to 9.
        colour: one of COLOURS.
        cell: the patch it fills, 0 to GRID * GRID - 1, in raster order.
        start: its first frame.
        duration: frames it stays, 1 or 2.
    """

    digit: int
    colour: str
    cell: int
    start: int
    duration: int = 2


def digit_images(held_out: bool) -> tuple[Tensor, Tensor]:
    """Handwritten digits at patch size.

    Args:
        held_out: True for the quarter that training never sees, False for the rest.

    Returns:
        images [N, PATCH, PATCH] float32 in [0, 1], labels [N] int64.
    """
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    images = F.interpolate(images, size=(PATCH, PATCH), mode="bilinear")[:, 0]
    chosen = (torch.arange(len(labels)) % 4 == 0) == held_out
    return images[chosen], torch.tensor(labels)[chosen]


def make_video(num_frames: int, needles: list[Needle], generator: Generator, noise: float = 0.02) -> Tensor:
    """Draw a video with these needles in it, with held-out digits.

    Args:
        num_frames: F, at least 4.
        needles: what to hide.
        generator: every random choice comes from it.
        noise: standard deviation of the sensor noise.

    Returns:
        [F, SIDE, SIDE, 3] uint8.
    """
    video = _background(num_frames, generator)
    images, labels = digit_images(held_out=True)
    for needle in needles:
        candidates = images[labels == needle.digit]
        image = candidates[int(torch.randint(len(candidates), (1,), generator=generator))]
        row, column = (PATCH * i for i in divmod(needle.cell, GRID))
        frames = slice(needle.start, needle.start + needle.duration)
        video[frames, :, row : row + PATCH, column : column + PATCH] = _sticker(image, needle.colour, generator)
    video += noise * torch.randn(video.shape, generator=generator)
    return (video.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def questions(num_frames: int, needles: list[Needle]) -> list[tuple[str, str]]:
    """Every question about the first needle, and how many there are, each with its answer."""
    needle = needles[0]
    row, column = divmod(needle.cell, GRID)
    return [
        (f"Which digit is on the {needle.colour} box?", str(needle.digit)),
        (f"When does the {needle.colour} box appear?", QUARTERS[needle.start * 4 // num_frames]),
        (f"Where is the {needle.colour} box?", QUADRANTS[row * 2 // GRID * 2 + column * 2 // GRID]),
        ("How many boxes appear?", COUNTS[len(needles)]),
        (f"Which colour is the box with the digit {needle.digit}?", needle.colour),
    ]


def _sticker(image: Tensor, colour: str, generator: Generator) -> Tensor:
    """A white digit [PATCH, PATCH] on a box of this colour, slightly varied -> [3, PATCH, PATCH]."""
    box = torch.tensor(_RGB[colour]) * (0.8 + 0.2 * torch.rand(1, generator=generator))
    box = box + 0.06 * (torch.rand(3, generator=generator) - 0.5)
    ink = image * (0.85 + 0.15 * torch.rand(1, generator=generator))
    return box[:, None, None] * (1 - ink) + ink


def _background(num_frames: int, generator: Generator) -> Tensor:
    """One to three scenes under one panning camera, with a disc that crosses them -> [F, 3, SIDE, SIDE]."""
    num_scenes = int(torch.randint(1, 4, (1,), generator=generator))
    cuts = torch.randint(2, num_frames - 1, (num_scenes - 1,), generator=generator)
    scenes = torch.stack([_scene(generator) for _ in range(num_scenes)])
    speed = (torch.rand(2, generator=generator) * 2 - 1) * 1.2
    origin = 32 + (torch.rand(2, generator=generator) * 2 - 1) * 8
    frames = []
    for frame in range(num_frames):
        top, left = (origin + speed * frame).round().long().clamp(0, _CANVAS - SIDE).tolist()
        scene = scenes[int((cuts <= frame).sum())]
        frames.append(scene[:, top : top + SIDE, left : left + SIDE])
    return _add_disc(torch.stack(frames), generator)


def _scene(generator: Generator) -> Tensor:
    """Coarse colour noise, fine grey noise, three rectangles -> [3, _CANVAS, _CANVAS]."""

    def smooth_noise(channels: int, cells: int) -> Tensor:
        noise = torch.rand(1, channels, cells, cells, generator=generator)
        return F.interpolate(noise, size=(_CANVAS, _CANVAS), mode="bilinear", align_corners=True)[0]

    scene = smooth_noise(3, 7) * 0.8 + 0.1 + 0.35 * (smooth_noise(1, 24) - 0.5)
    for _ in range(3):
        top, left, height, width = torch.randint(0, _CANVAS, (4,), generator=generator).tolist()
        colour = torch.rand(3, 1, 1, generator=generator)
        scene[:, top : top + height % 40 + 8, left : left + width % 40 + 8] = colour
    return scene.clamp(0, 1)


def _add_disc(video: Tensor, generator: Generator) -> Tensor:
    """A disc of one colour that moves in a straight line over [F, 3, SIDE, SIDE]."""
    start = torch.rand(2, generator=generator) * SIDE
    velocity = (torch.rand(2, generator=generator) * 2 - 1) * 3
    radius = 6 + 6 * torch.rand(1, generator=generator)
    centre = start + velocity * torch.arange(len(video))[:, None]  # [F, 2]
    pixel = torch.arange(SIDE)
    rows, columns = pixel - centre[:, :1], pixel - centre[:, 1:]  # [F, SIDE] each
    inside = rows[:, :, None] ** 2 + columns[:, None, :] ** 2 < radius**2
    return torch.where(inside[:, None], torch.rand(3, 1, 1, generator=generator), video)
