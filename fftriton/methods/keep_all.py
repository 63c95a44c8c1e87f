"""KeepAll: no reduction. The model runs as it is, and the report says how many tokens each layer held."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Method


@dataclass(frozen=True)
class KeepAll(Method):
    """Keep every token. Outputs are bit-identical to those of the plain model."""

    def count(self, frames: int, patches: int) -> int:
        return frames * patches
