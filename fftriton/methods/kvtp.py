"""KVTP: a token budget for every frame, from how much the frame has to do with the question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import check_budget, check_choice, check_count, check_positive
from .base import Prompt, VideoTokens
from .chain import BeforeLayers
from .frame_budgets import frame_budgets
from .pruners import PRUNERS, Frames, Pruner, ToMe


@dataclass(frozen=True)
class FrameContext:
    """One video of a prompt, as a relevance function gets it.

    Args:
        sample: the row of the batch.
        video: which video of the batch it is, counted sample by sample.
        hidden: [F, P, D] its tokens, as the first layer would get them; `present` [F, P] bool is False at holes.
        text: [n, D] the prompt's tokens that are in no video.
    """

    sample: int
    video: int
    hidden: Tensor
    present: Tensor
    text: Tensor

    @property
    def num_frames(self) -> int:
        """F: frames of tokens. Qwen2-VL's tokens stand for two frames of the video each."""
        return self.hidden.shape[0]


Relevance = Tensor | Callable[[FrameContext], Tensor]


class Unbound(Protocol):
    """Relevance that asks for the video and the question, such as a SiglipRelevance."""

    def bind(self, video: Any, question: str) -> Relevance: ...


@dataclass(frozen=True, eq=False)
class KVTP(BeforeLayers):
    """Give each frame a number of tokens by its relevance, shorten it to that, and run the model on what is left.

    Everything happens before the first layer, so that all layers hold round(budget * video tokens) video tokens.
    Positions stay as in the full prompt: M-RoPE's times and places stay true. Several videos of a sample share one
    budget. What is in no frame of the layout (text, images, LLaVA-OneVision's newline token) is kept and not counted; a
    newline that is in the layout is a token of its frame like any other.

    Args:
        budget: video tokens to keep, as a fraction of the prompt's, in (0, 1].
        relevance: what each frame has to do with the question, higher for more. A tensor [F] of scores; a function
            that gets a FrameContext and returns [F], such as what `SiglipRelevance.bind` returns, and that is asked
            for every video; or a list of these, one for each video of the batch, sample by sample. F counts frames of
            tokens. A SiglipRelevance itself has to be told of the video and the question by `about`. None for the same
            count in every frame.
        pruner: how a frame is shortened: "random", "topk", "prumerge", "tome" or a Pruner.
        temperature: above 0, as for `frame_budgets`: low for the most relevant frames alone.
        min_tokens: tokens that every frame keeps at least. With 0 and a temperature near 0 whole frames stay, the most
            relevant first, and the others vanish: hard key frames.
        renumber: count the tokens that stay without gaps, as the authors' code does, rather than keep their positions.
            Only for models whose positions are single numbers (Qwen2, LLaVA, InternVL), not for M-RoPE.

    Raises:
        TypeError, ValueError: a parameter out of range. While it runs: ValueError for scores of the wrong number or not
            finite, and for a budget below `min_tokens` a frame.

    Source:
        KVTP, ICCV 2025, arXiv:2503.10742. The counts are exact, where the authors' code loses a part of the budget.
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
        """The method with the relevance of these frames to this question."""
        bind = getattr(self.relevance, "bind", None)
        return self if bind is None else replace(self, relevance=bind(frames, question))

    def begin(self, prompt: Prompt) -> _Frames:
        """The calls of one prefill."""
        if hasattr(self.relevance, "bind"):
            raise ValueError("KVTP: relevance must know the video and the question: bind them, or use `about`")
        return _Frames(self, prompt)

    @property
    def relevances(self) -> Sequence[Relevance] | None:
        """As they were given, in a list."""
        if isinstance(self.relevance, Tensor) or callable(self.relevance):
            return [self.relevance]
        return self.relevance  # type: ignore[return-value]  # bound by now

    def relevance_of(self, video: int) -> Relevance:
        """That of one video of the batch. Raises a ValueError where none was given for it."""
        if callable(self.relevance):
            return self.relevance
        assert self.relevances is not None
        if video >= len(self.relevances):
            raise ValueError(
                f"KVTP: relevance must hold scores for each video of the batch, got {len(self.relevances)} for "
                f"{video + 1} or more"
            )
        return self.relevances[video]


class _Frames(BeforeLayers):
    def __init__(self, method: KVTP, prompt: Prompt) -> None:
        self.method, self.prompt, self.budget = method, prompt, method.budget

    def before_attention(self, layer: int, tokens: VideoTokens) -> VideoTokens | None:
        method = self.method
        if layer > 0 or self.budget == 1:
            return None
        frames = Frames.of(self.prompt.layouts, tokens)
        scores = self._scores(tokens, frames)
        counts = frame_budgets(scores, frames.sizes, self.budget, method.temperature, method.min_tokens)
        pruner = PRUNERS[method.pruner]() if isinstance(method.pruner, str) else method.pruner
        left = pruner(tokens, frames, counts, total=round(self.budget * tokens.num_video))
        return _renumbered(left, tokens) if method.renumber else left

    def _scores(self, tokens: VideoTokens, frames: Frames) -> Tensor:
        """[F] fp32: the scores of all frames of all videos of the sample."""
        sizes = [len(layout.positions) for layout in self.prompt.layouts]
        if self.method.relevances is None:
            return torch.zeros(sum(sizes), device=tokens.hidden.device)
        text = tokens.hidden[0, tokens.patch[0] < 0]
        parts = [Frames(rows) for rows in frames.rows.split(sizes)]
        scores = []
        for i, (part, size) in enumerate(zip(parts, sizes, strict=True), start=self.prompt.first_video):
            relevance = self.method.relevance_of(i)
            if callable(relevance):
                sample = self.prompt.layouts[0].sample
                relevance = relevance(FrameContext(sample, i, part.take(tokens.hidden), part.present, text))
                _check_scores(relevance)
            if len(relevance) != size:
                raise ValueError(
                    f"KVTP: relevance must hold one score for each of the {size} frames of video {i}, "
                    f"got {len(relevance)}"
                )
            scores.append(relevance.to(tokens.hidden.device, torch.float32))
        return torch.cat(scores)


def _renumbered(left: VideoTokens, tokens: VideoTokens) -> VideoTokens:
    """What is left with the positions of the prompt's last tokens: without gaps, and what follows need not move.

    Attention depends on differences of positions alone, so this is as if they counted from 0.
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
