"""verified(): silent where the ops are right, and loud where any of them is not."""

import re
import threading

import pytest
import torch
from testing_helpers import make_video
from torch.utils._python_dispatch import TorchDispatchMode

import fftriton_kernels as ops
from fftriton_kernels import NO_LINK, VerificationError, verified
from fftriton_kernels._verify import too_far

paths = pytest.mark.parametrize("interpret", [True, False], ids=["kernel", "cpu"])


def calls(device):
    """Each operator: a call of the public op that runs it."""
    x, scores = make_video(2, 3, 4, 8, torch.float32, device), torch.rand(2, 12, device=device)
    positions = torch.arange(12, device=device).expand(2, -1)
    links, roots = positions - 4, torch.where(positions % 3 == 1, positions - 1, positions)
    q, k, cu = torch.rand(2, 4, 5, 8, device=device), torch.rand(2, 2, 9, 8, device=device), torch.tensor([0, 2, 5])
    rows = q[0].transpose(0, 1)
    bounds = {"cu_seqlens_q": cu.to(device), "cu_seqlens_k": cu.to(device)}
    return {
        "strided_cosine_similarity": lambda: ops.strided_cosine_similarity(x, 4),
        "linked_cosine_similarity": lambda: ops.linked_cosine_similarity(x, links),
        "merge_roots": lambda: ops.merge_roots(scores, 4, 0.1, 3),
        "connected_components": lambda: ops.connected_components(torch.tensor([[0, 3], [3, 5]], device=device), 7),
        "merge_mean": lambda: ops.merge_mean(x.bfloat16(), roots, (), links),
        "gather_rows": lambda: ops.gather_rows(links, x, positions),
        "attention_column_sum": lambda: ops.attention_column_sum(q, k, num_queries=2),
        "attention_column_sum_packed": lambda: ops.attention_column_sum(rows, rows[:, :2], **bounds),
        "topk_keep": lambda: ops.topk_keep(scores, 5),
        "segmented_topk_keep": lambda: ops.segmented_topk_keep(scores, positions // 4, positions[:, 1:4], capacity=9),
    }


PUBLIC = {"attention_column_sum_packed": "attention_column_sum"}
OPERATORS = list(calls("cpu"))


class Broken(TorchDispatchMode):
    """An operator whose result is wrong in one element."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name == f"fftriton_kernels::{self.operator}":
            last = (out if isinstance(out, torch.Tensor) else out[-1]).view(-1)[-1:]
            last += 0.1 * (1 + last.abs()) if last.is_floating_point() else 1
        return out


def test_every_operator_is_called_here():
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "fftriton" in name}
    assert names == set(OPERATORS)


@paths
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_wrong_result_raises(operator, interpret, device, monkeypatch):
    monkeypatch.setattr("fftriton_kernels._dispatch.INTERPRET", interpret)
    call = calls(device)[operator]
    with verified():
        call()
    op = PUBLIC.get(operator, operator)
    message = rf"^{op}: \S+ is not what the reference gives: 1 of \d+ elements differ, .* at \[.*; {operator} of \w+ "
    with Broken(operator), verified(), pytest.raises(VerificationError, match=message):
        call()


WRONG = {  # what a careless edit of the CPU path would do
    "strided_cosine_similarity": (
        "strided_predecessor",
        lambda f: lambda b, n, stride, *rest: f(b, n, stride + 1, *rest),
    ),
    "linked_cosine_similarity": ("_row_products", lambda f: lambda x, partner: f(x[..., :-1].contiguous(), partner)),
    "merge_roots": ("_highest", lambda f: lambda scores, joins, count, *rest: f(scores, joins, count - 1, *rest)),
    "merge_mean": ("_bag_means", lambda f: lambda x, members, starts, sizes: f(x, members, starts, sizes - 1)),
    "gather_rows": ("_take_rows", lambda f: lambda x, index: f(x, index.roll(1, 1))),
    "topk_keep": ("_highest", lambda f: lambda scores, joins, count, *rest: f(-scores, joins, count, *rest)),
    "segmented_topk_keep": ("_best_first", lambda f: lambda scores, *rest: f(-scores, *rest)),
}


@pytest.mark.parametrize("operator", WRONG)
def test_a_broken_implementation_raises(operator, monkeypatch):
    monkeypatch.setattr("fftriton_kernels._dispatch.INTERPRET", False)
    name, broken = WRONG[operator]
    monkeypatch.setattr(ops._cpu, name, broken(getattr(ops._cpu, name)))
    with verified(), pytest.raises(VerificationError, match=f"^{PUBLIC.get(operator, operator)}: "):
        calls("cpu")[operator]()


def test_another_thread_is_not_affected(device):
    call, seen = calls(device)["topk_keep"], []

    def elsewhere():
        with Broken("topk_keep"):
            seen.append(call())

    with verified():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_afterwards_nothing_is_checked(device):
    call = calls(device)["topk_keep"]
    with verified():
        call()
    with Broken("topk_keep"):
        call()


def test_gradients_pass(device):
    x = torch.randn(1, 6, 4, device=device, requires_grad=True)
    with verified():
        ops.merge_mean(x, torch.tensor([[0, 0, 2, 2, 2, 5]], device=device)).x.sum().backward()
    torch.testing.assert_close(x.grad[0, :, 0], torch.tensor([1 / 2] * 2 + [1 / 3] * 3 + [1.0], device=device))


def test_a_compiled_caller_is_checked(device):
    compiled = torch.compile(calls(device)["topk_keep"], backend="eager")
    compiled()
    with Broken("topk_keep"), verified(), pytest.raises(VerificationError):
        compiled()


def test_the_message_says_what_was_asked_and_what_came():
    with Broken("topk_keep"), verified(), pytest.raises(VerificationError) as error:
        ops.topk_keep(torch.tensor([[0.0, 2.0, 1.0]]), 2)
    assert str(error.value) == (
        "topk_keep: lengths is not what the reference gives: 1 of 1 elements differ, 3 for 2 at [0]"
        "; topk_keep of scores [1, 3] torch.float32, bound 2"
    )


ONE, INF, NAN = torch.ones(1, 1, dtype=torch.float64), float("inf"), float("nan")


@pytest.mark.parametrize(
    ("out", "eager", "truth", "fits"),
    [
        (1.0, 1.0, 1.0, True),
        (1.0 + 2**-23, 1.0, 1.0, True),  # a rounding
        (1.0 + 2**-19, 1.0, 1.0, False),
        (1.0 + 2**-19, 1.0 + 2**-20, 1.0, True),  # twice eager's own error
        (NAN, 1.0, 1.0, False),
        (INF, 1.0, 1.0, False),
        (1.0, NAN, NAN, False),
        (NAN, NAN, NAN, True),
        (-INF, INF, INF, False),
        (NO_LINK, NO_LINK, 0.5, True),  # eager is as far off
    ],
)
def test_the_rule(out, eager, truth, fits):
    assert (too_far(ONE.float() * out, ONE.float() * eager, ONE * truth, ONE) == "") == fits


def test_shapes_and_dtypes_must_agree():
    assert too_far(ONE, ONE.float(), ONE, ONE) == "[1, 1] torch.float64 for [1, 1] torch.float32"
    assert re.match(r"\[1\] .* for \[1, 1\]", too_far(ONE[0].float(), ONE.float(), ONE, ONE))
