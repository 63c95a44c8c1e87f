"""`fftriton eval`: the arithmetic of its figures, the records that it goes on from, and what it prints."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import typer
from models import tiny_qwen2, video_embeddings
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import fftriton
import fftriton.app.cli
import fftriton.evaluate.plots
from bench.needle import ablations
from fftriton.evaluate import Plan, Setting, evaluate, mcnemar_exact, runner, summarise, wilson_interval
from fftriton.evaluate.records import Record, RecordFolder
from fftriton.evaluate.rows import Row, depth_cells
from fftriton.hf.flops import prefill_flops, reduced_flops
from fftriton.needle import generate_sample
from fftriton.needle.task import NeedleTask
from fftriton.runtime.shipped import HARDER_MODEL, NEEDLE
from fftriton.runtime.target import Target

pytest.importorskip("av")  # reads videos


def no_bar(description):
    class Bar:
        def __enter__(self):
            return lambda done, total: None

        def __exit__(self, *exception):
            pass

    return Bar()


def record(index=0, right=True, **fields):
    values = {
        "key": "k", "kind": "what", "num_frames": 16, "depth": 0.5, "answer": "3", "expected": "3",
        "budget_achieved": 0.3, "flops": 2.0, "dense_flops": 8.0, "prefill_seconds": 0.01, "peak_memory": None,
        "vision_tokens": [4, 2],
    }  # fmt: skip
    return Record(index=index, right=right, **values | fields)


# ---- figures


def test_wilson_interval():
    assert wilson_interval(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.161125), abs=1e-6)
    assert wilson_interval(20, 20) == pytest.approx((1 - 0.161125, 1.0), abs=1e-6)


def test_points_and_lines_that_coincide_are_all_seen(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(fftriton.evaluate.plots, "save", lambda figure, path: figures.append(figure))
    figure_of = {"accuracy_low": 0.96, "accuracy_high": 0.99, "vision_tokens": [4.0, 2.0]}
    rows = [
        Row(name, 0.5, accuracy=0.975, relative_flops=cost, **figure_of)
        for name, cost in (("framefusion", 0.5), ("fastv", 0.5), ("kvtp", 0.3))
    ]
    fftriton.evaluate.plots.draw_pareto(tmp_path / "pareto.png", rows, "title")
    fftriton.evaluate.plots.draw_layers(tmp_path / "layers.png", rows, "title")
    pareto, layers = (figure.axes[0] for figure in figures)
    places = [bars.lines[0].get_xdata()[0] for bars in pareto.containers]
    assert places == pytest.approx([0.496, 0.504, 0.3])
    pareto.set_ylim(0.96, 0.99)
    figures[0].canvas.draw()
    assert "97.50%" in [label.get_text() for label in pareto.get_yticklabels()]
    heights = [line.get_data().values.tolist() for line in layers.patches]
    assert heights == [pytest.approx([4 + shift, 2 + shift]) for shift in (0, 0.048, 0.096)]


@pytest.mark.parametrize(("right", "samples"), [(1, 10), (30, 80)])
def test_wilson_interval_ends_where_the_score_test_does(right, samples):
    for end in wilson_interval(right, samples):
        assert abs(right / samples - end) / math.sqrt(end * (1 - end) / samples) == pytest.approx(1.959964, abs=1e-5)


def test_mcnemar_counts_every_outcome():
    for first, second in ((1, 9), (4, 4), (0, 5), (7, 2)):
        total = first + second
        outcomes = [bin(outcome).count("1") for outcome in range(2**total)]
        extreme = sum(abs(2 * heads - total) >= abs(first - second) for heads in outcomes)
        assert mcnemar_exact(first, second) == pytest.approx(extreme / 2**total)
    assert mcnemar_exact(0, 0) == 1.0


@pytest.mark.parametrize(
    "method",
    [
        fftriton.KeepAll(), fftriton.UniformFrames(0.4), fftriton.FrameFusion(0.5, -1.0, start_layer=2),
        fftriton.Anchors(0.4), fftriton.FrameFusion(0.5, -1.0, start_layer=2, proportional=True),
    ],
    ids=lambda method: type(method).__name__ + "-sizes" * getattr(method, "proportional", False),
)  # fmt: skip
def test_flops_are_those_that_torch_counts(method):
    model = tiny_qwen2(5, "eager")
    embeddings, layout = video_embeddings(6, 8)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), fftriton.reduce(model, method, layout) as reduction, counter:
        model(inputs_embeds=embeddings)
    counted = sum(sum(counter.get_flop_counts()[f"Qwen2ForCausalLM.model.layers.{i}"].values()) for i in range(5))
    tokens, sized = reduction.report.tokens_per_layer, reduction.report.sized_layers
    assert prefill_flops(model.config, tokens, tokens, sized) == counted / 2
    assert reduced_flops(model.config, reduction.report) == counted / 2
    assert bool(sized) == getattr(method, "proportional", False)


def test_flops_of_the_paper():
    config = tiny_qwen2(2).config
    config = type(config)(**{**config.to_dict(), "num_key_value_heads": config.num_attention_heads})
    d, f = config.hidden_size, config.intermediate_size
    expected = sum(4 * n * d**2 + 2 * n**2 * d for n in (10, 6)) + 3 * (6 + 6) * d * f
    assert prefill_flops(config, [10, 6], [10, 6]) == expected


def test_flops_of_experts_are_those_that_a_token_goes_through():
    config = tiny_qwen2(2).config
    dense = prefill_flops(config, [10, 6], [10, 6])
    config.update({"num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_experts": 4, "mlp_only_layers": [0]})
    d, f = config.hidden_size, config.intermediate_size
    assert prefill_flops(config, [10, 6], [10, 6]) == dense + 3 * 6 * d * (2 * 8 - f)
    config.update({"mlp_only_layers": None, "shared_expert_intermediate_size": 5})
    del config.intermediate_size
    assert prefill_flops(config, [10, 6], [10, 6]) == dense + 3 * 12 * d * (2 * 8 + 5 - f)


def test_rows():
    plan = Plan(methods=("keep-all", "framefusion", "fastv"), budgets=(0.5, 0.1), samples=4)
    assert plan.settings == [
        Setting("keep-all", 1.0), Setting("framefusion", 0.5), Setting("framefusion", 0.1),
        Setting("fastv", 0.5), Setting("fastv", 0.1),
    ]  # fmt: skip
    answers = {
        Setting("keep-all", 1.0): (True, True, True, True),
        Setting("framefusion", 0.5): (True, True, True, False),
        Setting("framefusion", 0.1): (True, False, False, False),
        Setting("fastv", 0.5): (False, True, False, True),
    }
    kinds = ("what", "where", "what", "where")
    records = {
        setting: [record(i, answer, kind=kinds[i], peak_memory=i * 2**20 or None) for i, answer in enumerate(own)]
        for setting, own in answers.items()
    }
    rows = {(row.method, row.budget): row for row in summarise(plan, records, {Setting("fastv", 0.1): "too little"})}
    first = rows["framefusion", 0.5]
    assert (first.accuracy, first.samples, first.relative_flops) == (0.75, 4, 0.25)
    assert (first.accuracy_low, first.accuracy_high) == wilson_interval(3, 4)
    assert first.by_kind == {"what": 1.0, "where": 0.5}
    assert first.vision_tokens == [4, 2]
    assert (first.prefill_ms, first.peak_mib) == (10.0, 2.0)
    assert (first.against, rows["keep-all", 1.0].against) == ("keep-all", None)
    assert (rows["fastv", 0.5].against, rows["fastv", 0.5].p_value) == ("keep-all", mcnemar_exact(0, 2))
    infeasible = rows["fastv", 0.1]
    assert (infeasible.accuracy, infeasible.samples, infeasible.note) == (None, 0, "too little")
    against_fusion = summarise(replace(plan, reference="framefusion"), records, {Setting("fastv", 0.1): ""})
    assert [row.p_value for row in against_fusion[1:4]] == [None, None, mcnemar_exact(1, 2)]
    assert Plan(methods=("fastv", "framefusion")).counterpart(Setting("framefusion", 0.3)) == Setting("fastv", 0.3)


def test_depths():
    records = [record(depth=depth, right=right) for depth, right in ((0.0, True), (0.1, False), (1.0, True))]
    records += [record(depth=None), record(depth=0.5, num_frames=32)]
    cells = depth_cells(Setting("framefusion", 0.3), records)
    found = [(cell.num_frames, cell.depth_from, cell.depth_to, cell.samples, cell.accuracy) for cell in cells]
    assert found == [(16, 0.0, 0.125, 2, 0.5), (16, 0.875, 1.0, 1, 1.0), (32, 0.5, 0.625, 1, 1.0)]


# ---- what to evaluate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "haystack"}, "task must be one of 'needle', got 'haystack'"),
        ({"split": "soft"}, "split must be one of 'easy', 'hard', .* got 'soft'"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"methods": ()}, "methods must be one or more, each once"),
        ({"budgets": (0.3, 0.3)}, "budgets must be one or more, each once"),
        ({"budgets": (0.3, 1.5)}, r"budgets must be in \(0, 1\], got 1.5"),
        ({"methods": ("slowv",)}, "method must be one of 'keep-all', .* got 'slowv'"),
        ({"methods": ("fastv:layer",)}, "must be NAME or NAME:PARAMETER=VALUE, .* got 'fastv:layer'"),
        (
            {"methods": ("framefusion:budget=0.5",)},
            "must leave the budget of the last one to budgets, got 'framefusion:",
        ),
        ({"methods": ("fastv:layer=0",)}, "FastV: layer must be at least 1, got 0"),
        ({"num_frames": (18,)}, "frames must be multiples of 4, got 18"),
        ({"reference": "fastv"}, "reference must be one of 'keep-all', 'framefusion', got 'fastv'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_bad_plans(changes, message):
    with pytest.raises(ValueError, match=message):
        Plan(**changes)


def test_parameters_of_methods():
    assert Setting("framefusion:similarity_threshold=0.9:importance_queries=1", 0.3).method() == fftriton.FrameFusion(
        0.3, 0.9, importance_queries=1
    )
    with pytest.raises(TypeError, match="'fastv:speed=1' cannot be made: .*speed"):
        Plan(methods=("fastv:speed=1",))
    draws = [Setting("randomtokens", 0.3).method(index).seed for index in (0, 7)]
    assert draws == [0, 7]
    assert Setting("randomtokens:seed=3", 0.3).method(7).seed == 3


def test_the_harder_splits_are_answered_by_the_model_that_ships_for_them():
    harder = Plan(split="relations").answering
    assert (harder.model, harder.name, harder.is_shipped) == (str(HARDER_MODEL), "needle-harder-qwen2vl", True)
    assert Plan(split="hard").answering == Target()
    assert replace(Plan(split="relations"), split="easy").answering == Target()
    assert Plan(split="relations", target=Target("my/model", dtype="float32")).answering.model == "my/model"
    assert Plan(split="relations", target=Target(dtype="float16")).answering.dtype == "float16"


# ---- answers

PLAN = Plan(methods=("keep-all", "framefusion", "fastv"), budgets=(0.5, 0.2), samples=5)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    plan = replace(PLAN, out=tmp_path_factory.mktemp("eval"))
    with pytest.MonkeyPatch.context() as patch:  # as the fixture `interpreter`, which comes later
        patch.setattr("fftriton_kernels._dispatch.INTERPRET", False)
        return plan, *evaluate(plan, no_bar)


@pytest.fixture
def answered(monkeypatch):
    """The index of every sample that is answered, and the settings."""
    seen, answer = [], runner.Answerer.answer

    def noted(self, sample, settings):
        seen.append((sample.index, len(settings)))
        return answer(self, sample, settings)

    monkeypatch.setattr(runner.Answerer, "answer", noted)
    return seen


def test_answers_are_those_of_the_plain_model(evaluated):
    plan, rows, records = evaluated
    model, processor = Target().load_model(), Target().load_processor()
    for index in range(plan.samples):
        sample = generate_sample("easy", 0, index)
        inputs = processor(sample.video, sample.question)
        with torch.no_grad():
            token = model(**inputs).logits[0, -1].argmax()
            with fftriton.reduce(model, fftriton.FrameFusion(0.2)) as reduction:
                reduced = model(**inputs).logits[0, -1].argmax()
        own = records[Setting("keep-all", 1.0)][index]
        assert (own.answer, own.expected) == (processor.tokenizer.decode(token), sample.answer)
        assert (own.kind, own.depth, own.flops) == (sample.kind, sample.needle_depth, own.dense_flops)
        fused = records[Setting("framefusion", 0.2)][index]
        assert fused.answer == processor.tokenizer.decode(reduced)
        assert fused.vision_tokens == reduction.report.vision_tokens_per_layer
    accuracy = {(row.method, row.budget): row.accuracy for row in rows}
    assert accuracy["keep-all", 1.0] >= 0.8
    assert accuracy["fastv", 0.2] is None


def test_a_second_run_answers_nothing_again(evaluated, answered):
    plan, rows, _ = evaluated
    again, _ = evaluate(plan, no_bar)
    assert answered == []
    assert again == rows


def test_a_run_that_was_broken_off_goes_on(evaluated, answered, tmp_path):
    plan, rows, _ = evaluated
    lines = (plan.out / "records-0.jsonl").read_text().splitlines()
    (tmp_path / "records-0.jsonl").write_text("\n".join(lines[:9]) + "\n" + lines[9][:40] + "\n")
    again, _ = evaluate(replace(plan, out=tmp_path), no_bar)
    assert answered == [(2, 3), (3, 4), (4, 4)]
    assert [row.accuracy for row in again] == [row.accuracy for row in rows]


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"split": "hard"}, {"num_frames": (8,)}, {"target": Target(max_new_tokens=2)}], ids=str
)
def test_other_settings_do_not_mix(evaluated, answered, changes):
    plan = replace(evaluated[0], methods=("framefusion",), budgets=(0.5,), samples=1, **changes)
    evaluate(plan, no_bar)
    assert answered == [(0, 1)]


def test_fewer_samples_or_methods_are_read_from_what_is_there(evaluated, answered):
    rows, _ = evaluate(replace(evaluated[0], methods=("framefusion",), samples=2), no_bar)
    assert answered == []
    assert [row.samples for row in rows] == [2, 2]


def test_retrained_weights_are_another_model():
    answerer = runner.Answerer(Target(), NeedleTask())
    before = answerer.describe()
    assert before == runner.Answerer(Target(), NeedleTask()).describe()
    with torch.no_grad():
        next(answerer.model.parameters()).add_(1e-3)
    assert before["weights"] != answerer.describe()["weights"]


def test_the_video_is_encoded_once(monkeypatch):
    answerer, calls = runner.Answerer(Target(), NeedleTask()), []
    model = answerer.model
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    settings = {Setting("keep-all", 1.0): "a", Setting("framefusion", 0.3): "b", Setting("uniformframes", 0.3): "c"}
    for index in (3, 4):
        answerer.answer(generate_sample("easy", 0, index), settings)
    assert len(calls) == 2
    assert "get_video_features" not in vars(model.model)


def test_records_keep_to_their_keys(tmp_path):
    first, second = RecordFolder(tmp_path, 0, Record), RecordFolder(tmp_path, 1, Record)
    first.append([record(0), record(1, key="other")])
    second.append([record(2)])
    assert sorted(first.read(["k"])) == [("k", 0), ("k", 2)]
    assert first.read(["k"]) == second.read(["k"])


# ---- the command


def invoke(*arguments):
    return CliRunner().invoke(fftriton.app.cli.app, ["eval", *map(str, arguments)])


ARGUMENTS = ("--methods", "keep-all,framefusion,fastv", "--budgets", "0.5,0.2", "--samples", 5)


def test_json_and_nothing_else(evaluated):
    result = invoke(*ARGUMENTS, "--out", evaluated[0].out, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    wanted = {"budget_achieved", "samples", "accuracy", "accuracy_low", "accuracy_high", "relative_flops"}
    assert all(wanted <= set(row) for row in rows)
    assert [(row["method"], row["budget"]) for row in rows] == [
        ("keep-all", 1.0), ("framefusion", 0.5), ("framefusion", 0.2), ("fastv", 0.5), ("fastv", 0.2),
    ]  # fmt: skip
    assert rows[-1]["accuracy"] is None
    assert "FastV: budget must be above" in rows[-1]["note"]
    assert rows[1]["accuracy_low"] <= rows[1]["accuracy"] <= rows[1]["accuracy_high"]


def test_table_files_and_pictures(evaluated):
    out = evaluated[0].out
    result = invoke(*ARGUMENTS, "--out", out)
    assert result.exit_code == 0, result.output
    assert "framefusion" in result.stdout
    assert "fastv at 20%: FastV: budget must be above" in result.stdout
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["keep-all", "framefusion", "framefusion", "fastv", "fastv"]
    assert rows[1]["accuracy how many"] in ("0", "1")
    assert {row["command"] for row in rows} != {""}
    for name in ("pareto.png", "depths.png", "layers.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "slowv"], "method must be one of"),
        (["--budgets", "0.3,a"], "budget must be a number in (0, 1], got 'a'"),
        (["--frames", "16,x"], "frames must be numbers separated by commas, got 'x'"),
        (["--model", str(NEEDLE.path.parent)], "model must be the folder or the hub name of"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_refused(tmp_path, arguments, message):
    result = invoke(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) <= 2  # the bar of loading, and the error


def test_processes_share_the_samples(tmp_path, evaluated):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fftriton",
        "eval", "--methods", "framefusion", "--budgets", "0.2", "--samples", "3", "--out", str(tmp_path), "--json",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(done.stdout)
    one_process = evaluated[2][Setting("framefusion", 0.2)][:3]
    assert (row["samples"], row["accuracy"]) == (3, sum(record.right for record in one_process) / 3)
    files = sorted(tmp_path.glob("records-*.jsonl"))
    assert [{json.loads(line)["index"] for line in file.open()} for file in files] == [{0, 2}, {1}]


# ---- the paper's ablations


def test_every_ablation_is_a_plan():
    for table in ablations.TABLES:
        plans = list(ablations.plans(table, Plan(), 0.9))
        assert plans
        for setting in (setting for plan in plans for setting in plan.settings):
            method = setting.method()
            assert setting.name == "keep-all" or method.similarity_threshold == 0.9


def test_ablations_are_written_line_by_line(tmp_path):
    app = typer.Typer()
    app.command()(ablations.main)
    out = tmp_path / "results.csv"
    arguments = ["--tables", "3", "--splits", "easy", "--budgets", "0.5", "--thresholds", "0.9", "--samples", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    with out.open() as file:
        lines = list(csv.DictReader(file))
    stages = ("merge", "prune", "prune,merge")
    names = ("framefusion", *(f"framefusion:stages=({part})" for part in stages))
    assert [line["method"] for line in lines] == [f"{name}:similarity_threshold=0.9" for name in names]
    assert {(line["table"], line["split"], line["samples"]) for line in lines} == {("3", "easy", "1")}
