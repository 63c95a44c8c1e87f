"""Planted relevance: videos in which each question is about one clip, and a small SigLIP that knows nothing yet.

Every clip shows a square of one colour on noise, in half of its frames; the question asks for a colour. The colours of
the other clips are distractors, so that a predictor has to read the question.

    python -m bench.kvtp.planted planted
    python -m bench.kvtp.train planted/train.jsonl --eval-data planted/held-out.jsonl --checkpoint planted/siglip \\
        --out planted/predictor --learning-rate 1e-3 --epochs 2
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from bench.kvtp.small import small_siglip
from bench.kvtp.triples import Triple, write_triples

COLOURS = {
    "red": (230, 25, 25), "green": (25, 200, 25), "blue": (40, 50, 240), "yellow": (230, 220, 25),
    "white": (240, 240, 240), "black": (10, 10, 10),
}  # fmt: skip
QUESTIONS = ("when does the {} square appear", "where is the {} square", "what happens around the {} square")
WORDS = " ".join([*QUESTIONS, *COLOURS]).replace("{}", "").split()
KEY = 5  # relevance of the clip that is asked about

_SIDE = 32


def planted_video(clips: int, clip: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """[clips * clip, 32, 32, 3] uint8 and the colour that each clip shows, all different."""
    colours = rng.permutation(list(COLOURS))[:clips].tolist()
    frames = rng.integers(60, 190, (clips * clip, _SIDE // 4, _SIDE // 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
    for number, colour in enumerate(colours):
        for frame in number * clip + rng.permutation(clip)[: max(1, clip // 2)]:
            top, left = rng.integers(0, _SIDE - 12, 2)
            frames[frame, top : top + 12, left : left + 12] = COLOURS[colour]
    return frames.astype(np.uint8), colours


def write_planted(path: Path, videos: int, clips: int, clip: int, seed: int, show: bool = False) -> list[Triple]:
    """Write videos and their triples, one question each, as `path` and a folder of its name."""
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    triples = []
    for number in track(range(videos), path.name, console=Console(stderr=True), disable=not show):
        frames, colours = planted_video(clips, clip, rng)
        file = folder / f"{number:05}.npy"
        np.save(file, frames)
        key = int(rng.integers(clips))
        question = QUESTIONS[rng.integers(len(QUESTIONS))].format(colours[key])
        triples.append(Triple(file, question, tuple(KEY * (other == key) for other in range(clips))))
    write_triples(path, triples)
    return triples


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the data and the model.")],
    videos: Annotated[int, typer.Option(min=1, help="To train on; a fifth as many are held out.")] = 800,
    clips: Annotated[int, typer.Option(min=2, max=len(COLOURS), help="Clips of a video.")] = 4,
    clip: Annotated[int, typer.Option(min=1, help="Frames of a clip.")] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write the data and a small SigLIP with random weights."""
    write_planted(out / "train.jsonl", videos, clips, clip, seed, show=True)
    write_planted(out / "held-out.jsonl", -(-videos // 5), clips, clip, seed + 1, show=True)
    small_siglip(WORDS, side=_SIDE, seed=seed).save_pretrained(out / "siglip")


if __name__ == "__main__":
    typer.run(main)
