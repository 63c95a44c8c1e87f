"""What `--settings FILE` chooses: the method, the budget, and the frames that they were measured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..methods.settings import read_settings
from ..runtime.sampling import Sampling
from ..runtime.target import Target


@dataclass(frozen=True)
class Chosen:
    """The method and what goes with it.

    Attributes:
        method, budget: as for `fftriton run`.
        sampling, max_pixels: which frames to take, and their size.
        notes: how this differs from what was measured.
    """

    method: str
    budget: float
    sampling: Sampling
    max_pixels: int | None
    notes: tuple[str, ...] = ()


def choose(
    settings: Path, given: Mapping[str, bool], target: Target, sampling: Sampling, max_pixels: int | None
) -> Chosen:
    """Take the method and the budget from a file of settings, and the frames unless other options choose them.

    Args:
        settings: the file.
        given: for "method" and "budget", whether the command names them, too.
        target: the model.
        sampling, max_pixels: what the command says of the frames.

    Raises:
        TypeError, ValueError: the file cannot be used, or the command names a method or a budget.
    """
    twice = [name for name in ("method", "budget") if given[name]]
    if twice:
        raise ValueError(f"{twice[0]} must come from --settings or from --{twice[0]}, not from both, got '{settings}'")
    read = read_settings(settings)
    measured = read.measured
    own, pixels = sampling, max_pixels
    if own == Sampling():
        own = _sampling(measured.get("sampling"), settings)
    if pixels is None:
        pixels = measured.get("max_pixels")
    answers = measured.get("answers")
    dtype = answers.get("dtype") if isinstance(answers, Mapping) else None
    now: dict[str, tuple[Any, Any]] = {
        "model": (measured.get("model"), target.name),
        "dtype": (dtype, str(target.torch_dtype())),
        "sampling": (measured.get("sampling"), asdict(own)),
        "max_pixels": (measured.get("max_pixels"), pixels),
    }
    notes = [
        f"{settings} was measured with {name} {before}, not {after}: its agreement is not known to hold here."
        for name, (before, after) in now.items()
        if before != after and (before is not None or (name == "max_pixels" and name in measured))
    ]
    return Chosen(read.method, read.budget, own, pixels, tuple(notes))


def _sampling(described: Any, settings: Path) -> Sampling:
    try:
        return Sampling(**described) if described is not None else Sampling()
    except TypeError as error:
        raise ValueError(f"settings must hold a sampling of frames, got {described!r} in '{settings}'") from error
