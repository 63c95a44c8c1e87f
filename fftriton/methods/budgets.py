"""How many tokens each frame may keep, given its relevance to the question."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_budget, check_count, check_positive

_WIDEST_GAP = 50.0  # between the logits of neighbours in rank: e^-50 of any budget is no token
_LOGIT_UNIT = 2.0**-40  # logits are summed as integers: exact, and the same on every device
_TOKEN_UNIT = 2.0**-24  # shares of a token that differ by less count as equal
_SMALLEST_WEIGHT = 1e-12  # whose logarithm is finite


def frame_budgets(
    scores: Tensor, patches: int | Tensor, budget: float, temperature: float = 2.0, min_tokens: int = 1
) -> Tensor:
    """Share a video's token budget among its frames, in proportion to softmax(scores / temperature).

    Each frame gets `min_tokens` first, and the rest is shared in proportion. If a frame is full, its excess is shared
    among the others in proportion, and so on. Fractions go to the largest remainders; ties go to the higher score, then
    to the earlier frame. The counts add up to exactly round(budget * F * patches), or round(budget * patches.sum()). A
    frame with a higher score never gets fewer tokens, and adding a constant to all scores changes nothing. Everything
    is computed on the device of the scores, for all samples and frames at once.

    Args:
        scores: [F] or [B, F] finite real numbers: the relevance of each frame; higher gets more tokens.
        patches: tokens per frame: an int, or integers [F] or [B, F] if frames differ. A frame with fewer than
            `min_tokens` keeps all its tokens.
        budget: tokens to keep, as a fraction of the video's, in (0, 1].
        temperature: above 0; if low, only the most relevant frames get more; `math.inf` gives equal counts.
        min_tokens: the fewest tokens that any frame keeps; with 0, frames may vanish.

    Returns:
        The number of tokens to keep of each frame, int64, in the shape of `scores`.

    Raises:
        TypeError: a parameter of another type.
        ValueError: scores that are not finite, patches of another shape or negative, a budget below
            `min_tokens` per frame, or any other parameter out of range.

    Source:
        KVTP, ICCV 2025, arXiv:2503.10742, section 3.3. The authors' code clips full frames and rounds down, so it
        loses part of the budget.
    """
    check_budget("frame_budgets", "budget", budget)
    check_positive("frame_budgets", "temperature", temperature)
    check_count("frame_budgets", "min_tokens", min_tokens, 0)
    _check_scores(scores)
    capacity = _capacities(patches, scores)
    least = capacity.clamp_max(min_tokens)
    if isinstance(patches, Tensor):
        total = (budget * capacity.sum(1).double()).round().long()  # [B]
    else:
        total = torch.full_like(capacity[:, 0], round(budget * scores.shape[-1] * patches))
    _check_values(scores, capacity, least, total, budget, min_tokens)
    ordered, order = scores.reshape(capacity.shape).double().sort(dim=1, descending=True, stable=True)
    least, room = least.gather(1, order), (capacity - least).gather(1, order)
    counts = least + _share(_logits(ordered, temperature), room, total - least.sum(1))
    return counts.gather(1, _inverse(order)).reshape(scores.shape)


def shared_out(number: int, of: int, weight: Tensor, room: Tensor) -> Tensor:
    """Share `number` tokens among frames in proportion to their weight, as far as they have room.

    Args:
        number: of tokens, from 0 to `of`.
        of: the sum of the room, which the host knows beforehand.
        weight: [F], at least 0. Frames of weight 0 get tokens only if the others are full, in equal parts.
        room: [F] int64, the most tokens that each frame takes.

    Returns:
        [F] int64, the sum of which is `number`.
    """
    if number == 0:
        return torch.zeros_like(room)
    return frame_budgets(weight.double().clamp_min(_SMALLEST_WEIGHT).log(), room, number / of, 1.0, min_tokens=0)


def _logits(scores: Tensor, temperature: float) -> Tensor:
    """[B, F] descending -> [B, F] scores / temperature, relative to the first; gaps between neighbours are bounded."""
    gaps = (-scores.diff(dim=1) / temperature).clamp_max(_WIDEST_GAP)
    below = F.pad((gaps / _LOGIT_UNIT).round().long(), (1, 0)).cumsum(1)
    return -below.double() * _LOGIT_UNIT


def _share(logits: Tensor, room: Tensor, total: Tensor) -> Tensor:
    """Share `total` [B] in proportion to exp(logits) [B, F], at most `room` [B, F] int64 each; int64 [B, F].

    In the order of room / exp(logit), the first k frames are full, for the smallest k after which the next is not.
    """
    full_from, order = (room.double().log() - logits).sort(dim=1, stable=True)  # log of the factor that fills a frame
    rest = total[:, None] - F.pad(room.gather(1, order).cumsum(1), (1, 0))  # [B, F+1]: left when the first k are full
    weight = logits.gather(1, order).flip(1).logcumsumexp(1).flip(1)  # log of the weight of all frames from k on
    fits = rest[:, :-1].double().log() - weight <= full_from  # False for a rest below 0
    num_full = F.pad(fits, (0, 1), value=True).int().argmax(1, keepdim=True)
    full = _inverse(order) < num_full
    shares = logits.masked_fill(full, float("-inf")).softmax(1) * rest.gather(1, num_full)
    shares = torch.minimum(shares, room).where(~full, room.double())
    shares = (shares / _TOKEN_UNIT).round() * _TOKEN_UNIT
    whole = shares.floor()
    place = _inverse((shares - whole).argsort(dim=1, descending=True, stable=True))
    missing = total - whole.sum(1).long()
    return whole.long() + (place < missing[:, None])


def _inverse(order: Tensor) -> Tensor:
    """[B, F] permutations -> [B, F] their inverses."""
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def _check_scores(scores: Tensor) -> None:
    if not isinstance(scores, Tensor) or scores.dtype == torch.bool or scores.is_complex():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"frame_budgets: scores must be a tensor of real numbers, got {got}")
    if scores.ndim not in (1, 2) or scores.shape[-1] == 0:
        raise ValueError(f"frame_budgets: scores must have shape [F] or [B, F], F >= 1, got {list(scores.shape)}")


def _capacities(patches: int | Tensor, scores: Tensor) -> Tensor:
    """[B, F] int64: the tokens of each frame."""
    frames = scores.reshape(-1, scores.shape[-1])
    if not isinstance(patches, Tensor):
        check_count("frame_budgets", "patches", patches, 1)
        return torch.full(frames.shape, int(patches), dtype=torch.int64, device=scores.device)
    if patches.is_floating_point() or patches.is_complex() or patches.dtype == torch.bool:
        raise TypeError(f"frame_budgets: patches must be integers, got {patches.dtype}")
    if patches.shape not in (scores.shape, scores.shape[-1:]):
        raise ValueError(
            f"frame_budgets: patches must hold one number for each of the scores {list(scores.shape)}, "
            f"got {list(patches.shape)}"
        )
    return patches.to(device=scores.device, dtype=torch.int64).expand(frames.shape)


def _check_values(
    scores: Tensor, capacity: Tensor, least: Tensor, total: Tensor, budget: float, min_tokens: int
) -> None:
    """Raise a ValueError for values that only the device knows, which it waits for once."""
    short = total < least.sum(1)
    wrong = torch.stack([~scores.isfinite().all(), (capacity < 0).any(), short.any()])
    not_finite, negative, below = wrong.tolist()
    if not_finite:
        raise ValueError(f"frame_budgets: scores must be finite, got {scores[~scores.isfinite()][0].item()}")
    if negative:
        raise ValueError(f"frame_budgets: patches must not be negative, got {int(capacity.min())}")
    if below:
        sample = int(short.int().argmax())
        raise ValueError(
            f"frame_budgets: budget must leave min_tokens = {min_tokens} to each of {capacity.shape[1]} frames, so at "
            f"least {int(least[sample].sum())} of {int(capacity[sample].sum())} tokens, got {budget}, which is "
            f"{int(total[sample])}"
        )
