"""Every code block of the documents runs, or says what it needs.

The Python blocks of a document run in their order, in one namespace. Names that a document leaves to its reader are in
`GIVEN`, and checkpoints of a model hub are replaced by what is here. Commands are not run: a test checks that they
exist, with the options and files that they name. A block that needs what cannot be had here has a comment right before
it:

    <!-- needs: a model hub -->
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from checkpoints import needs_torchvision
from remote_models import PLACEHOLDER, llava_qwen
from remote_prompts import pixels
from transformers import Qwen2VLForConditionalGeneration

import fftriton
from bench.kvtp.needle import WORDS
from bench.kvtp.small import small_siglip
from fftriton.app.cli import app
from fftriton.needle import generate_sample
from fftriton.runtime.processing import load_processor
from fftriton.runtime.shipped import MODEL

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md", "kernels/README.md", "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]  # fmt: skip
MARKER = re.compile(r"<!-- needs: .+ -->")
COMMAND = re.compile(r"`((?:make|fftriton|python|pip) [^`]+)`")
SHIPPED = {"Qwen/Qwen2-VL-7B-Instruct": MODEL}
PREDICTOR = "google/siglip-so400m-patch14-384"  # here a small one with random weights


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        document: where it stands.
        line: its first one, from 1.
        language: of a fence; "" for an indented block.
        text: what it holds.
        marked: whether a comment before it says what it needs.
    """

    document: str
    line: int
    language: str
    text: str
    marked: bool

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: str, text: str) -> Iterator[Block]:
    """Fenced and indented blocks, in their order."""
    lines, number, before = text.splitlines(), 0, ""
    while number < len(lines):
        line = lines[number]
        fence = re.match(r"(`{3,}|~{3,})\s*(\w*)", line)
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
        marked = MARKER.fullmatch(before) is not None
        yield Block(document, first, fence[2] if fence else "", "\n".join(body).strip("\n") + "\n", marked)
        before, number = "", after


def every_block() -> list[Block]:
    return [block for name in DOCUMENTS for block in blocks(name, (ROOT / name).read_text(encoding="utf-8"))]


def own_prompt() -> dict[str, Any]:
    """What a page calls the reader's own: a model, a video, a question and the inputs made of these."""
    sample = generate_sample("easy", seed=0, index=0)
    inputs = load_processor(MODEL)(sample.video, sample.question)
    known = inspect.signature(Qwen2VLForConditionalGeneration.forward).parameters
    return {
        "fftriton": fftriton,
        "model": Qwen2VLForConditionalGeneration.from_pretrained(MODEL),
        "inputs": {name: value for name, value in inputs.items() if name in known},
        "frames": sample.frames,
        "question": sample.question,
    }


def remote_prompt() -> dict[str, Any]:
    """A stand-in for LLaVA-Video, a video and a question about it."""
    ids = torch.tensor([[5, 6, PLACEHOLDER, 7, 8]])
    return {"fftriton": fftriton, "model": llava_qwen(), "input_ids": ids, "video": pixels(8, 5)}


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/bring-your-own-model.md": remote_prompt,
    "docs/bring-your-own-method.md": own_prompt,
    "docs/methods.md": own_prompt,
    "docs/troubleshooting.md": own_prompt,
}


@pytest.mark.parametrize(
    "document", [pytest.param(name, marks=needs_torchvision) if name == "README.md" else name for name in DOCUMENTS]
)
def test_python_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    python = [block for block in every_block() if block.document == document and block.language == "python"]
    checkpoints = dict(SHIPPED)
    if any(PREDICTOR in block.text for block in python):
        checkpoints[PREDICTOR] = tmp_path / "predictor"
        small_siglip(WORDS, side=64, patch=16, width=16, depth=1).save_pretrained(checkpoints[PREDICTOR])
    namespace = {"__name__": "document"} | GIVEN.get(document, dict)()
    for block in python:
        if block.marked:
            continue
        text = block.text
        for name, folder in checkpoints.items():
            text = text.replace(f'"{name}"', repr(str(folder)))
        source = "\n" * (block.line - 1) + text  # errors name the line
        code = compile(source, str(ROOT / document), "exec", dont_inherit=True)
        exec(code, namespace)


