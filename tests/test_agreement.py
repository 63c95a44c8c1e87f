"""How answers are compared: one forward says what generating says, and the distances are those of their formulas."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import fftriton
from fftriton.evaluate.agreement import DenseAnswer, OneForward, compare_steps
from fftriton.evaluate.plan import Setting
from fftriton.needle import generate_sample
from fftriton.runtime.forcing import Steps, append_answer, generate_steps
from fftriton.runtime.target import Target, to_model

N = 6  # tokens of an answer; the shipped model says one and goes on with nonsense


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return Target().load_model()


@pytest.fixture(scope="module")
def inputs(model):
    sample = generate_sample("easy", 0, 3)
    return to_model(Target().load_processor()(sample.video, sample.question), model)


@pytest.fixture
def penalty(model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 3.0)


def steps(logits, tokens=None) -> Steps:
    logits = torch.tensor(logits)
    return Steps(logits.argmax(-1) if tokens is None else torch.tensor(tokens), logits, logits)


def test_distances_by_hand():
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]), torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.6, 0.2]])
    found = compare_steps(steps(p.log().tolist()), steps(q.log().tolist()))
    assert (found.same, found.first_difference, found.tokens) == (False, 1, 2)
    assert found.overlap == pytest.approx(1 - (0.1 + 0.35) / 2)
    assert found.kl == pytest.approx((p * (p / q).log()).sum().item() / 2)
    assert found.loss == pytest.approx((0.0 + 0.5 - 0.25) / 2)
    again = compare_steps(steps(p.log().tolist()), steps(p.log().tolist()))
    assert (again.same, again.first_difference, again.overlap, again.kl, again.loss) == (True, None, 1.0, 0.0, 0.0)


def test_impossible_tokens_do_not_spoil_the_divergence():
    found = compare_steps(steps([[0.0, -torch.inf]]), steps([[0.0, 0.0]]))
    assert found.kl == pytest.approx(torch.log(torch.tensor(2.0)).item())
    assert found.overlap == pytest.approx(0.5)


@pytest.mark.parametrize(
    "method", ["keep-all", "framefusion", "fastv", "streamingllm", "uniformframes", "randomtokens"]
)
@pytest.mark.parametrize("penalised", [False, True], ids=["plain", "penalty"])
def test_one_forward_says_what_generating_says(model, inputs, method, penalised, request):
    """Up to where the free answer leaves the dense one, generating and both ways of forcing give the same logits."""
    if penalised:
        request.getfixturevalue("penalty")
    with torch.no_grad():
        dense = DenseAnswer(model, inputs, N)
        assert dense.is_plain
        assert len(dense.steps.tokens) == N
        way = Setting(method, 1.0 if method == "keep-all" else 0.5).method()
        slow, report = dense.under(way)
        quick, same_report = dense.under(way, one_forward=True)
        with fftriton.reduce(model, way):
            free = generate_steps(model, inputs, N)
    for name in ("logits", "scores"):
        torch.testing.assert_close(getattr(quick, name), getattr(slow, name), atol=1e-3, rtol=1e-3)
    assert torch.equal(quick.tokens, slow.tokens)
    if report.window is None:  # the answer has no part in what is kept
        assert report.vision_tokens_per_layer == same_report.vision_tokens_per_layer
    agreement = dense.compare(quick)
    known = N if agreement.same else agreement.first_difference + 1
    assert torch.equal(free.tokens[:known], quick.tokens[:known])
    assert torch.equal(free.tokens, dense.steps.tokens) == agreement.same


def test_a_penalty_changes_the_answer(model, inputs, penalty):
    """Otherwise the test above would compare nothing."""
    with torch.no_grad():
        found = generate_steps(model, inputs, N)
    assert not torch.equal(found.scores, found.logits)
    assert not torch.equal(found.tokens, found.logits.argmax(-1))


def test_other_logits_processors_need_generating(model, inputs, monkeypatch):
    monkeypatch.setattr(model.generation_config, "no_repeat_ngram_size", 1)
    with torch.no_grad():
        dense = DenseAnswer(model, inputs, N)
        assert not dense.is_plain
        forwards = count_prompts(model)
        found, _ = OneForward(model).under(dense, "keep-all", fftriton.KeepAll())
    forwards.handle.remove()
    assert len(forwards.lengths) == N  # token by token
    assert dense.compare(found).same


def count_prompts(model):
    """Lengths of the inputs of the decoder's first layer, as they come."""
    seen = SimpleNamespace(lengths=[])
    layer = model.get_decoder().layers[0]
    seen.handle = layer.register_forward_pre_hook(lambda module, arguments: seen.lengths.append(arguments[0].shape[1]))
    return seen


def test_a_method_that_reads_the_answer_is_found_out(model, inputs):
    """Both ways are compared once; where they differ, the method generates from then on."""

    class Fickle(DenseAnswer):
        def under(self, method, one_forward=False):
            self.calls.append(one_forward)
            return super().under(fftriton.KeepAll() if one_forward else method, one_forward)

    with torch.no_grad():
        dense = Fickle(model, inputs, N)
        dense.calls, ways = [], OneForward(model)
        few = Setting("uniformframes", 0.05).method()
        first, _ = ways.under(dense, "few", few)
        assert dense.calls == [True, False]
        torch.testing.assert_close(first.logits, dense.under(few)[0].logits)
        dense.calls.clear()
        second, _ = ways.under(dense, "few", few)
        assert dense.calls == [False]
        torch.testing.assert_close(first.logits, second.logits)
        dense.calls.clear()
        ways.under(dense, "all", fftriton.KeepAll())
        ways.under(dense, "all", fftriton.KeepAll())
        assert dense.calls == [True, False, True]


def test_an_answer_of_one_token_needs_no_second_look(model, inputs):
    with torch.no_grad():
        dense, forwards = DenseAnswer(model, inputs, 1), count_prompts(model)
        OneForward(model).under(dense, "keep-all", fftriton.KeepAll())
    forwards.handle.remove()
    assert forwards.lengths == [inputs["input_ids"].shape[1]]


def test_any_tokens_can_be_forced(model, inputs):
    tokens = torch.tensor([3, 4, 5])
    with torch.no_grad():
        forced, appended = generate_steps(model, inputs, 0, forced=tokens), append_answer(model, inputs, tokens)
    torch.testing.assert_close(forced.logits, appended.logits, atol=1e-3, rtol=1e-3)


def test_a_prompt_without_a_video_is_refused(model):
    ids = torch.tensor([[1, 9, 10, 11]])
    with torch.no_grad(), pytest.raises(ValueError, match="model must get a prompt with a video"):
        DenseAnswer(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 1)
