"""What is installed, what the device is, and how long a first compilation and launch take."""

from __future__ import annotations

import os
import platform
import subprocess
import time

import torch
from triton_interpreter import trouble

from fftriton.runtime.provenance import commit, device_name, version
from fftriton_kernels import strided_cosine_similarity

from .worker import Run

PACKAGES = (
    "torch", "triton", "transformers", "numpy", "safetensors", "accelerate", "flash-attn", "flash-colreduce", "pytest",
    "pytest-xdist", "hypothesis", "av", "kernels",
)  # fmt: skip
SMI = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw,memory.used"


def main(run: Run) -> None:
    run.note(
        "versions", commit=run.commit or commit() or "unknown", python=platform.python_version(), cores=os.cpu_count()
    )
    run.note("packages", **{name: version(name) for name in PACKAGES})
    if run.toy:
        run.note("device", name=device_name("cpu"), interpreter=trouble() or "works")
        return
    found = torch.cuda.get_device_properties(0)
    run.note(
        "device", name=found.name, capability=f"{found.major}.{found.minor}", processors=found.multi_processor_count,
        memory_gib=found.total_memory / 2**30, cuda=torch.version.cuda, hip=torch.version.hip,
    )  # fmt: skip
    try:
        command = ["nvidia-smi", SMI, "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        run.note("nvidia-smi", text=done.stdout.strip())
    except (OSError, subprocess.SubprocessError) as error:
        run.note("nvidia-smi", text=repr(error))
    x = torch.randn(1, 64, 256, device="cuda", dtype=torch.bfloat16)
    start = time.time()
    strided_cosine_similarity(x, 8)
    torch.cuda.synchronize()
    run.note("first launch", seconds=time.time() - start)
