"""Runs the commands of documents as a shell would: those of Python in this process, which has imported torch."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch


def run(command: str, names: Mapping[str, str], shorter: Mapping[str, list[str]] | None = None) -> None:
    """Run a command in the current folder, and raise if it fails.

    Args:
        command: a line of a document.
        names: what stands there, a name of a hub or a $VARIABLE, and what it is here.
        shorter: per start of a command, options that make it quick. They go to its end, where they win.
    """
    words = [substituted(word, names) for word in shlex.split(command, comments=True)]
    variables = dict(word.split("=", 1) for word in leading_variables(words))
    program, *arguments = words[len(variables) :]
    called = " ".join([program, *arguments])
    more = [extra for start, options in (shorter or {}).items() if called.startswith(start) for extra in options]
    arguments += more
    if variables or program in ("accelerate", "cp", "torchrun"):
        _run_process([program, *arguments], variables)
    elif program == "fftriton":
        _run_python("fftriton", arguments, module=True)
    elif program == "python" and arguments[0] == "-m":
        _run_python(arguments[1], arguments[2:], module=True)
    elif program == "python" and arguments[0] == "-c":
        exec(compile(arguments[1], command, "exec"), {"__name__": "__main__"})
    elif program == "python":
        _run_python(arguments[0], arguments[1:], module=False)
    else:
        pytest.fail(f"{command}: nothing here runs it; a comment before its block can say: <!-- needs: ... -->")


def leading_variables(words: list[str]) -> list[str]:
    """The NAME=VALUE in front of a program."""
    count = next((n for n, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
    return words[:count]


def substituted(word: str, names: Mapping[str, str]) -> str:
    """The word with what each name is here."""
    for name, value in names.items():
        word = word.replace(name, value)
    return word


def _run_python(name: str, arguments: list[str], module: bool) -> None:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        for loaded in (name, f"{name}.__main__"):
            patch.delitem(sys.modules, loaded, raising=False)
        try:
            if module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(name, run_name="__main__")
        except SystemExit as end:
            if end.code:
                pytest.fail(f"{shlex.join([name, *arguments])}: exit code {end.code}")
        finally:
            torch.set_num_threads(threads)


def _run_process(words: list[str], variables: Mapping[str, str]) -> None:
    programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    path = os.pathsep.join(filter(None, [variables.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables | {"PYTHONPATH": path}
    command = [*programs.get(words[0], words[:1]), *words[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
