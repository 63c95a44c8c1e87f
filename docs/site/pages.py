"""The files of the site: the repository's own pages at their own places, what they link to, and pages of docstrings.

So every link between files of the repository leads to the same place on the site.
"""

from __future__ import annotations

import csv
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import fftriton
import fftriton_kernels
from fftriton.methods.registry import METHODS

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "bench" / "results" / "needle-comparison.csv"
MEASURED_HOW = (
    "Percent of answers that are right on each split of the [needle task](../../bench/needle/README.md) (95 % "
    "interval), and the operations of the prefill relative to all tokens, by the budget: a part of "
    "[the comparison of all methods](../../bench/results/needle-comparison.md)."
)
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page per method into the navigation, where it says METHODS."""
    for section in config.nav:
        for pages in section.values():
            if isinstance(pages, list) and "METHODS" in pages:
                at = pages.index("METHODS")
                pages[at : at + 1] = [{class_of(name).__name__: f"docs/methods/{name}.md"} for name in METHODS]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace what is in the folder of documents; what the theme brings along stays."""
    own = Files([file for file in files if file.src_dir != config.docs_dir])
    pages = list(in_nav(config.nav))
    written = {path: ROOT / path for path in pages if (ROOT / path).exists()}
    for path in pages:
        if path in written:
            written |= {str(target.relative_to(ROOT)): target for target in linked(ROOT / path)}
    for path, source in written.items():
        own.append(File.generated(config, path, abs_src_path=str(source)))
    for name in METHODS:
        own.append(File.generated(config, f"docs/methods/{name}.md", content=method_page(name)))
    for package in (fftriton, fftriton_kernels):
        own.append(File.generated(config, f"docs/api/{package.__name__}.md", content=api_page(package)))
    return own


def in_nav(nav: Any) -> Iterator[str]:
    """The paths of a navigation."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for part in nav.values():
            yield from in_nav(part)
    else:
        for part in nav:
            yield from in_nav(part)


def linked(page: Path) -> Iterator[Path]:
    """Files of the repository that a page links to and that are no pages: pictures, sources, data."""
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path = (page.parent / target).resolve()
        if path.is_file() and path.suffix != ".md" and path.is_relative_to(ROOT):
            yield path


def class_of(name: str) -> type:
    module, _, cls = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def method_page(name: str) -> str:
    """The docstring of a method, and what was measured of it on the needle task."""
    cls = class_of(name)
    with MEASURED.open(encoding="utf-8", newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if row["method"].partition(":")[0] == name and "+" not in row["method"]
        ]
    measured = "".join(measured_table(text, rows) for text in dict.fromkeys(row["method"] for row in rows))
    if measured:
        measured = f"\n## Measured\n\n{MEASURED_HOW}\n{measured}"
    text = f"`--method {name}`. [All methods](../methods.md) compares them and says what a budget is.\n"
    return f"# {cls.__name__}\n\n{text}\n::: {cls.__module__}.{cls.__name__}\n{measured}"


def measured_table(method: str, rows: list[dict[str, str]]) -> str:
    """What was measured of a method, given as text: a split per line."""
    own = {(row["split"], float(row["budget"])): row for row in rows if row["method"] == method}
    budgets = sorted({budget for _, budget in own}, reverse=True)
    lines = [
        " | ".join([split, *(measured_cell(own.get((split, budget))) for budget in budgets)])
        for split in dict.fromkeys(split for split, _ in own)
    ]
    heading = " | ".join(["split", *(f"{budget:.0%}" for budget in budgets)])
    rule = "|".join(["---"] * (1 + len(budgets)))
    table = "\n".join(f"| {line} |" for line in (heading, *lines)).replace("\n", f"\n|{rule}|\n", 1)
    return f"\n`{method}`:\n\n{table}\n"


def measured_cell(row: dict[str, str] | None) -> str:
    """Percent right, its interval, and the operations."""
    if row is None:
        return ""
    if not row["accuracy"]:
        return "cannot"
    right, low, high, cost = (
        100 * float(row[name]) for name in ("accuracy", "accuracy_low", "accuracy_high", "relative_flops")
    )
    return f"{right:.1f} ({low:.1f}-{high:.1f}), {cost:.0f} %"


def api_page(package: Any) -> str:
    """The docstrings of all public names of a package, but for those that have pages of their own."""
    own = {class_of(name) for name in METHODS}
    parts = [f"# {package.__name__}\n\n{package.__doc__.splitlines()[0]}\n"]
    for name in sorted(package.__all__, key=str.lower):
        value = getattr(package, name)
        if callable(value) and value not in own:
            parts.append(f"::: {value.__module__}.{value.__qualname__}\n")
        elif name == "NO_LINK":
            parts.append(
                f"## NO_LINK\n\n`{value}`: the similarity of a token that has no partner, below every cosine.\n"
            )
    return "\n".join(parts)
