"""Record how the shipped model's answers change with the setting, for tests of `fftriton calibrate`.

    python -m bench.needle.calibrate --out bench/results/needle-calibrate.npz

Every sample of every split is answered with all tokens, under the controls of `fftriton calibrate` and in each setting,
many samples in one forward. The model answers in one token. Settings whose distributions overlap by less than .75 on
the first 60 samples, which nobody would recommend, are not run on the others: what was found repeats. The split
"unneeded" asks how many boxes appear in videos that show none: the model's answer does not depend on the video. The
samples of one forward share the random draws of the settings that draw.

The file has, for each split, arrays [settings, samples]: same, overlap, right; and "seconds" [settings], the median
time of a prefill of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

import fftriton
from fftriton.app.batch import collate
from fftriton.evaluate.agreement import compare_steps
from fftriton.evaluate.comparing import BLANK, CONTROLS, DENSE, RANDOM, Comparer, Question, blank_video
from fftriton.evaluate.plan import Setting
from fftriton.methods import KeepAll, RandomTokens
from fftriton.needle.samples import FPS, RECIPES, draw_video, generate_sample
from fftriton.runtime.answers import is_right
from fftriton.runtime.encoding import encoded_once
from fftriton.runtime.forcing import Steps
from fftriton.runtime.processing import Processor
from fftriton.runtime.provenance import commit, today
from fftriton.runtime.target import Target, to_model
from fftriton.runtime.video import Video

METHODS = ("framefusion", "fastv", "streamingllm", "uniformframes", "randomtokens")
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.2, 0.1)
SPLITS = ("easy", "hard", "blended", "real")
UNNEEDED = "unneeded"
FIELDS = {"same": np.bool_, "overlap": np.float32, "right": np.bool_}

_TOGETHER, _FIRST, _LEAST, _TIMED = 20, 60, 0.75, 12


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


class Recorder:
    """Answers questions together.

    Args:
        target: the model.
    """

    def __init__(self, target: Target) -> None:
        self.model, self.processor = target.load_model(), target.load_processor()
        self.layers = self.model.config.get_text_config().num_hidden_layers

    @torch.no_grad()
    def answer(self, asked: list[Question], ways: list[Setting]) -> dict[Setting, list[tuple[bool, float, bool]]]:
        """For each setting and question: same, overlap, right."""
        inputs = self._inputs(asked)
        with encoded_once(self.model):
            dense = self._logits(inputs, DENSE, 0)
            return {
                way: self._compare(
                    asked,
                    dense,
                    self._logits(self._inputs(map(blank_video, asked)), DENSE, 0)
                    if way == BLANK
                    else self._logits(inputs, way, asked[0].seed),
                )
                for way in ways
            }

    def _inputs(self, asked: Any) -> dict[str, Tensor]:
        prompts = [self.processor(question.video, question.text) for question in asked]
        return to_model(collate(prompts, self.processor.tokenizer.pad_token_id), self.model)

    def _logits(self, inputs: dict[str, Tensor], way: Setting, seed: int) -> Tensor:
        """The logits [B, V] of the first token."""
        method = KeepAll() if way == DENSE else RandomTokens(RANDOM.budget, seed) if way == RANDOM else way.method(seed)
        with fftriton.reduce(self.model, method):
            return self.model(**inputs, logits_to_keep=1).logits[:, -1].float()

    def _compare(self, asked: list[Question], dense: Tensor, reduced: Tensor) -> list[tuple[bool, float, bool]]:
        found = []
        for question, p, q in zip(asked, dense.split(1), reduced.split(1), strict=True):
            own, other = (Steps(logits.argmax(-1), logits, logits) for logits in (p, q))
            agreement = compare_steps(own, other)
            answer = self.processor.tokenizer.decode(other.tokens)
            right = question.is_right is not None and question.is_right(answer)
            found.append((agreement.same, agreement.overlap, right))
        return found


def record(split: str, samples: int, recorder: Recorder) -> dict[str, np.ndarray]:
    """Arrays [settings, samples] of a split, by field."""
    ways = settings(recorder.layers)
    found: dict[Setting, list[tuple[bool, float, bool]]] = {setting: [] for setting in ways}
    every = list(questions(split, samples, recorder.processor))
    for start in range(0, samples, _TOGETHER):
        for setting, own in recorder.answer(every[start : start + _TOGETHER], ways).items():
            found[setting] += own
        if start + _TOGETHER == _FIRST:
            overlaps = {setting: np.mean([overlap for _, overlap, _ in found[setting]]) for setting in ways}
            ways = [setting for setting in ways if setting in CONTROLS or overlaps[setting] >= _LEAST]
        print(f"{split}: {min(start + _TOGETHER, samples)} of {samples}, {len(ways)} settings", flush=True)
    return {
        name: np.array([np.resize([one[place] for one in own], samples) for own in found.values()], kind)
        for place, (name, kind) in enumerate(FIELDS.items())
    }


def times(recorder: Recorder) -> np.ndarray:
    """Median seconds of a prefill [settings], one sample at a time."""
    ways = dict.fromkeys(settings(recorder.layers), "")
    comparer, seconds = Comparer(recorder.model, 1), []
    for question in questions(SPLITS[0], _TIMED, recorder.processor):
        with encoded_once(recorder.model):
            seconds.append([record.seconds for record in comparer.compare(question, ways)])
    return np.median(seconds, axis=0)


def main(
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("needle-calibrate.npz"),
    samples: Annotated[int, typer.Option(help="Samples of each split.")] = 200,
    unneeded: Annotated[int, typer.Option(help="Samples whose question does not need the video.")] = 60,
) -> None:
    """Record all splits."""
    target = Target()
    torch.set_num_threads(target.threads)
    recorder = Recorder(target)
    names = [(setting.name, setting.budget) for setting in settings(recorder.layers)]
    arrays: dict[str, np.ndarray] = {
        "methods": np.array([name for name, _ in names]),
        "budgets": np.array([budget for _, budget in names]),
        "seconds": times(recorder),
        "origin": np.array(f"commit {commit()}, {today()}, torch {torch.__version__}"),
    }
    for split in (UNNEEDED, *SPLITS):
        own = record(split, unneeded if split == UNNEEDED else samples, recorder)
        arrays |= {f"{split}/{name}": values for name, values in own.items()}
        np.savez_compressed(out, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    typer.run(main)
