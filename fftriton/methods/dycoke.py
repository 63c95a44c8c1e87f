"""DyCoke's prefill: of every four frames, one whole, and of the others the tokens that changed most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import VideoTokens
from .frame_methods import FrameMethod, novelty
from .frames import FrameRows

_WINDOW = 4  # frames
_BACK = (0, 1, 2, 1)  # how many frames before each of them is the one that it is compared with
_WHOLE = 100.0  # the priority of a frame that is full before others get a token


@dataclass(frozen=True)
class DyCoke(FrameMethod):
    """Keep the first of every four frames, and the same share of each of the others: what changed most.

        score(t) = 1 - cos(x_t, x_partner(t)),   partner: the same patch in frame 0, 0, 2 for frames 1, 2, 3 of a window

    This is the temporal merging of its prefill, which drops what is similar; its second part, which hides tokens from
    single steps of decode and keeps them in the KV cache, is not here. It needs nothing but the tokens. A budget below
    a quarter leaves the first frames of the windows only, each with those of its tokens that differ most from the rest
    of the frame. Ties go to the earlier token.

    Args:
        budget: video tokens to keep, as a fraction of the prompt's, in (0, 1].

    Raises:
        TypeError, ValueError: a budget out of range.

    Source:
        DyCoke, arXiv:2411.15024, section 3.2; `dycole_ttm` in KD-TAO/DyCoke, commit dd74634. It has a rate instead of a
        budget, and keeps the third frame of the last window whole.
    """

    def rate(self, tokens: VideoTokens, frames: FrameRows) -> tuple[Tensor, Tensor]:
        shapes = frames.shapes or [(len(frames.rows), 0)]
        place = torch.cat([torch.arange(length) for length, _ in shapes]) % _WINDOW  # [F]: of each frame in its window
        back = torch.tensor(_BACK)[place].to(frames.rows.device)
        partner = frames.rows[torch.arange(len(back), device=back.device) - back]
        links = frames.spread(partner.masked_fill((back == 0)[:, None], -1), torch.full_like(tokens.position, -1))
        priority = torch.where(back == 0, _WHOLE, 0.0)
        return novelty(tokens, frames, links), priority
