"""Methods of a user's own: the example of its page, chains of any length, and methods of the former form."""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from models import tiny_qwen2, video_embeddings

import fftriton
from fftriton import KVTP, FastV, FrameFusion, KeepAll, RandomTokens, TemporalMerge, UniformFrames
from fftriton.methods import BeforeLayers, Chain, Method, MethodState, ScoringMethod

FRAMES, PATCHES = 8, 12


def run(method, seed=0):
    embeddings, layout = video_embeddings(FRAMES, PATCHES, "mixed", seed=seed)
    with torch.no_grad(), fftriton.reduce(tiny_qwen2(6), method, layout) as reduction:
        logits = tiny_qwen2(6)(inputs_embeds=embeddings).logits
    return logits, reduction.report


def same(one, other):
    (logits, report), (expected, others) = one, other
    assert torch.equal(logits, expected)
    assert report.vision_tokens_per_layer == others.vision_tokens_per_layer
    assert report.least_budget == others.least_budget
    assert (report.prune_layer, len(report.merge_steps)) == (others.prune_layer, len(others.merge_steps))
    for kept, positions in zip(report.kept_positions, others.kept_positions, strict=True):
        assert torch.equal(kept, positions)


# ---- one score


def test_the_example_of_the_page():
    text = (Path(__file__).parents[2] / "docs" / "bring-your-own-method.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:1]
    names = {"__name__": __name__}
    exec(code, names)
    distinct = names["Distinct"]
    _, report = run(distinct(0.3))
    assert report.vision_tokens_per_layer == [round(0.3 * 96)] * 6
    video = video_embeddings(FRAMES, PATCHES, "mixed")[0][0, report.layouts[0].tokens]
    scores = torch.nn.functional.cosine_similarity(video, video.mean(0), dim=-1)
    kept = report.layouts[0].tokens[scores.argsort(stable=True)[:29]].sort().values
    video_kept = report.kept_positions[0][torch.isin(report.kept_positions[0], report.layouts[0].tokens)]
    assert torch.equal(video_kept, kept)
    assert run(distinct(1.0))[1].vision_tokens_per_layer == [96] * 6
    _, report = run(distinct(0.5) + FrameFusion(0.3))
    assert report.budget_achieved == pytest.approx(0.3, abs=1 / 96)
    with pytest.raises(ValueError, match=r"Distinct: budget must be in \(0, 1\], got 0"):
        distinct(0)


@dataclass(frozen=True)
class Scores(ScoringMethod):
    """Returns these scores."""

    scores: object = None

    def score(self, tokens, prompt):
        return self.scores


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (None, TypeError, "Scores: score must return a tensor of real numbers, got NoneType"),
        (torch.ones(1, 103) > 0, TypeError, "Scores: score must return a tensor of real numbers, got torch.bool"),
        (torch.ones(5), ValueError, r"Scores: score must return one number per token, \[1, \d+\], got \[5\]"),
    ],
)
def test_scores_of_another_kind(scores, error, message):
    with pytest.raises(error, match=message):
        run(Scores(0.3, scores))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bfloat16], ids=str)
def test_scores_of_any_real_numbers(dtype):
    scores = -torch.arange(103)[None]  # which all dtypes hold exactly
    same(run(Scores(0.3, scores.to(dtype))), run(Scores(0.3, scores.float())))


def test_base_classes_alone():
    with pytest.raises(TypeError, match="abstract"):
        ScoringMethod(0.3)
    with pytest.raises(NotImplementedError, match="Unfinished must define shorten"):
        run(type("Unfinished", (BeforeLayers,), {"budget": 0.5})())


# ---- chains


def test_chains_are_flat():
    a, b, c = UniformFrames(0.8), KVTP(0.5), FrameFusion(0.3)
    for chain in ((a + b) + c, a + (b + c), Chain([a, b, c]), Chain((Chain([a]), Chain([b, Chain([c])])))):
        assert chain == Chain([a, b, c])
        assert chain.methods == (a, b, c)
        assert chain.budget == 0.3
        assert str(chain) == f"{a} + {b} + {c}"
    assert (a + KVTP(0.5, renumber=True)).renumbers
    assert not (a + b).renumbers


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        ([], ValueError, "Chain: methods must be one or more, got none"),
        (3, TypeError, "Chain: methods must be a list of methods, got 3"),
        (FastV(), TypeError, "Chain: methods must be a list of methods, got FastV"),
        ([KVTP(0.5), 3], TypeError, "Chain: methods must be methods, got 3"),
        ([KVTP(0.5), FastV(0.4), KVTP(0.3)], TypeError, "must work before the first layer.* got FastV"),
        ([KVTP(0.5), UniformFrames(0.6), FastV(0.3)], ValueError, "that of UniformFrames must not be .* 0.5; got 0.6"),
        ([KVTP(0.5), UniformFrames(0.4), FastV(0.5)], ValueError, "that of FastV must not be above .* 0.4; got 0.5"),
    ],
)  # fmt: skip
def test_chains_that_cannot_be(methods, error, message):
    with pytest.raises(error, match=message):
        Chain(methods)


def test_a_chain_of_three_is_two_chains_of_two():
    first, second, third = UniformFrames(0.5), TemporalMerge(0.4), FastV(0.25, layer=2)
    _, report = run(first + second + third)
    assert report.vision_tokens_per_layer[:2] == [round(0.4 * 96)] * 2
    assert report.budget_achieved == pytest.approx(0.25, abs=1 / 96)
    assert (report.prune_layer, len(report.merge_steps)) == (1, 1)
    assert (report.merge_steps[0].tokens_before, report.merge_steps[0].tokens_after) == (48, round(0.4 * 96))
    _, alone = run(first)
    assert torch.equal(report.pruned[: len(alone.pruned)], alone.pruned)
    _, both = run(first + second)
    assert torch.equal(both.kept_positions[0], report.kept_positions[0])
    same(run(first + second + FastV(0.25, layer=2)), run(UniformFrames(0.5) + (second + third)))


