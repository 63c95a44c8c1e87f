"""Block sizes and warps of the kernels: a fixed table, and what `tune` has measured on the GPU at hand.

A call looks its tile up and never measures. A tile changes the order of sums, so results on two devices, or before and
after tuning, agree to rounding; two runs with one tile agree bit for bit.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.testing
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ._dispatch import block

_FORMAT = 2  # of the cache file
_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
_ANY = 1 << 62  # a width that covers every other


class Tile(NamedTuple):
    """How a kernel is launched. A block size that the op does not have is 0.

    Attributes:
        num_warps: of a program.
        num_stages: of its software pipeline.
        still: attention: the rows that a program holds, of queries when it sums rows and of keys when it sums columns.
        streamed: attention: the rows of the other side that it loads at a time.
        width: mean: the elements of a row that a program takes.
    """

    num_warps: int
    num_stages: int
    still: int = 0
    streamed: int = 0
    width: int = 0


_FP32 = (4, 256, Tile(16, 2, still=32, streamed=32))  # no tensor cores; more than one row per thread spills
_COSINE = ((2, 4096, Tile(4, 3)), (2, _ANY, Tile(8, 3)), (4, 4096, Tile(4, 3)), (4, _ANY, Tile(8, 3)))
_DEFAULT: dict[str, tuple[tuple[int, int, Tile], ...]] = {  # (element size, width up to which, tile): the first counts
    "attention": ((2, 128, Tile(4, 2, still=128, streamed=64)), (2, 256, Tile(8, 2, still=64, streamed=64)), _FP32),
    "cosine": _COSINE,
    "strided_cosine": _COSINE,
    "mean": ((2, _ANY, Tile(4, 3, width=1024)), (4, _ANY, Tile(4, 3, width=1024))),
}
_ATTENTION = {  # where the default spills registers
    "sm100": ((2, 128, Tile(8, 2, still=128, streamed=64)), (2, 256, Tile(8, 2, still=64, streamed=64)), _FP32),
    "sm120": ((2, 64, Tile(4, 3, still=128, streamed=64)), *_DEFAULT["attention"]),
    "gfx942": (
        (2, 128, Tile(8, 2, still=128, streamed=64)),
        (2, 256, Tile(8, 2, still=64, streamed=64)),
        (4, 256, Tile(8, 2, still=32, streamed=32)),
    ),
}
_SM90 = {  # measured on an H200, D = 3584
    "cosine": ((2, 4096, Tile(2, 3)), *_COSINE[1:]),
    "mean": ((2, _ANY, Tile(2, 3, width=512)), *_DEFAULT["mean"][1:]),
}
TABLE = {"default": _DEFAULT, "sm90": _DEFAULT | _SM90} | {
    family: _DEFAULT | {"attention": rows} for family, rows in _ATTENTION.items()
}
"""Tiles by family, op, element size and width. A family without an entry takes the default one."""


@dataclass
class _Trial:
    """Tiles that stand in for those of the table, and the keys that a call has asked for, with their candidates."""

    forced: dict[str, Tile] = field(default_factory=dict)
    asked: dict[str, tuple[Tile, ...]] = field(default_factory=dict)


_TRIAL: ContextVar[_Trial | None] = ContextVar("fftriton_trial", default=None)


def lookup(op: str, x: Tensor, width: int) -> Tile:
    """The tile for rows of `width` elements like those of x: forced by a trial, tuned, or from the table."""
    trial = _TRIAL.get()
    if trial is None:
        return _settled(op, x.device, x.element_size(), width)
    key = _key(op, x.device, x.element_size(), width)
    trial.asked[key] = candidates(op, x.element_size())
    return trial.forced.get(key) or _settled(op, x.device, x.element_size(), width)


@cache
def _settled(op: str, device: torch.device, size: int, width: int) -> Tile:
    """The tile outside a trial, which costs time to find."""
    name, family = _device(device)
    tuned = _tuned().get(_key(op, device, size, width)) if name else None
    return tuned or next(tile for bytes_, most, tile in _rows(family, op) if bytes_ == size and width <= most)


def _key(op: str, device: torch.device, size: int, width: int) -> str:
    return f"{_device(device)[0]}|triton {triton.__version__}|{op}|{size}|{block(width, 1)}"


def lanes(x: Tensor, columns: int) -> dict[str, int]:
    """How the matrix units of x's device spread a row of `columns` sums over threads, those of other warps included.

    Returns:
        LANES: how many threads share a row. RUN: how many neighbours a thread holds.
    """
    family = _device(x.device)[1]
    if family.startswith("sm10"):  # tcgen05, two groups of warps
        return {"LANES": 2, "RUN": columns // 2}
    return {"LANES": 4 if family == "sm90" else 8, "RUN": 2}  # wgmma gives whole rows to a warp, mma.sync half ones


def registers(x: Tensor, tile: Tile) -> dict[str, int]:
    """A bound that lets three programs share a multiprocessor, where the compiler would take a few registers more."""
    few = _device(x.device)[1] == "sm90" and tile.num_warps == 4 and _TRITON >= (3, 6)  # older ones would spill many
    return {"maxnreg": 168} if few else {}


def candidates(op: str, size: int) -> tuple[Tile, ...]:
    """The tiles that `tune` tries, and the only ones that a cache file may hold."""
    if op == "attention" and size == 4:
        return tuple(Tile(warps, 2, still=32, streamed=32) for warps in (8, 16))
    if op == "attention":
        return tuple(
            Tile(warps, stages, still, streamed)
            for still, streamed, warps, stages in product((64, 128), (32, 64), (4, 8), (2, 3))
        )
    widths = {"cosine": (0,), "strided_cosine": (0,), "mean": (512, 1024, 2048)}
    return tuple(Tile(warps, 3, width=width) for width in widths[op] for warps in (2, 4, 8))


def tune(op: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Tile]:
    """Measure which tiles are fastest for a call on this GPU. Later calls, and later processes, use them.

    Calls `op(*arguments, **options)` many times. The best tiles are saved in a JSON file: the one that
    `$FFTRITON_TILES` names, or else `fftriton/tiles.json` in `$XDG_CACHE_HOME` (`~/.cache` if unset). A process reads
    it once. A tile is used on GPUs of the same name with the same Triton, for the same element size and for widths that
    round up to the same power of two.

    Args:
        op: a public op of this library, such as `attention_column_sum`, or any function that calls some.
        *arguments: its arguments: tensors of the usual shapes and dtypes, on the GPU.
        **options: its keyword arguments.

    Returns:
        The best tile for each key that the call looked up; empty for an op without a choice of tiles.

    Raises:
        RuntimeError: there is no GPU to measure on, or no tile of an op runs on it.
    """
    if not _has_gpu():
        raise RuntimeError("tune: needs an NVIDIA or AMD GPU to measure on, got none")
    run = partial(op, *arguments, **options)
    with trial({}) as attempt:
        run()
        for key, tiles in list(attempt.asked.items()):
            times = {tile: _time(run, attempt, key, tile) for tile in tiles}
            attempt.forced[key] = min(times, key=times.__getitem__)
            if times[attempt.forced[key]] == float("inf"):
                raise RuntimeError(f"tune: no tile runs on this GPU for {key}")
    _save(attempt.forced)
    return attempt.forced


@contextmanager
def trial(forced: dict[str, Tile]) -> Iterator[_Trial]:
    """Inside the block, lookups of the given keys give the given tiles, and all are noted."""
    attempt = _Trial(dict(forced))
    token = _TRIAL.set(attempt)
    try:
        yield attempt
    finally:
        _TRIAL.reset(token)


def cache_file() -> Path:
    """Where tuned tiles are kept."""
    if named := os.environ.get("FFTRITON_TILES"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fftriton" / "tiles.json"


def _rows(family: str, op: str) -> tuple[tuple[int, int, Tile], ...]:
    return TABLE.get(family, _DEFAULT)[op]


def _device(device: torch.device) -> tuple[str, str]:
    """Name and family of a GPU; no name in the interpreter."""
    return _gpu(device.index) if device.type == "cuda" else ("", "default")


@cache
def _gpu(index: int) -> tuple[str, str]:
    name = torch.cuda.get_device_name(index)
    if torch.version.hip:
        return name, torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return name, f"sm{major}{minor}"


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _milliseconds(run: Callable[[], Any]) -> float:
    return triton.testing.do_bench(run, return_mode="median")


def _time(run: Callable[[], Any], attempt: _Trial, key: str, tile: Tile) -> float:
    """Milliseconds of a call with this tile, infinite where it does not fit on the GPU."""
    attempt.forced[key] = tile
    try:
        return _milliseconds(run)
    except OutOfResources:
        return float("inf")


@cache
def _tuned() -> dict[str, Tile]:
    """The tiles in the cache file; none, with a warning, where it holds anything else."""
    path = cache_file()
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}")
        tiles = {}
        for key, entry in content["tiles"].items():
            tile = Tile(**entry)
            op, size = key.split("|")[2:4]
            if tile not in candidates(op, int(size)):
                raise ValueError(f"{tile} of {key}")
            tiles[key] = tile
        return tiles
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"fftriton_kernels: {path} holds no tiles of this version, ignored ({error})", stacklevel=4)
        return {}


def _save(tiles: dict[str, Tile]) -> None:
    """Add to the cache file; a process that reads it meanwhile sees all of it, old or new."""
    path = cache_file()
    entries = {key: tile._asdict() for key, tile in (_tuned() | tiles).items()}
    content = {"format": _FORMAT, "tiles": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)
    _tuned.cache_clear()
    _settled.cache_clear()
