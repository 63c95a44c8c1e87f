"""Memory of a training step of the predictor at the size of SigLIP so400m, extrapolated from one layer of this size.

One layer of the vision tower runs on a few frames in bf16, as `train.py --precision bfloat16 --checkpointing` runs it:
counted are the bytes of its input, which checkpointing keeps, and of all that its backward pass needs. The rest is
arithmetic: fp32 weights, gradients and Adam's two moments, the bf16 copies of the weights, the inputs of all layers for
all frames, and twice (with gradients) what the backward pass of one layer needs for one batch of frames.

    python -m bench.kvtp.memory
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

SIZE = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
VISION = SIZE | {"image_size": 384, "patch_size": 14}
TEXT = SIZE | {"vocab_size": 32000, "max_position_embeddings": 64, "projection_size": 1152}
BATCH = 32  # frames that are encoded at a time, as SiglipRelevance does
BYTES = 16 + 2  # of a weight: itself, its gradient and two moments in fp32, and a copy in bf16


def measure_layer(frames: int) -> tuple[float, float]:
    """Bytes per frame of a layer's input, and of what its backward pass needs; weights are not counted."""
    model = SiglipVisionModel(SiglipVisionConfig(**VISION | {"num_hidden_layers": 1})).train()
    (layer,) = [module for module in model.modules() if type(module).__name__ == "SiglipEncoderLayer"]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    tokens = frames * (VISION["image_size"] // VISION["patch_size"]) ** 2
    given: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() % tokens == 0:  # the others are copies of weights
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def before(layer: nn.Module, args: tuple) -> None:
        given.append(args[0].nbytes)
        hooks.__enter__()

    def after(layer: nn.Module, args: tuple, output: object) -> None:
        hooks.__exit__(None, None, None)

    hooks = saved_tensors_hooks(note, lambda tensor: tensor)
    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
    with torch.autocast("cpu", torch.bfloat16):
        model(pixel_values=torch.randn(frames, 3, VISION["image_size"], VISION["image_size"]))
    return given[0] / frames, sum(kept.values()) / frames


def num_weights() -> int:
    """Weights of a SigLIP so400m."""
    with torch.device("meta"):
        model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))
    return sum(parameter.numel() for parameter in model.parameters())


def main(
    frames: Annotated[int, typer.Option(min=1, help="Frames of the video of the step.")] = 128,
    measured: Annotated[int, typer.Option(min=2, help="Frames that are measured.")] = 3,
) -> None:
    """Measure one layer, and extrapolate."""
    given, needed = measure_layer(measured)
    weights = num_weights() * BYTES
    inputs = frames * SIZE["num_hidden_layers"] * given
    backward = 2 * min(frames, BATCH) * needed
    console = Console()
    for name, value in (
        ("measured: input of a layer, per frame", given), ("measured: needed backward, per frame", needed),
        ("weights, gradients, moments, bf16 copies", weights), (f"inputs of all layers, {frames} frames", inputs),
        (f"backward through a layer, {min(frames, BATCH)} frames", backward),
        (f"extrapolated: a step of {frames} frames", weights + inputs + backward),
    ):  # fmt: skip
        console.print(f"{name}: {value / 2**30:.3f} GiB", highlight=False)


if __name__ == "__main__":
    typer.run(main)
