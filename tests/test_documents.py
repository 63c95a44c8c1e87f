"""Every code block of the documents runs, or says what it needs.

The blocks of a document run in their order, in one folder and one namespace: Python, and commands as in a shell. A
block with a title is a file, and so is there from the start. The videos that a document names are a clip of the needle
task, its checkpoints of a model hub are the model that ships, and `GIVEN` has what else it leaves to its reader.

Commands that measure do so on little (`SHORTER`). A block that needs what cannot be had here, or that takes long and
runs at night, has a comment right before it:

    <!-- needs: a GPU -->
    <!-- takes: a minute -->
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from checkpoints import needs_torchvision
from command_checks import check_make, check_pip
from documents import DOCUMENTS, ROOT, Block, blocks, blocks_of, commands
from remote_models import PLACEHOLDER, llava_qwen
from remote_prompts import pixels
from shell import run, substituted
from transformers import Qwen2VLForConditionalGeneration

import fftriton
import fftriton.app.doctor
import fftriton.app.run
from bench.kvtp.needle import WORDS
from bench.kvtp.small import small_siglip
from fftriton.app.calibrate_output import results_table
from fftriton.app.cli import app
from fftriton.evaluate.calibration import Results
from fftriton.evaluate.relevance import sample_relevance
from fftriton.evaluate.tasks import GROUP
from fftriton.needle import generate_sample
from fftriton.runtime.processing import load_processor
from fftriton.runtime.shipped import MODEL, NEEDLE
from fftriton.runtime.video import write_video

HUB = "Qwen/Qwen2-VL-7B-Instruct"
PREDICTOR = "google/siglip-so400m-patch14-384"  # here a small one with random weights
VIDEO = re.compile(r"(?<![\w/.$])[\w/-]+\.mp4")
SECONDS = {"clips/0001.mp4": 48}  # of a video, which has a label for every 8
LONG = 72  # of others: a page asks about what comes after a minute
SHORTER = {  # how a command differs from what stands in a document: it asks or measures less
    "fftriton calibrate": ["--budgets", "0.5,0.2"],
    "fftriton eval": ["--samples", "1"],
    "torchrun --nproc-per-node 2 -m fftriton eval": ["--samples", "2"],
    "fftriton run --compare --report": ["--question", NEEDLE.question],  # about one of the two shipped clips
    "fftriton run --method": ["--question", NEEDLE.question],
    "fftriton run --config": ["--max-frames", "8"],
    "python -m bench.prefill --": [
        "--shape",
        "toy",
        "--frames",
        "16,24,32",
        "--batch",
        "1",
        "--patches",
        "4",
        "--layers",
        "4",
        "--turns",
        "1",
        "--steps",
        "1",
        "--dtype",
        "float32",
    ],
    "python -m bench.needle.show": ["--count", "2"],
}
ELSEWHERE = {"docs/sparsekv.md": "tests/test_sparsekv_page.py"}  # whose commands run there, on data in the right format


def own_prompt() -> dict[str, Any]:
    """What a page calls the reader's own: a model, a video, a question and the inputs made of these."""
    sample, processor = generate_sample("easy", seed=0, index=0), load_processor(MODEL)
    model = Qwen2VLForConditionalGeneration.from_pretrained(MODEL)
    inputs = processor(sample.video, sample.question)
    known = inspect.signature(Qwen2VLForConditionalGeneration.forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in known}
    return {
        "fftriton": fftriton,
        "model": model,
        "inputs": inputs,
        "inputs_with_images": as_image(inputs, model.config),
        "frames": sample.frames,
        "question": sample.question,
    }


