"""What a prefill computes, from the tokens that each layer held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def prefill_flops(config: Any, rows: Sequence[int], attended: Sequence[int]) -> float:
    """Multiplications of the decoder's layers in one prefill.

    Equation 5 of FrameFusion sums 4 n d^2 + 2 n^2 d and the feed-forward block's products over the layers, n tokens of
    width d in each. Here with the sizes that the decoder has: of n_l rows, each attending to at most a_l tokens,

        sum over layers l of  n_l (2 d q + 2 d k) + 2 n_l a_l q + 3 n_(l+1) d f

    with q = query heads * head size, k = key heads * head size and f the width of the gated feed-forward block, which
    sees the rows that are left behind the layer's attention: those of the next layer. Its last layer's are its own. For
    q = k = d that is the paper's. Causal attention counts in full, as there; text counts as video does. The vision
    encoder and the language model's head are left out: no method changes them.

    Args:
        config: the text configuration of a Qwen2-style model.
        rows: for each layer, the rows in its attention.
        attended: for each layer, the most tokens that a row attends to: as many as there are rows, unless there is a
            window.

    Returns:
        The number of multiplications, each followed by an addition.

    Source:
        FrameFusion, arXiv:2501.01986, after FastV, arXiv:2403.06764.
    """
    hidden, feed_forward = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    total = 0.0
    for n, a, n_behind in zip(rows, attended, [*rows[1:], rows[-1]], strict=True):
        total += 2 * n * hidden * (queries + keys) + 2 * n * a * queries + 3 * n_behind * hidden * feed_forward
    return total
