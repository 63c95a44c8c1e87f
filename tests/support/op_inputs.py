"""Arguments of the ops for the fuzzer: drawn as a few numbers, which its report repeats, and made from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from hypothesis import strategies as st
from testing_helpers import DTYPES, make_strided
from torch import Tensor

LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "strided": make_strided,
    "backwards": lambda x: x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))),
    "repeated": lambda x: x[-1:].expand_as(x),  # a stride of 0
}
SPECIAL = (0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1.0, -1.0, 3e38, 1e-40, -2.0)
HUGE = (2**31 - 1, 2**31, 306_783_379, 2**40, 2**63 - 1, 2**63, 10**30)

rows = st.integers(0, 12)  # where each takes the interpreter a program
lengths = st.one_of(st.integers(0, 40), st.sampled_from([127, 128, 129, 1025, 2049]))
widths = st.one_of(st.integers(0, 40), st.sampled_from([64, 129, 300]))
dtypes = st.sampled_from(DTYPES)
kinds = st.sampled_from(["smooth", "ties", "special", "large", "small", "zero"])
layouts = st.sampled_from(list(LAYOUTS))
capacities = st.one_of(st.none(), st.integers(0, 60))


@dataclass
class Inputs:
    """Tensors [B, N, ...], or packed [N, ...], that a seed determines."""

    batch: int
    length: int
    packed: bool
    layout: str
    seed: int
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,) if self.packed else (self.batch, self.length)

    @cached_property
    def options(self) -> dict[str, Tensor]:
        """cu_seqlens of 0 to 5 sequences, some of them empty; now and then padding stands before the first."""
        if not self.packed:
            return {}
        ends = self.integers(0, self.length + 1, int(self.integers(1, 6, 1)))
        ends[-1] = self.length
        first = torch.zeros(1, dtype=torch.int64) if self.seed % 3 else ends[:1]
        return {"cu_seqlens": torch.cat([first, ends]).sort().values.to(self.device, self.index)}

    @property
    def index(self) -> torch.dtype:
        return torch.int32 if self.seed % 2 else torch.int64

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.random)

    def floats(self, *shape: int, dtype: torch.dtype, kind: str = "smooth") -> Tensor:
        """Of the given shape; Triton's interpreter misreads subnormal bf16, so there are none."""
        x = torch.randn(shape, generator=self.random)
        if kind == "ties":
            x = (x * 2).round() / 2
        elif kind == "special":
            chosen = torch.tensor(SPECIAL)[self.integers(0, len(SPECIAL), *shape)]
            x = torch.where(torch.rand(shape, generator=self.random) < 0.2, chosen, x)
        elif kind in ("large", "small", "zero"):
            x = x * {"large": torch.finfo(dtype).max / 8, "small": torch.finfo(dtype).tiny * 8, "zero": 0.0}[kind]
        x = x.to(dtype)
        if dtype == torch.bfloat16:
            x = torch.where(x.abs() < torch.finfo(dtype).tiny, 0, x)
        return self.arranged(x)

    def indices(self, low: int, high: int, *shape: int) -> Tensor:
        return self.arranged(self.integers(low, high, *shape).to(self.index))

    def arranged(self, x: Tensor) -> Tensor:
        return LAYOUTS[self.layout](x.to(self.device)) if x.ndim else x.to(self.device)

    def links(self, outside: bool) -> Tensor:
        """The partner of each token: any token or none; or, where that is allowed, no token. Padding has none."""
        links = self.integers(-1, self.length, *self.shape)
        if self.index == torch.int64 and outside:
            links = torch.where(self.integers(0, 9, *self.shape) == 0, 2**40 * links, links)
        if outside:
            links = torch.where(self.integers(0, 9, *self.shape) == 0, links + 5, links)
        if self.packed and (padding := int(self.options["cu_seqlens"][0])):
            links[:padding] = -1
            return links.to(self.device, self.index)  # not one link for all
        return self.arranged(links.to(self.index))

    def counts(self, most: int) -> Tensor:
        """One number for each sample or sequence, now and then far outside 0..most."""
        count = len(self.options["cu_seqlens"]) - 1 if self.packed else self.batch
        odd = torch.tensor([-(2**31), -1, 2**31 - 1])[self.integers(0, 3, count)]
        plain = self.integers(0, most + 2, count)
        return self.arranged(torch.where(self.integers(0, 5, count) == 0, odd, plain).to(self.index))