def as_image(inputs: dict[str, Any], config: Any) -> dict[str, Any]:
    """The prompt with the first frame of its video, as a picture."""
    grid = inputs["video_grid_thw"].clone()
    grid[:, 0] = 1
    patches = int(grid.prod())
    ids = inputs["input_ids"][0]
    (places,) = torch.nonzero(ids == config.video_token_id, as_tuple=True)
    stays = torch.ones_like(ids, dtype=torch.bool)
    stays[places[patches // config.vision_config.spatial_merge_size**2 :]] = False
    ids = torch.where(ids == config.video_token_id, config.image_token_id, ids)[stays][None]
    return {"input_ids": ids, "pixel_values": inputs["pixel_values_videos"][:patches], "image_grid_thw": grid}


def remote_prompt() -> dict[str, Any]:
    """A stand-in for LLaVA-Video, a video and a question about it."""
    ids = torch.tensor([[5, 6, PLACEHOLDER, 7, 8]])
    return {"fftriton": fftriton, "model": llava_qwen(), "input_ids": ids, "video": pixels(8, 5)}


def client() -> dict[str, Any]:
    """A client of a server that looks at what it is asked, and the question."""

    def create(model: str, messages: list[Any], extra_body: dict[str, Any]) -> None:
        json.dumps([model, messages, extra_body])  # it can be sent
        asked.append(extra_body)

    asked: list[Any] = []
    chat = SimpleNamespace(completions=SimpleNamespace(create=create))
    sample = generate_sample("easy", seed=0, index=0)
    return {
        "client": SimpleNamespace(chat=chat), "asked": asked, "model": HUB, "messages": [],
        "frames": sample.frames, "question": sample.question,
    }  # fmt: skip


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/bring-your-own-model.md": remote_prompt,
    "docs/bring-your-own-method.md": own_prompt,
    "docs/calibrate.md": own_prompt,
    "docs/choosing-a-budget.md": lambda: {"fftriton": fftriton},
    "docs/methods.md": own_prompt,
    "docs/serving.md": client,
    "docs/troubleshooting.md": own_prompt,
}


@pytest.mark.parametrize(
    "document", [pytest.param(name, marks=needs_torchvision) if name == "README.md" else name for name in DOCUMENTS]
)
def test_a_document_runs(document, tmp_path, monkeypatch):
    visit(document, tmp_path, monkeypatch, at_night=False)


@pytest.mark.night
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if any(block.takes for block in blocks_of(name))])
def test_a_document_runs_with_what_takes_long(document, tmp_path, monkeypatch):
    visit(document, tmp_path, monkeypatch, at_night=True)


def visit(document: str, folder: Path, monkeypatch: pytest.MonkeyPatch, at_night: bool) -> None:
    """Do what a document says, from top to bottom."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(fftriton.app.run, "_REPEATS", 1)  # of what `fftriton run` times
    monkeypatch.setattr(fftriton.app.doctor, "_trouble", lambda module: "")  # slow, and shown in tests/test_doctor.py
    found = blocks_of(document)
    names = {HUB: str(MODEL), "Qwen/Qwen2.5-VL-7B-Instruct": str(MODEL), PREDICTOR: "siglip", "/your/project": "."}
    lay_out(found, names)
    namespace = {"__name__": "document"} | GIVEN.get(document, dict)()
    try:
        for block in found:
            if not block.needs and (at_night or not block.takes):
                follow(block, names, namespace)
    finally:
        sample_relevance.cache_clear()


def follow(block: Block, names: Mapping[str, str], namespace: dict[str, Any]) -> None:
    """Run a block of Python or of commands; of others, see that they are what they seem to be."""
    if block.language == "python":
        source = "\n" * (block.line - 1) + substituted(block.text, names)  # errors name the line
        exec(compile(source, str(ROOT / block.document), "exec", dont_inherit=True), namespace)
    elif block.is_shell and block.document not in ELSEWHERE:
        for command in commands(block.text):
            follow_command(command, names)
    else:
        assert block.title or block.language in ("text", "toml") or block.document in ELSEWHERE, block


def follow_command(command: str, names: Mapping[str, str]) -> None:
    """Run a command; those that install or test are what the tests themselves were started with."""
    program, *arguments = command.split("#")[0].split()
    if program == "make":
        check_make(arguments)
        workflows = [*(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / ".ci" / "run"]
        lines = [line.strip().removeprefix("- run: ") for path in workflows for line in path.read_text().splitlines()]
        assert " ".join([program, *arguments]) in lines, f"no workflow runs {command}"
    elif program == "pip":
        check_pip([argument.strip("'") for argument in arguments])
    else:
        run(command, names, SHORTER)


def lay_out(found: list[Block], names: Mapping[str, str]) -> None:
    """Put into the current folder what the blocks of a document name."""
    for name in ("bench", "fftriton", "kernels"):  # commands are given from the root of a checkout
        Path(name).symlink_to(ROOT / name)
    texts = "".join(block.text for block in found if block.language != "python" and not block.needs)
    if PREDICTOR in "".join(block.text for block in found) or "predictor" in texts:
        siglip = small_siglip(WORDS, side=64, patch=16, width=16, depth=1)
        for folder in ("siglip", "predictor", "needle/predictor"):
            siglip.save_pretrained(folder)
    asked, sample = VIDEO.findall(texts), generate_sample("easy", 0, 0)
    for video in set(asked):
        Path(video).parent.mkdir(parents=True, exist_ok=True)
        frames = np.repeat(sample.frames, 5, axis=0)[: SECONDS.get(video, LONG)]
        write_video(Path(video), frames, 1, crf=30)
    if "requests.jsonl" in texts:
        write_requests(Path("requests.jsonl"))
    for block in found:
        if block.title:
            text = substituted(block.text, names)
            Path(block.title).write_text(text.replace("revision: main\n", ""))  # a folder has none


def write_requests(path: Path) -> None:
    """Several, about different videos: an answer to one may be found among a few random tokens by chance."""
    lines = []
    for index in range(5):
        sample = generate_sample("easy", 1, index)
        write_video(Path(f"{index}.mp4"), sample.frames, 4, crf=18)
        lines.append(json.dumps({"video": f"{index}.mp4", "question": sample.question}) + "\n")
    path.write_text("".join(lines))


@needs_torchvision
def test_the_first_snippet_of_the_readme_answers(capsys):
    """As it stands, but for the model: Hugging Face's own processor makes the inputs."""
    text = blocks_of("README.md")[0].text
    assert text.count(f'"{HUB}"') == 1
    exec(compile(text.replace(f'"{HUB}"', repr(str(MODEL))), "README.md", "exec"), {"__name__": "document"})
    answer, figures = capsys.readouterr().out.splitlines()
    assert answer.startswith("['3 ")
    assert re.fullmatch(r"0\.30\d+ \[77(, 77){7}\]", figures)


