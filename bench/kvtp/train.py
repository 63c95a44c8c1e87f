"""Trains the relevance predictor of KVTP: a SigLIP, all of it, and its context fusion head.

    python -m bench.kvtp.train triples.jsonl --checkpoint google/siglip-so400m-patch14-384 --out predictor

The loss is the paper's. A clip's logit z_c is the mean of its frames' logits, weighted by their softmax; with y_c its
relevance less the mean over the video's clips, the loss of a video is - sum over c of log sigmoid(z_c y_c). The
defaults are the authors': Adam, a learning rate of 1e-6 that falls linearly to 0, one triple per step, one epoch,
gradients clipped to a norm of 1. More triples per step are accumulated, one after the other.

`--precision bfloat16` computes in bf16 and keeps the weights in fp32: a step of 1e-6 is below the resolution of bf16
weights, which would stay as they are. `--checkpointing` computes the layers' activations anew in the backward pass.

Several processes share the triples of a step, and add up their gradients, so that the weights are those of one process:

    accelerate launch --num_processes 4 -m bench.kvtp.train triples.jsonl --batch-size 4 ...

`out` holds the last checkpoint, which `SiglipRelevance.from_pretrained` loads, and what training needs to resume: the
same command continues an interrupted training. `log.csv` has a row per checkpoint.

Source: KVTP, ICCV 2025, arXiv:2503.10742, section 3.2.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from accelerate.utils import broadcast, reduce
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from bench.kvtp.triples import Triple, read_triples
from fftriton.relevance import ContextFusion, SiglipRelevance, load_relevance
from fftriton.runtime.options import CommonOptions, with_options
from fftriton.runtime.processes import this_process, wait_for_all
from fftriton.runtime.terminal import working

STATE = "trainer.pt"
LOG = "log.csv"


class Head(str, Enum):
    """Which context fusion head is trained."""

    scaled = "scaled"
    unscaled = "unscaled"
    none = "none"


class Precision(str, Enum):
    """What products are computed in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        learning_rate: of Adam at the first step; it falls linearly to 0.
        epochs: passes over the triples.
        batch_size: triples per step, accumulated; those of all processes together.
        clip: frames of a clip.
        max_norm: that gradients are clipped to.
        seed: of the order of the triples.
        save_every: steps from one checkpoint to the next.
        precision: that products are computed in: "float32" or "bfloat16"; weights are fp32.
        checkpointing: whether the backward pass computes activations anew, which saves memory.
    """

    learning_rate: float = 1e-6
    epochs: int = 1
    batch_size: int = 1
    clip: int = 8
    max_norm: float = 1.0
    seed: int = 0
    save_every: int = 500
    precision: str = "float32"
    checkpointing: bool = False


def clip_logits(frames: Tensor, clip: int) -> Tensor:
    """[T] logits of frames -> [C] of clips, the last of which may be short: means, weighted by their softmax."""
    exists = F.pad(torch.ones_like(frames, dtype=torch.bool), (0, -len(frames) % clip)).view(-1, clip)
    frames = F.pad(frames, (0, -len(frames) % clip)).view(-1, clip)
    return (frames.masked_fill(~exists, float("-inf")).softmax(1) * frames).sum(1)


def relevance_loss(clips: Tensor, relevance: Tensor) -> Tensor:
    """[C] logits and labels of a video's clips -> the video's loss."""
    return -F.logsigmoid(clips * (relevance - relevance.mean())).sum()


def score_clips(relevance: SiglipRelevance, triple: Triple, clip: int) -> Tensor:
    """[C] logits, with gradients where they are enabled."""
    frames = triple.frames(clip)
    parts = [frames[low : low + relevance.batch_size] for low in range(0, len(frames), relevance.batch_size)]
    images = torch.cat([relevance.embed_images(relevance.pixels(part)) for part in parts])
    texts = relevance.embed_texts(relevance.chunks(triple.question))
    return clip_logits(relevance.logits(images, texts).amax(-1), clip)


@torch.no_grad()
def key_clip_auc(relevance: SiglipRelevance, triples: Sequence[Triple], clip: int) -> float:
    """How often a clip above its video's mean relevance is scored above one that is not; ties count half.

    Processes share the triples.
    """
    wins, pairs, process = 0.0, 0, this_process()
    for triple in triples[process.index :: process.count]:
        scores = score_clips(relevance, triple, clip).cpu()
        labels = torch.tensor(triple.relevance, dtype=torch.float32)
        key = labels > labels.mean()
        difference = scores[key][:, None] - scores[~key]
        wins += float((difference > 0).sum() + 0.5 * (difference == 0).sum())
        pairs += difference.numel()
    if process.count > 1:
        wins, pairs = reduce(torch.tensor([wins, pairs], device=relevance.model.device), "sum").tolist()
    if pairs == 0:
        raise ValueError("eval data must hold a video whose clips differ in relevance, got none")
    return wins / pairs


class Trainer:
    """Training that can stop anywhere and resume from its last checkpoint.

    Args:
        relevance: what to train. All processes get the weights of the first.
        triples: the data.
        recipe: how.
        out: folder of the checkpoint. If there is one already, training resumes from it.
        held_out: triples whose AUC is measured at every checkpoint.

    Raises:
        ValueError: `out` holds a checkpoint of another recipe or of other data, or a step has fewer triples than there
            are processes.
    """

    def __init__(
        self, relevance: SiglipRelevance, triples: Sequence[Triple], recipe: Recipe, out: Path,
        held_out: Sequence[Triple] = (),
    ) -> None:  # fmt: skip
        self.relevance, self.triples, self.recipe = relevance, triples, recipe
        self.out, self.held_out = out, held_out
        self.process = this_process()
        if recipe.batch_size < self.process.count:
            raise ValueError(
                f"batch_size must be at least the number of processes, which share the triples of a step, got "
                f"{recipe.batch_size} for {self.process.count}"
            )
        parts = [relevance.model] if relevance.head is None else [relevance.model, relevance.head]
        self.modules = nn.ModuleList(parts)
        self.optimizer = torch.optim.Adam(self.modules.parameters(), lr=recipe.learning_rate)
        if recipe.checkpointing:
            enable_checkpointing(relevance.model)
        self.step, self.rows = 0, []
        if (out / STATE).is_file():
            self._resume()
        for parameter in self.modules.parameters():
            broadcast(parameter.data)
        wait_for_all()  # nobody writes a checkpoint before all have looked for one

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        return self.recipe.epochs * -(-len(self.triples) // self.recipe.batch_size)

    def run(self, progress: Progress) -> list[dict[str, Any]]:
        """Train to the end. Returns the rows of the log, one per checkpoint."""
        task = progress.add_task("training", total=self.num_steps, completed=self.step)
        total, count = 0.0, 0
        if self.step == 0:
            self._note(float("nan"))
        while self.step < self.num_steps:
            total, count = total + self.train_step(), count + 1
            progress.update(task, completed=self.step, description=f"loss {total / count:.3f}")
            if self.step % self.recipe.save_every == 0 or self.step == self.num_steps:
                self._note(total / count)
                self._save()
                total, count = 0.0, 0
        return self.rows

    def train_step(self) -> float:
        """One step of the optimiser; the mean loss of its triples."""
        self.modules.train()
        batch = self._batch(self.step)
        total = 0.0
        for triple in batch[self.process.index :: self.process.count]:
            labels = torch.tensor(triple.relevance, dtype=torch.float32, device=self.relevance.model.device)
            with self._precision():
                clips = score_clips(self.relevance, triple, self.recipe.clip)
            loss = relevance_loss(clips.float(), labels) / len(batch)
            loss.backward()
            total += float(loss.detach())
        total = self._add_up(total)
        nn.utils.clip_grad_norm_(self.modules.parameters(), self.recipe.max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * (1 - self.step / self.num_steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.modules.eval()
        self.step += 1
        return total

    def _add_up(self, loss: float) -> float:
        """Add up gradients and losses of all processes; returns the loss."""
        if self.process.count == 1:
            return loss
        for parameter in self.modules.parameters():
            if parameter.grad is None:  # of a process that had no triple in this step
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = reduce(parameter.grad, "sum")
        return float(reduce(torch.tensor(loss, device=self.relevance.model.device), "sum"))

    def _precision(self) -> torch.autocast:
        device = self.relevance.model.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    def _batch(self, step: int) -> list[Triple]:
        """The triples of one step: the same ones whenever training was interrupted."""
        per_epoch = self.num_steps // self.recipe.epochs
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(self.triples), generator=torch.Generator().manual_seed(self.recipe.seed + epoch))
        size = self.recipe.batch_size
        return [self.triples[i] for i in order[place * size : (place + 1) * size].tolist()]

    def _note(self, loss: float) -> None:
        auc = key_clip_auc(self.relevance, self.held_out, self.recipe.clip) if self.held_out else float("nan")
        head = [] if self.relevance.head is None else self.relevance.head.log_temperature.tolist()
        self.rows.append({"step": self.step, "loss": loss, "key_clip_auc": auc, "log_temperature": json.dumps(head)})

    def _save(self) -> None:
        """Write a checkpoint beside the last one, then put it in its place; the first process does so."""
        if not self.process.is_main:
            return
        new = self.out.with_name(self.out.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        self.relevance.save_pretrained(new)
        torch.save(
            {"step": self.step, "optimizer": self.optimizer.state_dict(), "rows": self.rows, "of": self._identity()},
            new / STATE,
        )
        with open(new / LOG, "w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)
        shutil.rmtree(self.out, ignore_errors=True)
        new.rename(self.out)

    def _resume(self) -> None:
        state = torch.load(self.out / STATE, map_location=self.relevance.model.device, weights_only=True)
        if state["of"] != self._identity():
            raise ValueError(
                f"out must be empty or hold a checkpoint of the same recipe and data, got one of {state['of']} in "
                f"{self.out}"
            )
        saved = SiglipRelevance.from_pretrained(self.out)
        self.relevance.model.load_state_dict(saved.model.state_dict())
        if self.relevance.head is not None and saved.head is not None:
            self.relevance.head.load_state_dict(saved.head.state_dict())
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.rows = state["step"], state["rows"]

    def _identity(self) -> dict[str, Any]:
        """What a training must share with the checkpoint that it resumes from."""
        free = ("save_every", "checkpointing")
        recipe = {name: value for name, value in asdict(self.recipe).items() if name not in free}
        head = None if self.relevance.head is None else self.relevance.head.extra_repr()
        return recipe | {"triples": len(self.triples), "head": head}


def enable_checkpointing(model: Any) -> None:
    """Have the backward pass compute activations anew; transformers renamed the call in 5.24."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def progress_bar(quiet: bool = False) -> Progress:
    """On standard error, of the first process."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True, quiet=quiet or not this_process().is_main))


@with_options
def main(
    *,
    data: Annotated[Path, typer.Argument(help="Triples in JSONL.", exists=True, dir_okay=False)],
    checkpoint: Annotated[str, typer.Option(help="The SigLIP to start from: a folder or a name on the hub.")],
    out: Annotated[Path, typer.Option(help="Folder of the result; training resumes from a checkpoint in it.")],
    eval_data: Annotated[Path | None, typer.Option(help="Triples whose AUC is measured.", exists=True)] = None,
    head: Annotated[Head, typer.Option(help="Context fusion: with 1/sqrt(d), without, or none.")] = Head.scaled,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = Recipe.learning_rate,
    epochs: Annotated[int, typer.Option(min=1)] = Recipe.epochs,
    batch_size: Annotated[int, typer.Option(min=1, help="Triples per step.")] = Recipe.batch_size,
    clip: Annotated[int, typer.Option(min=1, help="Frames of a clip.")] = Recipe.clip,
    save_every: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = Recipe.save_every,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the triples.")] = 0,
    device: Annotated[str | None, typer.Option(help="A torch device (default: the process's GPU, if any).")] = None,
    precision: Annotated[Precision, typer.Option(help="Of products; weights are float32.")] = Precision.float32,
    checkpointing: Annotated[bool, typer.Option(help="Less memory, for a third more time.")] = False,
    common: CommonOptions,
) -> None:
    """Train a SigLIP and its context fusion head to tell the clips that a question is about."""
    resumes = f"The last checkpoint is in {out}: the same command resumes."
    with working(common.quiet, common.verbose, resumes):
        fusion = None if head is Head.none else ContextFusion(clip, scaled=head is Head.scaled)
        relevance = load_relevance(checkpoint, fusion)
        if head is Head.none:
            relevance.head = None
        wait_for_all()  # joins the processes
        own = f"cuda:{this_process().local_index}" if torch.cuda.is_available() else "cpu"
        relevance.to(device or own)
        recipe = Recipe(
            learning_rate, epochs, batch_size, clip, seed=seed, save_every=save_every, precision=precision.value,
            checkpointing=checkpointing,
        )  # fmt: skip
        held_out = read_triples(eval_data) if eval_data else []
        trainer = Trainer(relevance, read_triples(data), recipe, out, held_out)
        with progress_bar(common.quiet) as progress:
            rows = trainer.run(progress)
        wait_for_all()
        before, after = rows[0]["key_clip_auc"], rows[-1]["key_clip_auc"]
        console = Console(quiet=not this_process().is_main)
        console.print(f"{trainer.step} steps: key-clip AUC {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    typer.run(main)
