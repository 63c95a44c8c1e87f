"""`Target`: the model that run, eval and lmms hold. What its parameters refuse, load and describe."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText

import fftriton.runtime.target
from fftriton.needle import generate_sample
from fftriton.runtime.processing import HubProcessor, QwenProcessor
from fftriton.runtime.shipped import MODEL
from fftriton.runtime.target import Target, to_model
from fftriton.runtime.unusable import torchvision_works


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "toaster"}, ValueError, "device must be one that torch can use here, got 'toaster'"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of 'float32', 'bfloat16', 'float16', got 'int8'"),
        ({"revision": "v1"}, ValueError, "revision must go with a name on the hub, got 'v1' and '.*needle-qwen2vl'"),
        ({"device_map": "evenly"}, ValueError, "device_map must be one of 'auto', 'balanced', .* got 'evenly'"),
        ({"device_map": "{"}, ValueError, "device_map must be a JSON object, got '{'"),
        (
            {"device_map": "auto", "device": "cpu"},
            ValueError,
            "device_map must go without device, got 'auto' and 'cpu'",
        ),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens must be an integer of at least 1, got 1.5"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(arguments, error, message):
    with pytest.raises(error, match=message):
        Target(**arguments)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model must be the folder or the hub name of"):
        Target(str(tmp_path)).load_model()


def test_the_model_is_as_asked():
    model = Target(dtype="bfloat16", attention="eager").load_model()
    assert model.dtype == torch.bfloat16
    assert model.config.get_text_config()._attn_implementation == "eager"
    assert not model.training
    plain = Target().load_model()
    assert plain.dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def test_a_device_map_needs_accelerate(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"device_map needs accelerate \(pip install accelerate\), got 'auto'"):
        Target(device_map="auto")


@pytest.mark.parametrize(
    ("device_map", "passed"),
    [("auto", "auto"), ('{"model": "cpu", "lm_head": "cpu"}', {"model": "cpu", "lm_head": "cpu"})],
    ids=["by name", "by module"],
)
def test_a_model_that_is_spread_over_devices(monkeypatch, device_map, passed):
    seen, load = [], fftriton.runtime.target.load_part
    monkeypatch.setattr(
        fftriton.runtime.target, "load_part", lambda *args, **settings: seen.append(settings) or load(*args, **settings)
    )
    target = Target(device_map=device_map)
    model = target.load_model()
    assert [settings["device_map"] for settings in seen] == [passed]
    assert target.describe()["device_map"] == device_map
    assert not model.training


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A checkpoint with two revisions in the cache of the hub, which cannot be reached: (name, their image means)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    means, folder = {"main": 0.25, "v2": 0.75}, tmp_path / "models--some--model"
    for number, (revision, mean) in enumerate(means.items()):
        snapshot = folder / "snapshots" / (40 * str(number))
        shutil.copytree(MODEL, snapshot)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(snapshot.name)
        model = AutoModelForImageTextToText.from_pretrained(MODEL)
        model.lm_head.weight.data.fill_(mean)
        model.generation_config.max_new_tokens = number + 5
        model.save_pretrained(snapshot)
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
            content = json.loads((snapshot / name).read_text()) | {"image_mean": [mean] * 3}
            (snapshot / name).write_text(json.dumps(content))
    return "some/model", means


def test_a_revision_is_that_of_weights_configuration_and_processor(hub):
    name, means = hub
    pixels = []
    for number, revision in enumerate([None, "v2"]):
        target = Target(name, revision=revision)
        model = target.load_model()
        assert (model.lm_head.weight == means[revision or "main"]).all()
        assert target.answer_length(model) == number + 5
        sample = generate_sample("easy", 0, 0)
        for kind in (HubProcessor, QwenProcessor) if torchvision_works() else (QwenProcessor,):
            pixels.append(kind(name, None, False, revision)(sample.video, "what red")["pixel_values_videos"])
        torch.testing.assert_close(target.load_processor()(sample.video, "what red")["pixel_values_videos"], pixels[-1])
    assert not torch.allclose(pixels[0], pixels[-1])
    torch.testing.assert_close(pixels[0], pixels[len(pixels) // 2 - 1])
    assert Target(name, revision="v2").describe()["revision"] == "v2"
    with pytest.raises(ValueError, match="got 'some/model' at revision 'v3'"):
        Target(name, revision="v3").load_model()


def test_a_torchvision_that_cannot_be_imported_counts_as_absent(tmp_path):
    """As PyPI's beside a CPU build of torch, which transformers would import with every model."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    code = """
from fftriton.runtime.unusable import hide_unusable_torchvision, torchvision_works
hide_unusable_torchvision()
import transformers
print(torchvision_works(), transformers.Qwen2VLForConditionalGeneration.__name__)
"""
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "False Qwen2VLForConditionalGeneration\n", done.stderr


def test_the_length_of_answers():
    model = Target().load_model()
    assert Target(max_new_tokens=7).answer_length(model) == 7
    own = model.generation_config.max_new_tokens
    assert Target().answer_length(model) == (own or 64)


def test_names():
    assert (Target().is_shipped, Target().checkpoint, Target().name) == (True, str(MODEL), MODEL.name)
    other = Target("some/model")
    assert (other.is_shipped, other.checkpoint, other.name) == (False, "some/model", "some/model")
    assert Target().describe()["model"] == MODEL.name


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), Target().own_threads():
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before


def test_only_what_the_model_knows_is_moved():
    model = Target().load_model()
    inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long), "pixel_values_videos": torch.zeros(1), "other": None}
    moved = to_model(inputs, model)
    assert set(moved) == {"input_ids", "pixel_values_videos"}
    assert moved["pixel_values_videos"].dtype == model.dtype


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import fftriton", ("torch", "transformers", "numpy", "matplotlib", "av")),
        ("import fftriton.app.cli", ("torch", "transformers", "matplotlib", "av")),
        ("import fftriton.needle, fftriton.needle.task", ("matplotlib", "av")),
        ("import fftriton.hf.flops", ("av",)),
    ],
)
def test_what_is_not_imported(statement, absent):
    code = f"import sys; {statement}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [[], ["run"], ["eval"]], ids=" ".join)
def test_help_imports_no_torch(command):
    code = (
        "import sys, time; from fftriton.app.cli import app\n"
        f"try: app({[*command, '--help']})\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, seconds = done.stdout.split()[-2:]
    assert imported == "False"
    assert float(seconds) < 1.5
