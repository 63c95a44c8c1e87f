"""Kernels for compressing the token sequences of transformers. Needs torch and triton, nothing else.

Each op validates its arguments, then runs a Triton kernel on CUDA and ROCm tensors and plain PyTorch elsewhere.
With TRITON_INTERPRET=1 set before the import, CPU tensors run the Triton kernels in Triton's interpreter.
"""

from .cosine import linked_cosine_similarity, strided_cosine_similarity
from .reference import NO_LINK

__all__ = [
    "NO_LINK",
    "linked_cosine_similarity",
    "strided_cosine_similarity",
]
