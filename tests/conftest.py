"""Without a GPU the kernel tests run in Triton's interpreter; all other tests run the plain PyTorch path."""

import os
import runpy
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from feature_table import spoken_for
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when fftriton_kernels is imported, so before any test module
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products ask for
torch.set_num_threads(1)
STARTUP = Path(__file__).parent / "support" / "startup"
runpy.run_path(
    str(STARTUP / "sitecustomize.py")
)  # torchvision can be imported: here, and in processes that tests start
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STARTUP), os.environ.get("PYTHONPATH")]))

FUZZ_MINUTES = float(os.environ.get("FUZZ_MINUTES", 0))  # what `make fuzz` sets: for all tests marked `fuzz` together
settings.register_profile(
    "seeded", max_examples=10, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.register_profile("fuzz", settings.get_profile("seeded"), derandomize=False, print_blob=True)
settings.load_profile("fuzz" if FUZZ_MINUTES else "seeded")


@pytest.fixture
def device() -> str:
    """Where kernel tests put their tensors."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the PyTorch path; tests/kernels overrides this."""
    monkeypatch.setattr("fftriton_kernels._dispatch.INTERPRET", False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.user_properties += [("feature", f"{family}: {feature}") for family, feature in spoken_for(item)]
    on_gpu = torch.cuda.is_available()
    shared = on_gpu and "PYTEST_XDIST_WORKER" in os.environ
    for item in items:
        if not on_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if shared and item.get_closest_marker("large"):
            item.add_marker(pytest.mark.skip(reason="takes most of a GPU's memory: pytest -m large, in one process"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """While fuzzing, a test marked `fuzz` is run again, with other examples, until its share of the time is over."""
    start = time.monotonic()
    yield
    if FUZZ_MINUTES and item.get_closest_marker("fuzz"):
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
        while time.monotonic() < start + 60 * FUZZ_MINUTES * workers / len(item.session.items):
            item.runtest()
