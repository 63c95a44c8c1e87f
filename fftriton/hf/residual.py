"""The residual stream on its way through one layer that rows leave in its middle.

A layer binds its residual before its post_attention_layernorm, so rows cannot be taken out of it from outside. What the
layer itself adds to that residual is thrown away instead, and the sum over the rows that are kept is made here.
"""

from __future__ import annotations

from torch import Tensor

from .invariants import STRUCTURE, Invariants

_STAND_IN = 0.5  # what a layer adds to a residual that is thrown away; not 0, so that its sum can be checked


class ResidualStream:
    """What is pending between the hooks of one layer, and the hidden states that a caller asked for.

    For each layer, the calls come in the order in which they stand here.

    Args:
        invariants: gets the check that the layer's output is its residual plus the output of its mlp.
        collects_states: whether hidden states are asked for.

    Attributes:
        states: the input of the first layer and the output of each, or None if they are not asked for.
    """

    def __init__(self, invariants: Invariants, collects_states: bool) -> None:
        self._invariants = invariants
        self._fed: Tensor | None = None  # [B, D] the last row that this layer's post_attention_layernorm got
        self._sum: Tensor | None = None  # [B, D] what the layer is to return there
        self._kept: Tensor | None = None  # [B, M, D] rows kept, waiting for their feed-forward output
        self._output: Tensor | None = None  # [B, M, D] what the layer is to return
        self._left_inside = False
        self.states: list[Tensor] | None = [] if collects_states else None

    def reach_norm(self, hidden: Tensor) -> None:
        """Note the input [B, N, D] of post_attention_layernorm, from which no row has left yet."""
        self._fed = hidden[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Rows have left: `rows` [B, M, D] is what remains of the layer's residual."""
        self._kept = rows

    def add_feed_forward(self, added: Tensor) -> Tensor | None:
        """What the layer is to add to the residual that it holds, or None if that is `added` [B, M, D] itself."""
        assert self._fed is not None  # torch calls the norm's hook before
        if self._kept is None:
            self._sum, self._fed = self._fed + added[:, -1], None
            return None
        self._output, self._kept = self._kept + added, None
        stand_in = added.new_full((1,), _STAND_IN)
        self._sum, self._fed = self._fed + stand_in, None
        return stand_in

    @property
    def is_pending(self) -> bool:
        """Whether a layer's feed-forward block has run, and its output has not been made."""
        return self._sum is not None

    def leave_layer(self, index: int, given: Tensor, inside: bool = False) -> Tensor:
        """The layer's output [B, M, D], if it returned `given`.

        inside: whether this is called within the layer's own call, as gradient checkpointing needs it; the call that
            follows for the same layer then returns what it is given.

        Raises:
            TypeError: the layer's feed-forward block has not run since the last layer.
        """
        if self._left_inside:
            self._left_inside = False
            return given
        self._left_inside = inside
        if self._sum is None:
            raise TypeError(f"reduce: layer {index} of the decoder {STRUCTURE}")
        self._invariants.expect_output(index, given[:, -1], self._sum)
        self._sum = None
        hidden, self._output = given if self._output is None else self._output, None
        return hidden

    def note_state(self, hidden: Tensor) -> None:
        """Keep [B, M, D] hidden states, if they are asked for."""
        if self.states is not None:
            self.states.append(hidden)
