"""`Target`: the model that run, eval and lmms hold. What its parameters refuse, load and describe."""

import subprocess
import sys

import pytest
import torch

from fftriton.runtime.shipped import MODEL
from fftriton.runtime.target import Target, to_model


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "toaster"}, ValueError, "device must be one that torch can use here, got 'toaster'"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of 'float32', 'bfloat16', 'float16', got 'int8'"),
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
