"""What per-frame budgets are worth when relevance is known with noise: recall of tokens in simulated videos.

In each trial, a few key frames hold needle tokens, and every other frame holds one context token. A token's salience is
normal noise, raised for needle tokens and more for context tokens; a frame's relevance is normal noise, raised by `gap`
for key frames. A policy gives each frame a count, and the most salient tokens of a frame are kept. Recall is the
fraction of the needle (context) tokens that are kept.

    uniform   the same count for every frame
    kvtp      frame_budgets of the relevance
    hard      whole frames, the most relevant first

With a gap of 0 relevance knows nothing of the key frames: the control.

Run: python -m bench.kvtp.simulate [--trials 200] [--gaps 4,0]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from fftriton import frame_budgets
from fftriton_kernels import segmented_topk_keep


@dataclass(frozen=True)
class Setting:
    """The simulated videos, and what is kept of them.

    Args:
        frames, patches: size of a video in tokens.
        key_frames: frames that hold the needle.
        needles: needle tokens in each of them.
        needle_salience, context_salience: what they have above the rest, in deviations of the noise.
        budget, temperature, min_tokens: as for `frame_budgets`.
    """

    frames: int = 128
    patches: int = 169
    key_frames: int = 8
    needles: int = 20
    needle_salience: float = 1.0
    context_salience: float = 3.0
    budget: float = 0.2
    temperature: float = 2.0
    min_tokens: int = 4


@dataclass(frozen=True)
class Recall:
    """Fractions of the needle and context tokens that were kept."""

    needle: float
    context: float


def simulate(setting: Setting, gap: float, trials: int, seed: int = 0) -> dict[str, Recall]:
    """The recall of each policy, over the same trials. gap: what key frames have in relevance above the others."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, list[Tensor]] = {}
    for _ in range(trials):
        key = torch.zeros(setting.frames, dtype=torch.bool)
        key[torch.randperm(setting.frames, generator=generator)[: setting.key_frames]] = True
        relevance = torch.randn(setting.frames, generator=generator) + gap * key
        salience = torch.randn(setting.frames, setting.patches, generator=generator)  # tokens come in no special order
        salience[key, : setting.needles] += setting.needle_salience
        salience[~key, 0] += setting.context_salience
        for policy, counts in allocations(setting, relevance).items():
            flags = keep(salience, counts)
            needle = flags[key, : setting.needles].double().mean()
            kept.setdefault(policy, []).append(torch.stack([needle, flags[~key, 0].double().mean()]))
    return {policy: Recall(*torch.stack(rows).mean(0).tolist()) for policy, rows in kept.items()}


def allocations(setting: Setting, relevance: Tensor) -> dict[str, Tensor]:
    """[F] relevance -> the counts [F] int64 of each policy; all spend the same budget, to the token."""
    patches, budget = setting.patches, setting.budget
    return {
        "uniform": frame_budgets(relevance, patches, budget, math.inf),
        "kvtp": frame_budgets(relevance, patches, budget, setting.temperature, setting.min_tokens),
        "hard": frame_budgets(relevance, patches, budget, temperature=1e-6, min_tokens=0),
    }


def keep(salience: Tensor, counts: Tensor) -> Tensor:
    """[F, P] salience, [F] counts -> [F, P] bool: the most salient of each frame."""
    frame = torch.arange(len(salience)).repeat_interleave(salience.shape[1])
    kept = segmented_topk_keep(salience.view(1, -1), frame[None], counts[None])
    return torch.zeros(salience.numel(), dtype=torch.bool).index_fill(0, kept[0], True).view_as(salience)


def main(
    trials: Annotated[int, typer.Option(min=1, help="Simulated videos for each gap.")] = 200,
    gaps: Annotated[str, typer.Option(help="What key frames have in relevance above the others.")] = "4,0",
    seed: Annotated[int, typer.Option(help="Seed of the videos.")] = 0,
) -> None:
    """Print the recall of each policy at each gap."""
    table = Table("gap", "policy", "needle recall", "context recall")
    for gap in track(list(map(float, gaps.split(","))), "simulating", console=Console(stderr=True)):
        for policy, recall in simulate(Setting(), gap, trials, seed).items():
            table.add_row(f"{gap:g}", policy, f"{recall.needle:.3f}", f"{recall.context:.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
