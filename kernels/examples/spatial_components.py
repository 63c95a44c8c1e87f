"""Merging regions inside a frame: connected components of similar neighbours.

Two patches of a frame that are next to each other, side by side or one above the other, are connected when the cosine
of their features exceeds a threshold. Each connected component becomes one token, the mean of its patches.

Ops: linked_cosine_similarity compares each patch with the one to its left, strided_cosine_similarity with the one
above; connected_components labels the regions, merge_mean averages and compacts. A pair that is not similar enough
becomes the edge (-1, -1), which is none: so the number of edges does not depend on the data, and nothing waits for the
device before merge_mean.

Run: python kernels/examples/spatial_components.py
"""

import torch
from torch import Tensor

from fftriton_kernels import (
    Merged,
    connected_components,
    linked_cosine_similarity,
    merge_mean,
    strided_cosine_similarity,
)


def region_roots(frames: Tensor, width: int, threshold: float) -> Tensor:
    """The first patch of each patch's region.

    Args:
        frames: [F, P, D] fp16, bf16 or fp32, patches row by row.
        width: how many patches a row has.
        threshold: neighbours whose cosine is above it are connected.

    Returns:
        [F, P] int64, positions within the frame.
    """
    count, patches, _ = frames.shape
    patch = torch.arange(patches, device=frames.device)
    left = torch.where(patch % width == 0, -1, patch - 1)
    beside = linked_cosine_similarity(frames, left.expand(count, -1))  # [F, P]
    above = strided_cosine_similarity(frames, width)  # [F, P], NO_LINK in the first row

    node = torch.arange(count * patches, device=frames.device).view(count, patches)
    edges = torch.cat([_edges(node, node - 1, beside > threshold), _edges(node, node - width, above > threshold)])
    label = connected_components(edges, count * patches)  # the smallest node of each region
    return label.view(count, patches) - node[:, :1]


def merge_regions(frames: Tensor, width: int, threshold: float) -> Merged:
    """frames [F, P, D] -> one token for each region, padded on the left to the frame with the most regions."""
    return merge_mean(frames, region_roots(frames, width, threshold))


def _edges(node: Tensor, neighbour: Tensor, connected: Tensor) -> Tensor:
    """[F, P] nodes and neighbours -> [F * P, 2], -1 where they are not connected."""
    return torch.where(connected.unsqueeze(-1), torch.stack((node, neighbour), -1), -1).flatten(0, 1)


def main() -> None:
    """Draw the regions of two frames in which a square moves over a background of two halves."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(3, 64, generator=generator)
    scene = torch.zeros(2, 8, 12, dtype=torch.int64)
    scene[:, :, 6:] = 1
    scene[0, 2:5, 1:4] = 2
    scene[1, 4:7, 5:8] = 2
    frames = (colours[scene] + 0.05 * torch.randn(2, 8, 12, 64, generator=generator)).flatten(1, 2)
    roots = region_roots(frames, width=12, threshold=0.9).view(2, 8, 12)
    merged = merge_regions(frames, width=12, threshold=0.9)
    for frame in range(2):
        names = {root: "abcdefgh"[i] for i, root in enumerate(roots[frame].unique().tolist())}
        print(f"frame {frame}: 96 patches are {int(merged.lengths[frame])} regions")
        for row in roots[frame].tolist():
            print("   ", " ".join(names[root] for root in row))


if __name__ == "__main__":
    main()
