"""What the video tokens of a prompt look like to each layer: how similar and how important they are."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fftriton_kernels import NO_LINK, linked_cosine_similarity

from ..methods import Method, MethodState, Prompt, VideoTokens
from ..methods.base import Steps

_MOST_FRAMES = 8  # whose tokens are in the similarity matrix
_MOST_TOKENS = 1024  # in it, unless two frames have more
_ROWS = 512  # of a similarity matrix at a time


@dataclass(frozen=True)
class Observed:
    """The V video tokens of one prompt, in their order, in each of L layers of the unreduced model.

    Attributes:
        frame: [V] int64: the frame of each token, counted across videos.
        patch: [V] int64: which patch of its frame it shows; the same in every frame of a video.
        similarity: [L, V] fp32: cosine of a layer's input with that of the same patch one frame earlier; NaN if there
            is no such token, or one of the two is zero or not finite.
        importance: [L, V] fp32: attention received in the layer, summed over all queries and averaged over the heads;
            NaN in layers without attention.
        matrix: [n, n] fp32: cosine of the first layer's inputs for the tokens of the first frames.
        by_distance: [d] fp32: mean cosine of the first layer's inputs of two tokens that stand k + 1 tokens apart.
    """

    frame: np.ndarray
    patch: np.ndarray
    similarity: np.ndarray
    importance: np.ndarray
    matrix: np.ndarray
    by_distance: np.ndarray

    @property
    def patches(self) -> int:
        """The largest number of tokens that a frame has: P of the t-P diagonal."""
        return int(np.bincount(self.frame).max())


@dataclass(frozen=True)
class Observer(Method):
    """Keeps every token and takes notes: `observed` describes the last prompt."""

    _notes: list[_Notes] = field(default_factory=list, compare=False, repr=False)

    def begin(self, prompt: Prompt) -> MethodState:
        self._notes.append(_Notes(self, prompt))
        return self._notes[-1]

    @property
    def observed(self) -> Observed:
        """What was observed in the last prompt.

        Raises:
            ValueError: no prompt with a video has run, or no patch has one frame earlier.
        """
        if not self._notes or not self._notes[-1].similarity:
            raise ValueError("inspect: the prompt must contain a video, got none")
        return self._notes[-1].observed()


class _Notes(MethodState):
    def __init__(self, method: Method, prompt: Prompt) -> None:
        super().__init__(method, prompt)
        self.similarity: list[Tensor] = []
        self.importance: dict[int, Tensor] = {}

    def wants_attention(self, layer: int) -> bool:
        return True

    def before_attention(self, layer: int, tokens: VideoTokens) -> Steps:
        video = tokens.patch[0] >= 0
        if layer == 0:
            self.frame = self.prompt.frame[tokens.position[0, video].cpu()]
            self.patch = tokens.patch[0, video].cpu()
            self.matrix, self.by_distance = _cosines(tokens.hidden[0, video], self.frame)
        cosine = linked_cosine_similarity(tokens.hidden, tokens.predecessor)[0, video].cpu()
        self.similarity.append(torch.where(cosine == NO_LINK, torch.nan, cosine))
        return []

    def after_attention(self, layer: int, tokens: VideoTokens) -> Steps:
        if tokens.attention is not None:
            self.importance[layer] = tokens.attention(None)[0, tokens.patch[0] >= 0].float().cpu()
        return []

    def observed(self) -> Observed:
        similarity = torch.stack(self.similarity).numpy()
        if np.isnan(similarity[0]).all():
            frames = len(self.frame.unique())
            raise ValueError(f"inspect: frames must be such that two of them share a patch, got {frames} for the model")
        importance = np.full_like(similarity, np.nan)
        for layer, received in self.importance.items():
            importance[layer] = received.numpy()
        parts = (self.frame, self.patch, self.matrix, self.by_distance)
        frame, patch, matrix, by_distance = (part.numpy() for part in parts)
        return Observed(frame, patch, similarity, importance, matrix, by_distance)


def _cosines(hidden: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [V, D], frame [V] -> the matrix [n, n] of the first frames, and the mean by distance [d], on the CPU."""
    unit = F.normalize(hidden.float(), dim=-1)
    sizes = frame.unique(return_counts=True)[1]
    ends = sizes.cumsum(0)[:_MOST_FRAMES].tolist()
    count = max(end for number, end in enumerate(ends) if number < 2 or end <= _MOST_TOKENS)
    matrix = torch.cat([part @ unit[:count].mT for part in unit[:count].split(_ROWS)])
    farthest = min(3 * int(sizes.max()) + 1, len(unit) - 1)
    by_distance = torch.stack([(unit[k:] * unit[: len(unit) - k]).sum(-1).mean() for k in range(1, farthest + 1)])
    return matrix.cpu(), by_distance.cpu()
