"""The kernel library taken for itself: its README, its examples, its docstrings, and loading it as a Hub kernel."""

import ast
import importlib.metadata
import importlib.util
import inspect
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_interpreter import trouble

import fftriton_kernels

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "kernels"
PACKAGE = LIBRARY / "fftriton_kernels"
FUNCTIONS = {name: getattr(fftriton_kernels, name) for name in fftriton_kernels.__all__}
NO_OPS = ("implementation", "self_test", "tune", "verified", "warm_up")
OPS = {name: op for name, op in FUNCTIONS.items() if inspect.isfunction(op) and name not in NO_OPS}
SNIPPETS = re.findall(r"^```python\n(.*?)^```", (LIBRARY / "README.md").read_text(), re.DOTALL | re.MULTILINE)
EXAMPLES = {path.stem: path for path in sorted((LIBRARY / "examples").glob("*.py"))}
HUB = next((d for d in importlib.metadata.distributions() if d.metadata["Name"] == "kernels"), None)

# `kernels` with nothing installed under that name: only what the repository root itself has
WITHOUT_HUB = f"""
import sys
from importlib.machinery import PathFinder

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{str(ROOT)!r}]) if name == "kernels" else None

sys.meta_path.insert(0, Finder)
"""
# loads the folder in sys.argv[1] with Hugging Face's package and merges with it, beside the one in sys.argv[2]
LOAD = """
import sys
from inspect import signature
from pathlib import Path
import torch
import kernels

folder, name = Path(sys.argv[1]), "fftriton_kernels"
arguments = (folder, name) if "package_name" in signature(kernels.get_local_kernel).parameters else (folder,)
loaded = kernels.get_local_kernel(*arguments)
assert name not in sys.modules, "an absolute import"
x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]])
merged = loaded.merge_mean(x, loaded.merge_roots(loaded.strided_cosine_similarity(x, 2), 2, 0.9))
assert merged.x.tolist() == [[[2.0, 0.0], [0.0, 1.0]]]
sys.path.insert(0, sys.argv[2])
import fftriton_kernels  # a second copy, broken: the first one does not notice
fftriton_kernels._cpu.group_mean = None
again = loaded.merge_mean(x, loaded.merge_roots(loaded.strided_cosine_similarity(x, 2), 2, 0.9))
assert torch.equal(again.x, merged.x)
print(Path(kernels.__file__).resolve())
print(Path(loaded.__file__).resolve())
"""


@pytest.fixture(params=["pytorch", "interpreter"])
def path(request, monkeypatch, device):
    """The PyTorch path and Triton's interpreter; where there is a GPU, the PyTorch path and the GPU."""
    if request.param == "pytorch":
        return "cpu"
    if device == "cpu" and (reason := trouble()):
        pytest.skip(reason)
    if device == "cpu":
        monkeypatch.setattr("fftriton_kernels._dispatch.INTERPRET", True)
    return device


def run(*arguments, cwd, **environment):
    """A fresh Python without the interpreter and without a network; environment values of None unset."""
    environment = {"TRITON_INTERPRET": None, "HF_HUB_OFFLINE": "1", "PYTHONPATH": None, **environment}
    env = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def load_example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- README ---


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: re.findall(r"(\w+)\(", text)[-1])
def test_readme_snippets_run(snippet, path):
    with torch.device(path):
        exec(compile(snippet, "kernels/README.md", "exec"), {})


def test_readme_shows_every_op():
    imported = re.findall(r"^from fftriton_kernels import (.+)$", "\n".join(SNIPPETS), re.MULTILINE)
    assert set(OPS) <= {name for line in imported for name in line.split(", ")}
    assert all(len(snippet.splitlines()) <= 6 for snippet in SNIPPETS)


@pytest.mark.parametrize("name", OPS)
def test_readme_table_has_the_signature(name):
    table = (LIBRARY / "README.md").read_text()
    (written,) = re.findall(rf"^\| `{name}\((.*?)\)` \|", table, re.MULTILINE)
    parameters = inspect.signature(OPS[name]).parameters.values()
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    assert f"({written})" == str(inspect.Signature(plain))


# --- what the README guarantees of all ops alike; tests/kernels has the rest ---

