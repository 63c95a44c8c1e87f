"""What bench/gpu.py runs: phases one after the other, the parts of a phase side by side, so what is timed is alone."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from . import findings

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
FOLDERS = (ROOT, ROOT / "kernels", ROOT / "tests" / "support")
MINUTES = 7.0  # that the limits below are made for
NAMES = ["versions", "checks", "tests", "sanitizer", "kernels", "prefill", "profiles", "graphs", "large"]
KERNEL_TESTS = (
    "cosine",
    "merge",
    "components",
    "select",
    "compile",
    "tiles",
    "varlen",
    "attention",
    "attention_varlen",
)
HF_TESTS = ("generation", "offload", "attention_backends")
SANITIZER_FOUND = 9  # the exit status asked of compute-sanitizer where it finds an error


@dataclass(frozen=True)
class Part:
    """One process.

    Args:
        name: as the findings call it.
        group: what `--parts` calls it.
        command: what runs, in the root of the checkout.
        seconds: its limit.
        environment: all of its variables.
        log: the file in the results' folder that takes its output.
        required: correctness is not shown before it has ended.
        missing: why it cannot run here, if it cannot.
        wrong: the exit statuses that say that something is wrong; None: all but 0.
    """

    name: str
    group: str
    command: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str]
    log: str = findings.LOG
    required: bool = False
    missing: str | None = None
    wrong: tuple[int, ...] | None = None


def environment(**more: str) -> dict[str, str]:
    """Variables of a process that finds the checkout's modules, and no network."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([*map(str, FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return found | {
        "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "2", **more,
    }  # fmt: skip


def gpu_phases(out: Path, minutes: float, commit: str = "") -> list[list[Part]]:
    """All parts, at the sizes of a 7B model."""
    scale, variables = minutes / MINUTES, environment()
    uncached = variables | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a step too far leaves the allocation

    def own(group: str, module: str, seconds: float, shares: int = 1, warm: bool = False, **more: bool) -> list[Part]:
        made = []
        for share in range(shares):
            name = module + " warm-up" * warm + f" {share + 1}/{shares}" * (shares > 1)
            options = ["--name", name, "--share", f"{share}/{shares}", "--commit", commit, *["--warm"] * warm]
            made.append(Part(name, group, worker(module, out, *options), seconds * scale, variables, **more))
        return made

    def sanitize(tool: str) -> Part:
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        options = ("--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), "--print-limit", "20")
        name = f"sanitizer, {tool}"
        return Part(
            name, "sanitizer", (program, *options, *worker("sanitized", out, "--name", name)), 115 * scale, uncached,
            log=findings.SANITIZER, missing=None if Path(program).exists() else "compute-sanitizer was not found",
            wrong=(SANITIZER_FOUND,),
        )  # fmt: skip

    def tests(name: str, group: str, seconds: float, log: str, *options: str) -> Part:
        return Part(name, group, pytest(*options), seconds * scale, variables, log=log, missing=no_pytest())

    marked = ("-m", "gpu and not large", "tests/kernels", *(f"tests/hf/test_{name}.py" for name in HF_TESTS))
    files = [f"tests/kernels/test_{name}.py" for name in KERNEL_TESTS]
    others = (*in_parallel(), "-m", "not gpu and not large", *files)
    return [
        own("versions", "versions", 40),
        [
            *own("checks", "merge", 120, shares=2, required=True),
            *own("checks", "selection", 120, required=True),
            *own("checks", "attention", 120, shares=4, required=True),
            tests("tests marked gpu", "tests", 120, findings.GPU_TESTS, *marked),
            tests("tests of the kernels", "tests", 120, findings.KERNEL_TESTS, *others),
            sanitize("memcheck"),
            sanitize("racecheck"),
            *own("kernels", "kernels", 120, shares=2, warm=True),
            *own("prefill", "prefill", 120, warm=True),
        ],
        own("kernels", "kernels", 85),
        own("prefill", "prefill", 90),
        own("profiles", "profiles", 30),
        own("graphs", "graphs", 55),
        [tests("tests marked large", "large", 60, findings.GPU_TESTS, "-m", "large", "tests/kernels")],
    ]


def toy_phases(out: Path) -> list[list[Part]]:
    """The same without a GPU: tiny sizes on a CPU, in Triton's interpreter, as a rehearsal."""
    limit = 60 * MINUTES  # nothing is timed here: only a part that hangs is stopped
    pytorch = environment(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    interpreter = pytorch | {"TRITON_INTERPRET": "1"}

    def own(group: str, module: str, variables: Mapping[str, str] = interpreter, required: bool = False) -> Part:
        command = worker(module, out, "--name", module, "--toy")
        return Part(module, group, command, limit, variables, required=required)

    few = ("-k", "errors or table_rows", "tests/kernels/test_cosine.py", "tests/kernels/test_tiles.py")
    return [
        [own("versions", "versions")],
        [own("checks", name, required=True) for name in ("merge", "selection", "attention")]
        + [
            Part("tests", "tests", pytest(*few), limit, interpreter, findings.KERNEL_TESTS, missing=no_pytest()),
            own("sanitizer", "sanitized"),
        ],
        [own("kernels", "kernels"), own("prefill", "prefill", pytorch)],
        [own("profiles", "profiles"), own("graphs", "graphs")],
    ]


def worker(module: str, out: Path, *options: str) -> tuple[str, ...]:
    """The command of a part that is a module of this package."""
    return sys.executable, "-m", "bench.first_contact.worker", module, "--out", str(out), *options


def pytest(*options: str) -> tuple[str, ...]:
    """The command of a part that is a run of pytest; -v, so that a run that is cut off shows how far it came."""
    quiet = ("-p", "no:cacheprovider", "--no-header", "-v", "--tb=short")
    return sys.executable, "-m", "pytest", *quiet, *options


def no_pytest() -> str | None:
    return None if find_spec("pytest") else "pytest is not installed"


def in_parallel() -> tuple[str, ...]:
    """Half of the cores: as many parts run beside it."""
    workers = min(8, max(1, (os.cpu_count() or 1) // 2))
    return ("--numprocesses", str(workers)) if find_spec("xdist") else ()
