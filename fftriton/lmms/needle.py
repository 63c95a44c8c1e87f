"""The needle task as a task of lmms-eval.

    python -m fftriton.lmms.needle tasks --split easy --samples 500 --seed 0
    python -m lmms_eval --include_path tasks --tasks fftriton_needle_easy --batch_size 1 --model fftriton \
        --model_args base=qwen2_vl,processing=fftriton,method=framefusion,budget=0.3

The folder contains a task file and the indices of the samples. The videos are those of `fftriton eval` and are drawn
on demand. They are frames, not files, and so need `processing=fftriton`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checks import check_count
from ..needle import generate_sample
from ..runtime.answers import is_right
from ..runtime.files import writing
from ..runtime.terminal import working
from ..runtime.video import Video

_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {samples}
test_split: test
output_type: generate_until
doc_to_visual: !function fftriton.lmms.needle.doc_to_visual
doc_to_text: !function fftriton.lmms.needle.doc_to_text
doc_to_target: answer
process_results: !function fftriton.lmms.needle.process_results
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""


def write_task(
    folder: Annotated[Path, typer.Argument(help="Folder for --include_path; created if missing.")],
    split: Annotated[str, typer.Option(help="easy, hard, blended, real, long or a harder one.")] = "easy",
    samples: Annotated[int, typer.Option(help="Number of questions.")] = 500,
    seed: Annotated[int, typer.Option(help="Selects the samples.")] = 0,
) -> None:
    """Write the task `fftriton_needle_SPLIT`."""
    with working(uses_transformers=False):
        check_count("fftriton.lmms.needle", "samples", samples, 1)
        name, path = f"fftriton_needle_{split}", folder.resolve() / f"fftriton_needle_{split}.jsonl"
        lines = []
        for index in range(samples):
            sample, doc = generate_sample(split, seed, index), {"split": split, "seed": seed, "index": index}
            lines.append(json.dumps(doc | {"question": sample.question, "answer": sample.answer}) + "\n")
        with writing(path) as partial:
            partial.write_text("".join(lines), encoding="utf-8")
        with writing(path.with_suffix(".yaml")) as partial:
            partial.write_text(_TASK.format(name=name, samples=json.dumps(str(path))), encoding="utf-8")


def doc_to_visual(doc: dict[str, Any]) -> list[Video]:
    """The video of a sample."""
    sample = generate_sample(doc["split"], doc["seed"], doc["index"])
    frames = len(sample.frames)
    return [Video(sample.frames, list(range(frames)), frames, sample.fps)]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The question."""
    return doc["question"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is right, by the rule of `fftriton eval`."""
    return {"accuracy": float(is_right(results[0], doc["answer"]))}


if __name__ == "__main__":
    typer.run(write_task)
