"""The adapter to lmms-eval: its task files, and the same scores as `fftriton eval` where lmms-eval is installed."""

import json
from importlib.metadata import entry_points

import pytest
import remote_models as remote
import torch
from remote_prompts import film, pixels, units

from fftriton.evaluate import Plan, Setting, evaluate
from fftriton.lmms import needle
from fftriton.needle import generate_sample
from fftriton.runtime.shipped import MODEL
from fftriton.runtime.target import Target

pytest.importorskip("av")  # reads videos

REASON = "needs lmms-eval 0.7 (pip install lmms-eval; it depends on torchvision, decord and many more)"


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
    assert str(tmp_path / "tasks" / "fftriton_needle_hard.jsonl") in task
    for index, doc in enumerate(docs):
        sample = generate_sample("hard", 4, index)
        assert (needle.doc_to_text(doc), doc["answer"]) == (sample.question, sample.answer)
        (video,) = needle.doc_to_visual(doc)
        assert (video.frames == sample.frames).all()
        assert needle.process_results(doc, [sample.answer]) == {"accuracy": 1.0}
        assert needle.process_results(doc, ["nothing"]) == {"accuracy": 0.0}


@pytest.mark.parametrize("method", ["framefusion:similarity_threshold=0.9", "fastv:layer=1", "keep-all"])
def test_scores_are_those_of_the_harness(tmp_path, method, monkeypatch):
    pytest.importorskip("lmms_eval.evaluator", reason=REASON)
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

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
