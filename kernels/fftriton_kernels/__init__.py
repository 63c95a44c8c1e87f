"""Kernels for compressing the token sequences of transformers. Needs only torch and triton.

Each op validates its arguments, then runs a Triton kernel on CUDA and ROCm tensors and plain PyTorch elsewhere.
With TRITON_INTERPRET=1 set before the import, CPU tensors run the Triton kernels in Triton's interpreter.
"""

from ._self_test import OpCheck, implementation, self_test
from ._tiles import tune
from ._types import NO_LINK, Merged
from ._verify import VerificationError, verified
from ._warm_up import warm_up
from .attention import attention_column_sum
from .components import connected_components
from .cosine import linked_cosine_similarity, strided_cosine_similarity
from .merge import merge_mean, merge_roots
from .select import gather_rows, segmented_topk_keep, topk_keep

__version__ = "0.1.0"

__all__ = [
    "NO_LINK",
    "Merged",
    "OpCheck",
    "VerificationError",
    "attention_column_sum",
    "connected_components",
    "gather_rows",
    "implementation",
    "linked_cosine_similarity",
    "merge_mean",
    "merge_roots",
    "segmented_topk_keep",
    "self_test",
    "strided_cosine_similarity",
    "topk_keep",
    "tune",
    "verified",
    "warm_up",
]
