"""Prompts for the stand-ins of remote_models.py, and what they give to their decoder."""

from contextlib import contextmanager

import torch
from models import snapshot
from remote_models import QUERIES

STEPS = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def words(count, seed=0):
    return torch.randint(20, 130, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def film(frames, patches, seed=0, width=3, fresh=0.0):
    """[frames, patches, width] that change slowly; a share of `fresh` is new in each frame."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(1, patches, width, generator=generator)
    noise = torch.randn(frames, patches, width, generator=generator)
    is_fresh = torch.rand(frames, patches, 1, generator=generator) < fresh
    return torch.where(is_fresh, 2 * noise, first + 0.2 * noise)


def pixels(frames, side, seed=0, fresh=0.0):
    """[frames, 3, side, side] of one pixel per patch."""
    return film(frames, side * side, seed, fresh=fresh).transpose(1, 2).unflatten(2, (side, side))


def ids_of(rows, padding_side="right"):
    """Rows of ids of any length -> [B, n] and a mask."""
    length = max(map(len, rows))
    fill = [[0] * (length - len(row)) for row in rows]
    pairs = [(pad, row) if padding_side == "left" else (row, pad) for pad, row in zip(fill, rows, strict=True)]
    mask = [
        [0] * len(pad) + [1] * len(row) if padding_side == "left" else [1] * len(row) + [0] * len(pad)
        for pad, row in zip(fill, rows, strict=True)
    ]
    return torch.tensor([[*a, *b] for a, b in pairs]), torch.tensor(mask)


def decoder_of(model):
    part = getattr(model, "llm", None) or getattr(model, "language_model", None) or model
    return part.model


@contextmanager
def listening(model):
    """The embeddings [B, N, D] of the first prompt that reaches the decoder."""
    seen = []
    decoder = decoder_of(model)

    def note(module, args, kwargs):
        if kwargs.get("inputs_embeds") is not None and kwargs["inputs_embeds"].shape[1] > 1:
            seen.append(kwargs["inputs_embeds"])

    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def state(model):
    """All that a reduction touches, without what a stand-in notes."""
    return {key: value for key, value in snapshot(model).items() if key[-1] not in ("videos", "projected")}


def logits_of(output):
    if isinstance(output, torch.Tensor):
        return output.float()
    logits = output.logits
    return torch.stack(logits, 1) if isinstance(logits, tuple) else logits[:, -1:]


def units(frames, count=1, seed=0):
    """Images of `count` units of 4 patches each, as the frames of a video: a list of [count, 4, 3]."""
    return list(film(frames, count * QUERIES, seed).unflatten(1, (count, QUERIES)))
