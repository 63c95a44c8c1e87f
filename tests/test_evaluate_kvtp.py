"""`fftriton eval` with KVTP: settings that name a predictor, the control, and two methods one after the other."""

import json
import shutil

import pytest
import torch

import fftriton
from bench.kvtp.needle import WORDS
from bench.kvtp.small import small_siglip
from fftriton import KVTP, ToMe, TopKPruner
from fftriton.evaluate import Plan, Setting, evaluate
from fftriton.evaluate.relevance import SampleRelevance, sample_relevance
from fftriton.evaluate.runner import Answerer
from fftriton.needle import generate_sample
from fftriton.needle.samples import write_clip
from fftriton.needle.task import NeedleTask
from fftriton.needle.vocabulary import COLOURS, DIGITS
from fftriton.relevance import BoundRelevance, SiglipRelevance
from fftriton.runtime.target import Target

pytest.importorskip("av")  # reads videos


@pytest.fixture
def predictor(tmp_path):
    """A predictor with random weights: its folder."""
    relevance = small_siglip(WORDS, side=64, patch=16, width=16, depth=1)
    relevance.save_pretrained(tmp_path / "predictor")
    yield tmp_path / "predictor"
    sample_relevance.cache_clear()


def test_settings(predictor):
    setting = Setting(f"kvtp:relevance='{predictor}':pruner='tome':temperature=3", 0.2)
    method = setting.method()
    assert (method.budget, method.pruner, method.temperature) == (0.2, "tome", 3)
    assert method.relevance is setting.relevances[0] is sample_relevance(str(predictor))
    assert not setting.is_control
    assert Setting(f"kvtp:relevance='{predictor}':question='unrelated'", 0.2).is_control
    chain = Setting("kvtp:pruner='random'+framefusion:similarity_threshold=0.9", 0.16).method()
    first, second = chain.methods
    assert (first.budget, first.pruner, chain.budget) == (0.4, "random", 0.16)
    assert second.similarity_threshold == 0.9
    assert Setting("uniformframes:budget=0.5+fastv:layer=1", 0.3).method().methods[0].budget == 0.5


def test_each_method_of_a_chain_has_its_own_predictor(predictor, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(predictor, other)
    setting = Setting(f"kvtp:relevance='{predictor}' + kvtp:relevance='{other}'", 0.2)
    first, second = (method.relevance for method in setting.method().methods)
    assert (first, second) == (sample_relevance(str(predictor)), sample_relevance(str(other)))
    assert setting.relevances == [first, second]
    assert Setting("kvtp:relevance=None", 0.2).relevances == []


def test_a_chain_whose_first_budget_only_some_totals_fit():
    name = "temporalmerge:budget=0.4+fastv:layer=1"
    few, many = Plan(methods=(name,), budgets=(0.3, 0.5)).settings
    assert few.problem(8) is None
    assert "FastV must not be above that of TemporalMerge, 0.4; got 0.5" in many.problem(8)
    with pytest.raises(ValueError, match="FastV must not be above that of TemporalMerge, 0.4; got 0.5"):
        Plan(methods=(name,), budgets=(0.5,))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kvtp:relevance='/nowhere'", "relevance must be the checkpoint of a SigLIP, got '/nowhere'"),
        ("kvtp:question='mine'", "question must be one of 'unrelated', got 'mine'"),
        ("framefusion+kvtp", "'framefusion' cannot come before 'kvtp', because it works inside the layers"),
        ("kvtp:budget=0.1+framefusion", "FrameFusion must not be above that of KVTP, 0.1; got 0.2"),
    ],
)
def test_settings_that_cannot_be(name, message):
    with pytest.raises(ValueError, match=message):
        Setting(name, 0.2).method()


class Noting(SampleRelevance):
    """Scores that count the frames, and a note of every question."""

    digest = "noting"

    def __init__(self):
        self.questions = []

    def to(self, device):
        return self

    def bind(self, frames, question):
        self.questions.append(question)
        return BoundRelevance(torch.arange(len(frames)).float())


def test_the_control_is_told_another_question(monkeypatch, tmp_path):
    noting = Noting()
    monkeypatch.setattr("fftriton.evaluate.plan.sample_relevance", lambda checkpoint: noting)
    name = "kvtp:relevance='x'"
    plan = Plan(methods=(name, f"{name}:question='unrelated'"), budgets=(0.2,), samples=2, out=tmp_path)
    rows, _ = evaluate(plan, lambda description: _NoBar())
    own = [generate_sample("easy", 0, index).question for index in range(2)]
    assert noting.questions[::2] == own
    for question, other in zip(own, noting.questions[1::2], strict=True):
        names = [set(text.replace("?", "").split()) & {*COLOURS, *DIGITS} for text in (question, other)]
        assert names[1]
        assert not names[0] & names[1]
    assert [row.budget_achieved for row in rows] == pytest.approx([51 / 256] * 2)


def test_a_predictor_reads_the_query_of_a_line(monkeypatch, tmp_path):
    noting, lines = Noting(), []
    monkeypatch.setattr("fftriton.evaluate.plan.sample_relevance", lambda checkpoint: noting)
    for index in range(2):
        sample = generate_sample("easy", 0, index)
        write_clip(tmp_path / f"{index}.mp4", sample.frames)
        line = {"video": f"{index}.mp4", "question": sample.question, "answer": sample.answer, "query": f"box {index}"}
        lines.append(json.dumps(line))
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    methods = ("kvtp:relevance='x'", "kvtp:relevance='x':question='unrelated'")
    plan = Plan(methods=methods, budgets=(0.2,), task=str(tmp_path / "q.jsonl"), samples=2, out=tmp_path / "out")
    evaluate(plan, lambda description: _NoBar())
    assert noting.questions == ["box 0", "box 1", "box 1", "box 0"]


