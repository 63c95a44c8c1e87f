"""The commands that documents name exist, with the options and files that they name.

This is for commands in the text, and for those in blocks that cannot run here; tests/test_documents.py runs the others.
"""

from __future__ import annotations

import re

import pytest
from command_checks import check
from documents import DOCUMENTS, ROOT, blocks, blocks_of, commands

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"`((?:make|fftriton|python|pip) [^`]+)`")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_the_text_exist(document):
    text = FENCE.sub("", (ROOT / document).read_text(encoding="utf-8"))
    for command in COMMAND.findall(text):
        if "..." not in command:
            check(" ".join(command.split()))


@pytest.mark.parametrize(
    "block",
    [block for name in DOCUMENTS for block in blocks_of(name) if block.is_shell and (block.needs or block.takes)],
    ids=str,
)
def test_commands_that_cannot_run_here_exist(block):
    for command in commands(block.text):
        check(command, block.needs)


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


def test_a_misspelt_marker_is_an_error_and_not_no_marker():
    block = "```sh\nls\n```\n"
    with pytest.raises(ValueError, match=r"page.md:3: the comment before a block must be .*, got <!-- need: a GPU -->"):
        list(blocks("page.md", f"<!-- need: a GPU -->\n{block}"))
    (marked,) = blocks("page.md", f"<!-- needs: a GPU -->\n{block}")
    assert marked.needs == "a GPU"
