"""Training data of the relevance predictor: (video, question, relevance of each clip) triples in JSONL.

One line a triple, paths relative to the file:

    {"video": "clips/0001.mp4", "question": "When does she open the door?", "relevance": [0, 0, 4, 5, 0, 1]}

`relevance` has one number, 0 to 5, for each of as many equal stretches of the video. With `"frames": 43` it has one for
each clip of the 43 frames that are sampled, of which the last clip may have fewer. A `query` is read in place of the
question, with whose options it is often too long for SigLIP. A video is a file that FFmpeg reads, or frames in a NumPy
file: [T, H, W, 3] uint8. `python -m fftriton.labels` makes such lines from public data sets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fftriton.runtime.video import read_video


@dataclass(frozen=True)
class Triple:
    """One question about one video, and what each clip of it has to do with it.

    Args:
        video: the file.
        question: about it.
        relevance: of each clip, higher for more.
        num_frames: frames to sample, of which the last clip may have fewer; None for as many of each clip.
    """

    video: Path
    question: str
    relevance: tuple[float, ...]
    num_frames: int | None = None

    def frames(self, clip: int) -> np.ndarray:
        """[T, H, W, 3] uint8: as many frames of each clip, evenly spaced.

        With `num_frames` it is that many, and the last clip may be short.

        Raises:
            ValueError: a video that cannot be read, or none of [T, H, W, 3] uint8.
        """
        wanted = self.num_frames or clip * len(self.relevance)
        if -(-wanted // clip) != len(self.relevance):
            raise ValueError(
                f"relevance must have a number for each of the {-(-wanted // clip)} clips of {wanted} frames, got "
                f"{len(self.relevance)} for {self.video}"
            )
        frames = np.load(self.video) if self.video.suffix == ".npy" else read_video(self.video, wanted).frames
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
            raise ValueError(f"video must be [T, H, W, 3] uint8, got {frames.shape} of {frames.dtype} in {self.video}")
        return frames[(np.arange(wanted) * 2 + 1) * len(frames) // (2 * wanted)]  # repeats those of a short video


def read_triples(path: str | Path) -> list[Triple]:
    """All triples of a JSONL file.

    Raises:
        ValueError: a line that is none, by its number. OSError: no such file.
    """
    path, triples = Path(path), []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            triples.append(_parse(line, path, number))
    if not triples:
        raise ValueError(f"data must hold at least one triple, got none in {path}")
    return triples


def write_triples(path: str | Path, triples: Iterable[Triple]) -> None:
    """Write triples, with paths relative to the file's folder."""
    path = Path(path)
    lines = [
        json.dumps(
            {
                "video": str(triple.video.relative_to(path.parent)),
                "question": triple.question,
                "relevance": triple.relevance,
            }
            | ({} if triple.num_frames is None else {"frames": triple.num_frames})
        )
        for triple in triples
    ]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _parse(line: str, path: Path, number: int) -> Triple:
    where = f"line {number} of {path}"
    try:
        value = json.loads(line)
        video, relevance = value["video"], [float(label) for label in value["relevance"]]
        question = value["query"] if "query" in value else value["question"]
    except (ValueError, TypeError, KeyError) as error:
        rule = 'data must hold {"video", "question", "relevance"} in each line'
        raise ValueError(f"{rule}, got {error!r} in {where}") from None
    num_frames = value.get("frames")
    if num_frames is not None and (not isinstance(num_frames, int) or num_frames < 1):
        raise ValueError(f"frames must be an integer of at least 1, got {num_frames!r} in {where}")
    if not relevance or not all(map(math.isfinite, relevance)):
        raise ValueError(f"relevance must be finite numbers, one a clip, got {relevance} in {where}")
    if not str(question).strip():
        raise ValueError(f"question must not be empty, in {where}")
    if not (path.parent / video).is_file():
        raise ValueError(f"video must be a file, got '{video}' in {where}")
    return Triple(path.parent / video, question, tuple(relevance), num_frames)
