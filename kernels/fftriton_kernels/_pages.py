"""Memory for large results on a CPU.

Writing to fresh memory costs a page fault for every 4 KiB: most of the time that a gather of 50 MB takes. Linux backs a
mapping by pages of 2 MiB where it is asked to.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

_LARGE = 2**25  # bytes; from here on malloc takes a mapping of its own each time, too


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """As torch.empty, of the dtype and on the device of `like`."""
    size = prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=like.dtype).view(shape)
