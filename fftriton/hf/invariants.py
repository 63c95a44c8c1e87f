"""What must hold while a method is at work, whether a transformers release, a decoder or a method would break it.

What the host knows is checked at once. What a device has to compute is collected there and read once, before the
decoder returns: so no wrong answer leaves the model, and there is no waiting for a GPU in between.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import Method, VideoTokens, wrong_kind
from .cache import ReducedLayer

STRUCTURE = (
    "must be built as norm, attention, residual, norm, feed-forward, residual: its output must be the input of "
    "post_attention_layernorm plus the output of mlp"
)
_ROUNDING = 8  # by how many roundings a layer's own sum may be off
_COLUMNS = 16  # of the hidden states that are checked for NaN


class Invariants:
    """The rules of one forward that a device has to confirm."""

    def __init__(self) -> None:
        self._rules: list[str] = []
        self._holds: list[Tensor | Callable[[], Tensor]] = []
        self._layers: list[tuple[int, Tensor, Tensor]] = []

    def expect(self, holds: Tensor | Callable[[], Tensor], rule: str) -> None:
        """Demand something.

        Args:
            holds: a bool, or what computes it from small tensors that stay as they are: only then when it is read,
                while the devices still have enough to do.
            rule: what the error says if it is False.
        """
        self._rules.append(rule)
        self._holds.append(holds)

    def expect_output(self, layer: int, output: Tensor, expected: Tensor) -> None:
        """Demand that a layer's last row [B, D] is the sum of its residual and the output of its feed-forward block."""
        self._layers.append((layer, output - expected, expected))  # copies, so that no layer's output is held

    def read(self) -> None:
        """Wait for the devices, once, and raise for the first rule that does not hold.

        Raises:
            TypeError: a decoder layer of another structure. RuntimeError: any other rule.
        """
        flags = [*self._right_outputs(), *(holds() if callable(holds) else holds for holds in self._holds)]
        if not flags:
            return
        held = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
        for (number, _, _), right in zip(self._layers, held, strict=False):
            if not right:
                raise TypeError(f"reduce: layer {number} of the decoder {STRUCTURE}")
        for rule, holds in zip(self._rules, held[len(self._layers) :], strict=True):
            if not holds:
                raise RuntimeError(rule)

    def _right_outputs(self) -> Sequence[Tensor]:
        """For each layer a bool: whether its output is that sum."""
        if not self._layers:
            return ()
        device = self._layers[-1][1].device
        off = torch.stack([off.to(device) for _, off, _ in self._layers]).abs()
        size = torch.stack([expected.to(device) for _, _, expected in self._layers]).abs()
        allowed = _ROUNDING * torch.finfo(off.dtype).eps * size.nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True)
        return ((off <= allowed) | off.isnan()).flatten(1).all(1).unbind()


