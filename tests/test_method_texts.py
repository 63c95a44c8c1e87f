"""Methods as texts and dicts: the grammar, the names, the way back, and each error message."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fftriton
from fftriton import KVTP, FastV, FrameFusion, KeepAll, PruMerge, RandomTokens, TopKPruner, UniformFrames
from fftriton.methods import Chain, Pruner, ScoringMethod, from_dict, names, parse, split_methods, to_dict, to_text


@dataclass(frozen=True)
class Loudest(ScoringMethod):
    """A method outside the package."""

    power: float = 2.0
    name: str = "a"
    layers: tuple[int, ...] = ()

    def score(self, tokens, prompt):
        return tokens.hidden.norm(dim=-1)


@dataclass(frozen=True)
class Nested(fftriton.Method):
    """A method that takes methods and pruners."""

    inner: fftriton.Method = field(default_factory=KeepAll)
    others: tuple[fftriton.Method, ...] = ()
    either: "str | Pruner | fftriton.Method | None" = None
    sizes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class HalfPruner(Pruner):
    """A pruner outside the package."""

    share: float = 0.5

    def __call__(self, tokens, frames, counts, total):
        return tokens


HERE = __name__


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("framefusion", FrameFusion(0.3)),
        ("framefusion:similarity_threshold=0.9:importance_queries=1", FrameFusion(0.3, 0.9, importance_queries=1)),
        (" frame-fusion : budget = 0.5 ", FrameFusion(0.5)),
        ("FrameFusion:importance_queries=None:cascaded=False", FrameFusion(0.3, cascaded=False)),
        ("framefusion:stages=(prune,merge)", FrameFusion(0.3, stages=("prune", "merge"))),
        ("framefusion:stages=( 'prune' ; merge; )", FrameFusion(0.3, stages=("prune", "merge"))),
        ("framefusion:stages=(merge,)", FrameFusion(0.3, stages=("merge",))),
        ("framefusion:stages=(merge)", FrameFusion(0.3, stages=("merge",))),
        ("framefusion:stages=[merge]", FrameFusion(0.3, stages=("merge",))),
        ("framefusion:similarity_threshold=-1e-3", FrameFusion(0.3, -0.001)),
        ("keep-all", KeepAll()),
        ("keepall", KeepAll()),
        ("KeepAll", KeepAll()),
        ("keep_all", KeepAll()),
        ("kvtp:pruner=tome", KVTP(0.3, pruner="tome")),
        ("kvtp:pruner='tome'", KVTP(0.3, pruner="tome")),
        ('kvtp:pruner="tome":temperature=inf', KVTP(0.3, pruner="tome", temperature=math.inf)),
        ("kvtp:pruner=prumerge(neighbours=16)", KVTP(0.3, pruner=PruMerge(neighbours=16))),
        ("kvtp:pruner=PruMerge(norm)", None),
        ("kvtp:pruner=TopK(importance=norm):min_tokens=0", KVTP(0.3, pruner=TopKPruner("norm"), min_tokens=0)),
        ("kvtp:pruner=topk()", KVTP(0.3, pruner=TopKPruner())),
        ("kvtp:pruner=visionzip(contextual=0.2)", KVTP(0.3, pruner=fftriton.VisionZip(contextual=0.2))),
        ("kvtp:relevance=attention:pruner=evs", KVTP(0.3, "attention", "evs")),
        ("VisionZip:importance=norm + fastv", fftriton.VisionZip(0.3**0.5, "norm") + FastV(0.3)),
        (f"kvtp:pruner={HERE}:HalfPruner(share=0.25)", KVTP(0.3, pruner=HalfPruner(0.25))),
        ("uniformframes:budget=0.5+fastv:layer=1", UniformFrames(0.5) + FastV(0.3, layer=1)),
        ("uniformframes:budget=0.5 + fastv:layer=1", UniformFrames(0.5) + FastV(0.3, layer=1)),
        ("kvtp+framefusion:budget=0.09", KVTP(0.3) + FrameFusion(0.09)),
        (f"{HERE}:Loudest", Loudest(0.3)),
        (f"{HERE}:Loudest:power=3:name='a:b+c,d'", Loudest(0.3, 3, "a:b+c,d")),
        (f"{HERE}:Loudest:name='it\\'s (':layers=(1,2)", Loudest(0.3, name="it's (", layers=(1, 2))),
        (f"{HERE}:Loudest:layers=()", Loudest(0.3)),
        (f"{HERE}:Loudest + fastv:budget=0.2", Loudest(math.sqrt(0.2)) + FastV(0.2)),
        (f"{HERE}:Nested:inner=fastv(layer=3,budget=0.4)", Nested(FastV(0.4, layer=3))),
        (f"{HERE}:Nested:inner=framefusion", Nested(FrameFusion())),
        (f"{HERE}:Nested:others=(fastv,{HERE}:Loudest(power=1))", Nested(others=(FastV(), Loudest(power=1)))),
        (f"{HERE}:Nested:either=fastv", Nested(either="fastv")),
        (f"{HERE}:Nested:either=fastv()", Nested(either=FastV())),
        (f"{HERE}:Nested:either=tome()", Nested(either=fftriton.ToMe())),
        (f"{HERE}:Nested:either={HERE}:HalfPruner()", Nested(either=HalfPruner())),
        (f"{HERE}:Nested:either={HERE}:Loudest()", Nested(either=Loudest())),
        (f"{HERE}:Nested:sizes=[1,2]", Nested(sizes=[1, 2])),
    ],
)  # fmt: skip
def test_texts(text, method):
    if method is None:
        with pytest.raises(ValueError, match=r"must be PARAMETER=VALUE, got 'norm'"):
            parse(text)
        return
    assert repr(parse(text)) == repr(method)  # KVTP does not compare


def test_budgets_of_chains():
    chain = parse("uniformframes+temporalmerge+fastv", 0.125)
    assert [method.budget for method in chain.methods] == pytest.approx([0.5, 0.25, 0.125])
    assert chain.budget == 0.125
    four = parse("uniformframes+temporalmerge:budget=0.6+randomtokens+fastv", 0.16)
    assert [method.budget for method in four.methods] == pytest.approx([0.16**0.25, 0.6, 0.16**0.75, 0.16])
    for budget in torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist():
        assert parse("kvtp+framefusion", budget).methods[0].budget == math.sqrt(budget)


@pytest.mark.parametrize("name", names())
def test_methods_by_name(name):
    method = parse(name, 0.5)
    assert method.budget == (1.0 if name == "keep-all" else 0.5)
    assert type(parse(name.upper())) is type(parse(type(method).__name__)) is type(method)
    assert to_dict(method)["method"] == name
    with pytest.raises(ValueError, match=r"budget must be in \(0, 1\], got 2"):
        parse(name, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slowv", "method must be one of 'keep-all', 'framefusion', .* or MODULE:CLASS, got 'slowv'$"),
        ("fastw", r"got 'fastw' \(did you mean 'fastv'\?\)"),
        ("", "method must be NAME or NAME:PARAMETER=VALUE, where NAME may be MODULE:CLASS, got ''"),
        ("fastv+", "method must be NAME or .* got ''"),
        ("fastv:layer", "method must be NAME or .* got 'fastv:layer'"),
        ("layer=3", "method must be NAME or .* got 'layer=3'"),
        ("fast v", "method must be NAME or .* got 'fast v'"),
        ("a:b:c", "method must be NAME or .* got 'a:b:c'"),
        ("fastv:layer=", "a value must be a number, .* got '' in 'fastv:layer='"),
        ("fastv:layer==3", "a value must be a number, .* got '=3' in"),
        ("fastv:layer=1,keep-all", "a value must be a number, .* got '1,keep-all' in"),
        ("fastv:layer='1' '2", "quotes and parentheses must be closed, got"),
        ("kvtp:pruner='a'b'c'", "a value must be a number, .* got ''a'b'c''"),
        ("kvtp:pruner=(", "quotes and parentheses must be closed"),
        ("kvtp:pruner=)", "parentheses must be closed in order"),
        ("kvtp:pruner=(]", "parentheses must be closed in order"),
        ("framefusion:stages=(,)", "an item must not be empty, got ','"),
        ("framefusion:stages=(merge,,prune)", "an item must not be empty"),
        ("framefusion:3=4", "a parameter must be PARAMETER=VALUE, got '3=4' in 'framefusion:3=4'"),
        ("fastv:layer=1:layer=2", "a parameter must be given once, got 'layer' twice in"),
        ("fastv:layer=0", "FastV: layer must be at least 1, got 0"),
        ("fastv:budget=2", r"fastv: budget must be in \(0, 1\], got 2"),
        ("framefusion:stages=(prune)+kvtp", "method 'framefusion' cannot come before 'kvtp', because it works inside"),
        ("kvtp:budget=0.1+fastv", "that of FastV must not be above that of KVTP, 0.1; got 0.3"),
        ("kvtp:pruner=fastv(layer=1)", "pruner must be one of 'random', 'topk', .*'visionzip' or MODULE"),
        ("no_such_module:Method", "method must be a class that can be imported, got 'no_such_.*: No module"),
        ("math:Method", "method must be a class that can be imported, got 'math:Method'"),
        ("math:pi", "method must be a subclass of Method, got 'math:pi'"),
        ("fftriton.methods.tome:ToMe", "method must be a subclass of Method, got"),
    ],
)  # fmt: skip
def test_texts_that_cannot_be(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (3, "method must be a text, got 3"),
        ("fastv:speed=1", "parameters of 'fastv' must be among budget, layer, importance_queries, got 'speed'"),
        ("fastv:layers=1", r"got 'layers' \(did you mean 'layer'\?\)"),
        ("keep-all:budget=0.5", "parameters of 'keep-all' must be among none, got 'budget'"),
        ("kvtp:pruner=prumerge(neighbors=16)", r"parameters of 'prumerge' .* got 'neighbors' \(did you mean"),
        ("fastv:layer=one", "FastV: layer must be an integer of at least 1, got 'one'"),
        ("fastv:budget=half", r"fastv: budget must be a number in \(0, 1\], got 'half'"),
    ],
)
def test_texts_of_another_type(text, message):
    with pytest.raises(TypeError, match=message):
        parse(text)


def test_lists_of_methods():
    texts = ["keep-all", "framefusion:stages=(prune,merge)", "kvtp:pruner='a,b'+fastv"]
    assert split_methods(" , ".join(texts)) == texts
    assert split_methods("") == []


@pytest.mark.parametrize(
    ("name", "stages"), [("merge-only", ("merge",)), ("prune-only", ("prune",)), ("prune-merge", ("prune", "merge"))]
)
def test_former_names(name, stages):
    with pytest.warns(DeprecationWarning, match=f"'{name}' is deprecated: use 'framefusion:stages="):
        method = parse(f"{name}:similarity_threshold=0.9", 0.5)
    assert method == FrameFusion(0.5, 0.9, stages=stages)
    with pytest.warns(DeprecationWarning, match=f"'{name}' is deprecated"):
        assert from_dict({"method": name, "budget": 0.5}) == FrameFusion(0.5, stages=stages)


def test_former_functions():
    with pytest.warns(
        DeprecationWarning, match=r"fftriton.methods.NAMES is deprecated: use fftriton.methods.names\(\)"
    ):
        known = fftriton.methods.NAMES
    assert known["framefusion"] is FrameFusion
    assert known["merge-only"](budget=0.5) == FrameFusion(0.5, stages=("merge",))
    with pytest.warns(DeprecationWarning, match="make_method is deprecated: use fftriton.methods.parse"):
        make_method = fftriton.methods.make_method
    assert make_method("fastv", 0.5, layer=3) == FastV(0.5, layer=3)
    assert make_method("keep-all", 0.5) == KeepAll()
    with pytest.raises(ValueError, match="method must be one of 'keep-all', 'framefusion', .*, got 'slowv'"):
        make_method("slowv", 0.5)
    with pytest.warns(DeprecationWarning, match="PRUNERS is deprecated"):
        assert fftriton.methods.PRUNERS["prumerge"] is PruMerge
    with pytest.raises(AttributeError, match="no attribute 'SLOWV'"):
        fftriton.methods.SLOWV  # noqa: B018


def test_methods_of_other_distributions(monkeypatch):
    point = EntryPoint("loud-est", f"{HERE}:Loudest", "fftriton.methods")
    broken = EntryPoint("broken", "no_such_module:Method", "fftriton.methods")
    monkeypatch.setattr("fftriton.methods.registry.entry_points", lambda group: [point, broken])
    assert names()[-2:] == ["broken", "loud-est"]
    assert parse("Loudest:power=1") == Loudest(0.3, 1)
    with pytest.raises(ValueError, match="got 'broken': No module named 'no_such_module'"):
        parse("broken")
    assert to_text(Loudest(0.3, 1)).startswith("loud-est:")
    assert parse(to_text(Loudest(0.3, 1))) == Loudest(0.3, 1)


@pytest.mark.parametrize("text", ["chain", "chain:methods=[randomtokens,framefusion]"])
def test_a_chain_is_written_with_plus_signs(text):
    with pytest.raises(ValueError, match="must have plus signs between the methods of a chain, got 'chain'"):
        parse(text, 0.05)


@pytest.mark.parametrize("text", ["False", "false"])
def test_booleans_in_any_case(text):
    assert parse(f"framefusion:cascaded={text}") == FrameFusion(cascaded=False)
    with pytest.raises(TypeError, match="FrameFusion: cascaded must be True or False, got 'no'"):
        parse("framefusion:cascaded=no")


# ---- the way back

FRACTION = st.floats(0.0, 1.0, exclude_min=True)
COUNT = st.integers(1, 10**20)
SEED = st.integers(0, 2**63 - 1)
PRUNER = st.one_of(
    st.sampled_from(["random", "topk", "prumerge"]),
    st.builds(fftriton.RandomPruner, SEED),
    st.builds(TopKPruner, st.sampled_from(["norm", "distinctness"])),
    st.builds(PruMerge, st.sampled_from(["norm", "distinctness"]), COUNT),
    st.builds(HalfPruner, FRACTION),
)
TEXT = st.text(max_size=8)
LAST = st.one_of(
    st.builds(FastV, FRACTION, COUNT, st.none() | COUNT),
    st.builds(
        FrameFusion, FRACTION, st.floats(-1, 1), st.floats(0, 1), st.none() | COUNT,
        st.sampled_from([("merge", "prune"), ("merge",), ("prune",), ("prune", "merge")]), COUNT, st.booleans(),
    ),
    st.builds(fftriton.StreamingLLM, FRACTION, COUNT),
    st.builds(fftriton.STSimDiff, FRACTION, st.floats(-1, 1), st.floats(-1, 1), st.none() | COUNT),
)  # fmt: skip
FIRST = st.one_of(
    st.builds(RandomTokens, FRACTION, SEED),
    st.builds(UniformFrames, FRACTION),
    st.builds(fftriton.TemporalMerge, FRACTION),
    st.builds(fftriton.EVS, FRACTION),
    st.builds(fftriton.Anchors, FRACTION, FRACTION, st.booleans()),
    st.builds(fftriton.FlashVID, FRACTION, st.floats(0, 1), st.floats(-1, 1), st.floats(-1, 1), COUNT),
    st.builds(fftriton.FastVID, FRACTION, st.floats(0, 1), st.floats(-1, 1), COUNT, COUNT, st.floats(0, 1)),
    st.builds(fftriton.VisionZip, FRACTION, st.sampled_from(["distinctness", "norm"]), st.floats(0, 1)),
    st.builds(KVTP, FRACTION, st.none(), PRUNER, FRACTION | st.just(math.inf), COUNT, st.booleans()),
    st.builds(Loudest, FRACTION, st.floats(allow_nan=False), TEXT, st.lists(COUNT, max_size=3).map(tuple)),
)


def chain(methods):
    ordered = sorted(methods, key=lambda method: -method.budget)
    if len({type(method) for method in ordered[:-1]} & {FastV, FrameFusion, fftriton.StreamingLLM, fftriton.STSimDiff}):
        return ordered[0]
    return Chain(ordered)


CHAIN = st.lists(FIRST | LAST, min_size=1, max_size=4).map(chain)
NESTED = st.builds(
    Nested, LAST | FIRST | CHAIN, st.lists(LAST, max_size=2).map(tuple), st.one_of(st.none(), TEXT, PRUNER, LAST),
    st.lists(COUNT, max_size=2),
)  # fmt: skip
METHOD = st.one_of(LAST, FIRST, NESTED, st.builds(KeepAll), CHAIN)


@pytest.mark.fuzz
@given(METHOD)
def test_every_method_comes_back(method):
    written = json.loads(json.dumps(to_dict(method), allow_nan=False))
    assert written == to_dict(method)
    assert repr(from_dict(written)) == repr(method)  # KVTP does not compare
    if not isinstance(method, Chain) or len(method.methods) > 1:
        assert repr(parse(to_text(method))) == repr(method)  # KVTP does not compare
        assert split_methods(f"{to_text(method)},keep-all") == [to_text(method), "keep-all"]


def test_dicts():
    assert to_dict(FrameFusion()) == {
        "method": "framefusion", "budget": 0.3, "similarity_threshold": 0.6, "min_merge_ratio": 0.1,
        "importance_queries": None, "stages": ["merge", "prune"], "start_layer": 0, "cascaded": True,
        "proportional": False,
    }  # fmt: skip
    assert to_dict(UniformFrames(0.5) + FastV(0.3)) == {
        "method": "chain",
        "methods": [
            {"method": "uniformframes", "budget": 0.5},
            {"method": "fastv", "budget": 0.3, "layer": 2, "importance_queries": 1},
        ],
    }
    assert to_dict(KVTP(pruner=PruMerge(neighbours=16)))["pruner"] == {
        "pruner": "prumerge", "importance": "distinctness", "neighbours": 16, "keys": "tokens", "weights": "softmax",
        "adds": "dropped",
    }  # fmt: skip
    assert to_dict(Loudest())["method"] == f"{Loudest.__module__}:Loudest"
    assert from_dict({"method": "FrameFusion", "stages": ["prune"]}) == FrameFusion(stages=("prune",))
    assert from_dict({"method": "kvtp", "temperature": "inf"}).temperature == math.inf
    assert from_dict({"method": "chain", "methods": [{"method": "keep-all"}]}).methods == (KeepAll(),)


@pytest.mark.parametrize(
    ("description", "error", "message"),
    [
        ({"budget": 0.3}, TypeError, "method must be a dict with the key 'method', got"),
        ([], TypeError, "method must be a dict with the key 'method', got"),
        ({"pruner": "tome"}, TypeError, "method must be a dict with the key 'method', got"),
        ({"method": 3}, TypeError, "method must be a name, got 3"),
        ({"method": "slowv"}, ValueError, "method must be one of"),
        ({"method": "fastv", "speed": 1}, TypeError, "parameters of 'fastv' must be among .* got 'speed'"),
        ({"method": "fastv", "layer": 0}, ValueError, "FastV: layer must be at least 1, got 0"),
        ({"method": "kvtp", "pruner": {"pruner": "x"}}, ValueError, "pruner must be one of 'random'"),
        ({"method": "kvtp", "pruner": {"method": "fastv"}}, ValueError, "KVTP: pruner must be one of"),
        ({"method": "chain", "methods": []}, ValueError, "Chain: methods must be one or more, got none"),
        ({"method": "chain", "methods": ["slowv"]}, ValueError, "method must be one of"),
    ],
)
def test_dicts_that_cannot_be(description, error, message):
    with pytest.raises(error, match=message):
        from_dict(description)


class Plain(fftriton.Method):
    """No dataclass."""


def test_methods_that_cannot_be_written():
    @dataclass(frozen=True)
    class Local(fftriton.Method):
        pass

    @dataclass(frozen=True)
    class Clash(fftriton.Method):
        method: int = 0

    for method, message in (
        (KVTP(relevance=torch.rand(3)), "KVTP: relevance must be a number, .* to be written, got Tensor"),
        (KVTP(relevance=[torch.rand(3)]), "KVTP: relevance must be a number, .* to be written, got Tensor"),
        (KVTP(relevance=lambda context: context), "KVTP: relevance must be .* got function"),
        (
            KVTP(pruner=TopKPruner(lambda context: context)),
            "TopKPruner: importance must be .* function",
        ),
        (UniformFrames() + KVTP(relevance=torch.rand(3)), "KVTP: relevance must be a number"),
        (Plain(), "method must be a dataclass to be written, got Plain"),
        (Local(), "method must be a class that can be imported, got .*<locals>.Local"),
        (Clash(), "Clash: a parameter must not be called 'method' to be written"),
        (3, "method must be a Method, got int"),
    ):
        for write in (to_dict, to_text):
            with pytest.raises(TypeError, match=message):
                write(method)


def test_names_need_no_torch():
    """With the package's own `__init__` left out."""
    root = fftriton.__path__[0]
    code = (
        "import sys, types\n"
        f"package = types.ModuleType('fftriton'); package.__path__ = [{root!r}]; sys.modules['fftriton'] = package\n"
        "from fftriton.methods.registry import names\n"
        "import fftriton.methods\n"
        "assert fftriton.methods.names()[0] == names()[0] == 'keep-all'\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_everything_is_exported():
    for name in fftriton.methods.__all__:
        assert getattr(fftriton.methods, name) is not None
    assert set(fftriton.methods.__all__) <= set(dir(fftriton.methods))
    assert callable(fftriton.methods.frame_budgets)  # not the module
