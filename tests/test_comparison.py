"""The comparison of all methods: what is measured, kept and written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
import typer

from bench.needle import compare
from bench.needle.compare import DENSE, REFERENCE, Line
from fftriton.evaluate import Plan
from fftriton.methods import names
from fftriton.methods.text import read
from fftriton.needle import HARDER_SPLITS, SPLITS

MINE = """
from dataclasses import dataclass
import fftriton

@dataclass(frozen=True)
class Mine(fftriton.UniformFrames):
    "A user's own method."
"""


def line(split, method, budget, accuracy, **changes):
    about = Line(
        split, method, budget, budget, 500, accuracy, 0.5, 0.6, 0.25, 0.3, 12.5, None, 9000, "needle", "cpu",
        1, "2", "5", "abc", "2026-01-01",
    )  # fmt: skip
    return replace(about, **changes)


def table_of(values):
    """Lines of split -> method -> accuracy at 30 and 10 %; keep-all once."""
    return [
        line(split, method, budget, accuracy)
        for split, methods in values.items()
        for method, accuracies in methods.items()
        for budget, accuracy in zip((1.0,) if method == DENSE else (0.3, 0.1), accuracies, strict=True)
    ]


LINES = table_of(
    {
        "easy": {DENSE: (1.0,), REFERENCE: (0.9, 0.6), "evs": (0.8, 0.7), "fastv": (0.9, None)},
        "brief": {DENSE: (0.5,), REFERENCE: (0.5, 0.4), "evs": (0.25, 0.1), "fastv": (0.5, None)},
    }
)


def test_every_method_of_the_package_is_compared():
    compared = {part.name for text in compare.METHODS for part in read(text)}
    assert compared == set(names())
    settings = Plan(methods=compare.METHODS, budgets=compare.FIRST, split="easy", samples=1).settings
    possible = {setting.name for setting in settings if setting.problem(num_layers=8) is None}
    assert possible == set(compare.METHODS)


def test_a_share_is_of_the_accuracy_with_all_tokens_of_the_same_split():
    assert compare.shares(LINES, 0.3)["evs"] == {"easy": 0.8, "brief": 0.5}
    assert compare.shares(LINES, 0.1)["evs"] == {"easy": 0.7, "brief": pytest.approx(0.2)}
    assert "fastv" not in compare.shares(LINES, 0.1)


def test_the_best_are_those_that_reach_both_budgets():
    assert compare.best_methods(LINES) == [REFERENCE, "evs"]
    assert compare.best_methods(LINES, count=0) == [REFERENCE]


def test_new_lines_replace_old_ones_and_the_others_stay():
    new = [line("easy", "evs", 0.1, 0.99), line("easy", "evs", 0.05, 0.5)]
    lines = compare.merged(LINES, new)
    assert len(lines) == len(LINES) + 1
    own = [one for one in lines if (one.split, one.method) == ("easy", "evs")]
    assert [(one.budget, one.accuracy) for one in own] == [(0.3, 0.8), (0.1, 0.99), (0.05, 0.5)]
    assert [one.split for one in lines] == ["easy"] * 8 + ["brief"] * 7


def test_the_summary_has_the_mean_and_the_worst_split():
    rows = compare.summary(LINES).splitlines()
    assert rows[2:] == [
        "| `framefusion` | 95.0 | 90.0 (easy) | 70.0 | 60.0 (easy) |",
        "| `evs` | 65.0 | 50.0 (brief) | 45.0 | 20.0 (brief) |",
        "| `fastv` | 95.0 | 90.0 (easy) |  |  |",
    ]


def test_the_file_reads_back(tmp_path):
    lines = [*LINES, line("easy", "fastv", 0.2, None, note="too few layers", p_value=None)]
    compare.write_csv(lines, tmp_path / "lines.csv")
    assert compare.read_lines(tmp_path / "lines.csv") == lines
    assert compare.read_lines(tmp_path / "none.csv") == []


def test_a_method_of_ones_own_is_compared_by_one_option(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    out, records = tmp_path / "out", tmp_path / "records"

    def run():
        compare.main("evs", ["my_module:Mine"], "easy", samples=4, out=out, records=records)
        return compare.read_lines(out / "needle-comparison.csv")

    lines = run()
    assert {one.method for one in lines} == {DENSE, REFERENCE, "evs", "my_module:Mine"}
    budgets = [one.budget for one in lines if one.method == "my_module:Mine"]
    assert budgets == list(compare.THEN)
    dense = next(one for one in lines if one.method == DENSE)
    assert dense.accuracy >= 0.75
    assert dense.samples == 4
    against = [one.p_value for one in lines if one.method == "evs"]
    assert None not in against
    answers = (records / "easy" / "records-0.jsonl").read_bytes()
    assert run() == lines  # from the records
    assert (records / "easy" / "records-0.jsonl").read_bytes() == answers
    page = (out / "needle-comparison.md").read_text()
    assert "| `my_module:Mine` |" in page
    assert "## easy, 4 samples" in page
    assert (out / "needle-comparison.png").stat().st_size > 10_000


def test_an_unknown_split_is_refused_before_any_work(tmp_path):
    with pytest.raises(typer.BadParameter, match=r"splits must be among easy, .*, longer, got 'soft'"):
        compare.main(splits="easy,soft", out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_documents_show_what_was_measured():
    lines = compare.read_lines(compare.RESULTS / f"{compare.NAME}.csv")
    assert (compare.RESULTS / f"{compare.NAME}.md").read_text(encoding="utf-8") == compare.page(lines) + "\n"
    assert f"{compare.BEGIN}\n\n{compare.summary(lines)}\n\n{compare.END}" in compare.README.read_text(encoding="utf-8")
    budgets = {method: (1.0,) if method == DENSE else compare.FIRST for method in compare.METHODS}
    budgets |= dict.fromkeys(compare.best_methods(lines), compare.THEN)
    every = {(split, m, b) for split in (*SPLITS, *HARDER_SPLITS) for m, own in budgets.items() for b in own}
    assert every <= {line.key for line in lines}
    assert (
        len({(line.samples, line.seed, line.device, line.torch, line.transformers) for line in lines if line.samples})
        == 1
    )
    for split in SPLITS:
        assert {line.model for line in lines if line.split == split} == {"needle-qwen2vl"}
    for split in HARDER_SPLITS:
        assert {line.model for line in lines if line.split == split} == {"needle-harder-qwen2vl"}
    found = {line.key: line for line in lines}
    for split in (*SPLITS, *HARDER_SPLITS):  # as bench/needle/README.md has it
        anchors, reference = ([found[split, name, b] for b in compare.FIRST] for name in ("anchors", REFERENCE))
        assert anchors[0].accuracy >= reference[0].accuracy
        assert anchors[1].accuracy > reference[1].accuracy
        assert anchors[1].p_value < 0.004
        for own, other in zip(anchors, reference, strict=True):
            assert 1.01 < own.relative_flops / other.relative_flops < 1.105
    least = [min(compare.shares(lines, budget)["anchors"].values()) for budget in compare.FIRST]
    assert least[0] > 0.995
    assert least[1] > 0.977


def test_a_method_of_some_splits_alone_is_not_ranked():
    lines = [*LINES, line("easy", "vidcom2", 0.3, 1.0), line("easy", "vidcom2", 0.1, 1.0)]
    assert compare.best_methods(lines) == [REFERENCE, "evs"]
    assert compare.summary(lines).splitlines()[-1] == "| `vidcom2` |  |  |  |  |"


@pytest.mark.parametrize(("changes", "named"), [({"samples": 50}, "samples 4"), ({"seed": 1}, "seed 9000")])
def test_lines_that_cannot_be_compared_are_refused_before_any_work(tmp_path, changes, named):
    about = {"torch": torch.__version__, "transformers": transformers.__version__}
    own = line("easy", "evs", 0.3, 0.5, samples=4, **about)
    cannot = replace(own, budget=0.1, accuracy=None, samples=0)
    compare.write_csv([cannot, own], tmp_path / "needle-comparison.csv")
    with pytest.raises(typer.BadParameter, match=f"out must be .* has some with {named}, and this run has"):
        compare.main("evs", splits="easy", out=tmp_path, records=tmp_path / "records", **{"samples": 4} | changes)
    assert [path.name for path in tmp_path.iterdir()] == ["needle-comparison.csv"]
