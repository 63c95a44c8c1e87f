"""A KV cache layer that holds fewer tokens than it reports.

`get_seq_length()` stays the length of the whole sequence, so that generate, position ids, a second turn and everything
else that counts tokens see what they would without a reduction. Only the keys and values of kept tokens are there; in a
batch, they stand at the right end of their rows, after padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .compat import KNOWN_LAYERS, RecurrentLayer, UnknownReleaseError
from .window import Windows

_NOT_INSIDE = (
    "the KV cache holds a reduced prompt, which only a model that is being reduced can read: use it inside "
    "`with fftriton.reduce(...)`"
)


class Permit:
    """Says whether reduced caches can be used now. Copies of a cache share it; a pickle has none.

    Attributes:
        active: whether a model is being reduced.
        compiled: whether its compiled code runs, which takes no snapshot itself.
    """

    def __init__(self) -> None:
        self.active = self.compiled = False

    def __deepcopy__(self, memo: dict) -> Permit:
        return self

    def __reduce__(self) -> tuple:
        return Permit, ()


class ReducedLayer(DynamicLayer):
    """A DynamicLayer that also counts the tokens that it does not hold.

    Attributes:
        reduced: whether the rows are anything but all of the sequence's tokens in order.
        missing: how many more tokens the sequence has than there are rows.
        fixed: the length of the sequence below which it cannot be cropped.
        valid: [B, rows] bool, False for padding; None: no padding, or nothing known while `reduced` is False.
        log_sizes: [B, rows] fp32, the logarithm of how many tokens each row stands for; None: each for itself.
        broken: whether a forward failed in the middle and could not be taken back.
        permit: a reduced layer can be used while it is active.
        window: tokens outside of it are forgotten as soon as no later token can attend to them; None: nothing is.
        snapshot: that of the forward that is writing here, or was when it was interrupted; None between forwards.
        beside_recurrent: whether other layers of the cache are recurrent.
    """

    keys: Any
    values: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forget()
        self.permit = Permit()
        self.snapshot: Snapshot | None = None
        self.beside_recurrent = False

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**self.__dict__, "snapshot": None}  # no forward writes to a copy

    def _forget(self) -> None:
        self.reduced, self.missing, self.fixed, self.broken = False, 0, 0, False
        self.valid: Tensor | None = None
        self.log_sizes: Tensor | None = None
        self.window: Windows | None = None

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> ReducedLayer:
        """A ReducedLayer with what `layer` holds."""
        reduced = cls()
        reduced.__dict__.update(layer.__dict__)
        return reduced

    @property
    def rows(self) -> int:
        """Number of tokens that are held here."""
        return super().get_seq_length()

    @property
    def is_plain(self) -> bool:
        """Whether no row is padding, and each stands for itself."""
        return self.valid is None and self.log_sizes is None

    def get_seq_length(self, *args: Any) -> int:
        self._settle()
        return super().get_seq_length() + self.missing

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        if (self.reduced or self.fixed) and not self.permit.active:  # recurrent layers change before an update refuses
            raise RuntimeError(_NOT_INSIDE)
        return super().get_mask_sizes(*args, **kwargs)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if self.broken:
            raise RuntimeError("the KV cache is from a forward that failed in the middle: reset it, or take a new one")
        is_called = self.permit.active and (self.permit.compiled or self.snapshot is not None)
        if (self.reduced or self.fixed) and not is_called:  # by another model, say
            self.broken = self.beside_recurrent
            raise RuntimeError(_NOT_INSIDE)
        keys, values = super().update(*args, **kwargs)
        if self.window is not None:
            self._forget_unseen(self.window)
        return keys, values

    def _forget_unseen(self, window: Windows) -> None:
        """Keep only what the next token may attend to. This forward itself has got everything."""
        kept = window.kept(self.valid, self.rows)
        if kept is None:
            return
        index, self.valid = kept
        if self.log_sizes is not None:
            self.log_sizes = self.log_sizes.gather(1, index.to(self.log_sizes.device))
        self.missing += self.rows - index.shape[1]
        index = index.to(self.keys.device)[:, None, :, None]
        self.keys = self.keys.gather(2, index.expand(-1, self.keys.shape[1], -1, self.keys.shape[3]))
        self.values = self.values.gather(2, index.expand(-1, self.values.shape[1], -1, self.values.shape[3]))
        self.fixed = self.get_seq_length()

    def crop(self, length: int) -> None:
        """Remove -length tokens from the end or, if length is positive, all beyond it. Raises a ValueError if that
        would remove part of what has been reduced."""
        self.recover()
        logical = self.get_seq_length()
        end = logical + length if length <= 0 else min(length, logical)
        if end == logical:
            return
        if end < self.fixed and self.window is not None:
            raise ValueError(
                f"crop: length must be at least {self.fixed}, the whole sequence, for a method with a window "
                f"(StreamingLLM), which forgets what it has left behind; got {end}. Prompt lookup and assistants "
                "cannot take back their candidates then"
            )
        if end < self.fixed:
            raise ValueError(f"crop: length must be at least {self.fixed}, the end of the reduced video, got {end}")
        rows = self.rows - (logical - end)
        self.keys = self.keys[..., :rows, :]
        self.values = self.values[..., :rows, :]
        self.valid = None if self.valid is None else self.valid[:, :rows]
        self.log_sizes = None if self.log_sizes is None else self.log_sizes[:, :rows]

    def recover(self) -> None:
        """Take back a forward that was interrupted in the middle."""
        if self.snapshot is not None:
            self.snapshot.restore()

    def _settle(self) -> None:
        """The same, unless the forward is still on its way, as it is in compiled code."""
        if self.snapshot is not None and not self.permit.compiled and not self.snapshot.is_running():
            self.snapshot.restore()

    def reset(self) -> None:
        self.recover()
        self.keys = self.values = None  # as in a new layer
        self.is_initialized = False
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.recover()
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.recover()
        super().batch_repeat_interleave(repeats)
        sinks = None if self.window is None else self.window.sinks
        known = next((part for part in (self.valid, self.log_sizes, sinks) if part is not None), None)
        if known is not None:
            self._select(torch.arange(len(known)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.recover()
        super().batch_select_indices(indices)
        self._select(indices)

    def _select(self, samples: Tensor) -> None:
        if self.valid is not None:
            self.valid = self.valid[samples.to(self.valid.device)]
        if self.log_sizes is not None:
            self.log_sizes = self.log_sizes[samples.to(self.log_sizes.device)]
        if self.window is not None:
            self.window = self.window[samples]


class Snapshot:
    """What a cache held before a forward, so that a forward that fails can be taken back.

    It holds keys and values only of layers that forget some. The layers refer to it until the forward has ended, with
    success or without. What recurrent layers held, and layers that have only now begun to forget, cannot be taken back:
    such a cache is emptied if it was empty before; otherwise it cannot be used until it is reset.

    Args:
        cache: a DynamicCache, or None.
        is_running: whether the forward is still on its way.
    """

    def __init__(self, cache: Any, is_running: Callable[[], bool]) -> None:
        layers = [] if cache is None else cache.layers
        for layer in layers:
            if isinstance(layer, ReducedLayer):
                layer.recover()
        self._states = [(layer, layer.rows, _notes(layer)) for layer in layers if isinstance(layer, ReducedLayer)]
        for layer, *_ in self._states:
            layer.snapshot = self
        self._was_empty = all(rows == 0 for _, rows, _ in self._states)
        self._recurrent = [
            (layer, _without_states(layer) if self._was_empty else None)
            for layer in layers
            if not isinstance(layer, ReducedLayer)
        ]
        self.is_running, self._open = is_running, True

    def release(self) -> None:
        """The forward went through."""
        self._open = False
        for layer, *_ in self._states:
            layer.snapshot = None

    def restore(self) -> None:
        """Take out of each layer what it has received since. Only once: later the cache may have been used again."""
        if not self._open:
            return
        self.release()
        forgotten = any(layer.window is not None and notes["window"] is None for layer, _, notes in self._states)
        broken = not self._was_empty and (forgotten or bool(self._recurrent))
        for layer, rows, notes in self._states:
            if rows == 0:
                layer.reset()
            elif layer.rows > rows:
                layer.keys, layer.values = layer.keys[..., :rows, :], layer.values[..., :rows, :]
            layer.__dict__.update(notes, broken=broken)
        for recurrent, before in self._recurrent:
            if before is None:
                recurrent.reset()
            else:  # a reset keeps the size of the batch
                recurrent.__dict__.clear()
                recurrent.__dict__.update(before)


def _notes(layer: ReducedLayer) -> dict[str, Any]:
    names = ("reduced", "missing", "fixed", "valid", "log_sizes", "window") + (
        ("keys", "values") if layer.window is not None else ()
    )
    return {name: getattr(layer, name) for name in names}


def _without_states(layer: Any) -> dict[str, Any] | None:
    """A copy of what a recurrent layer holds, or None if it has states."""
    notes = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}
    values = [part for value in notes.values() for part in (value.values() if isinstance(value, dict) else [value])]
    return None if any(isinstance(part, Tensor) for part in values) else notes


def check_cache(cache: Any) -> None:
    """Raise an UnknownReleaseError for a plain DynamicCache with layers of an unknown class."""
    for number, layer in enumerate(getattr(cache, "layers", ()) if type(cache) is DynamicCache else ()):
        of_one_model = type(layer).__module__.startswith("transformers.models.")
        if type(layer) is not ReducedLayer and type(layer) not in KNOWN_LAYERS and not of_one_model:
            raise UnknownReleaseError(
                f"layer {number} of a DynamicCache must be a DynamicLayer, but is a {type(layer).__name__}"
            )


def prepare(cache: Any, num_layers: int, permit: Permit) -> list[ReducedLayer | None] | None:
    """Make every attention layer of a DynamicCache a ReducedLayer. Returns None, and changes nothing, if that is not
    possible.

    Recurrent states have no rows: they stay as they are, and are None in what is returned.
    """
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return None
    if any(type(layer) not in (DynamicLayer, ReducedLayer, RecurrentLayer) for layer in cache.layers):
        return None
    cache.layers = [ReducedLayer.adopt(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    cache.layers += [ReducedLayer() for _ in range(num_layers - len(cache.layers))]
    layers = [layer if isinstance(layer, ReducedLayer) else None for layer in cache.layers]
    is_recurrent = None in layers
    for layer in filter(None, layers):
        layer.permit, layer.beside_recurrent = permit, is_recurrent
    return layers