CALLS = {
    "strided_cosine_similarity": lambda x: fftriton_kernels.strided_cosine_similarity(x, 3),
    "linked_cosine_similarity": lambda x: fftriton_kernels.linked_cosine_similarity(x, links(x)),
    "merge_roots": lambda x: fftriton_kernels.merge_roots(x[..., 0], 3, 0.0, 4),
    "merge_mean": lambda x: fftriton_kernels.merge_mean(x, roots(x), (x,), links(x)),
    "connected_components": lambda x: fftriton_kernels.connected_components((x[:, :2, 0] * 4).long(), 9),
    "attention_column_sum": lambda x: fftriton_kernels.attention_column_sum(x[:, None], x[:, None]),
    "topk_keep": lambda x: fftriton_kernels.topk_keep(x[..., 0], min(4, x.shape[1])),
    "segmented_topk_keep": lambda x: fftriton_kernels.segmented_topk_keep(
        x[..., 0], roots(x) % 2, torch.full((x.shape[0], 2), 2, device=x.device)
    ),
    "gather_rows": lambda x: fftriton_kernels.gather_rows(links(x), x),
}


def links(x):
    return (torch.arange(x.shape[1], device=x.device) - 3).clamp_min(-1).expand(x.shape[0], -1)


def roots(x):
    return (torch.arange(x.shape[1], device=x.device) % 3).expand(x.shape[0], -1)


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [] if result is None else [tensor for part in result for tensor in tensors(part)]


def make_x(*shape, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def test_every_op_is_called_here():
    assert set(CALLS) == set(OPS)


@pytest.mark.parametrize("name", CALLS)
def test_double_precision_is_a_type_error_or_copied(name, path):
    x = make_x(2, 12, 5, device=path)
    if name in ("gather_rows", "connected_components"):  # any dtype; integers only
        assert all(
            a.equal(b.to(a.dtype)) for a, b in zip(*map(tensors, map(CALLS[name], (x, x.double()))), strict=True)
        )
    else:
        with pytest.raises(TypeError, match=rf"^{name}: \w+ must have dtype torch.float16 or"):
            CALLS[name](x.double())


@pytest.mark.parametrize("shape", [(0, 12, 5), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_empty_input_gives_empty_results(name, shape, path):
    if name == "connected_components":
        edges = torch.zeros(0, 2, dtype=torch.int64, device=path)
        assert fftriton_kernels.connected_components(edges, 3).tolist() == [0, 1, 2]
        assert fftriton_kernels.connected_components(edges, 0).shape == (0,)
    else:
        assert sum(map(torch.Tensor.numel, tensors(CALLS[name](make_x(*shape, device=path))))) == 0 or (
            name == "merge_mean" and shape[0]  # the lengths: zeros
        )


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name, path):
    x = make_x(2, 12, 5, device=path).requires_grad_()
    out = tensors(CALLS[name](x))[0]
    if name in ("merge_mean", "gather_rows"):
        out.sum().backward()
        assert x.grad.isfinite().all()
        assert (x.grad != 0).any()
    elif out.is_floating_point():
        with pytest.raises(RuntimeError, match="no autograd formula"):
            out.sum().backward()
    else:
        assert not out.requires_grad


@pytest.mark.parametrize("name", CALLS)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_without_a_graph_break(name, path):
    x = make_x(2, 12, 5, device=path)
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], backend="aot_eager", fullgraph=True)(x)
    assert all(a.equal(b) for a, b in zip(tensors(compiled), tensors(CALLS[name](x)), strict=True))


