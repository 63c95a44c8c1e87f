"""Each fault of vLLM that the plugin steps around is still there; once a test fails, its workaround can go."""

import inspect

from vllm.model_executor.models import qwen2_vl
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from fftriton.vllm.faults import mergers_with, step_around


def test_the_cpu_runner_does_not_ask_whether_videos_are_pruned():
    step_around()
    theirs = CPUModelRunner.load_model.fftriton_original
    assert "is_multimodal_pruning_enabled" in inspect.getsource(GPUModelRunner.load_model)
    assert "is_multimodal_pruning_enabled" not in inspect.getsource(theirs)
    assert "super().load_model" not in inspect.getsource(theirs)


def test_stepping_around_twice_changes_nothing():
    step_around()
    once = CPUModelRunner.load_model
    step_around()
    assert CPUModelRunner.load_model is once


def test_the_vision_tower_of_qwen2_vl_forgets_its_merge_size():
    made = inspect.getsource(qwen2_vl.Qwen2VisionTransformer.__init__)
    call = made[made.index("Qwen2VisionPatchMerger(") :]
    assert "spatial_merge_size" not in call[: call.index(")\n")]
    merger = qwen2_vl.Qwen2VisionPatchMerger
    with mergers_with(1):
        assert qwen2_vl.Qwen2VisionPatchMerger.keywords == {"spatial_merge_size": 1}
    assert qwen2_vl.Qwen2VisionPatchMerger is merger
