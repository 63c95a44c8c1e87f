"""Relevance that is bound to one video and one question."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods import FrameContext
from .patches import Patches, group_size

_SAME_VIDEO = 0.05  # relative difference of mean tokens: bf16 against fp32 makes 0.001, other videos 0.2 and more


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a predictor has seen of a video, for any question.

    Args:
        features: [T, D] fp32 of its frames.
        patches: what the pooling head says about their patches, or None.
        seconds: what it took.
        macs: its multiply-accumulates, each of which counts once.
    """

    features: Tensor
    patches: Patches | None = None
    seconds: float = 0.0
    macs: float = 0.0


@dataclass(frozen=True, eq=False)
class BoundRelevance:
    """The scores of one video's frames, as a relevance function for KVTP.

    It belongs to its video: the first call notes what the tokens look like, and a later one with tokens of another
    video is refused.

    Args:
        scores: [T], one per frame that the model gets. If a token covers two frames, as in Qwen2-VL, the higher score
            counts.
        seconds: what it took to find them out.
        macs: the multiply-accumulates of that.
        patches: importance and keys of the frames' patches, or None.
    """

    scores: Tensor
    seconds: float = 0.0
    macs: float = 0.0
    patches: Patches | None = None
    _seen: dict[torch.Size, Tensor] = field(default_factory=dict, repr=False)

    of_one_video = True

    def __call__(self, context: FrameContext) -> Tensor:
        """Scores [F] of the F frames of tokens.

        Raises:
            ValueError: T frames cannot have become F, or the tokens are those of another video.
        """
        scores = of_token_frames(self.scores, context.num_frames)
        self._check_video(context)
        return scores

    def _check_video(self, context: FrameContext) -> None:
        look = mean_tokens(context)
        known = self._seen.setdefault(look.shape, look).to(look.device)
        if float((look - known).norm()) > _SAME_VIDEO * float(known.norm()):
            raise ValueError(
                "BoundRelevance: a relevance belongs to the video that it was first used for, got tokens of another "
                "one; bind each video, and each question, anew"
            )


def of_token_frames(scores: Tensor, frames: int) -> Tensor:
    """[T] scores of the frames that were taken -> [F], the highest of each frame of tokens.

    Raises:
        ValueError: T frames cannot have become F.
    """
    size = group_size(len(scores), frames)
    padded = F.pad(scores, (0, size * frames - len(scores)), value=float("-inf"))
    return padded.view(frames, size).amax(1)


def mean_tokens(context: FrameContext) -> Tensor:
    """[F, D] fp32: the mean token of each frame."""
    means, hidden = [], context.tokens.hidden
    for part in context.frames.parts(hidden.shape[-1]):
        present = part.present.float()
        x = part.take(hidden).float().nan_to_num()
        means.append(torch.bmm(present[:, None], x)[:, 0] / present.sum(1, keepdim=True).clamp_min(1))
    return torch.cat(means)
