"""Train the needle model from scratch, and measure it on videos and handwritings that training never saw.

    python -m bench.needle.train --out needle-run [--device cuda]
    python -m bench.needle.train --out needle-harder-run --course harder

The second starts with the weights of the model that ships and learns the harder splits.
An interrupted run resumes from its last checkpoint, and ends with the same weights. The model, with its
processor files, lands in OUT/model, the course of training in OUT/training.csv, its accuracy in OUT/accuracy.csv.
"""

from __future__ import annotations

import csv
import inspect
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2VLForConditionalGeneration
from transformers.utils import ModelOutput

from bench.needle.batches import (
    NO_DIGIT,
    PATCHES,
    AlignmentBatches,
    Frames,
    HarderBatches,
    Length,
    QuestionBatches,
    Questions,
)
from bench.needle.model import batch_frames, make_harder_model, make_model, save_model
from fftriton.checks import check_choice
from fftriton.needle import HARDER_SPLITS, SPLITS, Sample, generate_sample
from fftriton.needle.needles import Style, blended, brief, covered, faded_in, moved, small
from fftriton.needle.samples import HARDER_KINDS, HARDER_RECIPES, RECIPES, Recipe, recipe_of
from fftriton.needle.scenes import GRID
from fftriton.needle.vocabulary import COLOURS, DIGITS, HARDER_IDS, IDS, QUADRANTS, VISION_START
from fftriton.runtime.processing import Processor, load_processor
from fftriton.runtime.shipped import BUNNY

_CHECKPOINT_EVERY = 50  # steps

BUSY = Recipe(speed=(0.0, 3.0), flashes=(0, 12))
_MIXED = (
    BUSY,
    RECIPES["hard"],
    Recipe(styles=(covered, blended, faded_in, moved), speed=(0.0, 3.0), flashes=(0, 12)),
)


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own data and learning rate.

    Attributes:
        name: as shown.
        steps: how many.
        data: makes its batches from the seed of the training and the phase's number.
        loss: of the model on a batch, and which of its answers are right.
        rate: highest learning rate.
        decay: weight decay of matrices.
        betas: of AdamW.
        warm_up: steps until the rate is reached.
        hold: share of the steps before it falls, as a cosine, to 2 %.
        stop: the step to end at, of a phase that is planned for more; 0 for its last.
        sees: whether the vision tower learns; else the decoder does, and the embeddings always.
    """

    name: str
    steps: int
    data: Callable[[int, int], Dataset]
    loss: Callable[[Qwen2VLForConditionalGeneration, Any], tuple[Tensor, Tensor]]
    rate: float = 1e-3
    decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    warm_up: int = 100
    hold: float = 0.0
    stop: int = 0
    sees: bool = False

    @property
    def last(self) -> int:
        """The step that it ends with."""
        return self.stop or self.steps

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        fallen = max(0.0, step / self.steps - self.hold) / max(1 - self.hold, 1 / self.steps)
        return self.rate * min(1.0, (step + 1) / self.warm_up) * (0.02 + 0.49 * (1 + math.cos(math.pi * fallen)))


def align(model: Qwen2VLForConditionalGeneration, batch: Frames) -> tuple[Tensor, Tensor]:
    """Pull what the vision tower makes of a patch towards the embeddings of its digit, its colour and its quadrant."""
    grid = torch.tensor([[len(batch.digit), GRID, GRID]], device=batch.pixels.device)
    seen = model.model.visual(batch.pixels, grid_thw=grid)
    tokens = getattr(seen, "pooler_output", seen).view(len(batch.digit), PATCHES, -1)  # a tensor until transformers 5
    embeddings = model.get_input_embeddings().weight

    def scores(names: tuple[str, ...]) -> Tensor:
        return (tokens @ embeddings[[IDS[name] for name in names]].T).float()  # [N, PATCHES, len(names)]

    shown = batch.digit != NO_DIGIT
    patch = torch.arange(PATCHES, device=shown.device)
    quadrant = (patch // GRID // (GRID // 2) * 2 + patch % GRID // (GRID // 2)).expand(len(shown), -1)
    digits, colours, quadrants = scores(DIGITS), scores((*COLOURS, VISION_START)), scores(QUADRANTS)
    loss = (
        F.cross_entropy(digits[shown], batch.digit[shown])
        + F.cross_entropy(colours.flatten(0, 1), batch.colour.flatten())
        + 0.5 * F.cross_entropy(quadrants[shown], quadrant[shown])
    )
    return loss, digits[shown].argmax(-1) == batch.digit[shown]


def answer(model: Qwen2VLForConditionalGeneration, batch: Questions) -> tuple[Tensor, Tensor]:
    """The answers' loss, and which are right [B, Q]."""
    logits = question_logits(model, batch)
    return F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten()), logits.argmax(-1) == batch.answers


