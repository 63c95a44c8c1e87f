"""The calls that put a method to work on a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..layout import VideoLayout
from ..methods import FrameFusion, Method
from .families import LayoutRule
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

    On exit, after exceptions too, the model is exactly as before. A KV cache that was filled inside can be used inside
    only, by any reduction; after a forward that failed it is as it was before that forward, once the next one begins.

    Each sample of a batch comes out as it does alone, padded on either side; one without a video is left alone. Behind
    a reduced prompt there may be more turns, with videos or without. A chunk of a prompt is a prompt of its own, with
    its own share of the budget and its own queries; no chunk may cut a video.

    A forward gives back the last hidden states and the logits at full length, zeros for tokens that left. The other
    `hidden_states` and the `attentions` have the rows of their layer, those of a batch on the right behind padding. A
    label of a token that left, or that such a token was to predict, counts as -100. `logits_to_keep` = n + 1 says that
    the last n tokens follow the prompt (an answer to be scored, candidates): they have no say in what stays.

    Args:
        model: a Hugging Face causal or conditional generation model with a Qwen2-style decoder.
        method: what to keep: FrameFusion, FastV, KeepAll or a Method of your own.
        layout: where the videos stand in the prompt. None finds them in the families that transformers ships; otherwise
            a list of VideoLayout (fftriton.layouts makes it for some more), whose positions count from the first token
            of the sequence, turns before it included; or a callable that gets the model and the arguments of its
            forward, or of `generate` once for the whole prompt, by name and returns such a list, counted from the first
            token that is new; it is not asked for single tokens.

    Raises:
        TypeError: an unsupported model, method or layout. ValueError: a method that cannot work at this depth.
        RuntimeError: on entering, when the model is being reduced already.
        While it runs: ValueError for a layout that does not fit the prompt, a chunk that cuts a video, a mask that
        hides one, gradient checkpointing, and what cannot follow a reduced prompt.
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
