"""KVTP: a token budget for every frame, from how much the frame has to do with the question."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..checks import check_bool, check_budget, check_choice, check_count, check_positive
from .base import FrameScores, MethodState, Prompt, Steps, VideoTokens
from .before_layers import BeforeLayers, BeforeLayersState
from .budgets import frame_budgets
from .frames import FrameContext, FrameRows
from .own_attention import OwnAttention
from .pruners import Pruner
from .registry import PRUNERS, find

Relevance = Tensor | np.ndarray | Callable[[FrameContext], Tensor]


ATTENTION = "attention"
"""The name of the relevance that is the model's own attention."""


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
        relevance: how relevant each frame is to the question; higher is more. Scores [F] of the one video of the batch,
            a tensor or an array, where F is the number of frames of tokens; the result of `SiglipRelevance.bind`, which
            also belongs to one video; a function that takes a FrameContext and returns [F], which is called for every
            video; or a list of these with one for each video of the batch, sample by sample, where None gives the
            frames of that video as much as the average frame of the sample's other videos; or "attention" or an
            `OwnAttention`, which needs no second model: what the model itself attends to in a cheap first pass. A
            SiglipRelevance itself needs the video and the question first, from `about`. None gives every frame the same
            number of tokens.
        pruner: how a frame is shortened: "random", "topk", "prumerge", "tome" or a Pruner; or "evs", "vidcom2",
            "dycoke" or "visionzip", methods whose way to choose tokens is taken, and not their numbers of tokens.
        temperature: above 0, as for `frame_budgets`; if low, only the most relevant frames get more than `min_tokens`.
        min_tokens: the fewest tokens that any frame keeps. With 0 and a temperature near 0 the most relevant frames
            stay whole and the others vanish: hard key frames.
        renumber: number the remaining tokens without gaps, as the authors' code does, instead of keeping their
            positions. Only for models whose positions are single numbers (Qwen2, LLaVA, InternVL), not for M-RoPE.

    A budget below `min_tokens` per frame is met as closely as possible.

    Raises:
        TypeError, ValueError: a parameter out of range. While it runs: ValueError for scores that are too few, too
            many, not finite or of another video.

    Source:
        KVTP, ICCV 2025, arXiv:2503.10742. The counts are exact, while the authors' code loses part of the budget.
    """

    budget: float = 0.2
    relevance: OwnAttention | Relevance | Unbound | Sequence[Relevance | None] | None = field(default=None, repr=False)
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
        if self.min_tokens == 0 and not (pruner := self.make_pruner()).may_drop:
            name = type(pruner).__name__
            raise ValueError(f"KVTP: min_tokens must be at least 1 for {name}, which merges and drops nothing, got 0")
        if isinstance(self.relevance, str) and self.relevance == ATTENTION:
            object.__setattr__(self, "relevance", OwnAttention())
        if not hasattr(self.relevance, "bind") and not isinstance(self.relevance, OwnAttention):
            object.__setattr__(self, "relevance", _as_relevance(self.relevance))

    def check(self, num_layers: int) -> None:
        """Raise a ValueError if the relevance wants a layer that a decoder of `num_layers` layers does not have."""
        if isinstance(self.relevance, OwnAttention):
            self.relevance.layer_of(num_layers)

    @property
    def renumbers(self) -> bool:
        return self.renumber

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        """Whether the pruner's tokens have sizes."""
        return self.make_pruner().proportional

    def about(self, frames: Any, question: str) -> KVTP:
        """The same method with the relevance of these frames to this question."""
        bind = getattr(self.relevance, "bind", None)
        if bind is None:
            return self
        wanted = {"patches": True} if self.make_pruner().wants_predictor else {}
        return replace(self, relevance=bind(frames, question, **wanted))

    def count(self, frames: int, patches: int) -> int | None:
        if self.proportional:
            return None
        if self.budget == 1:
            return frames * patches
        return max(frames * min(patches, self.min_tokens), round(self.budget * (frames * patches)))

    def make_pruner(self) -> Pruner:
        """The pruner, made if it is given by name."""
        return find(Pruner, self.pruner)() if isinstance(self.pruner, str) else self.pruner

    def begin(self, prompt: Prompt) -> MethodState:
        if hasattr(self.relevance, "bind"):
            raise ValueError("KVTP: relevance must know the video and the question: bind them, or use `about`")
        return _KVTPState(self, prompt)

    def relevances(self, prompt: Prompt) -> Callable[[int], Any]:
        """The relevance of a video by its number in the batch; None for one without.

        Raises:
            ValueError: there are not as many as the batch has videos.
        """
        given: Any = self.relevance
        is_function = callable(given) and not getattr(given, "of_one_video", False)
        if given is None or is_function or isinstance(given, OwnAttention):
            return lambda video: given
        listed = given if isinstance(given, list) else [given]
        videos = prompt.videos_in_batch or 1 + max(map(prompt.number_of, range(len(prompt.layouts))))
        if len(listed) != videos:
            raise ValueError(
                f"KVTP: relevance must hold scores for each video of the batch, got {len(listed)} for {videos}"
            )
        return listed.__getitem__


