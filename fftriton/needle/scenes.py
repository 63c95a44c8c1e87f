"""Backgrounds of the needles: textured scenes under a moving camera, or excerpts of real clips."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ..runtime.video import read_video
from .digits import PATCH
from .resize import resize

GRID = 4  # patches along a side
SIDE = GRID * PATCH  # pixels along a frame's side

_CANVAS = 128  # pixels along the side of the texture over which the camera pans
_CLIP_HEIGHT = 80  # height in pixels to which a real clip is scaled before frames are cut out
_MAX_STRIDE = 3  # maximum step in frames of a real clip between two frames of the video


def textured_scenes(num_frames: int, speed: tuple[float, float], still: float, rng: np.random.Generator) -> np.ndarray:
    """Draw one to three textures under one panning camera, with a moving disc.

    Args:
        num_frames: F.
        speed: minimum and maximum pixels per frame that the camera moves along each axis.
        still: probability that the camera does not move.
        rng: source of all random choices.

    Returns:
        [F, 3, SIDE, SIDE] float32 in [0, 1].
    """
    scene_of_frame = _cut(num_frames, rng)
    textures = [_texture(rng) for _ in range(scene_of_frame[-1] + 1)]
    velocity = rng.uniform(*speed, 2) * rng.choice([-1, 1], 2) * (rng.random() >= still)
    path = rng.uniform(24, 40, 2) + velocity * np.arange(num_frames)[:, None]  # [F, 2]
    corners = _bounce(path, _CANVAS - SIDE).round().astype(int)
    frames = [
        textures[scene][:, top : top + SIDE, left : left + SIDE]
        for scene, (top, left) in zip(scene_of_frame, corners, strict=True)
    ]
    return _add_disc(np.stack(frames), rng)


def real_scenes(
    num_frames: int, clips: tuple[Path, ...], rng: np.random.Generator, speed: tuple[float, float] | None = None
) -> np.ndarray:
    """Cut one to three excerpts from real clips: a window of SIDE pixels, played forward and, at the end, backward.

    Args:
        num_frames: F.
        clips: video files to cut from.
        rng: source of all random choices.
        speed: minimum and maximum pixels per frame that the window moves along each axis; None: it stands still.

    Returns:
        [F, 3, SIDE, SIDE] float32 in [0, 1].

    Raises:
        ValueError: a clip cannot be read.
    """
    scene_of_frame = _cut(num_frames, rng)
    parts = []
    for scene in range(scene_of_frame[-1] + 1):
        clip = _load_clip(clips[rng.integers(len(clips))])
        stride = rng.integers(1, _MAX_STRIDE + 1)
        times = rng.integers(len(clip)) + stride * np.arange((scene_of_frame == scene).sum())
        top, left = (rng.integers(size - SIDE + 1) for size in clip.shape[2:])
        played = clip[_bounce(times, len(clip) - 1)]
        if speed is None:
            parts.append(played[:, :, top : top + SIDE, left : left + SIDE])
        else:
            parts.append(_pan(played, (top, left), rng.uniform(*speed, 2) * rng.choice([-1, 1], 2)))
    return np.concatenate(parts).astype(np.float32) / 255


def add_flashes(video: np.ndarray, count: int, rng: np.random.Generator) -> None:
    """Put coarse random noise into `count` patches of a video [F, 3, SIDE, SIDE], each for one frame, in place."""
    for frame, row, column in zip(*(rng.integers(0, n, count) for n in (len(video), GRID, GRID)), strict=True):
        noise = rng.random((3, 4, 4), dtype=np.float32).repeat(PATCH // 4, axis=1).repeat(PATCH // 4, axis=2)
        video[frame, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = noise


def _pan(frames: np.ndarray, start: tuple[int, int], velocity: np.ndarray) -> np.ndarray:
    """The window of SIDE pixels that moves over frames [F, 3, H, W] and turns back at their edges."""
    limits = [size - SIDE for size in frames.shape[2:]]
    path = np.array(start) + velocity * np.arange(len(frames))[:, None]  # [F, 2]
    rows, columns = (
        _bounce(along, limit).round().astype(int) if limit else np.zeros(len(frames), int)
        for along, limit in zip(path.T, limits, strict=True)
    )
    windows = zip(frames, rows, columns, strict=True)
    return np.stack([frame[:, top : top + SIDE, left : left + SIDE] for frame, top, left in windows])


def _cut(num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """The scene of each frame, [F] int from 0, for one to three scenes (fewer in shorter videos)."""
    cuts = rng.integers(2, max(3, num_frames - 1), rng.integers(0, 3))
    cuts = np.unique(cuts[cuts < num_frames])
    return (np.arange(num_frames)[:, None] >= cuts).sum(1)


def _bounce(position: np.ndarray, limit: int) -> np.ndarray:
    """Fold positions into [0, limit], like a ball between two walls."""
    return limit - np.abs(position % (2 * limit) - limit)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """A texture of coarse colour noise, fine grey noise and three rectangles: [3, _CANVAS, _CANVAS] float32."""

    def smooth_noise(channels: int, cells: int) -> np.ndarray:
        noise = torch.from_numpy(rng.random((1, channels, cells, cells), dtype=np.float32))
        return resize(noise, (_CANVAS, _CANVAS), "bilinear", align_corners=True)[0].numpy()

    texture = smooth_noise(3, 7) * 0.8 + 0.1 + 0.35 * (smooth_noise(1, 24) - 0.5)
    for _ in range(3):
        top, left = rng.integers(0, _CANVAS, 2)
        height, width = rng.integers(8, 48, 2)
        texture[:, top : top + height, left : left + width] = rng.random((3, 1, 1), dtype=np.float32)
    return texture.clip(0, 1)


def _add_disc(video: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a disc of one colour that moves in a straight line over a video [F, 3, SIDE, SIDE]."""
    start, velocity, radius = rng.uniform(0, SIDE, 2), rng.uniform(-3, 3, 2), rng.uniform(6, 12)
    centre = start + velocity * np.arange(len(video))[:, None]  # [F, 2]
    pixel = np.arange(SIDE)
    rows, columns = pixel - centre[:, :1], pixel - centre[:, 1:]  # [F, SIDE] each
    inside = rows[:, :, None] ** 2 + columns[:, None, :] ** 2 < radius**2
    return np.where(inside[:, None], rng.random((3, 1, 1), dtype=np.float32), video)


@lru_cache
def _load_clip(path: Path) -> np.ndarray:
    """All frames of a clip, scaled: [T, 3, _CLIP_HEIGHT, W] uint8."""
    frames = torch.from_numpy(read_video(path, 10**9).frames).permute(0, 3, 1, 2)
    height, width = frames.shape[2:]
    size = (_CLIP_HEIGHT, max(SIDE, round(width * _CLIP_HEIGHT / height)))
    return torch.cat([resize(frame[None].float(), size, "area") for frame in frames]).byte().numpy()
