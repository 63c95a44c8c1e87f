"""The parts of documents that commands write: `make features` and `make gpu-plots`."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def updated(text: str, new: str, begin: str, end: str) -> str:
    """The text with `new` between the two markers."""
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{new}\n\n{end}{rest.partition(end)[2]}"
