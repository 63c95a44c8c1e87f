"""Memory of a training step of the predictor at the size of SigLIP so400m, from layers of this size.

One and two layers of the vision tower are measured on a few frames, forward and backward, in bf16 with checkpointing as
`train.py --precision bfloat16 --checkpointing` runs them. The rest is arithmetic: weights, gradients and Adam's two
moments in fp32, what a layer saves for each frame, and what the backward pass of one batch of frames needs on top.

    python -m bench.kvtp.memory
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from bench.kvtp.train import enable_checkpointing
from fftriton.runtime.measure import memory_before, peak_memory

SIZE = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
VISION = SIZE | {"image_size": 384, "patch_size": 14}
TEXT = SIZE | {"vocab_size": 32000, "max_position_embeddings": 64, "projection_size": 1152}
BATCH = 32  # frames that are encoded at a time, as SiglipRelevance does
BYTES = 16  # of a weight: itself, its gradient and two moments, all fp32


def peak_of_layers(layers: int, frames: int, device: torch.device) -> int:
    """Bytes above the weights and gradients that a forward and backward of so many layers takes at its peak."""
    model = SiglipVisionModel(SiglipVisionConfig(**VISION | {"num_hidden_layers": layers})).to(device).train()
    enable_checkpointing(model)
    pixels = torch.randn(frames, 3, VISION["image_size"], VISION["image_size"], device=device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = memory_before(device)
    if before is None:
        raise OSError("the peak memory of this process cannot be read on this system")
    with torch.autocast(device.type, torch.bfloat16):
        output = model(pixel_values=pixels).pooler_output
    output.float().square().sum().backward()
    return peak_memory(device) - before


def num_weights() -> int:
    """Weights of a SigLIP so400m."""
    with torch.device("meta"):
        model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))
    return sum(parameter.numel() for parameter in model.parameters())


def main(
    frames: Annotated[int, typer.Option(min=1, help="Frames of the video of the step.")] = 128,
    measured: Annotated[int, typer.Option(min=1, help="Frames that are measured.")] = 4,
) -> None:
    """Measure one and two layers, and extrapolate."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    one, two = (peak_of_layers(layers, measured, device) for layers in (1, 2))
    saved = (two - one) / measured  # by a layer, for each frame
    working = max(0.0, one / measured - saved)  # of the backward pass through one layer, for each frame
    weights = num_weights() * BYTES
    total = weights + frames * SIZE["num_hidden_layers"] * saved + min(frames, BATCH) * working
    console = Console()
    for name, value in (
        (f"measured: one layer, {measured} frames", one), (f"measured: two layers, {measured} frames", two),
        ("weights, gradients, moments", weights), ("saved by a layer for a frame", saved),
        ("needed on top for a frame", working), (f"extrapolated: a step of {frames} frames", total),
    ):  # fmt: skip
        console.print(f"{name}: {value / 2**30:.3f} GiB", highlight=False)


if __name__ == "__main__":
    typer.run(main)
