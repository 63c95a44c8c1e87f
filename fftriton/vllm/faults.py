"""Faults of vLLM that the plugin steps around, each with the release in which it was seen.

tests/vllm/test_faults.py fails once one of them is gone, so that its workaround can go, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any


def step_around() -> None:
    """What has to happen before a model is loaded. Doing it again changes nothing."""
    _tell_cpu_runner_of_pruning()


def _tell_cpu_runner_of_pruning() -> None:
    """Seen in 0.32.0: CPUModelRunner.load_model replaces GPUModelRunner.load_model and leaves out the line that finds
    out whether videos are pruned, so positions are never asked for, and embeddings have too many columns."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.load_model
    if hasattr(original, "fftriton_original"):
        return

    @wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = self.model_config.multimodal_config
        self.is_multimodal_pruning_enabled = bool(
            config is not None
            and config.is_multimodal_pruning_enabled()
            and getattr(self.model, "supports_multimodal_pruning", False)
        )

    load_model.fftriton_original = original  # type: ignore[attr-defined]
    CPUModelRunner.load_model = load_model


@contextmanager
def mergers_with(size: int) -> Iterator[None]:
    """Seen in 0.32.0: Qwen2-VL's vision tower makes its merger without the checkpoint's spatial_merge_size, so that
    only checkpoints with the default of 2 can be loaded. Inside, mergers have this size."""
    from vllm.model_executor.models import qwen2_vl

    merger = qwen2_vl.Qwen2VisionPatchMerger
    qwen2_vl.Qwen2VisionPatchMerger = partial(merger, spatial_merge_size=size)
    try:
        yield
    finally:
        qwen2_vl.Qwen2VisionPatchMerger = merger