def test_links_of_a_chain_that_do_nothing():
    same(run(KVTP(1.0) + UniformFrames(1.0) + FrameFusion(0.3)), run(FrameFusion(0.3)))
    same(run(KVTP(1.0) + KeepAll()), run(KeepAll()))
    same(run(RandomTokens(0.5) + RandomTokens(0.5)), run(RandomTokens(0.5)))


def test_a_chain_checks_each_method_at_its_budget():
    with pytest.raises(ValueError, match=r"FastV: budget must be above layer / num_layers = 3/6"):
        run(UniformFrames(0.9) + KVTP(0.8) + FastV(0.4, layer=3))
    run(UniformFrames(0.9) + KVTP(0.6) + FastV(0.4, layer=3))


def test_nonsense_inside_a_chain():
    @dataclass(frozen=True)
    class Nonsense(BeforeLayers):
        budget: float = 0.5
        answer: object = None

        def shorten(self, tokens, prompt):
            return self.answer(tokens)

    for answer, message in (
        (lambda tokens: 3, "must return VideoTokens, a list of them or None, got int"),
        (lambda tokens: [tokens.keep_top(tokens.hidden[..., 0], 9), 3], "must return VideoTokens.* got int"),
        (lambda tokens: fftriton.methods.VideoTokens(*[None] * 4), "hidden must be a tensor, got NoneType"),
    ):
        with pytest.raises(TypeError, match=f"Nonsense.* FastV.*, before_attention of layer 0: {message}"):
            run(Nonsense(0.5, answer) + FastV(0.4))


def test_former_chains():
    with pytest.warns(DeprecationWarning, match=r"Chain\(first, second\) is deprecated"):
        chain = Chain(KVTP(0.5), FastV(0.3))
    assert chain.methods == (chain.methods[0], FastV(0.3))
    with pytest.warns(DeprecationWarning, match=r"Chain\(first, second\) is deprecated"):
        assert Chain(first=UniformFrames(0.5), second=FastV(0.3)) == UniformFrames(0.5) + FastV(0.3)
    with pytest.warns(DeprecationWarning, match=r"use Chain.methods\[0\]"):
        assert chain.first is chain.methods[0]
    with pytest.warns(DeprecationWarning, match=r"use Chain.methods\[1\]"):
        assert chain.second is chain.methods[1]


# ---- methods that answer the calls themselves, as those of the last release did

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)

    @dataclass(frozen=True)
    class FormerRandom(BeforeLayers):
        """RandomTokens as it was."""

        budget: float = 0.3
        seed: int = 0

        def before_attention(self, layer, tokens):
            if layer > 0 or self.budget == 1:
                return None
            generator = torch.Generator().manual_seed(self.seed)
            scores = torch.rand(tokens.length, generator=generator).to(tokens.hidden.device)
            return tokens.keep_top(scores.expand_as(tokens.position), max(1, round(self.budget * tokens.num_video)))

    @dataclass(frozen=True)
    class FormerFastV(Method):
        """FastV as it was, with a state that is a method."""

        budget: float = 0.3
        notes: list = field(default_factory=list, compare=False)

        def begin(self, prompt):
            return _FormerPruning(self, prompt)

    class _FormerPruning(Method):
        def __init__(self, method, prompt):
            self.method, self.prompt, self.budget = method, prompt, method.budget

        @property
        def least_budget(self):
            return (2 + 4 / self.prompt.num_video_tokens) / 6

        def wants_attention(self, layer):
            return layer == 1

        def after_attention(self, layer, tokens):
            if layer != 1:
                return None
            self.method.notes.append(layer)
            return tokens.keep_top(tokens.attention(1), round(tokens.num_video * (self.budget * 6 - 2) / 4))

    @dataclass(frozen=True)
    class FormerWindow(Method):
        """StreamingLLM as it was."""

        budget: float = 0.3

        def window(self, length):
            return fftriton.methods.Window(8, max(1, round(self.budget * length) - 8))


@pytest.mark.filterwarnings("ignore:.*MethodState:DeprecationWarning")
def test_former_methods_still_work():
    same(run(FormerRandom(0.4, 3)), run(RandomTokens(0.4, 3)))
    same(run(FormerWindow(0.4)), run(fftriton.StreamingLLM(0.4)))
    former = FormerFastV(0.5)
    same(run(former), run(FastV(0.5)))
    assert former.notes == [1]
    same(run(FormerRandom(0.6) + FormerFastV(0.4)), run(RandomTokens(0.6) + FastV(0.4)))


def test_former_methods_warn():
    with pytest.warns(DeprecationWarning, match="Mine: a Method that defines window, after_attention is deprecated"):

        class Mine(Method):
            window_size: int = 3

            def window(self, length):
                return None

            def after_attention(self, layer, tokens):
                return None

    with pytest.warns(DeprecationWarning, match=r"FormerFastV\(.*: a `begin` that returns a Method is deprecated"):
        run(FormerFastV(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        class Modern(Method):
            window: int = 8  # a parameter of this name is no call

            def begin(self, prompt):
                return MethodState(self, prompt)

        same(run(Modern()), run(KeepAll()))
