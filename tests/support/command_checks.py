"""Checks that what a command of a document names is there: targets, modules, files, options."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from documents import ROOT
from shell import leading_variables

from fftriton.app.cli import app

LAUNCHERS = ("accelerate", "torchrun")
FOREIGN = ("cp", "export", "pip", "vllm")


def check(command: str, needs: str = "") -> None:
    """Raise unless all that a command names is there, but for programs that are not ours and that its block needs."""
    words = shlex.split(command, comments=True)
    variables = dict(word.split("=", 1) for word in leading_variables(words))
    program, *arguments = words[len(variables) :]
    if program in LAUNCHERS:
        arguments = arguments[arguments.index("-m") :]
        program, arguments = ("fftriton", arguments[2:]) if arguments[1] == "fftriton" else ("python", arguments)
    if needs and (
        program in FOREIGN or program.startswith("clips=") or arguments[:1] == ["-c"] or arguments[1:2] == ["lmms_eval"]
    ):
        return
    if program == "python" and arguments[0].startswith("bench/"):
        found = "." in variables.get("PYTHONPATH", "").split(":")
        assert found, f"{command}: a bench needs the root on its path; python -m bench... has it there"
    if program not in CHECKS:
        pytest.fail(f"{command}: run it in a test, or say what it needs in a comment before it: <!-- needs: ... -->")
    CHECKS[program](arguments)


def check_make(arguments: list[str]) -> None:
    """Targets and variables of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for names in re.findall(r"^([\w. %-]+):(?!=)", makefile, re.MULTILINE) for name in names.split()}
    for argument in arguments:
        variable, is_variable, _ = argument.partition("=")
        if is_variable:
            assert f"$({variable})" in makefile, f"make has no variable {variable}"
        else:
            found = any(re.fullmatch(re.escape(target).replace("%", ".+"), argument) for target in targets)
            assert found, f"make has no target {argument}"


def check_fftriton(arguments: list[str]) -> None:
    """A subcommand and its options, or an option of the program."""
    name, *options = arguments
    program = typer.main.get_command(app)
    parse(program, arguments) if name.startswith("-") else parse(program.commands[name], options)


def check_python(arguments: list[str]) -> None:
    """A module with its options, if it is one of the benches, or a file."""
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file(), f"there is no file {arguments[0]}"
        return
    module, options = arguments[1], arguments[2:]
    found = importlib.util.find_spec(module)
    assert found is not None, f"there is no module {module}"
    module += ".__main__" if found.submodule_search_locations is not None else ""
    if not module.startswith("bench."):
        return
    main = importlib.import_module(module).main
    if "typer.run(main)" in (ROOT / Path(*module.split("."))).with_suffix(".py").read_text():
        alone = typer.Typer()
        alone.command()(main)
        parse(typer.main.get_command(alone), options)
    else:
        known = string_constants(ROOT / Path(*module.split(".")).with_suffix(".py"))
        assert {option for option in options if option.startswith("--")} <= known


def check_pip(arguments: list[str]) -> None:
    """Extras of setup.py."""
    settings: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", settings.update)
        runpy.run_path(str(ROOT / "setup.py"))
    assert arguments[0] == "install"
    for target in arguments[1:]:
        extra = re.fullmatch(r"(?:\.|fftriton)\[(.+)\]", target)
        assert target in (".", "fftriton") or (extra and extra[1] in settings["extras_require"]), target


CHECKS = {"make": check_make, "fftriton": check_fftriton, "python": check_python, "pip": check_pip}


def parse(command: Any, arguments: list[str]) -> None:
    """Raise if a command of typer does not know an option."""
    value = "VALUE"  # of an option that is named in a text without one
    command.make_parser(command.context_class(command)).parse_args([*arguments, value])


def string_constants(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
