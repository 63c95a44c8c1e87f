"""Token merging by bipartite soft matching, as ToMe does it in every block of an image transformer.

Even tokens may join odd ones. Each even token proposes its most similar odd one; the r best proposals are taken, and
each odd token becomes the mean of itself and all that joined it, weighted by how many patches each stands for. Rows
stay in the order of the sequence (the authors' code puts the even ones first).

Ops: linked_cosine_similarity scores the proposals, topk_keep takes r of them, merge_mean averages and compacts.
merge_roots is not used: it joins a token with an earlier one, whereas here a partner may stand on either side. Choosing
the partners is a matrix product, so it is left to PyTorch.

Source: ToMe, arXiv:2210.09461, section 3.   Run: python kernels/examples/tome.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fftriton_kernels import NO_LINK, gather_rows, linked_cosine_similarity, merge_mean, topk_keep


def merge_tokens(x: Tensor, metric: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge r tokens of each sample away.

    Args:
        x: [B, N, D] fp16, bf16 or fp32 tokens.
        metric: [B, N, C] of the same dtypes, what similarity is measured on: the attention's keys, averaged over heads.
        size: [B, N, 1] fp32, how many patches each token stands for, ones at the start.
        r: how many tokens to merge; never more than N // 2, nor an even token that is zero or not finite.

    Returns:
        The tokens [B, N - r, D], their sizes [B, N - r, 1] and their original positions [B, N - r]. Samples in which
        fewer were merged set the length; the others are padded on the left, with position -1 and zeros.
    """
    batch, length, _ = x.shape
    r = min(r, length // 2)
    position = torch.arange(length, device=x.device).expand(batch, -1)
    if r == 0:
        return x, size, position

    direction = F.normalize(metric.float(), dim=-1)
    proposals = direction[:, ::2] @ direction[:, 1::2].mT  # [B, even, odd]
    partner = torch.full_like(position, -1)
    partner[:, ::2] = 2 * proposals.argmax(-1) + 1

    similarity = linked_cosine_similarity(metric, partner)  # [B, N], NO_LINK for odd tokens
    best = torch.zeros_like(position).scatter(1, topk_keep(similarity, r), 1)
    roots = torch.where((best == 1) & (similarity > NO_LINK), partner, position)

    weighted = torch.cat((x.float() * size, size), dim=-1)
    merged = merge_mean(weighted, roots)
    total, weight = merged.x[..., :-1], merged.x[..., -1:]  # both divided by the number of members, which cancels
    sizes = torch.zeros_like(size).scatter_add(1, roots.unsqueeze(-1), size)
    (size,) = gather_rows(merged.kept, sizes)
    return (total / weight.where(weight > 0, 1.0)).to(x.dtype), size, merged.kept


def main() -> None:
    """Merge a picture of 14 x 14 patches, which has only a few colours, block by block as a transformer would."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(6, 64, generator=generator)
    regions = torch.randint(6, (2, 7, 7), generator=generator)
    regions = regions.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)  # [2, 196]
    x = colours[regions] + 0.1 * torch.randn(2, 196, 64, generator=generator)
    size = torch.ones(2, 196, 1)
    for block in range(4):
        x, size, _ = merge_tokens(x, x, size, r=40)
        print(f"after block {block}: {x.shape[1]} of 196 tokens, the largest stands for {int(size.max())} patches")
    nearest = torch.cdist(x, colours.expand(2, -1, -1)).amin(-1)
    print(f"a token is {nearest.max():.2f} from its colour at most; two colours are {F.pdist(colours).min():.2f} apart")


if __name__ == "__main__":
    main()
