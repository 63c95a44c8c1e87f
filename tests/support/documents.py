"""The documents of the repository, and the blocks of code in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    "README.md", "kernels/README.md", "CONTRIBUTING.md", "fftriton/assets/needle-qwen2vl/README.md",
    "fftriton/assets/needle-harder-qwen2vl/README.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "bench").rglob("README.md"))),
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]  # fmt: skip
GENERATED = re.compile(r"<!-- (made by|end of) ")
MARKER = re.compile(r"<!-- (needs|takes): (.+) -->")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        document: where it stands.
        line: its first one, from 1.
        language: of a fence; "" for an indented block.
        text: what it holds.
        title: of a fence: the name of the file that it is.
        needs: what a comment before it says that it needs and cannot be had here.
        takes: how long a comment before it says that it takes, so that it runs at night.
    """

    document: str
    line: int
    language: str
    text: str
    title: str = ""
    needs: str = ""
    takes: str = ""

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def is_shell(self) -> bool:
        """Whether it holds commands."""
        return self.language in ("sh", "")


def blocks(document: str, text: str) -> Iterator[Block]:
    """Fenced and indented blocks, in their order."""
    lines, number, before = text.splitlines(), 0, ""
    while number < len(lines):
        line = lines[number]
        fence = re.match(r"(`{3,}|~{3,})\s*(\w*)(?:\s+title=\"(.+)\")?", line)
        if fence:
            end = next((n for n in range(number + 1, len(lines)) if lines[n].startswith(fence[1])), len(lines))
            body, first, after = lines[number + 1 : end], number + 2, end + 1
        elif line.startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            body, first, after = [part.removeprefix("    ") for part in lines[number:end]], number + 1, end
        else:
            before, number = line.strip() or before, number + 1
            continue
        marker = MARKER.fullmatch(before)
        if before.startswith("<!--") and not marker and not GENERATED.match(before):
            raise ValueError(f"{document}:{first}: the comment before a block must be {MARKER.pattern}, got {before}")
        said = {marker[1]: marker[2]} if marker else {}
        language, title = (fence[2], fence[3] or "") if fence else ("", "")
        yield Block(document, first, language, "\n".join(body).strip("\n") + "\n", title, **said)
        before, number = "", after


def blocks_of(document: str) -> list[Block]:
    """The blocks of a document of the repository."""
    return list(blocks(document, (ROOT / document).read_text(encoding="utf-8")))


def commands(text: str) -> list[str]:
    """The commands of a block, one per line. A prompt, and the output after it, do not count."""
    lines = text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip()]
