"""Checks of what users pass: each error names the owner, the parameter, the rule and the value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any


def check_real(owner: str, name: str, value: Any, low: float, high: float) -> None:
    """Raise unless `value` is a number in [low, high]."""
    if not _is_number(value):
        raise TypeError(f"{owner}: {name} must be a number in [{low}, {high}], got {value!r}")
    if not low <= value <= high:  # False for nan
        raise ValueError(f"{owner}: {name} must be in [{low}, {high}], got {value}")


def check_budget(owner: str, name: str, value: Any) -> None:
    """Raise unless `value` is a fraction in (0, 1]."""
    if not _is_number(value):
        raise TypeError(f"{owner}: {name} must be a number in (0, 1], got {value!r}")
    if not 0 < value <= 1:  # False for nan
        raise ValueError(f"{owner}: {name} must be in (0, 1], got {value}")


def check_positive(owner: str, name: str, value: Any) -> None:
    """Raise unless `value` is a number above 0; infinity is one."""
    if not _is_number(value):
        raise TypeError(f"{owner}: {name} must be a number above 0, got {value!r}")
    if not value > 0:  # False for nan
        raise ValueError(f"{owner}: {name} must be above 0, got {value}")


def check_count(owner: str, name: str, value: Any, least: int) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{owner}: {name} must be an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")


def check_bool(owner: str, name: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {value!r}")


def check_seed(owner: str, name: str, value: Any) -> None:
    """Raise unless `value` is an integer from 0 to 2**63 - 1, which torch takes as a seed."""
    check_count(owner, name, value, 0)
    if value >= 2**63:
        raise ValueError(f"{owner}: {name} must be below 2**63, got {value}")


def check_choice(owner: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_spelling(keys: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError for a key that is nearly one of those that have a meaning, such as "optons"."""
    names = list(known)
    for key in keys:
        if key not in names and (meant := get_close_matches(key, names, 1, 0.9)):
            raise ValueError(f"keys must not be nearly '{meant[0]}', got '{key}'")


def first_line(error: Exception) -> str:
    """What an exception says, in one line; the name of its class if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
