"""The commands of docs/sparsekv.md run as they are written, on small files in the formats of the data sets."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import blocks_of, commands
from scripted_endpoint import chat, endpoint
from shell import run

from bench.kvtp.needle import WORDS
from bench.kvtp.small import small_siglip
from fftriton.evaluate.relevance import sample_relevance
from fftriton.needle import generate_sample
from fftriton.runtime.shipped import MODEL
from fftriton.runtime.video import write_video

pytest.importorskip("av")
parquet = pytest.importorskip("pyarrow.parquet", reason="reads .parquet files: pip install 'fftriton[labels]'")

PAGE = "docs/sparsekv.md"
SECONDS = 72


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_data_sets() -> None:
    """Three videos of Video-MME, two of EgoSchema, two of NExT-QA, in the current folder."""
    import pyarrow

    videos = [*(f"videomme/videos/m{i}" for i in range(3)), *(f"egoschema/videos/e{i}" for i in range(2))]
    for index, name in enumerate([*videos, *(f"nextqa/videos/11/{i}" for i in (70, 71))]):
        frames = np.repeat(generate_sample("easy", 0, index).frames, 5, 0)[:SECONDS]
        write_video(f"{name}.mp4", frames, 1, crf=30)
    rows = [
        {
            "video_id": f"00{i}", "duration": "short", "domain": "-", "sub_category": "-", "url": "-",
            "videoID": f"m{i}", "question_id": f"00{i}-1", "task_type": "Counting", "question": f"Which digit is {i}?",
            "options": ["A. 1", "B. 2", "C. 3", "D. 4"], "answer": "B",
        }
        for i in range(3)
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), "videomme/test-00000-of-00001.parquet")
    choices = {f"option {i}": f"C is {i}" for i in range(5)}
    ego = [{"q_uid": f"e{i}", "google_drive_id": "-", "question": f"What is C {i}?"} | choices for i in range(2)]
    Path("egoschema/questions.json").write_text(json.dumps(ego))
    Path("egoschema/subset_answers.json").write_text('{"e0": 3}')
    size = {"frame_count": SECONDS, "width": 64, "height": 64}
    texts = {f"a{i}": text for i, text in enumerate(("red", "blue", "green", "white", "black"))}
    next_qa = [
        {"video": 70 + i} | size | {"question": f"where is it {i}", "answer": i, "qid": 0, "type": "DL"} | texts
        for i in range(2)
    ]
    write_table(Path("nextqa/val.csv"), next_qa)
    Path("nextqa/map_vid_vidorID.json").write_text('{"70": "11/70", "71": "11/71"}')
    Path("nextgqa").mkdir()
    grounded = {"question": "why does it stop", "answer": "blue", "qid": 1, "type": "CW"}
    write_table(Path("nextgqa/test.csv"), [{"video_id": 70} | size | grounded | texts])
    spans = {"70": {"duration": SECONDS, "location": {"1": [[16.2, 20.9]]}, "fps": 1}}
    Path("nextgqa/gsub_test.json").write_text(json.dumps(spans))


def score(body: dict[str, Any], number: int) -> Any:
    prompt = body["messages"][0]["content"]
    if prompt.startswith("A search engine"):
        return chat("which digit is on the red box?")
    clips = [line.split(": ")[0] for line in prompt.splitlines() if line.startswith("[")]
    return chat(json.dumps({clip: 5 * (index == 3) for index, clip in enumerate(clips)}))


def test_the_commands_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data_sets()
    small_siglip(WORDS, side=64, patch=16, width=16, depth=1).save_pretrained("siglip")
    found = [line for block in blocks_of(PAGE) if block.is_shell and not block.needs for line in commands(block.text)]
    assert len(found) == 8
    with endpoint(score) as (url, requests):
        variables = {"$CAPTIONER": str(MODEL), "$SCORER": f"m@{url}", "$SIGLIP": "siglip", "$MODEL": str(MODEL)}
        try:
            for command in found:
                run(command, variables)
        finally:
            sample_relevance.cache_clear()
    assert len(requests) == 8 + 7  # short forms, and scores but for NExT-GQA
    lines = [json.loads(line) for line in Path("data/labelled.jsonl").read_text().splitlines()]
    sets = [line["id"].partition("-")[0] for line in lines]
    assert sets == [*["videomme"] * 3, *["egoschema"] * 2, *["nextqa"] * 2, "nextgqa"]
    assert all(line["frames"] == SECONDS and sum(line["relevance"]) == 5 and line["query"] for line in lines)
    assert lines[-1]["relevance"][2] == 5
    parts = {name: Path(f"data/sparsekv/{name}.jsonl").read_text() for name in ("train", "sparse", "dense")}
    assert parts["train"].count("\n") + parts["sparse"].count("\n") == 8
    assert parts["dense"] == ""
    assert Path("predictor/context_fusion.safetensors").is_file()
    with Path("table/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert all(int(row["samples"]) == parts["sparse"].count("\n") >= 3 for row in rows)
    assert [bool(row["relevance_gigaflops"]) for row in rows] == [False, False, True, True]
    assert float(rows[0]["budget_achieved"]) == 1
    assert all(float(row["budget_achieved"]) == pytest.approx(0.2, abs=0.01) for row in rows[1:])
