"""The adapter to lmms-eval: its task files, and the same scores as `fftriton eval` where lmms-eval is installed."""

import importlib
import json
import sys
import types
from importlib.metadata import entry_points

import numpy as np
import pytest
import remote_models as remote
import torch
import typer
from remote_prompts import film, pixels, units
from typer.testing import CliRunner

from bench.kvtp.needle import WORDS
from bench.kvtp.small import small_siglip
from fftriton.evaluate import Plan, Setting, evaluate
from fftriton.evaluate.runner import Answerer
from fftriton.lmms import needle
from fftriton.lmms.asking import as_frames
from fftriton.needle import generate_sample
from fftriton.needle.task import NeedleTask
from fftriton.relevance import SiglipRelevance
from fftriton.runtime.answers import TokenClock, generate
from fftriton.runtime.shipped import MODEL
from fftriton.runtime.target import Target, to_model

pytest.importorskip("av")  # reads videos

REASON = "needs lmms-eval 0.7, which pip cannot install beside fftriton: it asks for PyAV below 16, videos need 16"


class NoBar:
    def __init__(self, description):
        pass

    def __enter__(self):
        return lambda done, total: None

    def __exit__(self, *exception):
        pass


def test_task_files(tmp_path):
    needle.write_task(tmp_path / "tasks", "hard", samples=3, seed=4)
    docs = [json.loads(line) for line in (tmp_path / "tasks" / "fftriton_needle_hard.jsonl").open()]
    task = (tmp_path / "tasks" / "fftriton_needle_hard.yaml").read_text()
    assert "task: fftriton_needle_hard\n" in task
    assert json.dumps(str(tmp_path / "tasks" / "fftriton_needle_hard.jsonl")) in task
    for index, doc in enumerate(docs):
        sample = generate_sample("hard", 4, index)
        assert (needle.doc_to_text(doc), doc["answer"]) == (sample.question, sample.answer)
        (video,) = needle.doc_to_visual(doc)
        assert (video.frames == sample.frames).all()
        assert needle.process_results(doc, [sample.answer]) == {"accuracy": 1.0}
        assert needle.process_results(doc, ["nothing"]) == {"accuracy": 0.0}


@pytest.mark.parametrize(
    ("options", "why"),
    [(["--split", "foo"], "split must be one of easy"), (["--samples", "0"], "samples must be at least 1, got 0")],
)
def test_a_task_that_cannot_be_written_leaves_nothing(tmp_path, options, why):
    command = typer.Typer()
    command.command()(needle.write_task)
    result = CliRunner().invoke(command, [str(tmp_path / "tasks"), *options])
    assert result.exit_code == 2
    assert why in result.output
    assert not (tmp_path / "tasks").exists()