# --- examples ---


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_and_use_public_ops_only(name):
    assert run(EXAMPLES[name], cwd=ROOT, PYTHONPATH=str(LIBRARY)).count("\n") >= 3
    tree = ast.parse(EXAMPLES[name].read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules <= {"torch", "torch.nn.functional", "fftriton_kernels"}


def cosine(a, b):
    return math.fsum(map(math.prod, zip(a, b, strict=True))) / (math.hypot(*a) * math.hypot(*b))


def tome_by_hand(x, metric, size, r):
    """One sample as lists: (position, mean, size) of what is left, in order."""
    even, odd = range(0, len(x), 2), range(1, len(x), 2)
    best = {a: max(odd, key=lambda b: cosine(metric[a], metric[b])) for a in even if odd}
    ranked = sorted(best, key=lambda a: -cosine(metric[a], metric[best[a]]))
    groups = {token: [token] for token in range(len(x))}
    for a in ranked[:r]:
        groups[best[a]].append(a)
        del groups[a]
    left = []
    for token, members in sorted(groups.items()):
        total = math.fsum(size[m] for m in members)
        mean = [math.fsum(size[m] * x[m][d] for m in members) / total for d in range(len(x[0]))]
        left.append((token, mean, total))
    return left


@pytest.mark.parametrize(
    ("batch", "length", "r"), [(1, 2, 1), (2, 13, 4), (3, 20, 10), (1, 9, 99), (2, 7, 0), (1, 1, 3)]
)
def test_tome_matches_plain_python(batch, length, r, path):
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(batch, length, 5, generator=generator)
    metric = torch.randn(batch, length, 3, generator=generator)
    size = torch.randint(1, 9, (batch, length, 1), generator=generator).float()
    merged, sizes, kept = load_example("tome").merge_tokens(x.to(path), metric.to(path), size.to(path), r)
    for b in range(batch):
        r = min(r, length // 2)
        left = tome_by_hand(x[b].tolist(), metric[b].tolist(), size[b, :, 0].tolist(), r)
        assert kept[b].tolist() == [position for position, _, _ in left]
        assert sizes[b, :, 0].tolist() == [total for _, _, total in left]
        torch.testing.assert_close(merged[b].cpu(), torch.tensor([mean for _, mean, _ in left]), rtol=1e-5, atol=1e-5)
    assert merged.shape == (batch, length - r, 5)


def test_tome_keeps_what_has_no_direction(path):
    metric = torch.ones(1, 6, 3, device=path)
    metric[0, 2] = 0
    merged, _, kept = load_example("tome").merge_tokens(metric, metric, torch.ones(1, 6, 1, device=path), 3)
    assert kept.tolist() == [[1, 2, 3, 5]]
    assert merged.isfinite().all()


def regions_by_hand(frame, width, threshold):
    """One frame as lists: the patches of each region, by flooding, in order of their first patch."""
    regions, seen = [], set()
    for start in range(len(frame)):
        if start in seen:
            continue
        region, waiting = [], [start]
        seen.add(start)
        while waiting:
            patch = waiting.pop()
            region.append(patch)
            row, column = divmod(patch, width)
            for r, c in ((row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)):
                other = r * width + c
                if not (0 <= c < width and 0 <= other < len(frame)) or other in seen:
                    continue
                if cosine(frame[patch], frame[other]) > threshold:
                    seen.add(other)
                    waiting.append(other)
        regions.append(sorted(region))
    return regions


@pytest.mark.parametrize(("count", "height", "width"), [(1, 1, 1), (2, 5, 7), (3, 6, 1), (2, 1, 9), (1, 9, 8)])
def test_spatial_components_match_plain_python(count, height, width, path):
    generator = torch.Generator().manual_seed(height)
    frames = torch.randn(count, height * width, 2, generator=generator)
    example = load_example("spatial_components")
    merged = example.merge_regions(frames.to(path), width, 0.3)
    roots = example.region_roots(frames.to(path), width, 0.3)
    for f in range(count):
        regions = regions_by_hand(frames[f].tolist(), width, 0.3)
        assert merged.lengths[f] == len(regions)
        assert merged.kept[f, -len(regions) :].tolist() == [region[0] for region in regions]
        assert all(roots[f, patch] == region[0] for region in regions for patch in region)
        means = torch.stack([frames[f, region].mean(0) for region in regions])
        torch.testing.assert_close(merged.x[f, -len(regions) :].cpu(), means)


# --- as a Hub kernel, and beside Hugging Face's package of the name `kernels` ---


needs_hub = pytest.mark.skipif(HUB is None, reason="Hugging Face's package `kernels` is not installed")


@needs_hub
@pytest.mark.parametrize("place", ["root", "elsewhere"])
@pytest.mark.parametrize("interpret", [None, "1"], ids=["pytorch", "interpreter"])
def test_loads_as_a_hub_kernel(place, interpret, tmp_path):
    folder = tmp_path / "hub"
    for _ in range(2):  # again over what is there
        run(LIBRARY / "hub_folder.py", folder, cwd=tmp_path)
    cwd, path = (ROOT, str(ROOT)) if place == "root" else (tmp_path, None)
    theirs, ours = run("-c", LOAD, folder, LIBRARY, cwd=cwd, PYTHONPATH=path, TRITON_INTERPRET=interpret).split()
    assert Path(theirs) == Path(HUB.locate_file("kernels/__init__.py")).resolve()
    assert Path(ours).is_relative_to(folder.resolve())


@needs_hub
def test_build_toml_is_what_kernel_builder_reads(tmp_path):
    try:
        from kernels._rust import Build
    except ImportError:
        pytest.skip("this release of `kernels` does not read build.toml")
    Build.open(str(LIBRARY))
    (tmp_path / "build.toml").write_text((LIBRARY / "build.toml").read_text().replace("torch-noarch", "torch-nowhere"))
    with pytest.raises(ValueError, match="build"):  # so that opening ours says something
        Build.open(str(tmp_path))


def test_without_theirs_kernels_is_as_good_as_absent():
    code = """
import importlib.util
assert importlib.util.find_spec("kernels").origin is None
try:
    from kernels import get_kernel
except ImportError:
    print("absent")
import transformers
from transformers import Qwen2ForCausalLM
"""
    assert run("-c", WITHOUT_HUB + code, cwd=ROOT).strip() == "absent"


def test_theirs_wins_over_the_folder(tmp_path):
    """From the root with the root first on the path, as pytest and scripts may have it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'theirs'")
    path = os.pathsep.join(map(str, (ROOT, LIBRARY, tmp_path)))
    code = "import kernels, fftriton_kernels; print(kernels.get_kernel, hasattr(kernels, 'fftriton_kernels'))"
    assert run("-c", code, cwd=ROOT, PYTHONPATH=path).split() == ["theirs", "False"]


def test_nothing_of_ours_is_installed_as_kernels():
    assert not (LIBRARY / "__init__.py").exists()
    setup = ast.parse((ROOT / "setup.py").read_text())
    (packages,) = (node.value for node in ast.walk(setup) if isinstance(node, ast.keyword) and node.arg == "packages")
    names = ast.literal_eval(packages)
    assert "fftriton_kernels" in names
    assert not [name for name in names if name.split(".")[0] == "kernels"]


def test_works_as_a_subpackage_of_another_project(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "theirs" / "tokens", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "theirs" / "__init__.py").touch()
    code = "import sys, theirs.tokens as t; print(t.connected_components.__module__, 'fftriton_kernels' in sys.modules)"
    assert run("-c", code, cwd=tmp_path).split() == ["theirs.tokens.components", "False"]


# --- the sources ---

MODULES = sorted(PACKAGE.glob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_imports_are_relative_or_of_torch_triton_and_the_standard_library(module):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 or (node.level == 0 and node.module.split(".")[0] in allowed), ast.unparse(node)
        elif isinstance(node, ast.Name):
            assert node.id not in {"__import__", "import_module"}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_modules_hold_no_state(module):
    """Constants only at module level, and no function that rebinds one."""
    tree = ast.parse(module.read_text())
    assert not [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                assert isinstance(target, ast.Name), ast.unparse(node)
                assert target.id.isupper() or target.id in ("__all__", "__version__"), ast.unparse(node)


def sections(docstring):
    """The text of each Google style section, by its name; what stands before the first one under the empty name."""
    found, name = {"": ""}, ""
    for line in docstring.splitlines():
        if re.fullmatch(r"[A-Z]\w+:", line):
            name = line[:-1]
            found[name] = ""
        else:
            found[name] += line + "\n"
    return found


def arguments(text):
    """The entries of an Args section, by name."""
    entries = re.split(r"^    (\w+):", text, flags=re.MULTILINE)
    return {name: " ".join(body.split()) for name, body in zip(entries[1::2], entries[2::2], strict=True)}


@pytest.mark.parametrize("name", OPS)
def test_docstrings_are_complete(name):
    parts = sections(inspect.getdoc(OPS[name]))
    assert list(parts) == ["", "Args", "Returns", "Raises", "Source"]
    assert all(text.strip() for text in parts.values())
    assert re.match(r"[A-Z].*\.$", parts[""].splitlines()[0]), "the first line is a sentence"
    entries = arguments(parts["Args"])
    signature = inspect.signature(OPS[name])
    assert list(entries) == list(signature.parameters)
    for argument, parameter in signature.parameters.items():
        if "Tensor" in str(parameter.annotation):
            entry = entries[argument]
            if other := re.search(r"as `(\w+)` takes", entry):
                entry = arguments(sections(inspect.getdoc(OPS[other[1]]))["Args"])[argument]
            assert re.search(r"\[[A-Z][\w, .+]*\]", entry), f"{argument}: no [shape]"
            assert re.search(r"\b(fp\d\d|bf16|int\d\d|bool|dtype)", entry), f"{argument}: no dtype"
    returned = " ".join(parts["Returns"].split())
    assert re.search(r"\[[A-Z\w][\w, .]*\]", returned)
    assert re.search(r"\b(fp32|int64)\b", returned) or name == "gather_rows", "no dtype"
    assert re.search(r"\bTypeError:", parts["Raises"])
    assert re.search(r"\bValueError:", parts["Raises"])


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_reference_and_its_file_says_what_bounds_it(name):
    assert callable(getattr(fftriton_kernels.reference, name))
    module = inspect.getdoc(sys.modules[OPS[name].__module__])
    assert f"reference.{name}" in module
    assert "Bound by" in module or "bound by" in module
