"""`fftriton doctor` says what is broken, and does not break with it."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from fftriton.app import doctor
from fftriton.app.cli import app
from fftriton.app.doctor import PACKAGES, Finding, Package
from fftriton_kernels import _cpu

ROOT = Path(__file__).parents[1]


@pytest.fixture
def troubles(monkeypatch):
    """What is wrong with each module, by its name: importing all of them takes half a minute."""
    found: dict[str, str] = {}
    monkeypatch.setattr(doctor, "_trouble", lambda module: found.get(module, ""))
    return found


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


def diagnose() -> tuple[int, dict]:
    result = invoke("--json")
    return result.exit_code, json.loads(result.stdout)


def test_a_sound_installation(troubles):
    result = invoke()
    assert result.exit_code == 0, result.output
    assert "Nothing is wrong." in result.output
    for name in (*(package.name for package in PACKAGES), "segmented_topk_keep", "CPU code"):
        assert name in result.output
    code, found = diagnose()
    assert (code, found["healthy"], found["faults"]) == (0, True, [])
    assert found["implementation"] == "PyTorch"
    assert "TRITON_INTERPRET=1 is not set" in found["why"]
    assert len(found["ops"]) == 9
    assert all(op["fault"] is None and op["seconds"] > 0 and op["error"] < 1e-5 for op in found["ops"])
    torch = next(one for one in found["packages"] if one["name"] == "torch")
    assert torch["version"] == metadata.version("torch")
    assert torch["supported"]


def test_the_interpreter_is_named(troubles, monkeypatch):
    monkeypatch.setattr("fftriton_kernels.implementation", lambda device: "Triton interpreter")
    monkeypatch.setattr("fftriton_kernels.self_test", lambda device, dtype: [])
    _, found = diagnose()
    assert found["why"] == "TRITON_INTERPRET=1 is set"


def test_a_broken_torchvision(troubles, tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").touch()  # it is installed
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    troubles["torchvision"] = "RuntimeError: operator torchvision::nms does not exist"
    code, found = diagnose()
    assert code == 1
    assert found["faults"] == ["torchvision: torchvision cannot be imported: " + troubles["torchvision"]]
    (command,) = [one["command"] for one in found["install"] if "torchvision" in one["command"]]
    assert command.startswith("pip install --force-reinstall torch torchvision")


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_no_op_is_tried_without_torch_and_triton(troubles, name):
    troubles[name] = "ImportError: libcuda.so.1: cannot open shared object file"
    code, found = diagnose()
    assert code == 1
    assert found["ops"] == []
    assert found["faults"] == [f"{name}: {name} cannot be imported: {troubles[name]}",
                               f"ops: they cannot run without {name}"]  # fmt: skip
    assert troubles[name] in invoke().output


def test_a_missing_package(troubles, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    code, found = diagnose()
    assert (code, found["faults"]) == (1, ["av: is not installed"])
    assert {"for": "videos (PyAV)", "command": "pip install 'av>=16'"} in found["install"]


def test_an_optional_package_may_be_missing(troubles, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    code, found = diagnose()
    assert (code, found["faults"]) == (0, [])
    assert "pip install 'accelerate>=1.0'" in [one["command"] for one in found["install"]]


@pytest.mark.parametrize("release", ["4.40.2", "6.0.0"])
def test_an_unsupported_release(troubles, monkeypatch, release):
    known = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: release if name == "transformers" else known(name))
    code, found = diagnose()
    assert code == 1
    assert found["faults"] == [f"transformers: {release} is not supported: transformers>=4.57,<6"]
    assert "pip install 'transformers>=4.57,<6'" in [one["command"] for one in found["install"]]


def test_a_wrong_op(troubles, monkeypatch):
    right = _cpu.topk_keep
    monkeypatch.setattr(_cpu, "topk_keep", lambda *a, **o: (lambda out: (out[0] * 0, *out[1:]))(right(*a, **o)))
    code, found = diagnose()
    assert code == 1
    assert [fault.partition(":")[0] for fault in found["faults"]] == ["topk_keep"]
    (op,) = (op for op in found["ops"] if op["op"] == "topk_keep")
    assert op["error"] is op["seconds"] is None


def test_ops_that_cannot_start(troubles, monkeypatch):
    def fails(device, dtype):
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr("fftriton_kernels.self_test", fails)
    code, found = diagnose()
    assert code == 1
    assert found["faults"] == ["ops: RuntimeError: CUDA error: no kernel image is available"]


def test_a_device_that_is_not_there(troubles):
    result = invoke("--device", "cuda:99")
    assert result.exit_code == 2
    assert "device must be one that torch can use here, got 'cuda:99'" in result.output


def test_without_metadata(troubles, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    code, found = diagnose()
    assert code == 0
    assert "the releases that it supports are not checked" in found["notes"][0]


@pytest.mark.parametrize(
    ("code", "trouble"),
    [
        ("", ""),
        ("raise ImportError('\\nlibav.so: no such file\\nmore')", "ImportError: libav.so: no such file"),
        ("raise OSError", "OSError: OSError"),
        ("import os\nos.abort()", "the process ends by SIGABRT"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import not_here_at_all", "ModuleNotFoundError: No module named 'not_here_at_all'"),
    ],
)
def test_imports_are_tried_in_processes_of_their_own(code, trouble, tmp_path, monkeypatch):
    (tmp_path / "tried_by_the_doctor.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor._examine(Package("tried", "tried_by_the_doctor", "a test"), "")
    assert (found.version, found.broken) == ("", trouble)
    assert "tried_by_the_doctor" not in sys.modules


def test_a_folder_is_not_a_package(tmp_path, monkeypatch):
    (tmp_path / "tried_by_the_doctor").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._examine(Package("tried", "tried_by_the_doctor", "a test"), "").version is None


def test_builds_and_pre_releases_count_as_their_versions():
    package = Package("torch", "torch", "everything", needed=True)
    assert Finding(package, "2.13.0+cu130", "torch>=2.6").fault == ""
    assert Finding(package, "2.14.0a0", "torch>=2.6").fault == ""
    assert Finding(package, "2.5.1+cpu", "torch>=2.6").fault == "2.5.1+cpu is not supported: torch>=2.6"
    assert Finding(package, "", "torch>=2.6").fault == ""


def test_it_reports_where_nothing_can_be_imported(tmp_path):
    """A real run, with a torch that cannot be loaded, as next to a wrong CUDA."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.99: cannot open shared object file')")
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "fftriton", "doctor", "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    reason = "OSError: libcudart.so.99: cannot open shared object file"
    assert f"torch: torch cannot be imported: {reason}" in found["faults"]
    assert f"fftriton: fftriton.hf cannot be imported: {reason}" in found["faults"]
    assert any(one["name"] == "av" and one["fault"] is None for one in found["packages"])


def test_setup_declares_every_package(monkeypatch):
    settings: dict = {}
    monkeypatch.setattr("setuptools.setup", settings.update)
    runpy.run_path(str(ROOT / "setup.py"))
    asked = [settings["install_requires"], *settings["extras_require"].values()]
    declared = {Requirement(line).name for lines in asked for line in lines}
    assert {package.name for package in PACKAGES if package.module} <= declared
    needed = {Requirement(line).name for line in settings["install_requires"]}
    assert {package.name for package in PACKAGES if package.needed} <= needed