class _KVTPState(BeforeLayersState):
    method: KVTP
    _least: float | None = None
    _scores: Sequence[FrameScores] = ()

    @property
    def least_budget(self) -> float:
        return self.method.budget if self._least is None else self._least

    @property
    def frame_scores(self) -> Sequence[FrameScores]:
        return self._scores

    def shorten(self, tokens: VideoTokens) -> Steps:
        method, prompt = self.method, self.prompt
        frames = FrameRows.of_prompt(prompt, tokens)
        scores = self._score(tokens, frames)
        budget, floor = method.budget, int(frames.sizes.clamp_max(method.min_tokens).sum())
        if round(budget * tokens.num_video) < floor:
            self._least = budget = floor / tokens.num_video
        counts = frame_budgets(scores, frames.sizes, budget, method.temperature, method.min_tokens)
        pruner = method.make_pruner().with_predictor(method.relevances(prompt))
        left = pruner(tokens, frames, counts, total=round(budget * tokens.num_video))
        return _renumbered(left, tokens) if method.renumber else left

    def _score(self, tokens: VideoTokens, frames: FrameRows) -> Tensor:
        """[F] fp32: the scores of all frames of all videos of the sample."""
        if isinstance(self.method.relevance, OwnAttention):
            self._scores = self.method.relevance.score(tokens, frames, self.prompt)
            return torch.cat([one.scores for one in self._scores])
        relevance_of = self.method.relevances(self.prompt)
        device, found = tokens.hidden.device, []
        for context in frames.contexts(tokens):
            relevance = relevance_of(context.video)
            scores = relevance(context) if callable(relevance) else relevance
            if scores is not None:
                scores = _as_scores(scores)
                if len(scores) != context.num_frames:
                    raise ValueError(
                        f"KVTP: relevance must hold one score for each of the {context.num_frames} frames of video "
                        f"{context.video}, got {len(scores)}"
                    )
                scores = scores.to(device, torch.float32)
            found.append((context, relevance, scores))
        known = [scores for _, _, scores in found if scores is not None]
        if not known:
            return torch.zeros(len(frames.rows), device=device)
        self._scores = [
            FrameScores(context.video, scores, getattr(given, "seconds", 0.0), getattr(given, "macs", 0.0))
            for context, given, scores in found
            if scores is not None
        ]
        typical = _typical(torch.cat(known), self.method.temperature)
        return torch.cat([
            typical.expand(context.num_frames) if scores is None else scores for context, _, scores in found
        ])  # fmt: skip


def _typical(scores: Tensor, temperature: float) -> Tensor:
    """[1]: the score that a frame would have to have to get as much as the mean frame."""
    if math.isinf(temperature):
        return scores.mean()[None]
    peak = scores.max()
    return (peak + temperature * ((scores - peak) / temperature).exp().mean().log())[None]


def _renumbered(left: VideoTokens, tokens: VideoTokens) -> VideoTokens:
    """Give the remaining tokens the last positions of the prompt: without gaps, and the tokens after it need not move.

    Attention depends only on differences between positions, so this is equivalent to counting from 0.
    """
    return replace(left, companions=tuple(part[:, tokens.length - left.length :] for part in tokens.companions))


def _as_relevance(relevance: Any) -> Any:
    """The relevance with arrays as tensors; of lists and tuples, too."""
    if relevance is None or callable(relevance):
        return relevance
    if isinstance(relevance, list | tuple):
        return [one if one is None or callable(one) else _as_scores(one) for one in relevance]
    return _as_scores(relevance)


def _as_scores(scores: Any) -> Tensor:
    """Scores [F] as a tensor.

    Raises:
        TypeError, ValueError: something else than finite real numbers [F].
    """
    if isinstance(scores, np.ndarray) and scores.dtype.kind in "fiub":
        scores = torch.from_numpy(scores.copy())
    if not isinstance(scores, Tensor):
        got = f"an array of {scores.dtype}" if isinstance(scores, np.ndarray) else type(scores).__name__
        raise TypeError(f"KVTP: relevance must be a tensor, an array, a list of these, a function or None, got {got}")
    if scores.ndim != 1 or scores.dtype == torch.bool or scores.is_complex():
        raise ValueError(f"KVTP: relevance must be real numbers [F], got {list(scores.shape)} of {scores.dtype}")
    if not bool(scores.isfinite().all()):
        raise ValueError(f"KVTP: relevance must be finite, got {scores[~scores.isfinite()][0].item()}")
    return scores
