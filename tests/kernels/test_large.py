"""Rows more than 2^31 elements apart, where a 32-bit offset would wrap around. On a CPU few pages take memory."""

import pytest
import torch
from testing_helpers import far_rows

from fftriton_kernels import (
    attention_column_sum,
    gather_rows,
    linked_cosine_similarity,
    merge_mean,
    reference,
    strided_cosine_similarity,
)

pytestmark = pytest.mark.large


@pytest.fixture
def rows(device):
    """x [1, 4, 33], and the same rows with 1.1e9 elements from one to the next."""
    x = torch.randn(1, 4, 33, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    far = far_rows(x)
    assert far.stride(1) * 3 > 2**31
    return x, far


@pytest.mark.parametrize("stride", [1, 2])
def test_strided_cosine(stride, rows):
    x, far = rows
    out = strided_cosine_similarity(far, stride)
    torch.testing.assert_close(out, reference.strided_cosine_similarity(x, stride))


def test_linked_cosine(rows, device):
    x, far = rows
    links = torch.tensor([[-1, 0, 1, 1]], device=device)
    out = linked_cosine_similarity(far, links)
    torch.testing.assert_close(out, reference.linked_cosine_similarity(x, links))


def test_mean(rows, device):
    x, far = rows
    roots = torch.tensor([[0, 0, 2, 2]], device=device)
    out, expected = merge_mean(far, roots, (far,)), reference.merge_mean(x, roots, (x,))
    torch.testing.assert_close(out.x, expected.x)
    assert torch.equal(out.companions[0], expected.companions[0])


def test_gather(rows, device):
    x, far = rows
    kept = torch.tensor([[-1, 1, 2, 3]], device=device)
    assert torch.equal(gather_rows(kept, far)[0], reference.gather_rows(kept, x)[0])


@pytest.mark.parametrize("num_queries", [None, 1])
def test_column_sum(num_queries, rows):
    x, far = rows
    out = attention_column_sum(far[:, None], far[:, None], num_queries=num_queries)
    expected = reference.attention_column_sum(x[:, None], x[:, None], num_queries=num_queries)
    torch.testing.assert_close(out, expected)
    bounds = torch.tensor([0, 1, 4], device=x.device)
    packed = {"num_queries": num_queries, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    out = attention_column_sum(far.transpose(0, 1), far.transpose(0, 1), **packed)
    expected = reference.attention_column_sum(x.transpose(0, 1), x.transpose(0, 1), **packed)
    torch.testing.assert_close(out, expected)