ALL = [block for document in DOCUMENTS for block in blocks_of(document)]


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "yaml"], ids=str)
def test_files_of_options_are_read(block, tmp_path):
    (tmp_path / "options.yaml").write_text(block.text)
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        parent = group.context_class(group, info_name="fftriton")
        needed = ["requests.jsonl"] if name in ("batch", "calibrate") else []
        values = command.make_context(name, [*needed, "--config", str(tmp_path / "options.yaml")], parent=parent).params
        assert values.get("model", "none") == ("none" if name == "doctor" else HUB)


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "toml"], ids=str)
def test_entry_points_lead_somewhere(block, tmp_path, monkeypatch):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    (found,) = tomllib.loads(block.text)["project"]["entry-points"].items()
    for source in (other for other in blocks_of(block.document) if other.title.endswith(".py")):
        (tmp_path / source.title).write_text(source.text)
    monkeypatch.syspath_prepend(tmp_path)
    assert found[0] == GROUP
    for name, value in found[1].items():
        task = importlib.metadata.EntryPoint(name, value, found[0]).load()()
        assert task.score(task.sample(0), task.sample(0).answer)


def test_a_table_that_is_shown_is_one_that_is_printed():
    (block,) = [block for block in ALL if block.language == "text"]
    headings = [str(column.header) for column in results_table(Results([], [], None, "", 0.98, 0, 0)).columns]
    assert block.text.splitlines()[0].split() == " ".join(headings).split()


PAGE = """\
Text, `make test`.

```python title="a.py"
a = 1
```

<!-- needs: a GPU -->

    make nothing \\
        --more

* a list

<!-- takes: an hour -->

    $ make lint
    passed
"""


def test_blocks_are_found():
    found = list(blocks("page.md", PAGE))
    assert [(block.line, block.language, block.title, block.needs, block.takes) for block in found] == [
        (4, "python", "a.py", "", ""), (9, "", "", "a GPU", ""), (16, "", "", "", "an hour"),
    ]  # fmt: skip
    assert [commands(block.text) for block in found[1:]] == [["make nothing      --more"], ["make lint"]]


@pytest.mark.parametrize(
    "text",
    [
        "fftriton run --no-such-option", "fftriton run --video nothing.mp4", "fftriton batch nothing.jsonl",
        "python kernels/nothing.py", "python -m bench.nothing", "cp nothing somewhere", "curl https://example.org",
        "make nothing", "make bench-save", "pip install .[nothing]", "PYTHONPATH=kernels python nothing.py",
    ],
)  # fmt: skip
def test_a_command_that_fails_is_noticed(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((Exception, pytest.fail.Exception)):
        follow(Block("page.md", 1, "sh", text), {}, {})


def test_a_block_of_unknown_kind_is_noticed():
    with pytest.raises(AssertionError):
        follow(Block("page.md", 1, "json", "{}"), {}, {})