class _NoBar:
    def __enter__(self):
        return lambda done, total: None

    def __exit__(self, *exception):
        pass


def test_frames_are_encoded_once_and_answers_are_those_of_the_library(predictor, monkeypatch):
    names = [f"kvtp:relevance='{predictor}':pruner='{pruner}'" for pruner in ("random", "topk")]
    settings = {Setting(name, 0.2): name for name in names}
    calls, look = [], SiglipRelevance.look
    monkeypatch.setattr(SiglipRelevance, "look", lambda *args, **named: calls.append(1) or look(*args, **named))
    answerer = Answerer(Target(), NeedleTask())
    sample = generate_sample("easy", 0, 1)
    records = answerer.answer(sample, settings)
    assert len(calls) == 1
    bound = SiglipRelevance.from_pretrained(predictor).bind(sample.frames, sample.question)
    with torch.no_grad(), fftriton.reduce(answerer.model, KVTP(0.2, bound, "topk")) as reduction:
        token = answerer.model(**answerer.processor(sample.video, sample.question)).logits[0, -1].argmax()
    assert records[1].answer == answerer.processor.tokenizer.decode(token)
    assert records[1].vision_tokens == reduction.report.vision_tokens_per_layer


def test_features_of_a_video_serve_for_all_its_questions(predictor, monkeypatch):
    """However the frames come, and if other videos come in between; patches are looked at once they are wanted."""
    calls, look = [], SiglipRelevance.look
    monkeypatch.setattr(SiglipRelevance, "look", lambda *args, **named: calls.append(1) or look(*args, **named))
    relevance = sample_relevance(str(predictor))
    one, other = (generate_sample("easy", 0, index).frames for index in (0, 1))
    first = relevance.bind(one, "where is the red box")
    relevance.bind(other, "where is the red box")
    again = relevance.bind([*one.copy()], "where is the red box")
    assert torch.equal(first.scores, again.scores)
    assert (len(calls), first.macs) == (2, again.macs)
    assert relevance.bind(one, "where is it", patches=True).patches is not None
    assert len(calls) == 3


def test_the_rows_have_the_cost_of_the_predictor(predictor, tmp_path):
    name = f"kvtp:relevance='{predictor}'"
    rows, records = evaluate(
        Plan(methods=("kvtp", name), budgets=(0.2,), samples=2, out=tmp_path / "out"), lambda description: _NoBar()
    )
    without, scored = rows
    assert without.relevance_ms is without.relevance_gigaflops is None
    assert scored.gigaflops == pytest.approx(without.gigaflops + scored.relevance_gigaflops)
    assert scored.relative_flops == pytest.approx(scored.gigaflops / without.gigaflops * without.relative_flops)
    sample = generate_sample("easy", 0, 0)
    bound = SiglipRelevance.from_pretrained(predictor).bind(sample.frames, sample.question)
    own = records[Setting(name, 0.2)][0]
    assert own.relevance_flops == bound.macs
    assert own.relevance_seconds > 0
    assert scored.prefill_ms > scored.relevance_ms > 0


@pytest.mark.parametrize("pruner", ["topk(importance=predictor)", "tome(keys=predictor)"])
def test_pruners_take_importance_and_keys_from_the_predictor(predictor, pruner):
    sample = generate_sample("easy", 0, 0)
    inputs = Target().load_processor()(sample.video, sample.question)
    method = Setting(f"kvtp:relevance='{predictor}':pruner={pruner}", 0.2).method()
    model = Target().load_model()
    with torch.no_grad(), fftriton.reduce(model, method.about(sample.frames, sample.question)) as reduction:
        model(**inputs)
    patches = SiglipRelevance.from_pretrained(predictor).look(sample.frames, patches=True).patches
    given = {"importance": patches.importance} if "importance" in pruner else {"keys": patches.vectors}
    by_hand = (TopKPruner if "importance" in pruner else ToMe)(**given)
    bound = SiglipRelevance.from_pretrained(predictor).bind(sample.frames, sample.question)
    with torch.no_grad(), fftriton.reduce(model, KVTP(0.2, bound, by_hand)) as expected:
        model(**inputs)
    assert torch.equal(reduction.report.kept_positions[0], expected.report.kept_positions[0])


def test_a_retrained_predictor_is_another_one(predictor):
    before = sample_relevance(str(predictor)).digest
    relevance = SiglipRelevance.from_pretrained(predictor)
    with torch.no_grad():
        next(relevance.model.parameters()).add_(1e-3)
    relevance.save_pretrained(predictor)
    sample_relevance.cache_clear()
    assert sample_relevance(str(predictor)).digest != before


def test_an_unbound_predictor_is_refused(predictor):
    relevance = SiglipRelevance.from_pretrained(predictor)
    model = Target().load_model()
    with pytest.raises(ValueError, match="relevance must know the video and the question"):
        with torch.no_grad(), fftriton.reduce(model, KVTP(0.2, relevance)):
            inputs = Target().load_processor()(generate_sample("easy", 0, 0).video, "where is it")
            model(**inputs)
