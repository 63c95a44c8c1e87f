"""Reports: one type for any batch, plain types for JSON, tables for people."""

import copy
import dataclasses
import inspect
import json
import pickle
import re
import warnings

import pytest
import torch
from families import FAMILIES, collate
from models import behind, cache_of, tiny_qwen2, tiny_qwen2_vl, video_embeddings, video_prompt
from transformers import GenerationMixin

import fftriton
from fftriton.hf.report import SampleReport, Stopwatch

METHOD = fftriton.FrameFusion(0.3, 0.95, importance_queries=2)
OF_ONE_SAMPLE = [
    *(field.name for field in dataclasses.fields(SampleReport) if not field.name.startswith("_")),
    *(name for name, value in vars(SampleReport).items() if isinstance(value, property)),
]
OF_THE_FORWARD = {"method", "budget"}


def report_of(model, inputs, method=METHOD):
    with torch.no_grad(), fftriton.reduce(model, method) as reduction:
        model(**inputs)
    return reduction.report


@pytest.fixture(scope="module")
def in_pytorch():
    """As the fixture `interpreter`, which comes later than those of the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fftriton_kernels._dispatch.INTERPRET", False)
        yield


@pytest.fixture(scope="module")
def single(in_pytorch):
    return report_of(tiny_qwen2_vl(), video_prompt())


@pytest.fixture(scope="module")
def batch(in_pytorch):
    family = FAMILIES["qwen2_vl"]
    samples = [family.inputs(), family.inputs((), image=False, seed=1), family.inputs((6,), image=False, seed=2)]
    return report_of(family.model(), collate(samples, "left"))


def test_one_type(single, batch):
    assert type(single) is type(batch) is fftriton.Report
    assert [len(report.samples) for report in (single, batch)] == [1, 3]
    assert all(type(sample) is fftriton.SampleReport for sample in single.samples + batch.samples)


@pytest.mark.parametrize("name", OF_ONE_SAMPLE)
def test_properties_are_those_of_the_only_sample(name, single, batch):
    own, of_sample = getattr(single, name), getattr(single.samples[0], name)
    if isinstance(own, torch.Tensor):
        assert torch.equal(own, of_sample)
    else:
        assert own is of_sample or repr(own) == repr(of_sample)
    if name in OF_THE_FORWARD:
        assert getattr(batch, name) == getattr(batch.samples[2], name)
        return
    rule = rf"report: {name} belongs to one sample, but the batch has 3; use report\.samples\[i\]\.{name}"
    with pytest.raises(AttributeError, match=rule):
        getattr(batch, name)
    assert not hasattr(batch, name)
    assert hasattr(batch.samples[1], name)


def test_a_batch_can_be_copied_and_looked_at(single, batch):
    for report in (single, batch):
        names = dict(inspect.getmembers(report))
        assert {"samples", "seconds", "budget", "method"} <= set(names)
        assert ("kept_positions" in names) == (len(report.samples) == 1)
        for twin in (copy.copy(report), copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
            assert twin.to_dict() == report.to_dict()
            assert (str(twin), repr(twin), twin.seconds) == (str(report), repr(report), report.seconds)


def test_a_copied_stopwatch_holds_seconds():
    """A CUDA event cannot be copied."""

    class Event:
        def __init__(self, at):
            self.at = at

        def elapsed_time(self, end):
            return end.at - self.at

        def __reduce_ex__(self, protocol):
            raise TypeError

    watch = Stopwatch(torch.device("cpu"))
    watch.cuda, watch.spans = True, [("merge", Event(1), Event(501)), ("merge", Event(0), Event(250))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        twin = copy.deepcopy(watch)
    assert twin.seconds() == {"merge": 0.75}


def test_to_dict_is_json(single, batch):
    for report in (single, batch):
        there = report.to_dict()
        assert json.loads(json.dumps(there, allow_nan=False)) == there
        assert there["method"] == str(METHOD)
        assert there["budget"] == 0.3
        assert there["seconds"] == report.seconds
        for own, sample in zip(there["samples"], report.samples, strict=True):
            assert own == sample.to_dict()
            assert set(own) == set(OF_ONE_SAMPLE)
            assert own["kept_positions"] == [kept.tolist() for kept in sample.kept_positions]
            assert [step["merged"] for step in own["merge_steps"]] == [s.merged.tolist() for s in sample.merge_steps]
            assert [step["into"] for step in own["merge_steps"]] == [s.into.tolist() for s in sample.merge_steps]
            assert own["pruned"] == sample.pruned.tolist()
            assert own["budget_achieved"] == sample.budget_achieved
    assert single.merge_steps
    assert len(single.pruned) > 0


def test_to_dict_of_a_window():
    report = report_of(tiny_qwen2_vl(), video_prompt(), fftriton.StreamingLLM(0.4, sinks=2))
    window = report.window
    assert report.to_dict()["samples"][0]["window"] == {"sinks": 2, "recent": window.recent}
    assert f"attention to the first 2 and the last {window.recent} tokens" in str(report)


def test_text(single, batch):
    title, prompt, budget, seconds, heading, *layers = str(single).splitlines()
    assert title == str(METHOD)
    assert prompt == f"{single.num_tokens} tokens in the prompt, {single.num_video_tokens} of them video"
    assert budget.startswith(f"budget asked 30.0%, achieved {single.budget_achieved:.1%}, ")
    assert seconds.startswith("seconds: ")
    assert "prefill " in seconds
    assert heading.split() == ["layers", "rows", "tokens", "attended", "video", "tokens", "of", "all", "step"]
    table, covered = [line.split() for line in layers], []
    for first, rows, attended, video, share, *step in table:
        start, _, end = first.partition("-")
        for layer in range(int(start), int(end or start) + 1):
            covered.append(layer)
            assert int(rows) == single.rows_per_layer[layer]
            assert int(attended) == single.tokens_per_layer[layer]
            assert int(video) == single.vision_tokens_per_layer[layer]
            assert share == f"{single.vision_tokens_per_layer[layer] / single.num_video_tokens:.1%}"
        merges = [s for s in single.merge_steps if int(start) <= s.layer <= int(end or start)]
        assert step.count("merge") == len(merges)
        assert ("prune" in step) == (single.prune_layer == int(start))
    assert covered == list(range(len(single.tokens_per_layer)))
    title, sentence, _, heading, *rows = str(batch).splitlines()
    assert (title, sentence) == (str(METHOD), "3 samples, budget asked 30.0%")
    assert [row.split()[:3] for row in rows] == [
        [str(number), str(sample.num_tokens), str(sample.num_video_tokens)]
        for number, sample in enumerate(batch.samples)
    ]
    assert rows[1].split()[-1] == "-"  # which layer pruned where there is no video
    assert str(batch.samples[2]).splitlines()[1].startswith(f"{batch.samples[2].num_tokens} tokens in the prompt")


def test_one_line(single, batch):
    for report in (single, batch, *batch.samples):
        assert len(repr(report).splitlines()) == 1
        assert repr(report).startswith(f"{type(report).__name__}(method={str(METHOD)!r}")
    assert f"budget_achieved={single.budget_achieved:.4g}" in repr(single)
    assert "samples=3" in repr(batch)


def test_html(single, batch):
    for report in (single, batch, batch.samples[0]):
        html = report._repr_html_()
        rows = re.findall("<tr>(.*?)</tr>", html)
        cells = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in rows]
        text = [line.split() for line in str(report).splitlines()[-len(rows) :]]
        assert [" ".join(filter(None, row)).split() for row in cells] == text
    odd = copy.copy(single.samples[0])
    odd.method = "<script>&"
    assert "<script>" not in fftriton.Report([odd])._repr_html_()
    assert "&lt;script&gt;&amp;" in fftriton.Report([odd])._repr_html_()


@pytest.mark.parametrize("module", [fftriton, fftriton.hf, fftriton.hf.report], ids=lambda module: module.__name__)
def test_batch_report_works_for_one_more_release(module, single, batch):
    with pytest.warns(DeprecationWarning, match=r"BatchReport is deprecated .* every report is a Report") as caught:
        old = module.BatchReport
    assert caught[0].filename == __file__
    assert isinstance(batch, old)
    assert not isinstance(single, old)
    assert not isinstance(None, old)
    for report in (single, batch):  # what code for the two types does
        samples = report.samples if isinstance(report, old) else [report]
        assert [sample.num_tokens for sample in samples] == [sample.num_tokens for sample in report.samples]
    assert type(old(batch.samples)) is fftriton.Report
    with pytest.raises(AttributeError, match=rf"module '{module.__name__}' has no attribute 'Batch'"):
        _ = module.Batch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec("from fftriton import *", {})


# ---- whose report it is


@torch.no_grad()
def test_a_prompt_that_fails_has_no_report():
    model, (video, layout), words = tiny_qwen2(), video_embeddings(4, 5), torch.tensor([[3, 4, 5]])

    def place(_, arguments):
        if "inputs_embeds" not in arguments:
            return []
        if broken == ["layout"]:
            raise KeyError
        return layout

    def break_off(*_):
        if broken == ["layer"]:
            raise KeyError

    broken = []
    hook = model.model.layers[1].mlp.register_forward_hook(break_off)
    with fftriton.reduce(model, fftriton.FastV(0.6), place) as reduction:
        for ask in (lambda **given: model(**given), lambda **given: model.generate(**given, max_new_tokens=2)):
            for broken[:] in (["layout"], ["layer"]):
                wrong, broken[:] = list(broken), []
                ask(inputs_embeds=video)
                assert reduction.report is not None
                broken[:] = wrong
                with pytest.raises(KeyError):
                    ask(inputs_embeds=video)
                assert reduction.report is None
        broken[:] = []
        cache = cache_of(model(inputs_embeds=video))
        report = reduction.report
        broken[:] = ["layer"]
        for tokens in (words, words[:, :1]):  # what follows a prompt is none
            with pytest.raises(KeyError):
                model(input_ids=tokens, **behind(cache))
            assert reduction.report is report
        with pytest.raises(KeyError):
            model(input_ids=words)  # a prompt without a video
        assert reduction.report is None
    hook.remove()


@torch.no_grad()
def test_a_new_block_begins_without_a_report():
    model, inputs = tiny_qwen2_vl(), video_prompt()
    reduction = fftriton.reduce(model, METHOD)
    assert reduction.report is None
    for _ in range(2):
        with reduction:
            assert reduction.report is None
            model(**inputs)
            assert reduction.report.budget_achieved < 0.5
        assert reduction.report.budget_achieved < 0.5  # after its block, too


@torch.no_grad()
def test_generate_of_the_class_says_what_to_do():
    model, inputs = tiny_qwen2_vl(), video_prompt()
    bound = model.generate
    with fftriton.reduce(model, METHOD) as reduction:
        rule = r"looked up before, or on the class: call model\.generate\(\.\.\.\) inside the block"
        with pytest.raises(RuntimeError, match=rule):
            GenerationMixin.generate(model, **inputs, max_new_tokens=2)
        with pytest.raises(RuntimeError, match=rule):
            bound(**inputs, max_new_tokens=2)
        model.generate(**inputs, max_new_tokens=2)
        assert reduction.report.budget_achieved < 0.5
