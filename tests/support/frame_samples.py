"""Samples of videos for methods that look at frames, without a model."""

import torch

from fftriton import VideoLayout
from fftriton.layouts.layout import patch_ids
from fftriton.methods.base import VideoTokens
from fftriton.methods.frames import FrameRows


def ragged(seed=0, dtype=torch.float32):
    """A sample of two videos between text: frames of 1 to 7 tokens, holes in the middle."""
    generator = torch.Generator().manual_seed(seed)
    layouts, position = [], 2
    for frames, patches in ((5, 7), (3, 4)):
        there = torch.rand(frames, patches, generator=generator) < 0.7
        there[:, seed % patches] = True
        positions = torch.where(there, (there.flatten().cumsum(0) - 1).view_as(there) + position, -1)
        layouts.append(VideoLayout(positions))
        position = int(positions.max()) + 3
    x = torch.randn(1, position, 16, generator=generator)
    x[:, 3:] += x[:, 2:3]  # similar tokens, so that means and cosines are not all alike
    patch = patch_ids(layouts, 1, position, torch.device("cpu"))
    tokens = VideoTokens(x.to(dtype), torch.arange(position)[None], patch, sum(len(one.tokens) for one in layouts))
    return tokens, layouts


def sequence(x):
    """x [F, P, D] as a sample of one video."""
    frames, patches, width = x.shape
    layout = VideoLayout(torch.arange(frames * patches).view(frames, patches))
    patch = patch_ids([layout], 1, frames * patches, torch.device("cpu"))
    tokens = VideoTokens(x.reshape(1, -1, width), torch.arange(frames * patches)[None], patch, frames * patches)
    return tokens, FrameRows.of([layout], tokens)
