"""The calls that put a method to work on a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..layouts.families import LayoutRule
from ..layouts.layout import VideoLayout
from ..methods import FrameFusion, Method
from .reduction import Reduction


def reduce(
    model: Any,
    method: Method,
    layout: Sequence[VideoLayout] | LayoutRule | None = None,
    *,
    verify: bool = False,
) -> Reduction:
    """Run every forward of `model` inside a `with` block reduced.

        with fftriton.reduce(model, fftriton.FrameFusion(budget=0.3)) as reduction:
            model.generate(**inputs)
        reduction.report.budget_achieved

    On exit, after exceptions too, the model is exactly as before. A KV cache that was filled inside can only be used
    inside, by any reduction. After a forward that failed it is as it was before that forward (after a
    KeyboardInterrupt, as soon as it is used again).

    The model may be wrapped (PEFT, DistributedDataParallel, a module of your own), and calls may go to a module inside
    it. If the block ends and nothing was reduced although the model ran on images, videos or embeddings, there is one
    warning. Several threads may use the model at once, each with caches of its own; a compiled model is for one thread
    at a time. Hooks of your own see and change what they would without a reduction, for the rows that are left.

    Each sample of a batch comes out as it does alone, padded on either side; one without a video is left alone. Behind
    a reduced prompt there may be more turns, with videos or without. A chunk of a prompt is a prompt of its own, with
    its own share of the budget and its own queries; no chunk may cut a video.

    A forward gives back the last hidden states and the logits at full length, zeros for tokens that left. The other
    `hidden_states` and the `attentions` have the rows of their layer, those of a batch on the right behind padding. A
    label of a token that left, or that such a token was to predict, counts as -100. An answer to be scored has no say
    in what stays: `logits_to_keep` = n + 1 says that the last n tokens follow the prompt, and so do labels that are
    -100 before the answer.

    Args:
        model: a Hugging Face causal or conditional generation model with a Qwen2-style decoder.
        method: what to keep: FrameFusion, FastV, KeepAll or a Method of your own.
        layout: where the videos stand in the prompt. None finds them in the families that transformers ships; otherwise
            a list of VideoLayout (fftriton.layouts makes it for some more), whose positions count from the first token
            of the sequence, turns before it included; or a callable that gets the model and the arguments of its
            forward, or of `generate` once for the whole prompt, by name and returns such a list, counted from the first
            token that is new; it is not asked for single tokens.
        verify: recompute every op by its formula and look at all that a method leaves of the text and of positions, to
            chase a wrong answer. This takes many times the time and memory.

    Raises:
        TypeError: an unsupported model, method or layout; a decoder whose layers are not norm, attention, residual,
            norm, feed-forward, residual (if its weights are not there yet, on the first prompt).
        ValueError: a method that cannot work at this depth.
        RuntimeError: a transformers release in which something has another name than fftriton knows; on entering, if
            the model is being reduced already.
        While it runs: ValueError for a layout that does not fit the prompt, a chunk that cuts a video, a mask that
        hides one, gradient checkpointing, a paged cache, and what cannot follow a reduced prompt. RuntimeError for a
        method that returns what cannot be, a call in the midst of another, a copy of the model, and a KV cache that the
        decoder does not fill. With `verify`, fftriton_kernels.VerificationError.
    """
    return Reduction(model, method, layout, verify)


def apply(model: Any, method: Method, layout: Sequence[VideoLayout] | LayoutRule | None = None) -> Reduction:
    """As `reduce`, from now until `.remove()` of what it returns."""
    return Reduction(model, method, layout).install()


def apply_framefusion(
    model: Any,
    cost: float = 0.3,
    similarity_lower_bound: float = 0.6,
    ratio_lower_bound: float = 0.1,
    layout: Sequence[VideoLayout] | LayoutRule | None = None,
) -> Reduction:
    """FrameFusion with the parameters and the importance rule of the authors' code, until `.remove()`.

    Args:
        model: as for `reduce`.
        cost: FrameFusion's budget.
        similarity_lower_bound: its similarity_threshold.
        ratio_lower_bound: its min_merge_ratio.
        layout: as for `reduce`.

    Source:
        FrameFusion, ICCV 2025, arXiv:2501.01986, and its published code: importance is the attention of the last
        4 queries for the Qwen2-VL models and of the last one elsewhere.
    """
    queries = 4 if str(getattr(model.config, "model_type", "")).endswith("_vl") else 1
    method = FrameFusion(cost, similarity_lower_bound, ratio_lower_bound, importance_queries=queries)
    return apply(model, method, layout)
