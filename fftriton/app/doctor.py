"""`fftriton doctor`: what is installed, whether it works, and whether every op computes what its formula says.

Nothing here may fail because something is broken. So this module imports neither torch nor transformers, and packages
are tried in processes of their own, because a broken library may end the process that loads it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from .. import __version__
from ..checks import first_line
from ..runtime.provenance import device_name, version

if TYPE_CHECKING:
    import torch

    from fftriton_kernels import OpCheck

CPU_BUILDS = "https://download.pytorch.org/whl/cpu"

_MINUTES_TO_IMPORT = 5
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_OLDEST_CAPABILITY = (8, 0)  # that the tests compile the kernels for
_IMPORT = """
import importlib, sys
sys.path[:] = sys.argv[2:]
from fftriton.checks import first_line
try:
    importlib.import_module(sys.argv[1])
except Exception as error:
    sys.exit(f"{type(error).__name__}: {first_line(error)}")
"""


@dataclass(frozen=True)
class Package:
    """A package that fftriton can use.

    Attributes:
        name: name of the distribution.
        module: what to import; None for one that is only reported.
        use: what it is for, in a few words.
        needed: whether fftriton cannot do without it.
    """

    name: str
    module: str | None
    use: str
    needed: bool = False


PYTHON = Package("python", None, "", needed=True)
_WRAPPER_MODULE = "fftriton.hf"
WRAPPER = Package("fftriton", _WRAPPER_MODULE, "reducing models", needed=True)
PACKAGES = (
    Package("torch", "torch", "everything", needed=True),
    Package("triton", "triton", "the kernels", needed=True),
    Package("transformers", "transformers", "the models", needed=True),
    Package("av", "av", "videos (PyAV)", needed=True),
    Package("torchvision", "torchvision", "Hugging Face processors"),
    Package("accelerate", "accelerate", "device maps, processes"),
    Package("flash-attn", "flash_attn", "flash_attention_2 (GPU)"),
    Package("scikit-learn", "sklearn", "fftriton eval: needles"),
    Package("pyarrow", "pyarrow", "labels in .parquet files"),
    Package("sentencepiece", "sentencepiece", "KVTP: SigLIP tokenizer"),
    Package("protobuf", "google.protobuf", "KVTP: SigLIP tokenizer"),
    Package("vllm", None, "serving, with the plugin"),
)


@dataclass(frozen=True)
class Finding:
    """What was found out about a package.

    Attributes:
        package: which one.
        version: its version; "" if it has none; None if it is not installed.
        requirement: the package and the versions that fftriton works with, "torch>=2.6"; "" if that is not known.
        broken: why it cannot be imported; "" if it can be, or was not tried.
    """

    package: Package
    version: str | None
    requirement: str = ""
    broken: str = ""

    @property
    def loads(self) -> bool:
        """Whether it is installed and can be imported."""
        return self.version is not None and not self.broken

    @property
    def is_supported(self) -> bool:
        """Whether fftriton works with this version, as far as is known."""
        if not self.version or not self.requirement:
            return True
        return Requirement(self.requirement).specifier.contains(self.version, prereleases=True)

    @property
    def fault(self) -> str:
        """What is wrong; empty if nothing is, or if it is not installed and need not be."""
        if self.version is None:
            return "is not installed" if self.package.needed else ""
        faults = [] if self.is_supported else [f"{self.version} is not supported: {self.requirement}"]
        faults += [f"{self.package.module} cannot be imported: {self.broken}"] if self.broken else []
        return "; ".join(faults)


@dataclass(frozen=True)
class Ops:
    """Where the ops run, and what their self-test found.

    Attributes:
        device: the torch device; None if the ops could not be tried.
        processor: name of the GPU, or of the CPU.
        capability: compute capability of an NVIDIA GPU ("9.0"), or architecture of an AMD GPU ("gfx942").
        dtype: dtype of hidden states, queries and keys in the self-test.
        implementation: what serves them; see `fftriton_kernels.implementation`.
        why: the reason for that.
        checks: a result per op.
        notes: what else is to be said about the device.
        fault: why there are no results; empty if there are.
    """

    device: str | None = None
    processor: str | None = None
    capability: str | None = None
    dtype: str | None = None
    implementation: str | None = None
    why: str = ""
    checks: Sequence[OpCheck] = ()
    notes: Sequence[str] = ()
    fault: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that was found out: about Python, fftriton itself and its packages, and the ops."""

    python: Finding
    packages: Sequence[Finding]
    ops: Ops
    notes: Sequence[str] = ()

    @property
    def faults(self) -> list[str]:
        """Everything that is wrong, a line each; empty if nothing is."""
        found = [f"{one.package.name}: {one.fault}" for one in (self.python, *self.packages) if one.fault]
        found += [f"ops: {self.ops.fault}"] if self.ops.fault else []
        return found + [f"{check.op}: {check.fault}" for check in self.ops.checks if check.fault]

    @property
    def installs(self) -> list[tuple[str, str]]:
        """What a missing or unfit package is for, and the command that installs it."""
        (torch_version,) = (one.version or "" for one in self.packages if one.package.name == "torch")
        return [
            (one.package.use, _install(one, "+cpu" in torch_version))
            for one in self.packages
            if one.package.module and one.package != WRAPPER and (one.version is None or one.fault)
        ]


