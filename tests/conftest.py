"""Without a GPU the kernel tests run in Triton's interpreter; all other tests run the plain PyTorch path."""

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from feature_table import spoken_for

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when fftriton_kernels is imported, so before any test module
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products ask for
torch.set_num_threads(1)


@pytest.fixture
def device() -> str:
    """Where kernel tests put their tensors."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the PyTorch path; tests/kernels overrides this."""
    monkeypatch.setattr("fftriton_kernels._dispatch.INTERPRET", False)


class Scripts:
    """The scripts of the needle task, as attributes."""

    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(name)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Scripts:
    """What lies in bench/needle."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench" / "needle"))
    return Scripts()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.user_properties += [("feature", f"{family}: {feature}") for family, feature in spoken_for(item)]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
