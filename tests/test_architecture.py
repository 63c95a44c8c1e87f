"""Imports point one way: a package of fftriton may use those below it, and none above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FFTRITON, KERNELS = ROOT / "fftriton", ROOT / "kernels" / "fftriton_kernels"
LEVELS = [  # from the top; packages of one level do not import each other
    ("app", "lmms", "vllm"), ("evaluate", "labels"), ("needle",), ("runtime",), ("relevance",), ("hf",), ("methods",),
    ("layouts",),
]  # fmt: skip
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
FOR_ALL = {"fftriton.checks", "fftriton.__version__"}
LOOSE = {"__init__.py", "__main__.py", "checks.py"}
FORMER = {"former"}  # modules under the names of an earlier release, which forward for one more


def imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, inside functions and under TYPE_CHECKING, too.

    Args:
        path: the file.
        module: its own dotted name; with `.__init__` at the end for a package.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def is_part(name: str, package: str) -> bool:
    """Whether a dotted name is a package or something in it."""
    return name == package or name.startswith(package + ".")


def is_allowed(name: str, package: str) -> bool:
    """Whether a module of this package may import the name."""
    if not is_part(name, "fftriton"):
        return True
    if any(is_part(name, free) for free in FOR_ALL):
        return True
    other = name.split(".")[1] if "." in name else ""  # "": all of fftriton
    return other == package or LEVEL.get(other, -1) > LEVEL[package]


def offences(folder: Path, package: str) -> list[str]:
    """file:line: what is imported there and must not be."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        module = ".".join(["fftriton", package, *path.relative_to(folder).with_suffix("").parts])
        for line, name in imports(path, module):
            if not is_allowed(name, package):
                found.append(f"{path.relative_to(ROOT)}:{line}: {package} imports {name}")
    return found


@pytest.mark.parametrize("package", LEVEL)
def test_a_package_imports_only_those_below_it(package):
    found = offences(FFTRITON / package, package)
    assert not found, "\n" + "\n".join(found)


def test_the_kernels_import_nothing_of_fftriton():
    found = []
    for path in sorted(KERNELS.rglob("*.py")):
        module = ".".join(path.relative_to(KERNELS.parent).with_suffix("").parts)
        names = imports(path, module)
        found += [f"{path.relative_to(ROOT)}:{line}: {name}" for line, name in names if is_part(name, "fftriton")]
    assert not found, "\n" + "\n".join(found)


def test_checks_import_nothing_of_fftriton():
    found = [name for _, name in imports(FFTRITON / "checks.py", "fftriton.checks") if is_part(name, "fftriton")]
    assert not found


def test_every_package_has_a_level():
    packages = {path.parent.relative_to(FFTRITON).parts[0] for path in FFTRITON.glob("*/**/*.py")}
    assert packages - FORMER == set(LEVEL)


def test_there_are_no_loose_modules():
    assert {path.name for path in FFTRITON.glob("*.py")} == LOOSE


@pytest.mark.parametrize(
    ("code", "offending"),
    [
        ("from ..app import run", ["fftriton.app.run"]),
        ("def f():\n    from fftriton.app.run import start", ["fftriton.app.run.start"]),
        ("if TYPE_CHECKING:\n    import fftriton.lmms", ["fftriton.lmms"]),
        ("import fftriton", ["fftriton"]),
        ("from .. import reduce, __version__", ["fftriton.reduce"]),
        ("importlib.import_module('fftriton.app.cli')", ["fftriton.app.cli"]),
        ("from . import rows\nfrom .. import checks, hf\nfrom ..checks import check_fraction", []),
        ("from fftriton_kernels import merge_mean\nimport torch\nfrom ..needle.samples import ask", []),
    ],
)
def test_what_offends(code, offending, tmp_path):
    file = tmp_path / "module.py"
    file.write_text(code)
    names = [name for _, name in imports(file, "fftriton.evaluate.module") if not is_allowed(name, "evaluate")]
    assert names == offending
