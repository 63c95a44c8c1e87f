"""A saved run says what it ran on, but not on whose machine."""

from typing import Any

MACHINE = ("machine", "processor", "python_version", "system", "cpu")
PROCESSOR = ("arch", "bits", "count", "brand_raw")
COMMIT = ("id", "time", "dirty")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    import torch

    processor = machine_info.get("cpu", {})
    kept = {key: machine_info[key] for key in MACHINE if key in machine_info}
    kept["cpu"] = {key: processor[key] for key in PROCESSOR if key in processor}
    machine_info.clear()
    machine_info.update(kept, torch=torch.__version__)


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    kept = {key: commit_info[key] for key in COMMIT if key in commit_info}
    commit_info.clear()
    commit_info.update(kept)
