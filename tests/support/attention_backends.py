"""The attention back ends that a model may be set to, so that all of them run on a CPU.

- flex_attention runs without being compiled
- flash_attention_2 goes through the masks, unpadding and packing of transformers; only the two functions of flash-attn
  that it ends in are replaced, by plain PyTorch
- "registered" and "registered_without_mask" are functions of a user; the second one asks transformers for no mask
"""

import warnings
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import transformers.modeling_flash_attention_utils as flash_utils
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

BACKENDS = ["sdpa", "eager", "flex_attention", "flash_attention_2", "registered", "registered_without_mask"]


class FlashAttention:
    """Stands in for the flash-attn package; keeps what it was called with.

    Attributes:
        calls: "dense" or "varlen" of each call, with the lengths of its sequences: of the queries, of the keys.
    """

    def __init__(self):
        self.calls = []

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        """q [B, Nq, H, d], k and v [B, Nk, Hkv, d]; a causal mask is aligned to the bottom right."""
        self.calls.append(("dense", [q.shape[1]], [k.shape[1]]))
        return _attend(q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        """q [total, H, d], k and v [total, Hkv, d]: sequences one after the other, bounded by cu_seqlens."""
        lengths = [cu_seqlens.diff().tolist() for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)]
        assert [max(lengths[0]), max(lengths[1])] == [int(max_seqlen_q), int(max_seqlen_k)]
        self.calls.append(("varlen", *lengths))
        parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
        return torch.cat([_attend(q[None], k[None], v[None], softmax_scale, causal)[0] for q, k, v in parts])

    @contextmanager
    def installed(self):
        """transformers finds this package inside the block."""
        utils = flash_utils
        unpadding = (utils._pad_input, utils._unpad_input)
        functions = (self.flash_attn_func, self.flash_attn_varlen_func)
        if hasattr(utils, "_flash_with_kvcache_fn"):  # from 5.x on
            functions += (None,)
        with mock.patch.multiple(utils, _lazy_imports=lambda *_, **__: functions + unpadding):
            _forget_flash_functions()
            yield self
        _forget_flash_functions()


def _forget_flash_functions():
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_pad_fn", "_unpad_fn"):
        if hasattr(flash_utils, name):
            setattr(flash_utils, name, None)


def _attend(q, k, v, scale, causal):
    """[B, Nq, H, d], [B, Nk, Hkv, d] -> [B, Nq, H, d]."""
    groups = q.shape[2] // k.shape[2]
    k, v = (part.repeat_interleave(groups, 2) for part in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        rows, columns = scores.shape[-2:]
        later = torch.ones(rows, columns, dtype=torch.bool, device=q.device).triu(columns - rows + 1)
        scores = scores.masked_fill(later, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def registered(module, query, key, value, mask, scaling=None, **kwargs):
    """A user's attention function whose mask is boolean, True where a key is seen."""
    out = _attend_masked(query, key, value, mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def registered_without_mask(module, query, key, value, mask, scaling=None, **kwargs):
    """A user's attention function that knows how to be causal."""
    assert mask is None
    return _attend(*(part.transpose(1, 2) for part in (query, key, value)), scaling, True), None


def _attend_masked(q, k, v, mask, scale):
    groups = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


def registered_mask(*args, allow_is_causal_skip=True, **kwargs):
    """A user's mask function: always a mask."""
    return sdpa_mask(*args, allow_is_causal_skip=False, **kwargs)


@contextmanager
def attention(model, backend):
    """The decoder's layers attend with this back end inside the block; yields the FlashAttention where it is that."""
    config, flash = model.get_decoder().config, None
    with ExitStack() as stack:
        if backend == "flash_attention_2":
            flash = stack.enter_context(FlashAttention().installed())
        elif backend == "flex_attention":
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            warnings.filterwarnings("ignore", "_compile flag on create_block_mask")
        elif backend.startswith("registered"):
            AttentionInterface.register(backend, globals()[backend])
            stack.callback(AttentionInterface._global_mapping.pop, backend)
            if backend == "registered":
                AttentionMaskInterface.register(backend, registered_mask)
                stack.callback(AttentionMaskInterface._global_mapping.pop, backend)
        stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        config._attn_implementation = backend
        yield flash
