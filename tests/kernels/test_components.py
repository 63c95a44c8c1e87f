import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_libraries import libraries
from testing_helpers import far_rows, make_strided, shuffled_programs
from torch import Tensor

from fftriton_kernels import connected_components


def components_by_hand(edges: Tensor, num_nodes: int) -> list[int]:
    label = list(range(num_nodes))
    pairs = [(u, v) for u, v in edges.tolist() if 0 <= u < num_nodes and 0 <= v < num_nodes]
    changed = True
    while changed:
        changed = False
        for u, v in pairs:
            low = min(label[u], label[v])
            changed |= label[u] != low or label[v] != low
            label[u] = label[v] = low
    return label


def graph(name: str) -> tuple[Tensor, int]:
    torch.manual_seed(0)
    n = 700
    line = torch.stack([torch.arange(n - 1), torch.arange(1, n)], 1)
    return {
        "sparse": (torch.randint(0, n, (350, 2)), n),
        "connected": (torch.randint(0, n, (4 * n, 2)), n),
        "line": (line, n),
        "line backwards": (line.flip(0, 1), n),
        "line shuffled": (torch.randperm(n)[line[torch.randperm(n - 1)]], n),
        "star": (torch.stack([torch.full((n,), n - 1), torch.arange(n)], 1), n),
        "loops": (torch.arange(n)[:, None].expand(-1, 2), n),
        "the same edge": (torch.tensor([[600, 3]]).expand(900, 2), n),
        "no node": (torch.tensor([[0, 0], [-1, 2]]), 0),
        "one node": (torch.tensor([[0, 0]]), 1),
        "no edge": (torch.zeros(0, 2, dtype=torch.int64), 5),
        "ends outside": (torch.tensor([[0, 1], [-1, 1], [3, -1], [2, 5], [2**40, 0], [-(2**40), 4], [5, 5]]), 5),
    }[name]


GRAPHS = [
    "sparse", "connected", "line", "line backwards", "line shuffled", "star", "loops", "the same edge", "no node",
    "one node", "no edge", "ends outside",
]  # fmt: skip


@libraries
@pytest.mark.parametrize("name", GRAPHS)
def test_components_by_hand(library, name, device):
    edges, num_nodes = graph(name)
    label = library.connected_components(edges.to(device), num_nodes)
    assert label.dtype == torch.int64
    assert label.tolist() == components_by_hand(edges, num_nodes)


@libraries
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_strides(library, index, device):
    edges, num_nodes = graph("sparse")
    expected = components_by_hand(edges, num_nodes)
    edges = edges.to(device, index)
    assert library.connected_components(make_strided(edges), num_nodes).tolist() == expected
    assert library.connected_components(edges.T.contiguous().T, num_nodes).tolist() == expected


@pytest.mark.large
def test_rows_past_two_to_the_31_elements(device):
    edges = torch.tensor([[[4, 1], [0, 3], [3, 1]]], device=device)
    assert connected_components(far_rows(edges)[0], 5).tolist() == [0, 0, 2, 0, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has an order of its own")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["sparse", "line shuffled"])
def test_programs_in_any_order(name, seed):
    edges, num_nodes = graph(name)
    with shuffled_programs(seed):
        label = connected_components(edges, num_nodes)
    assert label.tolist() == components_by_hand(edges, num_nodes)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data(), num_nodes=st.integers(1, 30))
def test_labels_keep_the_rules(data, num_nodes):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    node = st.integers(0, num_nodes - 1)
    edges = torch.tensor(data.draw(st.lists(st.tuples(node, node), min_size=1, max_size=40)), device=device)
    label = connected_components(edges, num_nodes)
    assert (label <= torch.arange(num_nodes, device=device)).all()
    assert torch.equal(label[label], label)
    assert torch.equal(label[edges[:, 0]], label[edges[:, 1]])
    assert label.tolist() == components_by_hand(edges, num_nodes)


def test_the_edges_are_left_alone(device):
    edges, num_nodes = graph("connected")
    edges = edges.to(device)
    before = edges.clone()
    connected_components(edges, num_nodes)
    assert torch.equal(edges, before)


def test_opcheck(device):
    edges, num_nodes = graph("sparse")
    torch.library.opcheck(torch.ops.fftriton_kernels.connected_components.default, (edges.to(device), num_nodes))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"connected_components: edges must be a torch.Tensor, got list", ([[0, 1]], 2)),
        (TypeError, r"edges must have dtype torch.int32 or torch.int64, got torch.float32", (torch.zeros(1, 2), 2)),
        (ValueError, r"edges must have shape \[E, ends=2\], got \[1, 3\]", (torch.zeros(1, 3, dtype=torch.int64), 2)),
        (ValueError, r"edges must have shape \[E, ends=2\], got \[2\]", (torch.zeros(2, dtype=torch.int64), 2)),
        (ValueError, r"num_nodes must be at least 0, got -1", (torch.zeros(1, 2, dtype=torch.int64), -1)),
        (TypeError, r"num_nodes must be an int, got float", (torch.zeros(1, 2, dtype=torch.int64), 2.0)),
    ],
)
def test_errors(error, message, arguments):
    with pytest.raises(error, match=message):
        connected_components(*arguments)
