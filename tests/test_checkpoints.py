"""A checkpoint's own code runs only if the user says so, and nothing ever asks."""

import ast
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

import fftriton.app.cli
from fftriton.relevance import load_relevance
from fftriton.runtime.shipped import MODEL, NEEDLE

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "run": ["run", "--question", NEEDLE.question, "--no-compare"],
    "eval": ["eval", "--samples", "1", "--methods", "keep-all", "--budgets", "1"],
}
CODE = """
from pathlib import Path
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

Path({marker!r}).touch()

class Config(Qwen2VLConfig):
    pass

class Model(Qwen2VLForConditionalGeneration):
    config_class = Config
"""
AUTO_MAP = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model", "AutoModel": "code.Model"}
OF_CONFIG = {
    "a type of its own": {"model_type": "of_its_own", "auto_map": AUTO_MAP},
    "a configuration of its own": {"model_type": "of_its_own", "auto_map": {"AutoConfig": "code.Config"}},
    "a kernel from the hub": {"attn_implementation": "someone/kernels"},
}


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that exists once the checkpoint's code has run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path / "has-run"


def checkpoint_with_code(folder, marker, **config):
    """The shipped model with code beside it."""
    shutil.copytree(MODEL, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    return folder


def invoke(command, model, out, *more):
    """With a user who would say yes."""
    arguments = [*COMMANDS[command], "--model", str(model), "--out", str(out), *more]
    return CliRunner().invoke(fftriton.app.cli.app, arguments, input="y\n" * 9)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("needs", OF_CONFIG)
def test_a_checkpoint_that_needs_code_is_refused(tmp_path, marker, command, needs):
    model = checkpoint_with_code(tmp_path / "model", marker, **OF_CONFIG[needs])
    if needs == "a kernel from the hub" and AutoConfig.from_pretrained(model)._attn_implementation is None:
        pytest.skip("this release of transformers does not read which attention a checkpoint names")
    result = invoke(command, model, tmp_path / "out")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: model must not need its own code")
    assert "--trust-remote-code" in line
    assert str(model) in line
    assert not marker.exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"model_type": "llava_qwen"}, [], "of type llava_qwen, whose code is in a package of its own"),
        ({"model_type": "llava_qwen"}, ["--trust-remote-code"], "whose code is in a package of its own"),
        ({"model_type": "minicpmv", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}, [], None),
        (
            {"model_type": "minicpmv", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}},
            ["--trust-remote-code"],
            "of type minicpmv, whose code has methods of its own to be called by",
        ),
    ],
)
def test_code_that_is_elsewhere_is_named(tmp_path, marker, command, config, options, message):
    """The models of the paper: a package that transformers does not know, and code that is called by `chat`."""
    model = checkpoint_with_code(tmp_path / "model", marker, **config)
    result = invoke(command, model, tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert (message or "--trust-remote-code") in line
    assert message is None or line.endswith("inside fftriton.reduce(model, method)")
    assert not marker.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_code_that_is_not_needed_does_not_run_unless_trusted(tmp_path, marker, command):
    model = checkpoint_with_code(tmp_path / "model", marker, auto_map=AUTO_MAP)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(
        json.dumps(tokenizer | {"auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}})
    )
    result = invoke(command, model, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert not marker.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_trusted_code_runs(tmp_path, marker, command):
    model = checkpoint_with_code(tmp_path / "model", marker, auto_map=AUTO_MAP)
    result = invoke(command, model, tmp_path / "out", "--trust-remote-code")
    assert result.exit_code == 0, result.output
    assert marker.exists()


def test_a_predictor_of_relevance_runs_no_code(tmp_path, marker, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    model = checkpoint_with_code(tmp_path / "model", marker, **OF_CONFIG["a type of its own"])
    with pytest.raises(ValueError, match=r"relevance must be the checkpoint of a SigLIP, got '.*model': .*custom code"):
        load_relevance(str(model))
    assert not marker.exists()


def test_the_adapter_of_lmms_eval(tmp_path, marker, monkeypatch):
    api, models = ModuleType("lmms_eval.api.model"), ModuleType("lmms_eval.models")
    api.lmms, models.get_model = object, None
    for name, module in {"lmms_eval": ModuleType("lmms_eval"), api.__name__: api, models.__name__: models}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fftriton.lmms.model", raising=False)
    from fftriton.lmms.model import VideoModel

    monkeypatch.delitem(sys.modules, "fftriton.lmms.model")  # made with stand-ins
    needy = checkpoint_with_code(tmp_path / "needy", marker, **OF_CONFIG["a type of its own"])
    with pytest.raises(ValueError, match="model must not need its own code"):
        VideoModel("qwen2_vl", str(needy))
    assert not marker.exists()
    VideoModel(
        "qwen2_vl",
        str(checkpoint_with_code(tmp_path / "mixed", marker, auto_map=AUTO_MAP)),
        trust_remote_code=True,
    )
    assert marker.exists()


def test_every_part_is_loaded_with_a_word_about_trust():
    """Without one, transformers asks on the terminal."""
    silent = []
    for path in [*(ROOT / "fftriton").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or ast.unparse(node.func).rpartition(".")[2] != "from_pretrained":
                continue
            owner = ast.unparse(node.func.value)
            asks = owner.startswith("Auto") or owner == "part"
            if asks and "trust_remote_code" not in [keyword.arg for keyword in node.keywords]:
                silent.append(f"{path.name}:{node.lineno}: {owner}")
    assert not silent
