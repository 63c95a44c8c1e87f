"""KVTP: a token budget for every frame, from how much the frame has to do with the question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import check_bool, check_budget, check_choice, check_count, check_positive
from .base import MethodState, Prompt, Steps, VideoTokens
from .before_layers import BeforeLayers
from .budgets import frame_budgets
from .frames import FrameContext, FrameRows
from .pruners import Pruner
from .registry import PRUNERS, find
from .tome import ToMe

Relevance = Tensor | Callable[[FrameContext], Tensor]


class Unbound(Protocol):
    """Relevance that needs the video and the question, such as a SiglipRelevance."""

    def bind(self, video: Any, question: str) -> Relevance: ...


@dataclass(frozen=True, eq=False)
class KVTP(BeforeLayers):
    """Give each frame a number of tokens by its relevance to the question, and shorten it to that number.

    Everything happens before the first layer, so all layers hold round(budget * video tokens) video tokens. Positions
    stay those of the full prompt, so that M-RoPE's times and places remain correct. The videos of a sample share one
    budget. Tokens that belong to no frame of the layout (text, images, LLaVA-OneVision's newline token) are kept and
    not counted; a newline that is in the layout is treated like any other token of its frame.

    Args:
        budget: video tokens to keep, as a fraction of the prompt's, in (0, 1].
        relevance: how relevant each frame is to the question; higher is more. A tensor [F] of scores, where F is the
            number of frames of tokens; a function that takes a FrameContext and returns [F], such as the result of
            `SiglipRelevance.bind`, which is called for every video; or a list of these, one per video of the batch,
            sample by sample. A SiglipRelevance itself needs the video and the question first, from `about`. None gives
            every frame the same number of tokens.
        pruner: how a frame is shortened: "random", "topk", "prumerge", "tome" or a Pruner.
        temperature: above 0, as for `frame_budgets`; if low, only the most relevant frames get more than `min_tokens`.
        min_tokens: the fewest tokens that any frame keeps. With 0 and a temperature near 0 the most relevant frames
            stay whole and the others vanish: hard key frames.
        renumber: number the remaining tokens without gaps, as the authors' code does, instead of keeping their
            positions. Only for models whose positions are single numbers (Qwen2, LLaVA, InternVL), not for M-RoPE.

    Raises:
        TypeError, ValueError: a parameter out of range. While it runs: ValueError for scores that are too few, too many
            or not finite, and for a budget below `min_tokens` per frame.

    Source:
        KVTP, ICCV 2025, arXiv:2503.10742. The counts are exact, while the authors' code loses part of the budget.
    """

    budget: float = 0.2
    relevance: Relevance | Unbound | Sequence[Relevance] | None = field(default=None, repr=False)
    pruner: str | Pruner = "topk"
    temperature: float = 2.0
    min_tokens: int = 1
    renumber: bool = False

    def __post_init__(self) -> None:
        check_budget("KVTP", "budget", self.budget)
        check_positive("KVTP", "temperature", self.temperature)
        check_count("KVTP", "min_tokens", self.min_tokens, 0)
        check_bool("KVTP", "renumber", self.renumber)
        if not isinstance(self.pruner, Pruner):
            check_choice("KVTP", "pruner", self.pruner, tuple(PRUNERS))
        if self.min_tokens == 0 and (self.pruner == "tome" or isinstance(self.pruner, ToMe)):
            raise ValueError("KVTP: min_tokens must be at least 1 for ToMe, which merges and drops nothing, got 0")
        for relevance in () if hasattr(self.relevance, "bind") else self.relevances or ():
            if not callable(relevance):
                _check_scores(relevance)

    @property
    def renumbers(self) -> bool:
        return self.renumber

    def about(self, frames: Any, question: str) -> KVTP:
        """The same method with the relevance of these frames to this question."""
        bind = getattr(self.relevance, "bind", None)
        return self if bind is None else replace(self, relevance=bind(frames, question))

    def begin(self, prompt: Prompt) -> MethodState:
        if hasattr(self.relevance, "bind"):
            raise ValueError("KVTP: relevance must know the video and the question: bind them, or use `about`")
        return super().begin(prompt)

    def shorten(self, tokens: VideoTokens, prompt: Prompt) -> Steps:
        numbers = [prompt.number_of(video) for video in range(len(prompt.layouts))]
        frames = FrameRows.of(prompt.layouts, tokens, numbers)
        scores = self._scores(tokens, frames)
        counts = frame_budgets(scores, frames.sizes, self.budget, self.temperature, self.min_tokens)
        pruner = find(Pruner, self.pruner)() if isinstance(self.pruner, str) else self.pruner
        left = pruner(tokens, frames, counts, total=round(self.budget * tokens.num_video))
        return _renumbered(left, tokens) if self.renumber else left

    @property
    def relevances(self) -> Sequence[Relevance] | None:
        """The given relevance, as a list."""
        if isinstance(self.relevance, Tensor) or callable(self.relevance):
            return [self.relevance]
        return self.relevance  # type: ignore[return-value]  # bound by now

    def relevance_of(self, video: int) -> Relevance:
        """The relevance of one video of the batch. Raises a ValueError if none was given for it."""
        if callable(self.relevance):
            return self.relevance
        assert self.relevances is not None
        if video >= len(self.relevances):
            raise ValueError(
                f"KVTP: relevance must hold scores for each video of the batch, got {len(self.relevances)} for "
                f"{video + 1} or more"
            )
        return self.relevances[video]

    def _scores(self, tokens: VideoTokens, frames: FrameRows) -> Tensor:
        """[F] fp32: the scores of all frames of all videos of the sample."""
        if self.relevances is None:
            return torch.zeros(len(frames.rows), device=tokens.hidden.device)
        scores = []
        for context in frames.contexts(tokens):
            relevance = self.relevance_of(context.video)
            if callable(relevance):
                relevance = relevance(context)
                _check_scores(relevance)
            if len(relevance) != context.num_frames:
                raise ValueError(
                    f"KVTP: relevance must hold one score for each of the {context.num_frames} frames of video "
                    f"{context.video}, got {len(relevance)}"
                )
            scores.append(relevance.to(tokens.hidden.device, torch.float32))
        return torch.cat(scores)


def _renumbered(left: VideoTokens, tokens: VideoTokens) -> VideoTokens:
    """Give the remaining tokens the last positions of the prompt: without gaps, and the tokens after it need not move.

    Attention depends only on differences between positions, so this is equivalent to counting from 0.
    """
    return replace(left, companions=tuple(part[:, tokens.length - left.length :] for part in tokens.companions))


def _check_scores(scores: Tensor) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(
            f"KVTP: relevance must be a tensor, a list of tensors, a function or None, got {type(scores).__name__}"
        )
    if scores.ndim != 1 or scores.dtype == torch.bool or scores.is_complex():
        raise ValueError(f"KVTP: relevance must be real numbers [F], got {list(scores.shape)} of {scores.dtype}")
    if not bool(scores.isfinite().all()):
        raise ValueError(f"KVTP: relevance must be finite, got {scores[~scores.isfinite()][0].item()}")
