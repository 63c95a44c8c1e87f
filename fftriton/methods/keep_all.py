"""No reduction: the model runs as it is, and the report says what it held."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Method


@dataclass(frozen=True)
class KeepAll(Method):
    """Keep every token. Outputs are bit-identical to the plain model's."""