@needs_torchvision
def test_the_first_snippet_of_the_readme_answers(capsys):
    """As it stands, but for the model: Hugging Face's own processor makes the inputs."""
    text = next(blocks("README.md", (ROOT / "README.md").read_text(encoding="utf-8"))).text
    (name,) = SHIPPED
    assert text.count(f'"{name}"') == 1
    exec(compile(text.replace(f'"{name}"', repr(str(MODEL))), "README.md", "exec"), {"__name__": "document"})
    answer, figures = capsys.readouterr().out.splitlines()
    assert answer.startswith("['3 ")
    assert re.fullmatch(r"0\.30\d+ \[77(, 77){7}\]", figures)


@pytest.mark.parametrize("block", [block for block in every_block() if block.language == "yaml"], ids=str)
def test_files_of_options_are_read(block, tmp_path):
    (tmp_path / "options.yaml").write_text(block.text)
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        parent = group.context_class(group, info_name="fftriton")
        needed = ["requests.jsonl"] if name in ("batch", "calibrate") else []
        values = command.make_context(name, [*needed, "--config", str(tmp_path / "options.yaml")], parent=parent).params
        assert values.get("model", "none") == ("none" if name == "doctor" else "Qwen/Qwen2-VL-7B-Instruct")


@pytest.mark.parametrize(
    "block", [block for block in every_block() if block.language not in ("python", "toml", "yaml")], ids=str
)
def test_commands_exist(block):
    if not block.marked and not is_listing(block.text):
        for command in commands(block.text):
            check(command)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_the_text_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for block in blocks(document, text):
        text = text.replace(block.text, "")
    for command in COMMAND.findall(text):
        if "..." not in command:
            check(" ".join(command.split()))


def commands(text: str) -> list[str]:
    """The commands of a block, one per line. A prompt, and the output after it, do not count."""
    lines = text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip()]


def is_listing(text: str) -> bool:
    """Whether a block lists files and folders that exist, one a line."""
    names = [line.split()[0].rstrip(",") for line in text.splitlines() if line.strip()]
    return all((ROOT / name).exists() for name in names) and not all(name in CHECKS for name in names)


def check(command: str) -> None:
    """Raise unless all that a command names is there."""
    words = shlex.split(command, comments=True)
    variables = {}
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    program, arguments = words[0], words[1:]
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


PAGE = """\
Text, `make test`.

```python
a = 1
```

<!-- needs: a GPU -->

    make nothing \\
        --more

* a list

    $ make lint
    passed
"""


def test_blocks_are_found():
    found = list(blocks("page.md", PAGE))
    assert [(block.line, block.language, block.marked) for block in found] == [
        (4, "python", False), (9, "", True), (14, "", False),
    ]  # fmt: skip
    assert [commands(block.text) for block in found[1:]] == [["make nothing      --more"], ["make lint"]]


@pytest.mark.parametrize(
    "command",
    [
        "make nothing", "make test NO_SUCH=1", "fftriton run --no-such-option", "python bench/gpu.py --toy",
        "fftriton --no-such-option",
        "PYTHONPATH=. python bench/nothing.py",
        "python -m bench.kernels.run --no-such-option", "python -m bench.gpu --no-such-option",
        "python -m bench.nothing", "pip install .[nothing]", "curl https://example.org",
    ],
)  # fmt: skip
def test_what_does_not_exist_is_found(command):
    with pytest.raises((Exception, pytest.fail.Exception)):
        check(command)


@pytest.mark.parametrize(
    "command",
    [
        "fftriton --version", "make test-transformers-5.23",
        "make fuzz MINUTES=10", "fftriton run --compare --out out  # of a clip",
        "PYTHONPATH=kernels python -m bench.kernels.run --device cpu", "python -m bench.gpu --toy",
        "PYTHONPATH=kernels:. python bench/gpu.py --toy",
        "python kernels/examples/tome.py", "pip install .[eval]",
    ],
)  # fmt: skip
def test_what_exists_is_found(command):
    check(command)


def test_a_listing_is_no_command():
    assert is_listing("fftriton   the library\nbench, tests\n")
    assert not is_listing("fftriton run\n")
    assert not is_listing("fftriton\nnothing\n")