def examine(device: str | None, on_progress: Callable[[int, int], None]) -> Diagnosis:
    """Examine the packages, then the ops.

    Args:
        device: where to run the ops; None for the GPU if there is one.
        on_progress: called with how many packages are examined, and how many there are.

    Raises:
        ValueError: torch cannot use the device.
    """
    requirements, notes = _requirements()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wrapper = pool.submit(_trouble, _WRAPPER_MODULE)
        found = []
        for one in pool.map(lambda package: _examine(package, requirements.get(package.name, "")), PACKAGES):
            found.append(one)
            on_progress(len(found), len(PACKAGES) + 1)
        found.insert(0, Finding(WRAPPER, __version__, broken=wrapper.result()))
        on_progress(len(found), len(found))
    unfit = [one.package.name for one in found if one.package.name in ("torch", "triton") and not one.loads]
    ops = Ops(fault=f"they cannot run without {' and '.join(unfit)}") if unfit else _examine_ops(device)
    python = Finding(PYTHON, platform.python_version(), requirements.get("python", ""))
    return Diagnosis(python, found, ops, notes)


def _requirements() -> tuple[dict[str, str], list[str]]:
    """What setup.py asks for, extras included: name -> requirement without markers; and what is to be said about it."""
    try:
        distribution = metadata.distribution("fftriton")
    except metadata.PackageNotFoundError:
        return {}, ["fftriton is used without being installed, so the releases that it supports are not checked."]
    found = {"python": f"python{distribution.metadata['Requires-Python']}"}
    for line in distribution.requires or []:
        requirement = Requirement(line)
        bounds = sorted(map(str, requirement.specifier), reverse=True)  # the lower one first
        found[requirement.name] = requirement.name + ",".join(bounds)
    return found, []


def _examine(package: Package, requirement: str) -> Finding:
    module = package.module or package.name
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except Exception as error:  # of somebody's own finder
        return Finding(
            package, version(package.name) or "", requirement, f"{type(error).__name__}: {first_line(error)}"
        )
    if spec is None or (spec.origin is None and "." not in module):  # a folder is not a package
        return Finding(package, None, requirement)
    found = version(package.name) or ""
    return Finding(package, found, requirement, "" if package.module is None else _trouble(module))


def _trouble(module: str) -> str:
    """Why a fresh process that finds modules as this one does cannot import one; empty if it can."""
    command = [sys.executable, "-c", _IMPORT, module, *sys.path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * _MINUTES_TO_IMPORT)
    except subprocess.TimeoutExpired:
        return f"it takes more than {_MINUTES_TO_IMPORT} minutes"
    if done.returncode < 0:
        return f"the process ends by {signal.Signals(-done.returncode).name}"
    printed = done.stderr.strip().splitlines()
    return (printed[-1] if printed else f"exit code {done.returncode}") if done.returncode else ""


def _install(finding: Finding, torch_is_for_cpus: bool) -> str:
    """The command that installs a package, in a build that fits torch."""
    name = finding.package.name
    forced = ["--force-reinstall"] if finding.broken else []
    if name in ("torch", "torchvision"):  # they go in pairs
        index = ["--index-url", CPU_BUILDS] if torch_is_for_cpus else []
        return " ".join(["pip install", *forced, "torch torchvision", *index])
    isolated = ["--no-build-isolation"] if name == "flash-attn" else []  # its build imports torch
    return " ".join(["pip install", *forced, *isolated, shlex.quote(finding.requirement or name)])


def _examine_ops(name: str | None) -> Ops:
    """Run the self-test. All that torch and the kernels raise is a finding, except for a device that cannot be used."""
    device: torch.device | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            from ..runtime.devices import choose_device

            device = choose_device(name)
            return _test_ops(device, [str(warning.message).partition("\n")[0] for warning in caught])
        except Exception as error:
            if device is None and name is not None and isinstance(error, ValueError):
                raise
            return Ops(None if device is None else str(device), fault=f"{type(error).__name__}: {first_line(error)}")


def _test_ops(device: torch.device, notes: list[str]) -> Ops:
    import torch

    from fftriton_kernels import implementation, self_test

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    capability = None
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        capability = found.gcnArchName.split(":")[0] if torch.version.hip else f"{found.major}.{found.minor}"
        if not torch.version.hip and (found.major, found.minor) < _OLDEST_CAPABILITY:
            notes.append("The kernels were never tried on GPUs of a compute capability below 8.0.")
    elif _NVIDIA_DRIVER.exists() and torch.version.cuda is None:
        notes.append("This machine has the driver of an NVIDIA GPU, but this build of torch is for CPUs only.")
    served = implementation(device)
    processor = device_name(device)
    checks = self_test(device, dtype)
    return Ops(
        str(device), processor, capability, str(dtype).removeprefix("torch."), served, _reason(served, device), checks,
        notes,
    )  # fmt: skip


def _reason(served: str, device: torch.device) -> str:
    import torch

    if served == "Triton interpreter":
        return "TRITON_INTERPRET=1 is set"
    if served == "Triton":
        return "the tensors are on a GPU"
    if device.type == "cpu" and not torch.cuda.is_available():
        return "torch finds no GPU here, and TRITON_INTERPRET=1 is not set"
    return f"the kernels run on CUDA and ROCm, and the tensors are on the device '{device}'"
