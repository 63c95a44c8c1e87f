"""Resizing that gives the same bits in every process."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(images: Tensor, size: tuple[int, int], mode: str, **options: Any) -> Tensor:
    """F.interpolate of [N, C, H, W] in one thread; with several, rounding depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return F.interpolate(images, size=size, mode=mode, **options)
    finally:
        torch.set_num_threads(threads)