METHODS = ["framefusion:similarity_threshold=0.9", "fastv:layer=1", "keep-all", "kvtp:relevance=PREDICTOR"]


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_the_harness(tmp_path, method, monkeypatch):
    pytest.importorskip("lmms_eval.evaluator", reason=REASON)
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    small_siglip(WORDS, side=64, patch=16, width=16, depth=1).save_pretrained(tmp_path / "predictor")
    method = method.replace("PREDICTOR", str(tmp_path / "predictor"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    needle.write_task(tmp_path / "tasks", "hard", samples=20)
    found = simple_evaluate(
        model="fftriton",
        model_args=f"base=qwen2_vl,processing=fftriton,pretrained={MODEL},method={method},budget=0.2",
        tasks=["fftriton_needle_hard"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), model_name="fftriton"),
        batch_size=1,
    )
    plan = Plan(
        methods=(method,), budgets=(0.2,), split="hard", samples=20, target=Target(str(MODEL)), out=tmp_path / "out"
    )
    (row,), records = evaluate(plan, NoBar)
    assert found["results"]["fftriton_needle_hard"]["accuracy,none"] == pytest.approx(row.accuracy)
    answers = [sample["filtered_resps"][0] for sample in found["samples"]["fftriton_needle_hard"]]
    assert answers == [record.answer for record in records[plan.settings[0]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("base=qwen2_vl,processing=other", "processing must be one of 'base', 'fftriton', got 'other'"),
        ("base=qwen2_5_vl,processing=fftriton", "base must be qwen2_vl, as the checkpoint is, got qwen2_5_vl"),
        ("base=qwen2_vl,processing=fftriton,budget=2", r"budget must be in \(0, 1\], got 2"),
        ("base=qwen2_vl,processing=fftriton,method=slowv", "method must be one of"),
        ("base=qwen2_vl,processing=fftriton,batch_size=2", "batch_size must be 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    models = pytest.importorskip("lmms_eval.models", reason=REASON)
    with pytest.raises(ValueError, match=message):
        models.get_model("fftriton").create_from_arg_string(arguments)


def test_a_base_of_lmms_eval_is_reduced(monkeypatch):
    """What lmms-eval's own model answers is what it answers inside `fftriton.reduce`."""
    models = pytest.importorskip("lmms_eval.models", reason=REASON)
    from fftriton.lmms import model

    class Base(model.VideoModel):
        def __init__(self, pretrained, batch_size):
            super().__init__("qwen2_vl", pretrained, batch_size=batch_size)
            self.accelerator = "the base's"

    monkeypatch.setattr(model, "get_model", lambda name, force_simple: {"qwen2_vl": Base}[name])
    arguments = f"base=qwen2_vl,pretrained={MODEL},method=framefusion,budget=0.3"
    adapter = models.get_model("fftriton").create_from_arg_string(arguments, {"batch_size": 1})
    assert adapter.accelerator == "the base's"
    sample = {"split": "easy", "seed": 0, "index": 0, "question": "Which digit is on the red box?"}
    adapter.task_dict = {"task": {"test": [sample]}}

    class Request:
        args = (sample["question"], {}, needle.doc_to_visual, 0, "task", "test")

    assert len(adapter.generate_until([Request])) == 1
    assert adapter.reduction.report.budget_achieved == pytest.approx(0.3, abs=0.01)
    assert adapter.reduction.method == Setting("framefusion", 0.3).method()


@pytest.fixture
def without_lmms_eval(monkeypatch):
    """fftriton.lmms.model on a stand-in for what it uses of lmms-eval."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models")
    modules = {name: types.ModuleType(name) for name in names}
    modules["lmms_eval.api.model"].lmms = type("lmms", (), {"rank": 0, "world_size": 1, "cache_hook": None})
    modules["lmms_eval.models"].get_model = None
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fftriton.lmms.model", raising=False)
    yield importlib.import_module("fftriton.lmms.model")
    sys.modules.pop("fftriton.lmms.model", None)


class Request:
    def __init__(self, index):
        doc = {"split": "easy", "seed": 0, "index": index}
        self.question = generate_sample("easy", 0, index).question
        self.args = (self.question, {}, lambda doc: needle.doc_to_visual(doc), index, "task", "test")
        self.doc = doc


@pytest.mark.parametrize("processing", ["fftriton", "base"])
def test_every_question_is_told_to_the_predictor(without_lmms_eval, processing, tmp_path, monkeypatch):
    """The answers are those of the harness, whoever prepares the inputs; frames may be floats, channels first."""
    adapter_of, folder = without_lmms_eval, tmp_path / "predictor"
    small_siglip(WORDS, side=64, patch=16, width=16, depth=1).save_pretrained(folder)

    class Base(adapter_of.VideoModel):
        def __init__(self, pretrained):
            super().__init__("qwen2_vl", pretrained)
            self.own, self.processor = self.processor, self.process

        def process(self, videos, text):
            return self.own(self.video, text)

        def _answer(self, question, settings, doc_to_visual, doc_id, task, split):
            (self.video,) = doc_to_visual(self.task_dict[task][split][doc_id])
            frames = torch.from_numpy(self.video.frames).movedim(-1, 1).float()
            inputs = to_model(self.processor(videos=[frames], text=question), self.model)
            tokens = generate(self.model, inputs, TokenClock(), self.target.answer_length(self.model))
            return str(self.own.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    monkeypatch.setattr(adapter_of, "get_model", lambda name, force_simple: Base)
    name = f"kvtp:relevance={folder}:pruner=topk(importance=predictor)"
    adapter = adapter_of.FFTriton("qwen2_vl", name, 0.2, processing, pretrained=str(MODEL))
    requests = [Request(index) for index in range(4)]
    adapter.task_dict = {"task": {"test": [request.doc for request in requests]}}
    setting, scores = Setting(name, 0.2), []
    answerer = Answerer(Target(str(MODEL)), NeedleTask())
    for request in requests:  # one by one: what is kept, too
        (answer,) = adapter.generate_until([request])
        kept = adapter.reduction.report
        (record,) = answerer.answer(answerer.task.sample(request.args[3]), {setting: ""})
        assert (answer, kept.relevance_macs) == (record.answer, record.relevance_flops)
        expected = generate_sample("easy", 0, request.args[3]).answer
        scores.append((needle.process_results({"answer": expected}, [answer])["accuracy"], float(record.right)))
        sample = generate_sample("easy", 0, request.args[3])
        bound = SiglipRelevance.from_pretrained(folder).bind(sample.frames, request.question)
        torch.testing.assert_close(kept.frame_scores[0].scores, bound.scores, rtol=0, atol=1e-6)
    found, harness = zip(*scores, strict=True)
    assert found == harness
    assert adapter.generate_until(requests[:2]) == [adapter.generate_until([request])[0] for request in requests[:2]]
    with pytest.raises(ValueError, match="answers single questions only"):
        adapter.generate_until_multi_round(requests)
    with pytest.raises(ValueError, match="generates answers only"):
        adapter.loglikelihood(requests)


def test_a_base_that_hides_its_frames_is_refused(without_lmms_eval, tmp_path, monkeypatch):
    small_siglip(WORDS, side=64, patch=16, width=16, depth=1).save_pretrained(tmp_path / "predictor")

    class Base(without_lmms_eval.VideoModel):
        def __init__(self, pretrained):
            super().__init__("qwen2_vl", pretrained)

    monkeypatch.setattr(without_lmms_eval, "get_model", lambda name, force_simple: Base)
    name = f"kvtp:relevance={tmp_path / 'predictor'}"
    adapter = without_lmms_eval.FFTriton("qwen2_vl", name, 0.2, pretrained=str(MODEL))
    adapter.task_dict = {"task": {"test": [Request(0).doc]}}
    with pytest.raises(ValueError, match="the frames must be known for kvtp with relevance"):
        adapter.generate_until([Request(0)])
    with pytest.raises(ValueError, match="method must be told the question that is asked"):
        without_lmms_eval.FFTriton("qwen2_vl", f"{name}:question=unrelated", 0.2, pretrained=str(MODEL))


def test_frames_of_any_form():
    frames = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    channels_first = torch.from_numpy(frames).movedim(-1, 1)
    forms = (
        frames,
        [frames],
        [[*frames]],
        frames[None],
        channels_first,
        [channels_first.float()],
        channels_first[None],
    )
    for videos in forms:
        assert np.array_equal(as_frames(videos), frames)
    for videos, message in (
        ([frames, frames], "about one video .* got 2"), (frames / 255, "pixels must be from 0 to 255"),
        (frames[0], "a video must be"), (np.zeros((2, 4, 6, 5, 3), np.uint8), "about one video .* got 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            as_frames(videos)


def llava_vid():
    ids = torch.tensor([[5, 6, remote.PLACEHOLDER, 7, 8]])
    arguments = {"images": [pixels(8, 5)], "attention_mask": torch.ones_like(ids), "modalities": "video"}
    return remote.llava_qwen(), lambda model: model.generate(inputs=ids, **arguments, max_new_tokens=3)


def vila():
    ids = torch.tensor([[5, 6, 151, 7, 8]])
    return remote.nvila(), lambda model: model.generate(ids, media={"video": [pixels(8, 4)]}, max_new_tokens=3)


def minicpm_v():
    message = [*units(12), 7, 8]
    return remote.minicpm_v(), lambda model: model.chat(msgs=message, processor=remote.Processor(), max_new_tokens=3)


def internvl2():
    question = [*[9, 149] * 12, 7, 8]
    return remote.internvl_chat(), lambda model: model.chat(
        151, film(12, 4), question, {"max_new_tokens": 3}, num_patches_list=[1] * 12
    )


@pytest.mark.parametrize("case", [llava_vid, vila, minicpm_v, internvl2])
def test_models_of_remote_code_need_no_layout(case, monkeypatch):
    """As lmms-eval's own classes call them; the reduction is found by the model that they hold."""
    models = pytest.importorskip("lmms_eval.models", reason=REASON)
    from lmms_eval.api.model import lmms

    from fftriton.lmms import model as adapter_model

    class Base(lmms):
        def __init__(self, pretrained, batch_size):
            super().__init__()
            self.model, self.call = case()

        def generate_until(self, requests):
            return [self.call(self.model) for _ in requests]

        loglikelihood = generate_until_multi_round = None

    assert case.__name__ in {*models.AVAILABLE_MODELS, *models.AVAILABLE_SIMPLE_MODELS}
    monkeypatch.setattr(adapter_model, "get_model", lambda name, force_simple: {case.__name__: Base}[name])
    text = f"base={case.__name__},pretrained=x,method=framefusion,budget=0.3"
    adapter = models.get_model("fftriton").create_from_arg_string(text, {"batch_size": 1})
    adapter.task_dict = {}
    assert len(adapter.generate_until([None])) == 1
    report = adapter.reduction.report
    assert report.budget_achieved == pytest.approx(0.3, abs=1 / report.num_video_tokens)


def test_the_entry_point_is_there():
    pytest.importorskip("lmms_eval.models", reason=REASON)
    assert [point.value for point in entry_points(group="lmms_eval.models") if point.name == "fftriton"]
