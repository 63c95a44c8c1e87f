"""`--config FILE`: options from a YAML file, which serves all commands.

    model: Qwen/Qwen2-VL-7B-Instruct
    dtype: bfloat16
    run:
      video: [first.mp4, second.mp4]
    batch:
      out: answers.jsonl

Options at the top hold for each command that has them, and those under the name of a command for that one only. A value
is read as if it stood on the command line.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from .one_line import in_one_line

_NOT_IN_A_FILE = ("config", "help", "version", "install_completion", "show_completion")


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the options of a file the command's defaults. Typer calls this before it reads the other options."""
    if path is not None and not context.resilient_parsing:
        with in_one_line():
            context.default_map = dict(_defaults(context, _load(path), path))
    return path


def _load(path: Path) -> dict[str, Any]:
    """The file's options by name: texts, lists of texts and, for commands, dictionaries; None for null."""
    import yaml

    rule = f"config must be a YAML file of options, got '{path}'"
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        found = {} if node is None else _plain(node)
    except OSError as error:
        raise ValueError(f"{rule}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{rule}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{rule}, which holds no names with values")
    return found


def _plain(node: Any) -> Any:
    """The texts of a node, as they were written."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(part) for part in node.value]
    found: dict[str, Any] = {}
    for key, value in node.value:
        name = str(key.value).replace("-", "_")
        if name in found:
            raise ValueError(
                f"config must name each option once, got '{key.value}' again in line {key.start_mark.line + 1}"
            )
        found[name] = _plain(value)
    return found


def _defaults(context: typer.Context, found: dict[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """Name and value of each of the command's options that the file holds."""
    group = context.parent.command if context.parent is not None else None
    commands = getattr(group, "commands", {context.info_name: context.command})
    known = {name: _options(command) for name, command in commands.items()}
    everywhere = {name: value for name, value in found.items() if name not in commands}
    _check({option for options in known.values() for option in options}, everywhere, path)
    own: dict[str, Any] = {}
    for name in commands.keys() & found.keys():
        section = found[name] or {}
        if not isinstance(section, dict):
            raise ValueError(f"config must hold options under '{name}', got {section!r} in '{path}'")
        _check(known[name].keys(), section, path)
        own = section if name == context.info_name else own
    options = _options(context.command)
    for name, value in (everywhere | own).items():
        if name in options and value is not None:
            yield options[name].name, _value(options[name], name, value, path)


def _options(command: Any) -> dict[str, Any]:
    """The options and arguments of a command that a file may hold, by each of their names."""
    found: dict[str, Any] = {}
    for option in command.params:
        if option.name not in _NOT_IN_A_FILE:
            names = [name[2:].replace("-", "_") for name in option.opts if name.startswith("--")]
            found |= dict.fromkeys(names or [option.name], option)
    return found


def _check(known: Any, found: dict[str, Any], path: Path) -> None:
    for name in found:
        if name not in known:
            close = get_close_matches(name, known, 1)
            meant = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"config must hold options of the commands, got '{name}' in '{path}'{meant}")


def _value(option: Any, name: str, value: Any, path: Path) -> Any:
    """The value as the command line has it: a list is an option that is repeated, or else joined by commas."""
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"config must have one value or a list for '{name}', got {value!r} in '{path}'")
    return parts if getattr(option, "multiple", False) else ",".join(parts)
