"""The needle task for the relevance predictor: a small SigLIP that can read digits and boxes, and triples.

A SigLIP with random weights does not learn to read handwriting from a few hundred labelled videos, so it is aligned
first, as SigLIP checkpoints are before KVTP sees them: single frames against all questions that the task knows, by
SigLIP's own sigmoid loss. The triples then come from videos of the task; handwriting is never one that is held out.

    python -m bench.kvtp.needle needle
    python -m bench.kvtp.train needle/train.jsonl --eval-data needle/held-out.jsonl --checkpoint needle/siglip \\
        --out needle/predictor --learning-rate 1e-5 --clip 2
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from bench.kvtp.small import small_siglip
from bench.kvtp.train import progress_bar
from bench.kvtp.triples import Triple, write_triples
from fftriton.needle import generate_sample
from fftriton.needle.needles import Appearance, Needle, add_needle
from fftriton.needle.scenes import GRID, SIDE, add_flashes, textured_scenes
from fftriton.needle.vocabulary import COLOURS
from fftriton.relevance import SiglipRelevance

ABOUT_COLOURS = ("Which digit is on the {} box?", "When does the {} box appear?", "Where is the {} box?")
ABOUT_DIGITS = "Which colour is the box with the digit {}?"
ABOUT_ALL = "How many boxes appear?"
WORDS = " ".join((*ABOUT_COLOURS, ABOUT_DIGITS, ABOUT_ALL, *COLOURS, *"0123456789")).replace("?", " ? ").split()
KEY = 5  # relevance of a clip that shows the needle

_PATCH = SIDE // GRID
_NOISE = 0.02  # of the sensor, as in the task's videos
_SMOOTHING = 0.02  # pairs count as 0.98 or 0.02 of a match, which is a logit of +-3.9


class Stills:
    """Frames of the task's scenes with up to four needles pasted on, and which questions each has to do with.

    Args:
        held_out: True for the handwritings that training never sees.
        seed: of everything.
    """

    def __init__(self, held_out: bool, seed: int) -> None:
        self.held_out, self.rng = held_out, np.random.default_rng([seed, held_out])
        scenes = [textured_scenes(16, (0.0, 3.0), 0.3, self.rng) for _ in range(100)]
        for scene in scenes:
            add_flashes(scene, 20, self.rng)
        self.scenes = np.concatenate(scenes)

    def draw(self, count: int) -> tuple[np.ndarray, list[str], Tensor]:
        """[N, H, W, 3] uint8 frames, Q questions, and [N, Q] bool: whether the frame shows what is asked about."""
        rng = self.rng
        frames = self.scenes[rng.integers(0, len(self.scenes), count)].copy()
        shows = np.zeros((count, len(COLOURS) + 10 + 1), dtype=bool)
        for frame in range(count):
            for patch in rng.permutation(GRID * GRID)[: rng.integers(0, 5)]:
                digit, colour = int(rng.integers(10)), int(rng.integers(len(COLOURS)))
                corner = int(patch) // GRID * _PATCH, int(patch) % GRID * _PATCH
                needle = Needle(digit, COLOURS[colour], Appearance(frame, (corner,), (1.0,)))
                add_needle(frames, needle, self.held_out, rng)
                shows[frame, [colour, len(COLOURS) + digit, -1]] = True
        noisy = frames + _NOISE * rng.standard_normal(frames.shape, dtype=np.float32)
        pixels = (noisy.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
        about_colours = [str(rng.choice(ABOUT_COLOURS)).format(colour) for colour in COLOURS]
        questions = [*about_colours, *(ABOUT_DIGITS.format(digit) for digit in range(10)), ABOUT_ALL]
        return pixels, questions, torch.from_numpy(shows)


def align(relevance: SiglipRelevance, steps: int, size: int, rate: float, seed: int) -> None:
    """Train on stills by SigLIP's loss, a binary cross entropy summed over all pairs, with smoothed labels."""
    stills, model = Stills(False, seed), relevance.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    with progress_bar() as progress:
        task = progress.add_task("aligning", total=steps)
        for _ in range(steps):
            frames, questions, shows = stills.draw(size)
            images = relevance.embed_images(relevance.pixels(frames))
            logits = relevance.logits(images, relevance.embed_texts([question.lower() for question in questions]))
            labels = torch.where(shows, 1 - _SMOOTHING, _SMOOTHING)
            loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update(task, advance=1, description=f"aligning, loss {float(loss.detach()):.3f}")
    model.eval()


@torch.no_grad()
def still_auc(relevance: SiglipRelevance, count: int, seed: int) -> dict[str, float]:
    """How often a frame that shows what is asked about is scored above one that does not, in unseen handwritings."""
    frames, questions, shows = Stills(True, seed).draw(count)
    logits = relevance.logits(
        relevance.encode(frames, progress=False), relevance.embed_texts([q.lower() for q in questions])
    )
    wins = torch.stack(
        [(z[show][:, None] > z[~show]).double().mean() for z, show in zip(logits.T, shows.T, strict=True)]
    )
    colours, digits, every = wins.split([len(COLOURS), 10, 1])
    return {"colour": float(colours.mean()), "digit": float(digits.mean()), "any": float(every)}


def write_samples(path: Path, videos: int, clip: int, held_out: bool, seed: int) -> list[Triple]:
    """Write videos of the task's easy split as triples; a clip is relevant where it shows the needle asked about."""
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    triples = []
    for index in track(range(videos), path.name, console=Console(stderr=True)):
        sample = generate_sample("easy", seed, index, held_out=held_out)
        file = folder / f"{index:05}.npy"
        np.save(file, sample.frames)
        shown = np.isin(np.arange(len(sample.frames)), sample.needle_frames).reshape(-1, clip).any(1)
        triples.append(Triple(file, sample.question, tuple(KEY * int(key) for key in shown)))
    write_triples(path, triples)
    return triples


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the data and the model.")],
    steps: Annotated[int, typer.Option(min=1, help="Of the alignment.")] = 4000,
    videos: Annotated[int, typer.Option(min=1, help="To train on; a fifth as many are held out.")] = 600,
    clip: Annotated[int, typer.Option(min=1, help="Frames of a clip, a divisor of 16.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Evaluation uses another one: 0 is that of fftriton eval.")] = 7,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Align a small SigLIP with random weights and write the triples."""
    torch.set_num_threads(threads)
    relevance = small_siglip(WORDS, side=SIDE, patch=_PATCH, width=128, depth=3, longest=16, seed=seed)
    align(relevance, steps, 64, 1e-3, seed)
    auc = still_auc(relevance, 1000, seed)
    Console().print("AUC on held-out stills: " + ", ".join(f"{name} {value:.3f}" for name, value in auc.items()))
    relevance.save_pretrained(out / "siglip")
    write_samples(out / "train.jsonl", videos, clip, held_out=False, seed=seed)
    write_samples(out / "held-out.jsonl", -(-videos // 5), clip, held_out=True, seed=seed)


if __name__ == "__main__":
    typer.run(main)
