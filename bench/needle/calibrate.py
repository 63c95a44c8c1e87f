"""Record how the shipped model's answers change with the setting, for tests of `fftriton calibrate`.

    python -m bench.needle.calibrate --out bench/results/needle-calibrate.npz

Every sample of every split is answered with all tokens, under the controls of `fftriton calibrate` and in each setting.
Settings whose distributions overlap by less than .75 on the first 50 samples, which nobody would recommend, are not run
on the others: what was found repeats. The split "unneeded" asks how many boxes appear in videos that show none: the
model's answer does not depend on the video. The file has, for each split, arrays of settings x samples: same, overlap,
right, seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from fftriton.evaluate.calibration import Comparison
from fftriton.evaluate.comparing import CONTROLS, DENSE, Comparer, Question
from fftriton.evaluate.plan import Setting
from fftriton.needle.samples import FPS, RECIPES, draw_video, generate_sample
from fftriton.runtime.answers import is_right
from fftriton.runtime.encoding import encoded_once
from fftriton.runtime.processing import Processor
from fftriton.runtime.provenance import commit, today
from fftriton.runtime.target import Target
from fftriton.runtime.video import Video

METHODS = ("framefusion", "fastv", "streamingllm", "uniformframes", "randomtokens")
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.2, 0.1)
SPLITS = ("easy", "hard", "blended", "real")
UNNEEDED = "unneeded"
FIELDS = {"same": np.bool_, "overlap": np.float32, "right": np.bool_, "seconds": np.float32}

_FIRST, _LEAST = 50, 0.75


def settings(layers: int) -> list[Setting]:
    """The dense model, the controls, and every setting that can work."""
    every = [Setting(method, budget) for method in METHODS for budget in BUDGETS]
    return [DENSE, *CONTROLS, *(setting for setting in every if setting.problem(layers) is None)]


def questions(split: str, samples: int, processor: Processor) -> Iterator[Question]:
    """The questions of a split."""
    for index in range(samples):
        if split == UNNEEDED:
            rng = np.random.default_rng(index)
            frames = draw_video(RECIPES["easy"], 16, [], True, rng)
            video = Video(frames, list(range(len(frames))), len(frames), float(FPS))
            yield Question(str(index), video, "How many boxes appear?", processor)
            continue
        sample = generate_sample(split, 1, index)  # the seed of training's own tests is 0

        def right(answer: str, expected: str = sample.answer) -> bool:
            return is_right(answer, expected)

        yield Question(str(index), sample.video, sample.question, processor, right)


def record(split: str, samples: int, target: Target) -> dict[str, np.ndarray]:
    """Arrays [settings, samples] of a split, by field."""
    model, processor = target.load_model(), target.load_processor()
    ways = dict.fromkeys(settings(model.config.get_text_config().num_hidden_layers), "")
    comparer = Comparer(model, target.answer_length(model))
    found: dict[Setting, list[Comparison]] = {setting: [] for setting in ways}
    for number, question in enumerate(questions(split, samples, processor), 1):
        with encoded_once(model):
            for setting, one in zip(ways, comparer.compare(question, ways), strict=True):
                if one.error is not None:
                    raise RuntimeError(f"{split}, sample {question.index}, {setting}: {one.error}")
                found[setting].append(one)
        if number == _FIRST:
            hopeless = {s for s in ways if np.mean([one.overlap for one in found[s]]) < _LEAST} - {*CONTROLS}
            ways = {setting: key for setting, key in ways.items() if setting not in hopeless}
        if number % 20 == 0:
            print(f"{split}: {number} of {samples}, {len(ways)} settings", flush=True)
    return {
        name: np.array([np.resize([getattr(one, name) for one in own], samples) for own in found.values()], kind)
        for name, kind in FIELDS.items()
    }


def main(
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("needle-calibrate.npz"),
    samples: Annotated[int, typer.Option(help="Samples of each split.")] = 200,
    unneeded: Annotated[int, typer.Option(help="Samples whose question does not need the video.")] = 60,
) -> None:
    """Record all splits."""
    target = Target()
    torch.set_num_threads(target.threads)
    names = [(s.name, s.budget) for s in settings(target.load_config().get_text_config().num_hidden_layers)]
    arrays: dict[str, np.ndarray] = {
        "methods": np.array([name for name, _ in names]),
        "budgets": np.array([budget for _, budget in names]),
        "origin": np.array(f"commit {commit()}, {today()}, torch {torch.__version__}"),
    }
    for split in (UNNEEDED, *SPLITS):
        own = record(split, unneeded if split == UNNEEDED else samples, target)
        arrays |= {f"{split}/{name}": values for name, values in own.items()}
        np.savez_compressed(out, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    typer.run(main)
