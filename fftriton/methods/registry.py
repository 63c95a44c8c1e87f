"""The names of methods and pruners. Importing this module imports no torch; a class is imported once it is needed.

A name is one of the tables below, in any case and with or without hyphens and underscores; the name of the class; the
name of an entry point of the group `fftriton.methods`, which holds Method classes of other distributions; or
MODULE:CLASS for any class that can be imported.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from functools import reduce
from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUP = "fftriton.methods"

METHODS = {
    "keep-all": "fftriton.methods.keep_all:KeepAll",
    "framefusion": "fftriton.methods.framefusion:FrameFusion",
    "fastv": "fftriton.methods.fastv:FastV",
    "streamingllm": "fftriton.methods.streaming_llm:StreamingLLM",
    "kvtp": "fftriton.methods.kvtp:KVTP",
    "uniformframes": "fftriton.methods.uniform_frames:UniformFrames",
    "temporalmerge": "fftriton.methods.temporal_merge:TemporalMerge",
    "evs": "fftriton.methods.evs:EVS",
    "vidcom2": "fftriton.methods.vidcom2:VidCom2",
    "dycoke": "fftriton.methods.dycoke:DyCoke",
    "visionzip": "fftriton.methods.visionzip:VisionZip",
    "flashvid": "fftriton.methods.flashvid:FlashVID",
    "fastvid": "fftriton.methods.fastvid:FastVID",
    "st-simdiff": "fftriton.methods.st_simdiff:STSimDiff",
    "anchors": "fftriton.methods.anchors:Anchors",
    "randomtokens": "fftriton.methods.random_tokens:RandomTokens",
}
PRUNERS = {
    "random": "fftriton.methods.pruners:RandomPruner",
    "topk": "fftriton.methods.pruners:TopKPruner",
    "prumerge": "fftriton.methods.pruners:PruMerge",
    "tome": "fftriton.methods.tome:ToMe",
    **{name: METHODS[name] for name in ("evs", "vidcom2", "dycoke", "visionzip")},  # how they choose within a frame
}
RELEVANCES = {"attention": "fftriton.methods.own_attention:OwnAttention"}
FORMER: dict[str, tuple[str, dict[str, Any]]] = {
    "merge-only": ("framefusion", {"stages": ("merge",)}),
    "prune-only": ("framefusion", {"stages": ("prune",)}),
    "prune-merge": ("framefusion", {"stages": ("prune", "merge")}),
}
"""Deprecated names: the method and the parameters that they stand for."""

_CHAIN = {"chain": "fftriton.methods.chain:Chain"}  # in dicts; texts have a plus
_TABLES = {"Method": METHODS | _CHAIN, "Pruner": PRUNERS, "OwnAttention": RELEVANCES}
_PARAMETERS = {"Method": "method", "Pruner": "pruner", "OwnAttention": "relevance"}


def names() -> list[str]:
    """The names of all methods: those of the package, then those of other distributions."""
    return [*METHODS, *sorted({point.name for point in entry_points(group=GROUP)} - METHODS.keys())]


def is_known(name: str) -> bool:
    """Whether a method has this name, other than as MODULE:CLASS."""
    return _path("Method", name) is not None or entry_point(GROUP, name) is not None or name in FORMER


def unfold(name: str, parameters: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A method's name and parameters, with a deprecated name replaced, which warns."""
    if name not in FORMER:
        return name, parameters
    present, implied = FORMER[name]
    stages = ",".join(implied["stages"])
    warnings.warn(
        f"the method {name!r} is deprecated: use '{present}:stages=({stages})'", DeprecationWarning, stacklevel=3
    )
    return present, implied | parameters


def find(kind: type, name: str) -> type:
    """The class of this name.

    Args:
        kind: Method or Pruner.
        name: see above.

    Raises:
        ValueError: there is no such class, or it cannot be imported.
    """
    parameter = _PARAMETERS[kind.__name__]
    path = _path(kind.__name__, name)
    point = entry_point(GROUP, name) if kind.__name__ == "Method" and path is None else None
    place = path or (point.value if point else name)
    if ":" not in place:
        raise ValueError(_unknown(kind, name))
    found = load(place, f"fftriton: {parameter}", name)
    if not isinstance(found, type) or not issubclass(found, kind):
        raise ValueError(f"fftriton: {parameter} must be a subclass of {kind.__name__}, got {name!r}, {found!r}")
    return found


def name_of(kind: type, cls: type) -> str:
    """The name by which `find` finds the class.

    Raises:
        TypeError: the class is defined inside a function, so that it cannot be imported.
    """
    own = f"{cls.__module__}:{cls.__qualname__}"
    if "<locals>" in own:
        raise TypeError(f"fftriton: a {_PARAMETERS[kind.__name__]} must be a class that can be imported, got {own}")
    places = {path: name for name, path in _TABLES[kind.__name__].items()}
    if kind.__name__ == "Method":
        places = {point.value: point.name for point in entry_points(group=GROUP)} | places
    return places.get(own, own)


def closest(word: str, choices: list[str]) -> str:
    """The end of an error message: the most similar of `choices`, if one is similar."""
    similar = difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {similar[0]!r}?)" if similar else ""


def _unknown(kind: type, name: str) -> str:
    known = names() if kind.__name__ == "Method" else list(_TABLES[kind.__name__])
    choices = ", ".join(map(repr, known))
    return (
        f"fftriton: {_PARAMETERS[kind.__name__]} must be one of {choices} or MODULE:CLASS, got {name!r}"
        f"{closest(_normal(name), known)}"
    )


def _path(kind: str, name: str) -> str | None:
    wanted = _normal(name)
    for key, path in _TABLES[kind].items():
        if wanted in (_normal(key), _normal(path.rpartition(":")[2])):
            return path
    return None


def entry_point(group: str, name: str) -> EntryPoint | None:
    """The entry point of this name, in any case and with or without hyphens and underscores."""
    wanted = _normal(name)
    return next((point for point in entry_points(group=group) if _normal(point.name) == wanted), None)


def load(place: str, owner: str, given: str) -> Any:
    """What is at MODULE:NAME.

    Args:
        place: MODULE:NAME, where NAME may have dots.
        owner: what the error message starts with.
        given: the name that it names.

    Raises:
        ValueError: it cannot be imported.
    """
    module, _, qualname = place.partition(":")
    try:
        return reduce(getattr, qualname.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two for names such as ".x"
        raise ValueError(f"{owner} must be a class that can be imported, got {given!r}: {error}") from error


def _normal(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