def answer_in_steps(model: Qwen2VLForConditionalGeneration, batch: Questions) -> tuple[Tensor, Tensor]:
    """`answer`, and on the way what a relation is made of, or comparing digits is hardly learnt at all.

    After half of the layers, the digit of a box where a question names it; after three quarters, both digits at the end
    of a question that names two boxes.
    """
    seen = _see(model, batch, output_hidden_states=True)

    def loss(layers: int, at: Tensor, tokens: Tensor) -> Tensor:
        hidden = model.model.language_model.norm(seen.hidden_states[layers][:, at])
        return F.cross_entropy(model.lm_head(hidden).float().flatten(0, 1), tokens.flatten())

    question = torch.searchsorted(batch.asked_at, batch.named_at)
    of_two = question.bincount()[question] == 2
    layers = model.config.get_text_config().num_hidden_layers
    steps = loss(layers // 2, batch.named_at, batch.named)
    steps = steps + loss(layers * 3 // 4, batch.asked_at[question[of_two]], batch.named[:, of_two])
    logits = model.lm_head(seen.last_hidden_state[:, batch.asked_at]).float()
    return steps + F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten()), logits.argmax(-1) == batch.answers


def question_logits(model: Qwen2VLForConditionalGeneration, batch: Questions) -> Tensor:
    """For the token after each question: [B, Q, vocabulary] float32."""
    return model.lm_head(_see(model, batch).last_hidden_state[:, batch.asked_at]).float()


def _see(model: Qwen2VLForConditionalGeneration, batch: Questions, **kwargs: bool) -> ModelOutput:
    """What the decoder makes of the videos and the questions behind them."""
    return model.model(
        input_ids=batch.input_ids,
        attention_mask=batch.mask.expand(len(batch.input_ids), -1, -1, -1),
        position_ids=batch.positions,
        pixel_values_videos=batch.pixels,
        video_grid_thw=batch.grid,
        use_cache=False,
        **kwargs,
    )


def asking(recipes: tuple[Recipe, ...], lengths: tuple[Length, ...], resume_after: tuple[str, ...]) -> Callable:
    """Makes the batches of a phase that asks eight questions a video; the parameters are those of QuestionBatches."""
    return lambda seed, phase: QuestionBatches(seed, phase, recipes, lengths, 8, resume_after)


PHASES = (
    Phase(
        "See what a patch shows",
        1200,
        lambda seed, phase: AlignmentBatches(seed, 64),
        align,
        rate=2e-3,
        decay=0.02,
        betas=(0.9, 0.999),
        warm_up=50,
        sees=True,
    ),
    Phase(
        "Find it in 4 frames",
        300,
        asking((Recipe(needles=(2, 3), speed=(0.0, 3.0)),), (Length(4, 32),), ("space",)),
        answer,
        hold=1.0,
    ),
    Phase("Find it in 16 frames", 1150, asking((BUSY,), (Length(16, 16),), ("space",)), answer, warm_up=20, hold=0.1),
    Phase(
        "Find it anywhere",
        1200,
        asking(_MIXED, (Length(16, 16, 0.45), Length(32, 8, 0.3), Length(64, 4, 0.25)), ("space", "time")),
        answer,
        rate=7e-4,
    ),
)


@dataclass(frozen=True)
class Course:
    """What makes one model: where it starts, how it is trained, and the splits that it is measured on.

    Attributes:
        phases: what to do, in this order.
        splits: of the same kinds of question.
        make: the model to start with, from the seed.
        vocabulary: its tokens' ids.
    """

    phases: tuple[Phase, ...]
    splits: tuple[str, ...]
    make: Callable[[int], Qwen2VLForConditionalGeneration] = make_model
    vocabulary: Mapping[str, int] = field(default_factory=lambda: IDS)


MIXED = ("what", "when", *("after", "same") * 5)
COMPARING = ("what", *("when",) * 2, *("after",) * 3, *("same",) * 6)
BALANCED = ("what", *("when",) * 3, *("after",) * 4, *("same",) * 4)


def relating(
    styles: tuple[Style, ...],
    lengths: tuple[Length, ...],
    recipes: tuple[Recipe, ...] = (),
    needles: tuple[int, int] = (3, 4),
    kinds: tuple[str, ...] = MIXED,
    two_digits: float = 0.0,
) -> Callable:
    """Makes the batches of a phase that asks how needles are related, in textured scenes beside these recipes."""
    busy = Recipe(needles=needles, styles=styles, speed=(0.0, 3.0), flashes=(0, 12), kinds=HARDER_KINDS)
    ways = ("space", "time")
    return lambda seed, phase: HarderBatches(seed, phase, (busy, *recipes), lengths, kinds, ways, two_digits)


def _seeing(name: str, steps: int, rate: float) -> Phase:
    """A phase of small needles, too."""

    def data(seed: int, phase: int) -> Dataset:
        return AlignmentBatches(seed, 64, small=0.6, faint=0.1, phase=phase)

    return Phase(name, steps, data, align, rate=rate, decay=0.02, betas=(0.9, 0.999), warm_up=50, sees=True)


_ANYWHERE = ((covered, small, brief), (Length(16, 8, 0.5), Length(64, 2, 0.25), Length(128, 1, 0.25)))
_IN_8_FRAMES = (Length(8, 12),)

HARDER_PHASES = (
    _seeing("See small needles, too", 800, 2e-3),
    Phase("Relate in 8 frames", 600, relating((covered, small), _IN_8_FRAMES), answer, warm_up=50, hold=1.0),
    _seeing("See small needles better", 1000, 1.5e-3),
    Phase("Relate 2 or 3", 700, relating((covered,), _IN_8_FRAMES, (), (2, 3)), answer, warm_up=50, hold=1.0),
    Phase("Relate 3 or 4", 600, relating((covered, small), _IN_8_FRAMES), answer, warm_up=20, hold=1.0),
    Phase("Relate in 16 frames", 600, relating((covered, small), (Length(16, 8),)), answer, warm_up=20, hold=1.0),
    Phase("Relate in all", 1500, relating(*_ANYWHERE, (HARDER_RECIPES["brief"],)), answer, stop=100),
    _seeing("See small needles best", 800, 1e-3),
    Phase(
        "Compare in 8 frames",
        300,
        relating((covered,), _IN_8_FRAMES, kinds=COMPARING, two_digits=0.8),
        answer_in_steps,
        rate=2e-3,
        warm_up=20,
        hold=1.0,
    ),
    Phase(
        "Relate anywhere",
        1200,
        relating(*_ANYWHERE, (HARDER_RECIPES["brief"],), kinds=BALANCED, two_digits=0.5),
        answer_in_steps,
        warm_up=20,
        hold=0.3,
    ),
)

COURSES = {
    "needle": Course(PHASES, SPLITS),
    "harder": Course(HARDER_PHASES, HARDER_SPLITS, make_harder_model, HARDER_IDS),
}


class Trainer:
    """Trains one model, from its last checkpoint if there is one.

    Args:
        out: folder of the checkpoint and the results.
        phases: what to do, in this order.
        seed: fixes the weights to start from and all data.
        device: where to train.
        workers: processes that draw batches; 0 draws them here. The batches are the same.
        checkpoint_every: steps from one checkpoint, and one row of the log, to the next.
        on_step: called after each step with the phase's number, the step's, the loss and the share of right answers.
        make: the model to start with, from the seed.
        bf16: whether to compute in bfloat16 where autocast does.

    Attributes:
        model: as trained so far.
        phase: the number of the phase to continue with.
        log: a row every few steps.
    """

    def __init__(
        self,
        out: Path,
        phases: tuple[Phase, ...] = PHASES,
        seed: int = 0,
        device: str = "cpu",
        workers: int = 0,
        checkpoint_every: int = _CHECKPOINT_EVERY,
        on_step: Callable[[int, int, float, float], None] = lambda *_: None,
        make: Callable[[int], Qwen2VLForConditionalGeneration] = make_model,
        bf16: bool = True,
    ):
        self._out, self._phases, self._seed, self._workers, self._on_step = out, phases, seed, workers, on_step
        self._checkpoint_every, self._bf16 = checkpoint_every, bf16
        self._device = torch.device(device)
        self.model = make(seed).to(self._device).train()
        batch_frames(self.model)
        self.log: list[dict[str, Any]] = []
        self.phase = self._step = 0
        self._seconds = self._cpu_seconds = 0.0  # spent by earlier runs
        self._optimizer_state: dict[str, Any] | None = None
        self._start, self._cpu_start = time.monotonic(), _cpu_seconds()
        if self._checkpoint.exists():
            self._load()

    @property
    def _checkpoint(self) -> Path:
        return self._out / "checkpoint.pt"

    def run(self) -> None:
        """Do what is left of the phases."""
        while self.phase < len(self._phases):
            self._run_phase(self._phases[self.phase])
            self.phase, self._step = self.phase + 1, 0
            self._save(None)

    def _run_phase(self, phase: Phase) -> None:
        trained = self._choose_parameters(phase)
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": phase.decay},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=phase.rate, betas=phase.betas, fused=True)
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
            self._optimizer_state = None
        losses, rights = [], []
        for batch in self._batches(phase):
            for group in optimizer.param_groups:
                group["lr"] = phase.rate_at(self._step)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                loss, right = phase.loss(self.model, batch.to(self._device))
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self._step += 1
            losses.append(loss.item())
            rights.append(right.float().mean().item())
            self._on_step(self.phase, self._step, losses[-1], rights[-1])
            if self._step % self._checkpoint_every == 0 or self._step == phase.last:
                self._add_row(phase, fmean(losses), fmean(rights))
                losses, rights = [], []
                self._save(optimizer)

    def _choose_parameters(self, phase: Phase) -> list[nn.Parameter]:
        """Freeze all but what this phase trains."""
        vision = set(self.model.model.visual.parameters())
        embeddings = self.model.get_input_embeddings().weight
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter is embeddings or (parameter in vision) == phase.sees)
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _batches(self, phase: Phase) -> DataLoader:
        data = phase.data(self._seed, self.phase)
        steps = range(self._step, phase.last)
        return DataLoader(data, batch_size=None, sampler=steps, num_workers=self._workers)

    def _add_row(self, phase: Phase, loss: float, right: float) -> None:
        row = {"phase": phase.name, "step": self._step, "loss": f"{loss:.4f}", "right": f"{right:.4f}"}
        spent = {"seconds": self._spent()[0], "cpu_seconds": self._spent()[1]}
        self.log.append(row | {name: f"{value:.1f}" for name, value in spent.items()})
        write_csv(self._out / "training.csv", self.log)

    def _spent(self) -> tuple[float, float]:
        """Seconds on the clock and of the processors, over all runs."""
        seconds = self._seconds + time.monotonic() - self._start
        return seconds, self._cpu_seconds + _cpu_seconds() - self._cpu_start

    def _save(self, optimizer: torch.optim.Optimizer | None) -> None:
        content = {
            "seed": self._seed,
            "phase": self.phase,
            "step": self._step,
            "spent": self._spent(),
            "log": self.log,
            "model": self.model.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
        }
        self._out.mkdir(parents=True, exist_ok=True)
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(content, partial)
        partial.replace(self._checkpoint)

    def _load(self) -> None:
        content = torch.load(self._checkpoint, map_location=self._device, weights_only=True)
        if content["seed"] != self._seed:
            raise ValueError(f"seed must be that of the checkpoint in {self._out}, {content['seed']}, got {self._seed}")
        self.phase, self._step, self.log = content["phase"], content["step"], content["log"]
        self._seconds, self._cpu_seconds = content["spent"]
        self._optimizer_state = content["optimizer"]
        self.model.load_state_dict(content["model"])


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of the same columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@torch.no_grad()
def answers(model: Qwen2VLForConditionalGeneration, processor: Processor, samples: list[Sample]) -> list[str]:
    """The model's answers to samples, from its plain forward with all tokens; equally long prompts go together."""
    inputs = [processor(sample.video, sample.question) for sample in samples]
    known = inspect.signature(model.forward).parameters
    by_length: dict[int, list[int]] = {}
    for index, one in enumerate(inputs):
        by_length.setdefault(one["input_ids"].shape[1], []).append(index)
    found = {}
    for indices in by_length.values():
        names = [name for name in inputs[0] if name in known]
        batch = {name: torch.cat([inputs[index][name] for index in indices]).to(model.device) for name in names}
        tokens = model(**batch, logits_to_keep=1).logits[:, -1].argmax(-1)
        found |= zip(indices, tokens.tolist(), strict=True)
    return [processor.tokenizer.decode([found[index]]) for index in range(len(samples))]


