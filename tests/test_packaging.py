"""Importing changes nothing, the kernels stand alone, wheels work elsewhere, the lock pins all that is installed."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fftriton

ROOT = Path(__file__).parents[1]
SOURCES = (
    "fftriton", "kernels", "setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE",
    "MANIFEST.in",
)  # fmt: skip

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


def installed(source, folder):
    """Build the wheel of a distribution below `folder`, and install it there without its dependencies."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site = folder / "wheels", folder / "site"
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, "."], cwd=source, check=True
    )
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], cwd=folder, check=True)
    return site


def test_the_kernels_install_by_themselves(tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    site = installed(tmp_path / "kernels", tmp_path)
    code = """
import fftriton_kernels
from pathlib import Path
print(Path(fftriton_kernels.__file__).parents[1], fftriton_kernels.__version__)
"""
    assert assert_runs(code, tmp_path, PYTHONPATH=str(site)).split() == [str(site), fftriton.__version__]
    (metadata,) = distributions(path=[str(site)])
    assert (metadata.name, metadata.version) == ("fftriton-kernels", fftriton.__version__)
    assert {Requirement(line).name for line in metadata.requires} == {"torch", "triton"}
    information = f"fftriton_kernels-{fftriton.__version__}.dist-info"
    assert {path.parts[0] for path in metadata.files} == {"fftriton_kernels", information}


def unpacked_sdist(source, folder):
    """Build the sdist of a distribution, and unpack it below `folder`."""
    code = "from setuptools import build_meta; build_meta.build_sdist('../sdist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (archive,) = (folder / "sdist").glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def test_a_wheel_of_the_sdist_works_from_another_directory(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    site = installed(unpacked_sdist(source, tmp_path), tmp_path)
    code = """
import fftriton, fftriton_kernels
from pathlib import Path
print(Path(fftriton.__file__).parents[1], Path(fftriton_kernels.__file__).parents[1])
from fftriton.app.cli import app
assets = Path(fftriton.__file__).parent / "assets"
print(sorted(path.name for path in assets.rglob("*") if path.suffix in (".mp4", ".safetensors")))
"""
    printed = assert_runs(code, tmp_path, PYTHONPATH=str(site)).splitlines()
    assert printed[0] == f"{site} {site}"
    assert printed[1] == "['bunny.mp4', 'model.safetensors', 'model.safetensors', 'needle.mp4']"
    files = {path.relative_to(ROOT / "fftriton") for path in (ROOT / "fftriton").rglob("*.py")}
    assert {path.relative_to(site / "fftriton") for path in (site / "fftriton").rglob("*.py")} == files


LOCK = ROOT / ".ci" / "lock.txt"
OVERLAYS = sorted((ROOT / ".ci").glob("*-[0-9]*.txt"))
PYTHONS = ("3.10", "3.11", "3.12")


def environment(python):
    """What markers see on Linux with this Python."""
    linux = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}
    return {**default_environment(), **linux, "python_version": python, "python_full_version": f"{python}.0"}


def applies(requirement, python):
    return requirement.marker is None or requirement.marker.evaluate(environment(python))


def requirements(path):
    """The lines of a requirements file."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def pins(python):
    """{name: version} of the lock for one Python; a name that stands there twice for it fails."""
    found = [requirement for requirement in requirements(LOCK) if applies(requirement, python)]
    named = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in found}
    assert len(named) == len(found)
    return named


@pytest.fixture
def declared(monkeypatch):
    """What setup.py asks for, with the extra dev."""
    settings = {}
    monkeypatch.setattr("setuptools.setup", settings.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return [Requirement(line) for line in settings["install_requires"] + settings["extras_require"]["dev"]]


def test_the_lock_holds_names_and_versions_only():
    """No address, no option and no local version: it works with any index and any build of torch."""
    for line in LOCK.read_text().splitlines():
        assert "/" not in line
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9._-]+==[a-z0-9.]+( ; [^@+]+)?", line), line


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_what_setup_asks_for(declared, python):
    locked = pins(python)
    for requirement in [*declared, Requirement("pip"), Requirement("setuptools")]:
        if applies(requirement, python):
            version = locked[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} with Python {python}, locked {version}"


def test_the_lock_pins_everything_behind_that(declared):
    """Followed through what is installed here."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    locked, seen, waiting = pins(python), set(), list(declared)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if not applies(requirement, python) or (name, *requirement.extras) in seen:
            continue
        seen.add((name, *requirement.extras))
        assert name in locked
        inner = [Requirement(line) for line in distribution(name).requires or ()]
        for extra in ("", *requirement.extras):
            here = environment(python) | {"extra": extra}
            waiting += [
                Requirement(str(one).partition(";")[0]) for one in inner if not one.marker or one.marker.evaluate(here)
            ]


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_overlays_pin_the_release_of_their_name(path):
    name, _, release = path.stem.rpartition("-")
    named = {requirement.name: str(requirement.specifier) for requirement in requirements(path)}
    assert named[name].startswith(f"=={release}.")
    assert all(re.fullmatch(r"==[0-9.]+", version) for version in named.values())


@pytest.mark.parametrize(("target", "number"), [("demo", 2), ("test", 3)])
def test_nothing_is_installed_that_the_lock_does_not_pin(tmp_path, target, number):
    make = ["make", "--dry-run", "--no-print-directory", target, f"VENV={tmp_path / 'new'}"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert len(installs) == number
    for line in installs:
        assert "--constraint .ci/lock.txt" in line
        # what builds is pinned, and so is what has no dependencies
        assert any(part in line for part in ("--no-build-isolation", " pip setuptools", "--no-deps"))


@pytest.mark.parametrize("python", PYTHONS)
def test_the_locked_torchvision_is_the_one_for_the_locked_torch(python):
    """Release 0.N is made for torch 2.(N - 15)."""
    torch, torchvision = (pins(python)[name].split(".") for name in ("torch", "torchvision"))
    assert (torch[0], torchvision[0]) == ("2", "0")
    assert int(torchvision[1]) == int(torch[1]) + 15


def test_the_readme_names_the_releases_of_the_lock():
    section = (ROOT / "README.md").read_text().partition("## Install")[2].partition("## ")[0]
    for python in PYTHONS:
        locked = pins(python)
        for name in ("torch", "triton", "transformers"):
            assert locked[name] in section, f"{name} with Python {python}"


def test_every_overlay_of_transformers_is_tested_by_the_workflow():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    overlays = [path.stem.rpartition("-")[2] for path in OVERLAYS if path.stem.startswith("transformers-")]
    assert workflow["jobs"]["transformers"]["strategy"]["matrix"]["transformers"] == overlays


def test_newest_releases_are_tested_every_night_and_named():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())
    assert workflow[True]["schedule"]  # YAML reads `on` as a truth value
    for job, command in {"newest": "make test-newest", "newest-of-all": "make test CONSTRAINTS="}.items():
        *_, test, summary = workflow["jobs"][job]["steps"]
        assert test["run"] == command
        assert summary["if"] == "always()"
        assert "pip freeze" in summary["run"]
        assert "GITHUB_STEP_SUMMARY" in summary["run"]