def check_left(
    method: str, stage: str, layer: int, before: VideoTokens, after: Any, invariants: Invariants, thorough: bool
) -> VideoTokens:
    """Check what a method leaves of the tokens [1, N, ...] that it was given.

    Returns:
        The same tokens, with positions that are certain to be among those that were given.

    Raises:
        TypeError: something other than VideoTokens, or a field of the wrong kind. RuntimeError: impossible shapes,
            types or counts. All else is left to `invariants`.
    """

    def rule(text: str) -> str:
        return f"reduce: {method}, {stage} of layer {layer}: {text}"

    def demand(holds: bool, text: str) -> None:
        if not holds:
            raise RuntimeError(rule(text))

    if wrong := wrong_kind(after):
        raise TypeError(rule(wrong))
    demand(after.position.ndim == 2, f"position must be [1, rows], got {list(after.position.shape)}")
    rows = after.position.shape[-1]
    for name in ("hidden", "position", "patch", "companions", "additions"):
        old, new = (_listed(getattr(tokens, name)) for tokens in (before, after))
        demand(len(old) == len(new), f"{name} must be {len(old)} tensors, got {len(new)}")
        for was, now in zip(old, new, strict=True):
            shape = [1, rows, *was.shape[2:]]
            demand(
                list(now.shape) == shape and now.dtype == was.dtype and now.device == was.device,
                f"{name} must be {shape} of {was.dtype} on {was.device}, got {list(now.shape)} of {now.dtype} on "
                f"{now.device}",
            )
    demand(0 <= after.num_video <= rows, f"num_video must be from 0 to the {rows} rows left, got {after.num_video}")
    demand(rows <= before.length, f"must not leave more than the {before.length} rows that it was given, got {rows}")
    if after.sizes is not None:
        demand(
            after.sizes.shape == after.position.shape
            and after.sizes.dtype == torch.float32
            and after.sizes.device == after.position.device,
            f"sizes must be {list(after.position.shape)} of torch.float32 on {after.position.device}, got "
            f"{list(after.sizes.shape)} of {after.sizes.dtype} on {after.sizes.device}",
        )
        invariants.expect(
            (after.sizes > 0).all() & after.sizes.isfinite().all(), rule("sizes must be above 0 and finite")
        )
    text = before.length - before.num_video
    demand(
        rows - after.num_video == text,
        f"must keep the {text} rows that are no video, but says that of the {rows} rows that it leaves "
        f"{after.num_video} are video",
    )
    given, left = before.position[0].contiguous(), after.position[0].clone()  # the method may use its tensor again
    origin = torch.searchsorted(given, left).clamp_(max=before.length - 1)
    position, patch, left_patch, num_video = given[origin], before.patch[0], after.patch[0].clone(), after.num_video
    invariants.expect(lambda: (left.diff() > 0).all(), rule("position must ascend, and hold no row twice"))
    invariants.expect(lambda: (position == left).all(), rule("position must hold places of rows that it was given"))
    invariants.expect(
        lambda: (patch[origin] == left_patch).all(), rule("patch must stay as it was for every row that is left")
    )
    invariants.expect(
        lambda: (left_patch >= 0).sum() == num_video,
        rule(f"num_video must be the number of video rows that are left, got {num_video}"),
    )
    step = 1 if thorough else max(1, before.hidden.shape[-1] // _COLUMNS)
    nan_before, nan_after = (tokens.hidden[..., ::step].isnan().any() for tokens in (before, after))
    invariants.expect(lambda: ~nan_after | nan_before, rule("hidden must not become NaN"))
    if thorough:
        same = (before.hidden[0, origin] == after.hidden[0]) | before.hidden[0, origin].isnan()
        invariants.expect((same.all(-1) | (after.patch[0] >= 0)).all(), rule("hidden must stay as it was in text rows"))
    return replace(after, position=position[None])


def versions(tokens: VideoTokens) -> list[int] | None:
    """How often each tensor has been written to, or None in inference mode, which does not count."""
    sizes = () if tokens.sizes is None else (tokens.sizes,)
    parts = [tokens.hidden, tokens.position, tokens.patch, *tokens.companions, *tokens.additions, *sizes]
    return None if any(part.is_inference() for part in parts) else [part._version for part in parts]


def check_lengths(layers: Sequence[ReducedLayer]) -> int:
    """The length of the sequence, which all layers of a KV cache report alike.

    Raises:
        RuntimeError: they differ.
    """
    lengths = [layer.get_seq_length() for layer in layers]
    if lengths and min(lengths) != max(lengths):
        raise RuntimeError(
            f"reduce: the layers of the KV cache must stand for one sequence, but their lengths are {lengths}: a "
            "forward failed in the middle and could not be taken back; reset the cache, or take a new one"
        )
    return lengths[0] if lengths else 0


def check_growth(layers: Sequence[ReducedLayer | None], expected: int, method: Method) -> None:
    """Raise a RuntimeError unless each layer of the KV cache represents `expected` tokens."""
    for number, layer in enumerate(layers):
        if layer is not None and layer.get_seq_length() != expected:
            raise RuntimeError(
                f"reduce: {method}: after the forward, layer {number} of the KV cache must stand for {expected} "
                f"tokens, but stands for {layer.get_seq_length()}: the decoder does not write to the cache that it got"
            )


_SHORTENED = {"hidden_states", "attention_mask", "position_ids", "position_embeddings"}


def check_no_rows(
    layer: nn.Module, index: int, args: tuple, kwargs: Mapping[str, Any], batch: int, length: int
) -> None:
    """Raise a TypeError if a layer uses something else for each of `length` tokens, some of which have left.

    What it has no parameter for, it may be given and does not use.
    """
    names = _parameters(type(layer))  # type: ignore[arg-type]
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if name not in names:
            continue
        if isinstance(value, Tensor) and name not in _SHORTENED and value.shape[:2] in ((1, length), (batch, length)):
            raise TypeError(
                f"reduce: layer {index} of the decoder must get only hidden states, masks and positions for each "
                f"token, but gets {name!r} of shape {list(value.shape)}"
            )


@cache
def _parameters(kind: type) -> tuple[str, ...]:
    """What a layer's forward has parameters for, in their order; to ask each time would take longer than the check."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]


def _listed(part: Any) -> tuple[Tensor, ...]:
    return part if isinstance(part, tuple) else (part,)
