"""fftriton as a model of lmms-eval: any of its video models with reduced vision tokens, by its plugin mechanism.

    python -m lmms_eval --model fftriton --tasks videomme --batch_size 1 \
        --model_args base=qwen2_5_vl,pretrained=Qwen/Qwen2.5-VL-7B-Instruct,method=framefusion,budget=0.3

Installing fftriton is enough: lmms-eval finds `manifest` through the entry point `lmms_eval.models`.
"""

from typing import Any


def manifest() -> Any:
    """The manifest for lmms-eval's registry. Needs lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="fftriton", simple_class_path="fftriton.lmms.model.FFTriton")