def measure(
    checkpoint: Path,
    split: str,
    samples: int,
    seed: int,
    device: str,
    clips: tuple[Path, ...] = (BUNNY.path,),
    on_samples: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Share of held-out samples answered right with all tokens, over all kinds and of each."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).to(device).eval()
    processor = load_processor(checkpoint)
    kinds = recipe_of(split).kinds
    asked, right = Counter[str](), Counter[str]()
    for start in range(0, samples, len(kinds)):  # samples are equally long until a kind comes up again
        indices = range(start, min(start + len(kinds), samples))
        batch = [generate_sample(split, seed, index, clips=clips) for index in indices]
        for sample, text in zip(batch, answers(model, processor, batch), strict=True):
            asked[sample.kind] += 1
            right[sample.kind] += text == sample.answer
        on_samples(len(batch))
    shares = {kind: f"{right[kind] / asked[kind]:.4f}" for kind in kinds if asked[kind]}
    return {"split": split, "samples": samples, "seed": seed, "all": f"{right.total() / asked.total():.4f}"} | shares


def _cpu_seconds() -> float:
    """Of this process and its finished workers."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description:24}"), BarColumn(bar_width=30), MofNCompleteColumn())
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, the model and its figures.")] = Path("needle-run"),
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Fixes the first weights and all training data.", min=0)] = 0,
    workers: Annotated[int, typer.Option(help="Processes that draw batches; 0: none of their own.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Processor threads of torch; 0: torch's own choice.", min=0)] = 0,
    samples: Annotated[int, typer.Option(help="Held-out samples of each split at the end.", min=1)] = 1000,
    samples_seed: Annotated[int, typer.Option(help="Which held-out samples.", min=0)] = 0,
    clip: Annotated[list[Path] | None, typer.Option(help="Real clips to measure on; else the one that ships.")] = None,
    course: Annotated[str, typer.Option(help="needle, or harder for the model of the harder splits.")] = "needle",
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16; slow on a CPU that does not have it.")] = True,
) -> None:
    """Train the needle model, or resume from the last checkpoint, then measure its accuracy."""
    check_choice("train", "course", course, tuple(COURSES))
    chosen = COURSES[course]
    clips = tuple(clip or (BUNNY.path,))
    if threads:
        torch.set_num_threads(threads)
    with _bars(Console()) as progress:
        bars = [progress.add_task(phase.name, total=phase.last, note="") for phase in chosen.phases]

        def on_step(phase: int, step: int, loss: float, right: float) -> None:
            progress.update(bars[phase], completed=step, note=f"loss {loss:.3f}, right {right:.0%}")

        trainer = Trainer(out, chosen.phases, seed, device, workers, on_step=on_step, make=chosen.make, bf16=bf16)
        for bar, phase in zip(bars[: trainer.phase], chosen.phases, strict=False):
            progress.update(bar, completed=phase.last)
        trainer.run()
        save_model(trainer.model, out / "model", chosen.vocabulary)
        rows = []
        for split in chosen.splits:
            bar = progress.add_task(f"Measure {split}", total=samples, note="")
            on_samples = partial(progress.advance, bar)
            rows.append(measure(out / "model", split, samples, samples_seed, device, clips, on_samples))
            progress.update(bar, note=f"right {float(rows[-1]['all']):.1%}")
            write_csv(out / "accuracy.csv", rows)


if __name__ == "__main__":
    typer.run(main)
