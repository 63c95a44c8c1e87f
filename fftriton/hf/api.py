"""The calls that put a method to work on a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..layouts.families import LayoutRule
from ..layouts.layout import VideoLayout
from ..methods import FrameFusion, Method
from .modules import check_wrapper, find_decoder, owner_of
from .reduction import Reduction
from .remote_code import find_follower


def reduce(
    model: Any,
    method: Method,
    layout: Sequence[VideoLayout] | LayoutRule | None = None,
    *,
    verify: bool = False,
    images: bool = False,
) -> Reduction:
    """Run every forward of `model` inside a `with` block reduced.

        with fftriton.reduce(model, fftriton.FrameFusion(budget=0.3)) as reduction:
            model.generate(**inputs)
        reduction.report.budget_achieved

    On exit, also after an exception, the model is exactly as before. A KV cache that was filled inside a block can only
    be used inside one, of any reduction. If a forward fails, its cache is restored (after a KeyboardInterrupt, as soon
    as the cache is used again).

    The model may be wrapped (PEFT, DistributedDataParallel, a module of your own), and a module inside it may be called
    directly. If nothing was reduced in a block although the model ran on images, videos or embeddings, one warning says
    so at its end. Several threads may use the model at once, each with its own caches; a compiled model can be used by
    one thread at a time. Your own hooks see and change what they would without a reduction, for the rows that are left.

    On a GPU, Triton compiles a kernel when it is first needed, which takes seconds inside that prompt's prefill. A
    server calls `fftriton_kernels.warm_up` once, before its first request; prompts of other lengths compile nothing.

    Each sample of a batch gives the same result as it does alone, padded on either side; a sample without a video is
    not changed. A reduced prompt may be followed by more turns, with videos or without. Each chunk of a prompt is
    treated as a prompt of its own, with its own share of the budget and its own queries; no chunk may cut a video.

    A forward returns the last hidden states and the logits at full length, with zeros for dropped tokens. The other
    `hidden_states` and the `attentions` have the rows of their layer; in a batch, these are on the right, after
    padding. The label of a dropped token, and one that a dropped token was to predict, counts as -100. An answer to be
    scored has no influence on what is kept: `logits_to_keep` = n + 1 marks the last n tokens as following the prompt,
    and so do labels that are -100 before the answer.

    With gradient checkpointing (`model.gradient_checkpointing_enable()`), the second run of a layer repeats what the
    first one kept and merged, also after the block. A method that changes rows otherwise is refused: one of
    your own, or KVTP with "tome" or "prumerge", which weigh them.

    Args:
        model: a Hugging Face causal or conditional generation model with a Qwen2-style decoder; or LLaVA-Video, NVILA,
            MiniCPM-V 2.6 or InternVL2.5 as remote code, called by its own forward, generate or chat.
        method: what to keep: FrameFusion, FastV, KeepAll or a Method of your own.
        layout: the positions of the videos in the prompt. With None, they are found automatically for the families in
            transformers and for these four. Otherwise a list of VideoLayout (fftriton.layouts makes it for some other
            models), whose positions count from the first token of the sequence, including earlier turns; or a callable
            that receives the model and the arguments by name, of its forward, or of `generate` once for the whole
            prompt. It returns such a list, counted from the first new token, and is not called for single tokens.
        verify: recompute every op by its formula, and check all text rows and positions that a method leaves, to track
            down a wrong answer. This takes many times the time and memory.
        images: reduce images, too: each one is a video of one frame, in the order of the prompt. Neighbouring images
            without a token between them count as one. Without it, a prompt with no video and four or more images of one
            size warns once that nothing is reduced.

    Raises:
        TypeError: an unsupported model, method or layout; a decoder whose layers are not norm, attention, residual,
            norm, feed-forward, residual (on the first prompt, if its weights are not loaded yet).
        ValueError: a method that cannot work at this depth; images with a layout, or for a model without image tokens.
        RuntimeError: a transformers release in which something that fftriton needs has another name; on entering, if
            the model is being reduced already.
        ValueError: while it runs, a layout that does not fit the prompt, a chunk that cuts a video, a mask that hides
            one, gradient checkpointing that cannot be repeated, a paged cache, and what cannot follow a reduced prompt.
        RuntimeError: while it runs, a method that returns something impossible, a call during another call, a copy of
            the model, and a KV cache that the decoder does not fill.
        fftriton_kernels.VerificationError: with `verify`, an op that differs from its formula.
    """
    return Reduction(model, method, layout, verify, images)


def apply(
    model: Any,
    method: Method,
    layout: Sequence[VideoLayout] | LayoutRule | None = None,
    *,
    verify: bool = False,
    images: bool = False,
) -> Reduction:
    """Like `reduce`, from now until `.remove()` is called on what it returns."""
    return reduce(model, method, layout, verify=verify, images=images).install()


def apply_framefusion(
    model: Any,
    cost: float = 0.3,
    similarity_lower_bound: float = 0.6,
    ratio_lower_bound: float = 0.1,
    layout: Sequence[VideoLayout] | LayoutRule | None = None,
) -> Reduction:
    """Apply FrameFusion with the parameters and the importance rule of the authors' code, until `.remove()`.

    Args:
        model: as for `reduce`.
        cost: FrameFusion's budget.
        similarity_lower_bound: its similarity_threshold.
        ratio_lower_bound: its min_merge_ratio.
        layout: as for `reduce`. With None, tokens between the frames of NVILA and MiniCPM-V count as patches and
            merge, which is what the authors' code does with them.

    Source:
        FrameFusion, ICCV 2025, arXiv:2501.01986, and its published code: importance is the attention of the last
        4 queries for the Qwen2-VL models and of the last one elsewhere.
    """
    root = getattr(model, "_orig_mod", model)
    check_wrapper(root)
    if layout is None:
        layout = find_follower(root, separators=True)
    config = getattr(owner_of(find_decoder(root, root), root), "config", None)
    queries = 4 if str(getattr(config, "model_type", "")).endswith("_vl") else 1
    method = FrameFusion(cost, similarity_lower_bound, ratio_lower_bound, importance_queries=queries)
    return apply(model, method, layout)
