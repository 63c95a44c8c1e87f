"""fftriton inside vLLM: methods that work before the first layer, behind the vision towers of vLLM's own models.

    python -m fftriton.vllm Qwen/Qwen2.5-VL-7B-Instruct --method temporalmerge --budget 0.3

prints the command that serves the model. Installing fftriton is enough: vLLM finds `register` through the entry point
`vllm.general_plugins`. Its own classes stay as they are: a model is reduced if its architecture, in `--hf-overrides`,
is one of ours, which a vLLM without this plugin refuses.
"""

from __future__ import annotations

ARCHITECTURES = {
    "Qwen2VLForConditionalGeneration": "fftriton.vllm.qwen:Qwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "fftriton.vllm.qwen:Qwen25VL",
    "LlavaOnevisionForConditionalGeneration": "fftriton.vllm.llava:LlavaOnevision",
    "Qwen3VLForConditionalGeneration": "fftriton.vllm.qwen3:Qwen3VL",
    "Qwen3VLMoeForConditionalGeneration": "fftriton.vllm.qwen3:Qwen3VLMoe",
}
"""The class that stands behind each architecture of vLLM."""

PREFIX = "FFTriton"
"""What our architectures begin with."""

KEY = "fftriton"
"""Where the method stands in the model's configuration."""


def register() -> None:
    """Tell vLLM our architectures. Called in each of its processes, perhaps more than once; imports no torch."""
    from vllm import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    for architecture, place in ARCHITECTURES.items():
        if architecture in known:
            ModelRegistry.register_model(PREFIX + architecture, place)
    from .faults import step_around

    step_around()
