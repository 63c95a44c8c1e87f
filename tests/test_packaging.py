"""Importing changes nothing, the kernels stand alone, and a wheel works away from the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("fftriton", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")

SNAPSHOT = """
import logging, os, signal, sys, threading, warnings
import torch, triton, transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
import transformers.models.qwen2.modeling_qwen2 as qwen2
import transformers.models.qwen2_vl.modeling_qwen2_vl as qwen2_vl
import transformers.cache_utils as cache_utils

def members(owner):
    return {name: id(value) for name, value in vars(owner).items() if not name.startswith("__")}

def snapshot():
    owners = [torch, torch.nn.Module, torch.Tensor, torch.nn.functional, qwen2, qwen2_vl, qwen2.Qwen2Model,
              qwen2_vl.Qwen2VLForConditionalGeneration, cache_utils, cache_utils.DynamicLayer]
    state = {str(owner): members(owner) for owner in owners}
    state["attention"] = dict(ALL_ATTENTION_FUNCTIONS) | dict(ALL_MASK_ATTENTION_FUNCTIONS)
    state["cache layers"] = dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING) if hasattr(
        cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING") else None
    state["torch"] = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                      torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32,
                      torch.random.get_rng_state().tolist())
    state["process"] = (dict(os.environ), list(sys.path), warnings.filters[:], logging.root.handlers[:],
                        threading.active_count(), signal.getsignal(signal.SIGINT), sys.excepthook)
    return state

import torch._dynamo, torch.library  # noqa: loaded on demand by torch itself
before = snapshot()
import PACKAGE
after = snapshot()
for key in before:
    assert before[key] == after[key], (key, before[key], after[key])
"""


def python(code, cwd, **environment):
    """Run code in a fresh interpreter; environment values of None unset."""
    env = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def assert_runs(code, cwd, **environment):
    done = python(code, cwd, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.parametrize("package", ["fftriton_kernels", "fftriton"])
def test_importing_changes_nothing_else(package, tmp_path):
    assert_runs(SNAPSHOT.replace("PACKAGE", package), tmp_path, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}")


def test_the_kernels_need_torch_and_triton_only(tmp_path):
    blocked = ["transformers", "av", "typer", "rich", "matplotlib", "PIL", "fftriton", "safetensors", "tokenizers"]
    code = f"""
import sys
import torch, triton
for name in {blocked}:
    sys.modules[name] = None
import fftriton_kernels as kernels
x = torch.randn(1, 6, 4)
merged = kernels.merge_mean(x, kernels.merge_roots(kernels.strided_cosine_similarity(x, 2), 2, 0.0))
assert merged.x.shape[1] == int(merged.lengths)
"""
    assert_runs(code, tmp_path, PYTHONPATH=str(ROOT / "kernels"))


def test_transformers_is_not_confused_by_the_folder_kernels():
    assert_runs("import transformers; from transformers import Qwen2ForCausalLM, pipeline", ROOT)


def test_a_wheel_works_from_another_directory(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, "."], cwd=source, check=True
    )
    (wheel,) = wheels.glob("fftriton-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], cwd=tmp_path, check=True)
    code = """
import fftriton, fftriton_kernels
from pathlib import Path
print(Path(fftriton.__file__).parents[1], Path(fftriton_kernels.__file__).parents[1])
from fftriton.cli import app
assets = Path(fftriton.__file__).parent / "assets"
print(sorted(path.name for path in assets.rglob("*") if path.suffix in (".mp4", ".safetensors")))
"""
    printed = assert_runs(code, tmp_path, PYTHONPATH=str(site)).splitlines()
    assert printed[0] == f"{site} {site}"
    assert printed[1] == "['bunny.mp4', 'model.safetensors', 'needle.mp4']"
