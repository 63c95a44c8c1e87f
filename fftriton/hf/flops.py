"""Multiply-accumulates of a prefill, from the tokens in each layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from .sizes import channels

if TYPE_CHECKING:
    from .report import Report, SampleReport


def prefill_flops(
    config: Any, rows: Sequence[int], attended: Sequence[int], sized: Collection[int] = (), *, causal: bool = False
) -> float:
    """Multiply-accumulates of the decoder's layers in one prefill; each counts once.

    The papers call this count FLOPs; in the strict sense a multiply-accumulate is two floating point operations.
    Equation 5 of FrameFusion sums 4 n d^2 + 2 n^2 d and the products of the feed-forward block over the layers, for n
    tokens of width d in each. With the sizes of the decoder, n_l rows, and at most a_l tokens that a row attends to:

        sum over layers l of  n_l (2 d q + 2 d k) + 2 n_l a_l q + 3 n_(l+1) d f

    Here q = query heads * head size, k = key heads * head size, and f is the width of the gated feed-forward block: in
    a mixture of experts, of those that a token goes through, whose choice is not counted.
    This block processes the rows that are left after the layer's attention, which are those of the next layer; in the
    last layer they are its own. In the products with scores, the heads of layers that count sizes have the channels
    that carry them, too. For q = k = d the formula is the paper's. As in the paper, causal attention counts in
    full, unless `causal` is True: then a row counts with the rows up to its own, about half of them, which is what
    kernels compute. Text counts like video. The vision encoder and the head of the language model are not counted,
    because no method changes them.

    Args:
        config: text configuration of a Qwen2-style model.
        rows: for each layer, the rows in its attention.
        attended: for each layer, the maximum number of tokens that a row attends to: the number of rows, unless there
            is a window.
        sized: the layers whose attention counts sizes.
        causal: count only the scores that a causal mask leaves.

    Returns:
        The number of multiply-accumulates.

    Source:
        FrameFusion, arXiv:2501.01986, after FastV, arXiv:2403.06764.
    """
    hidden = config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    total = 0.0
    for layer, (n, a, n_behind) in enumerate(zip(rows, attended, [*rows[1:], rows[-1]], strict=True)):
        pairs = n * a - a * (a - 1) // 2 if causal else n * a
        scored = config.num_attention_heads * channels(head) if layer in sized else queries
        total += (
            2 * n * hidden * (queries + keys)
            + 2 * pairs * scored
            + 3 * n_behind * hidden * _feed_forward(config, layer)
        )
    return total


def _feed_forward(config: Any, layer: int) -> int:
    """The width of the feed-forward block that a token goes through."""
    experts, width = (getattr(config, name, None) for name in ("num_experts_per_tok", "moe_intermediate_size"))
    step = getattr(config, "decoder_sparse_step", None) or 1
    is_dense = layer in (getattr(config, "mlp_only_layers", None) or ()) or (layer + 1) % step
    if not experts or not width or is_dense:
        return config.intermediate_size
    return experts * width + (getattr(config, "shared_expert_intermediate_size", None) or 0)


def reduced_flops(config: Any, report: Report | SampleReport, *, causal: bool = False) -> float:
    """Multiply-accumulates of the prefill that a report is about, and of the predictors that it needed.

    What a method computes from the tokens or the scores of the decoder (similarities, distances, the column sums by
    which it prunes) is not counted.

    Args:
        config: as for `prefill_flops`.
        report: of one sample.
        causal: as for `prefill_flops`.
    """
    layers = report.rows_per_layer, report.tokens_per_layer, report.sized_layers
    return prefill_flops(config, *layers, causal=causal) + report.relevance_macs
