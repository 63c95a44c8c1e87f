"""Calls of a reduced model in any order, with errors anywhere: each comes out as by hand, and nothing is left behind.

`make fuzz` goes on for minutes, the suite draws a few. A failure ends with the calls that lead to it.
"""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from by_hand import SPECIAL, decoder_of
from conversations import (
    ERRORS,
    SCRIPTS,
    Conversation,
    Fault,
    Script,
    ScriptState,
    Subject,
    Turn,
    check_forward,
    expected_of,
    more_text,
    subject_of,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from models import behind, snapshot

import fftriton
from fftriton.hf import cache as caches
from fftriton.hf import importance, prefill

LONGEST = 200  # tokens of a conversation, and
MOST = 4  # samples of its batch: computing by hand is slow

scripts = st.sampled_from(SCRIPTS)
seeds = st.integers(0, 99)
counts = st.integers(1, 4)
few = st.lists(st.integers(0, 3), min_size=1, max_size=3)
sides = st.sampled_from(["left", "right"])
calls = st.sampled_from([0, 0, 0, 1, 2, 3])  # most places are called once a forward
faults = st.one_of(
    st.none(),
    st.builds(Fault, st.integers(0, 999), st.integers(0, 2), calls, st.booleans(), st.booleans()),
)
interruptions = st.one_of(st.none(), st.builds(Fault, st.integers(0, 999), st.just(2), calls, st.booleans()))


class Machine(RuleBasedStateMachine):
    """One model, reduced by one script after the other, and KV caches on their way through it."""

    conversations = Bundle("conversations")

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject, self.model = subject, subject.model
        self.living: list[Conversation] = []
        self.places = places_of(subject)
        self.before = snapshot(self.model)

    @initialize(script=scripts)
    def enter(self, script: Script) -> None:
        script = replace(script, proportional=script.proportional and not self.subject.is_recurrent)
        self.script = script
        self.reduction = fftriton.reduce(self.model, script, self.subject.layout)
        self.reduction.__enter__()
        self.inside = snapshot(self.model)
        self.has_reported = self.interrupted = False  # in this thread

    def teardown(self) -> None:
        if hasattr(self, "reduction"):
            self.leave()

    def leave(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing was reduced
            self.reduction.__exit__(None, None, None)
        assert snapshot(self.model) == self.before

    @invariant()
    def caches_agree(self) -> None:
        for conversation in self.living:
            if not conversation.interrupted:
                conversation.check_lengths()

    @invariant()
    def model_is_idle(self) -> None:
        if not self.interrupted:  # else hooks are there until the next forward
            assert snapshot(self.model) == self.inside

    # ---- forwards

    @rule(target=conversations, numbers=few, side=sides, fault=faults)
    def prompt(self, numbers: list[int], side: str, fault: Fault | None) -> Any:
        """A prompt on a new cache."""
        conversation = self.begin()
        inputs, valid, patch = self.subject.batch(numbers, self.side(side))
        self.forward(conversation, inputs, valid, patch, fault)
        return conversation

    @rule(conversation=conversations, count=counts, seed=seeds, told=st.booleans(), fault=faults)
    def say(self, conversation: Conversation, count: int, seed: int, told: bool, fault: Fault | None) -> None:
        """One or several tokens of text. told: whether mask and positions are given."""
        batch = max(conversation.batch, 1)
        ids = more_text(seed, batch, count)
        self.write(conversation, ids, torch.ones_like(ids).bool(), told, fault)

    @rule(conversation=conversations, lengths=st.lists(counts, min_size=MOST, max_size=MOST), seed=seeds, side=sides)
    def say_unequally(self, conversation: Conversation, lengths: list[int], seed: int, side: str) -> None:
        """As many tokens to each sample as it gets, padded."""
        if self.subject.is_recurrent or conversation.batch == 1:
            return
        lengths = lengths[: conversation.batch]
        count = max(lengths)
        places = torch.arange(count)
        number = torch.tensor(lengths)[:, None]
        valid = places >= count - number if side == "left" else places < number
        self.write(conversation, more_text(seed, conversation.batch, count) * valid, valid, True, None)

    def write(
        self, conversation: Conversation, ids: torch.Tensor, valid: torch.Tensor, told: bool, fault: Fault | None
    ) -> None:
        inputs = {"input_ids": ids}
        if conversation.is_padded or not valid.all() or (told and conversation.length > 0):
            inputs |= self.told(conversation, valid)
        self.forward(conversation, inputs, valid, torch.full_like(ids, -1), fault)

    def told(self, conversation: Conversation, valid: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "attention_mask": torch.cat([conversation.valid, valid], 1).long(),
            "position_ids": conversation.next_positions(valid),
        }

    @rule(conversation=conversations, numbers=st.lists(st.integers(0, 3), min_size=MOST, max_size=MOST), fault=faults)
    def show(self, conversation: Conversation, numbers: list[int], fault: Fault | None) -> None:
        """A second turn with videos, or without."""
        if conversation.length > 0 and conversation.batch > 1 and self.subject.has_axes:
            return  # their positions are those of a mask of the prompt alone
        inputs, valid, patch = self.subject.batch(numbers[: max(conversation.batch, 1)], "left")
        if conversation.length > 0:
            inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
            if conversation.is_padded or not valid.all():
                if self.subject.has_axes or self.subject.is_recurrent:
                    return
                inputs["attention_mask"] = torch.cat([conversation.valid, valid], 1).long()
        self.forward(conversation, inputs, valid, patch, fault)

    def side(self, side: str) -> str:
        return "left" if self.subject.is_recurrent else side  # whose states take right padding for tokens

    def begin(self) -> Conversation:
        conversation = self.subject.new_conversation()
        self.living.append(conversation)
        return conversation

    def forward(
        self, conversation: Conversation, inputs: dict[str, Any], valid: torch.Tensor, patch: torch.Tensor,
        fault: Fault | None = None,
    ) -> None:  # fmt: skip
        """One forward, which may fail, and may then be repeated."""
        if conversation.length + valid.shape[1] > LONGEST:
            return
        after = self.after(conversation, inputs, valid, patch)
        report = self.reduction.report
        if fault is not None and self.fails(conversation, inputs, fault):
            if not conversation.interrupted:
                conversation.check_lengths()
                assert snapshot(self.model) == self.inside
            if not fault.repeated:
                return
            report = self.reduction.report
        logits = self.run(conversation, inputs)
        if logits is None:  # recurrent states cannot be taken back
            self.start_again(conversation)
            return
        self.adopt(conversation, after)
        has_video = bool((patch >= 0).any())
        self.has_reported |= has_video
        check_forward(self.subject, conversation, logits, self.reduction.report, conversation.cache)
        if not has_video and (valid.shape[1] > 1 or conversation.length == valid.shape[1]):
            assert self.reduction.report is (report if conversation.reduced else None)

    def after(
        self, conversation: Conversation, inputs: dict[str, Any], valid: torch.Tensor, patch: torch.Tensor
    ) -> Conversation:
        """The conversation behind a forward, but for its cache."""
        turn = self.subject.see(lambda model, cache: model(**inputs, **behind(cache)), conversation)
        return conversation.behind(turn, valid, patch, inputs.get("input_ids"), self.script)

    @staticmethod
    def adopt(conversation: Conversation, after: Conversation) -> None:
        vars(conversation).update(vars(after))
        conversation.interrupted = False

    @torch.no_grad()
    def run(self, conversation: Conversation, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Logits; None where the cache says that it cannot be used any more, as it may after a failure."""
        self.interrupted = False
        with self.subject.with_deltas(conversation):
            try:
                return self.model(**inputs, **behind(conversation.cache)).logits
            except RuntimeError as error:
                self.check_refusal(error)
                return None

    def check_refusal(self, error: RuntimeError) -> None:
        """A forward may refuse a cache whose recurrent states an error has spoilt, and nothing else."""
        if not (self.subject.is_recurrent and "reset it, or take a new one" in str(error)):
            raise error

    def fails(self, conversation: Conversation, inputs: dict[str, Any], fault: Fault) -> bool:
        """Run a forward with an error somewhere; False where the place was not reached, and the cache is as before."""
        owner, name = self.places[fault.place % len(self.places)]
        error = ERRORS[fault.error]
        untouched = copy.deepcopy(conversation.cache)
        with broken(owner, name, error, fault), self.subject.with_deltas(conversation), torch.no_grad():
            try:
                with without_leftovers(self.model):
                    self.model(**inputs, **behind(conversation.cache))
            except error:
                conversation.interrupted = self.interrupted = error is ERRORS[2]
                return True
            except RuntimeError as refusal:
                self.check_refusal(refusal)
        conversation.cache = untouched
        return False

    def start_again(self, conversation: Conversation) -> None:
        fresh = self.subject.new_conversation()
        if not self.subject.is_recurrent:  # whose states keep the size of their batch
            conversation.cache.reset()
            fresh.cache = conversation.cache
        vars(conversation).update(vars(fresh))

    def settle(self, conversation: Conversation, before: Fault | None = None) -> bool:
        """Whether there is something in the cache. What an interrupted forward left there goes when it is used.

        before: of a forward that is interrupted right before.
        """
        if conversation.length == 0:
            return False
        if before is not None:
            ids = more_text(0, conversation.batch, 2)
            told = self.told(conversation, torch.ones_like(ids).bool()) if conversation.is_padded else {}
            self.fails(conversation, {"input_ids": ids} | told, before)
        conversation.interrupted = False
        return True

    # ---- what is done to caches

    @rule(
        conversation=conversations, before=interruptions, count=st.integers(0, 12), negative=st.booleans(),
        then=counts,
    )  # fmt: skip
    def crop(self, conversation: Conversation, before: Fault | None, count: int, negative: bool, then: int) -> None:
        if self.subject.is_recurrent or not self.settle(conversation, before):
            return
        count = max(min(count, conversation.length - max(conversation.fixed, 1)), 0)
        conversation.cache.crop(-count if negative and count else conversation.length - count)
        if count:
            conversation.dense.crop(-count)
        conversation.crop(conversation.length - count)
        self.go_on(conversation, then)

    @rule(conversation=conversations, beyond=counts)
    def crop_too_much(self, conversation: Conversation, beyond: int) -> None:
        if self.subject.is_recurrent or not conversation.reduced or not self.settle(conversation):
            return
        with pytest.raises(ValueError, match="crop: length must be at least"):
            conversation.cache.crop(max(conversation.fixed - beyond, 1))

    @rule(
        conversation=conversations, before=interruptions, rows=few,
        how=st.sampled_from(["reorder_cache", "batch_select_indices"]), then=counts,
    )  # fmt: skip
    def select(self, conversation: Conversation, before: Fault | None, rows: list[int], how: str, then: int) -> None:
        if (self.subject.is_recurrent and how == "batch_select_indices") or not self.settle(conversation, before):
            return
        chosen = torch.tensor([row % conversation.batch for row in rows])
        for cache in (conversation.cache, conversation.dense):
            getattr(cache, how)(chosen)
        conversation.select(chosen)
        self.go_on(conversation, then)

    @rule(conversation=conversations, before=interruptions, times=st.integers(2, 3), then=counts)
    def repeat(self, conversation: Conversation, before: Fault | None, times: int, then: int) -> None:
        if conversation.batch * times > MOST or self.subject.is_recurrent or not self.settle(conversation, before):
            return
        for cache in (conversation.cache, conversation.dense):
            cache.batch_repeat_interleave(times)
        conversation.select(torch.arange(conversation.batch).repeat_interleave(times))
        self.go_on(conversation, then)

    @rule(target=conversations, conversation=conversations, before=interruptions, then=counts)
    def fork(self, conversation: Conversation, before: Fault | None, then: int) -> Any:
        interrupted = conversation.interrupted
        if not self.settle(conversation, before):
            return multiple()
        conversation.interrupted = interrupted or before is not None
        other = replace(conversation, cache=copy.deepcopy(conversation.cache), dense=copy.deepcopy(conversation.dense))
        self.living.append(other)
        self.go_on(other, then)
        return other

    def go_on(self, conversation: Conversation, count: int) -> None:
        """Some text behind what has just been done."""
        ids = more_text(count, conversation.batch, count)
        self.write(conversation, ids, torch.ones_like(ids).bool(), False, None)

    @rule(conversation=conversations, before=interruptions, then=counts)
    def reset(self, conversation: Conversation, before: Fault | None, then: int) -> None:
        self.settle(conversation, before)
        self.start_again(conversation)
        self.go_on(conversation, then)

    @rule(conversation=consumes(conversations))
    def forget(self, conversation: Conversation) -> None:
        self.living = [other for other in self.living if other is not conversation]

    # ---- what must not be done

    @rule(
        conversation=conversations, seed=seeds, count=counts, number=st.one_of(st.none(), st.integers(0, 3)),
        inner=st.integers(0, 3), place=st.integers(0, 999), decoding=st.booleans(),
    )  # fmt: skip
    def call_inside(
        self, conversation: Conversation, seed: int, count: int, number: int | None, inner: int, place: int,
        decoding: bool,
    ) -> None:  # fmt: skip
        """Call the model where it is at work, by a hook or a method: refused, or as if it had been called elsewhere."""
        if conversation.batch > 1 or conversation.length > LONGEST // 2 or conversation.is_padded:
            return
        self.settle(conversation)
        if number is None:
            ids = more_text(seed, 1, count)
            inputs, valid, patch = {"input_ids": ids}, torch.ones_like(ids).bool(), torch.full_like(ids, -1)
        else:
            inputs, valid, patch = self.subject.batch([number], "left")
            inputs.pop("attention_mask")
        other = {"input_ids": more_text(seed, 1, 1)} if decoding else self.subject.batch([inner], "left")[0]
        chosen, was_refused = place % (len(self.callers(self.model)) + 1), False
        with self.calling(self.model, chosen, other):
            try:
                logits = self.run(conversation, inputs)
            except RuntimeError as error:
                if "must not call the model" not in str(error):
                    raise
                was_refused = True
        if was_refused:
            conversation.check_lengths()
            logits = self.run(conversation, inputs)
            after = self.after(conversation, inputs, valid, patch)
        else:  # a call moves what an M-RoPE model keeps, of the plain model, too
            with self.calling(self.subject.untouched, chosen, other):
                after = self.after(conversation, inputs, valid, patch)
        if logits is None:
            self.start_again(conversation)
            return
        self.adopt(conversation, after)
        check_forward(self.subject, conversation, logits, False, conversation.cache)

    @staticmethod
    def callers(model: Any) -> list[Any]:
        """The modules whose hooks may call the model, those of the layers twice as often."""
        return [*(module for layer in decoder_of(model).layers for module in layer.modules()), *model.modules()]

    @contextmanager
    def calling(self, model: Any, chosen: int, inputs: dict[str, Any]) -> Iterator[None]:
        """Let a module's hook call the model once or, behind the last module, the method of a reduced one."""
        busy, modules = [], self.callers(model)

        def call(*_: Any) -> None:
            if not busy:
                busy.append(True)
                self.subject.is_seen = False
                try:
                    with torch.no_grad():
                        model(**inputs)
                finally:
                    self.subject.is_seen = True

        if chosen < len(modules):
            handle = modules[chosen].register_forward_hook(call)
            try:
                yield
            finally:
                handle.remove()
        elif model is self.model:
            self.script.probes.append(call)
            try:
                yield
            finally:
                self.script.probes.clear()
        else:
            yield

    @rule()
    def enter_twice(self) -> None:
        with pytest.raises(RuntimeError, match="being reduced already"):
            fftriton.reduce(self.model, fftriton.KeepAll(), self.subject.layout).install()

    @rule(script=scripts, seed=seeds, number=st.integers(0, 3))
    def leave_and_enter(self, script: Script, seed: int, number: int) -> None:
        """Outside the model is as ever, and a reduced cache is refused; inside again it is read."""
        self.leave()
        for conversation in self.living:
            conversation.interrupted = False
            conversation.check_lengths()
            ids = more_text(seed, conversation.batch, 1)
            valid = torch.ones_like(ids).bool()
            if conversation.length == 0 or conversation.length >= LONGEST:
                continue
            inputs = {"input_ids": ids} | (self.told(conversation, valid) if conversation.is_padded else {})
            if conversation.reduced:
                with pytest.raises(RuntimeError, match="the KV cache holds a reduced prompt"):
                    self.run(conversation, inputs)
                conversation.check_lengths()
                continue
            after = self.after(conversation, inputs, valid, torch.full_like(ids, -1))
            logits = self.run(conversation, inputs)
            if logits is None:
                self.start_again(conversation)
                continue
            self.adopt(conversation, after)
            check_forward(self.subject, conversation, logits, False, conversation.cache)
        inputs, _, _ = self.subject.batch([number], "left")
        with torch.no_grad():
            assert torch.equal(self.model(**inputs).logits, self.subject.untouched(**inputs).logits)
        self.enter(script)

    # ---- generate

    @rule(numbers=few, beams=st.integers(1, 2), steps=st.integers(1, 3))
    def generate(self, numbers: list[int], beams: int, steps: int) -> None:
        """A prompt of its own; the conversations do not notice."""
        numbers = numbers if beams == 1 and not self.subject.is_recurrent else numbers[:1]
        inputs, valid, patch = self.subject.batch(numbers, "left")
        if beams > 1 and transformers.__version__ < "5" and not self.plain_beams_are_right(inputs, steps):
            return
        after = self.after(self.subject.new_conversation(), inputs, valid, patch)
        self.interrupted = False
        out = self.model.generate(
            **inputs, max_new_tokens=steps, num_beams=beams, do_sample=False, suppress_tokens=SPECIAL,
            output_logits=True, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens = out.sequences[:, -steps:]
        if beams == 1:
            self.check_generated(after, torch.stack(out.logits, 1), tokens)
            return
        chosen = self.by_hand(after, tokens).log_softmax(-1).gather(2, tokens[..., None])
        assert abs(chosen.mean() - out.sequences_scores[0]) < self.subject.tolerance

    @torch.no_grad()
    def plain_beams_are_right(self, inputs: dict[str, Any], steps: int) -> bool:
        """Whether transformers itself has the score of two beams right: 4.57 mixes up videos, or cannot split them."""
        if "input_ids" not in inputs:
            return True
        try:
            out = self.subject.untouched.generate(
                **inputs, max_new_tokens=steps, num_beams=2, do_sample=False, suppress_tokens=SPECIAL,
                output_scores=True, return_dict_in_generate=True,
            )  # fmt: skip
        except RuntimeError:
            return False
        tokens = out.sequences[:, -steps:]
        ids = torch.cat([inputs["input_ids"], tokens[:, :-1]], 1)
        whole = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        chosen = self.subject.untouched(**whole).logits[:, -steps:].log_softmax(-1).gather(2, tokens[..., None])
        return bool(abs(chosen.mean() - out.sequences_scores[0]) < self.subject.tolerance)

    @rule(conversation=conversations, seed=seeds, count=counts, steps=st.integers(1, 3))
    def go_on_generating(self, conversation: Conversation, seed: int, count: int, steps: int) -> None:
        """The next turn of a conversation by generate, as its documentation has it: with all ids."""
        if not conversation.alone or bool((conversation.ids < 0).any()) or conversation.length > LONGEST // 2:
            return
        if not self.settle(conversation):
            return
        question = more_text(seed, 1, count)
        ids = torch.cat([conversation.ids, question], 1)
        arguments = {
            "input_ids": ids, "max_new_tokens": steps, "do_sample": False, "suppress_tokens": SPECIAL,
            "output_logits": True, "return_dict_in_generate": True,
        }  # fmt: skip
        turn = self.subject.see(lambda model, cache: model.generate(**arguments, **behind(cache)), conversation)
        self.interrupted = False
        with self.subject.with_deltas(conversation):
            try:
                out = self.model.generate(**arguments, **behind(conversation.cache))
            except RuntimeError as error:
                self.check_refusal(error)
                self.start_again(conversation)
                return
        tokens = out.sequences[:, -steps:]
        said = torch.cat([question, tokens[:, :-1]], 1)
        turn.embeddings = self.subject.decoder.embed_tokens(said).detach()
        nothing = torch.full_like(said, -1)
        after = conversation.behind(turn, torch.ones_like(said).bool(), nothing, said, self.script)
        self.adopt(conversation, after)
        expected = expected_of(self.subject, conversation, 0).logits[-steps:]
        assert (torch.cat(out.logits) - expected).abs().max() < self.subject.tolerance
        conversation.check_lengths()

    def by_hand(self, after: Conversation, tokens: torch.Tensor) -> torch.Tensor:
        """[B, steps, V]: what comes out behind a prompt, and behind it and each of these tokens but the last."""
        rows = [expected_of(self.subject, after, row).logits[-1] for row in range(after.batch)]
        said = tokens[:, :-1]
        if said.shape[1] == 0:
            return torch.stack(rows)[:, None]
        valid = torch.ones_like(said).bool()
        turn = Turn(
            self.subject.decoder.embed_tokens(said).detach(), after.next_positions(valid), [], after.dense, after.deltas
        )
        later = after.behind(turn, valid, torch.full_like(said, -1), said, self.script)
        more = [expected_of(self.subject, later, row).logits for row in range(after.batch)]
        return torch.stack([torch.cat([first[None], rest]) for first, rest in zip(rows, more, strict=True)])

    def check_generated(self, after: Conversation, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        expected = self.by_hand(after, tokens)
        assert (logits - expected).abs().max() < self.subject.tolerance
        expected[..., SPECIAL] = -torch.inf
        chosen = expected.gather(2, tokens[..., None])[..., 0]
        assert (expected.amax(-1) - chosen).max() < self.subject.tolerance

    # ---- threads

    @rule(
        target=conversations, prompts=st.lists(few, min_size=2, max_size=2), turns=st.lists(counts, max_size=2),
        fault=faults,
    )  # fmt: skip
    def threads(self, prompts: list[list[int]], turns: list[int], fault: Fault | None) -> Any:
        """Two at once, each with a cache of its own; the forwards of the first may fail."""
        if self.subject.name.startswith("llava") and transformers.__version__ < "5":
            return multiple()  # two threads in its vision encoder exchange the forwards that it wraps for a call
        jobs = [self.job(numbers[:2], turns, seed) for seed, numbers in enumerate(prompts)]
        start, results = threading.Barrier(2), {}
        own = self.reduction.report

        def work(index: int) -> None:
            start.wait()
            cache, inputs, _ = jobs[index]
            for arguments in inputs:
                if index == 0 and fault is not None and not self.subject.is_recurrent:
                    self.fail_here(cache, arguments, fault)
                with torch.no_grad():
                    logits = self.model(**arguments, **behind(cache)).logits
                lengths = {layer.get_seq_length() for layer in cache.layers if hasattr(layer, "keys")}
                results.setdefault(index, []).append((logits, lengths, self.reduction.report))

        workers = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        pause = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            sys.setswitchinterval(pause)
        assert snapshot(self.model) == self.inside or self.interrupted
        for index, (cache, inputs, stages) in enumerate(jobs):
            assert len(results[index]) == len(inputs)
            for stage, (logits, _, report) in zip(stages, results[index], strict=True):
                check_forward(self.subject, stage, logits, report, None)
            stages[-1].cache = cache
            check_forward(self.subject, stages[-1], results[index][-1][0], False, cache)
            self.living.append(stages[-1])
        if self.has_reported:
            assert self.reduction.report is own
        return multiple(*(stages[-1] for _, _, stages in jobs))

    def job(self, numbers: list[int], turns: list[int], seed: int) -> tuple[Any, list[dict], list[Conversation]]:
        """A new cache, the arguments of each forward, and the conversation behind each."""
        conversation = self.subject.new_conversation()
        inputs, valid, patch = self.subject.batch(numbers, "left")
        every, stages = [inputs], [self.after(conversation, inputs, valid, patch)]
        for count in turns:
            ids = more_text(seed, len(numbers), count)
            valid = torch.ones_like(ids).bool()
            # with positions, for the M-RoPE models keep one offset for all threads
            every.append({"input_ids": ids, **self.told(stages[-1], valid)})
            stages.append(self.after(stages[-1], every[-1], valid, torch.full_like(ids, -1)))
        return conversation.cache, every, stages

    def fail_here(self, cache: Any, arguments: dict[str, Any], fault: Fault) -> None:
        """Let this thread's forward fail at the fault's place; where it is not reached, nothing happens."""
        owner, name = self.places[fault.place % len(self.places)]
        given = copy.deepcopy(cache)
        error = ERRORS[fault.error % 2]
        with broken(owner, name, error, fault), torch.no_grad():
            try:
                self.model(**arguments, **behind(cache))
            except error:
                return
        cache.layers = given.layers


def places_of(subject: Subject) -> list[tuple[Any, str]]:
    """What can fail: every module, the method, what it is built from, the cache."""
    text = [(module, "forward") for layer in decoder_of(subject.model).layers for module in layer.modules()]
    modules = [(module, "forward") for module in subject.model.modules() if type(module) is not torch.nn.ModuleList]
    ours = [
        (importance, "attention_column_sum"), (ScriptState, "before_attention"), (ScriptState, "after_attention"),
        (ScriptState, "merge"), (caches.ReducedLayer, "update"),
        (prefill.Prefill, "_pack"), (prefill.Prefill, "finish"),
    ]  # fmt: skip
    return [*text, *text, *modules, *ours * (len(modules) // 20)]


@contextmanager
def broken(owner: Any, name: str, error: type[BaseException], fault: Fault) -> Iterator[None]:
    """Let a function fail once, in this thread."""
    thread, calls = threading.get_ident(), []
    original: Callable = getattr(owner, name)
    was = vars(owner).get(name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        mine = threading.get_ident() == thread
        if mine:
            calls.append(True)
        due = mine and len(calls) == fault.call + 1
        if due and not fault.late:
            raise error("injected by the test")
        result = original(*args, **kwargs)
        if due:
            raise error("injected by the test")
        return result

    setattr(owner, name, fails)
    try:
        yield
    finally:
        if was is None:
            delattr(owner, name)
        else:
            setattr(owner, name, was)


@contextmanager
def without_leftovers(model: torch.nn.Module) -> Iterator[None]:
    """transformers 4 wraps the forwards of a vision tower's layers, and leaves them wrapped if one fails."""
    forwards = {module: vars(module).get("forward") for module in model.modules()}
    try:
        yield
    except BaseException:
        for module, forward in forwards.items():
            if vars(module).get("forward") is not forward and transformers.__version__ < "5":
                module.__dict__.pop("forward") if forward is None else module.__dict__.update(forward=forward)
        raise


SUBJECTS = [
    ("qwen2", "sdpa"), ("qwen2", "eager"), ("qwen2_vl", "sdpa"), ("qwen3_vl", "eager"), ("llava_onevision", "sdpa"),
    ("qwen3_5", "sdpa"),
]  # fmt: skip


@pytest.mark.fuzz
@pytest.mark.parametrize(("name", "attention"), SUBJECTS, ids=["-".join(subject) for subject in SUBJECTS])
def test_any_order_of_calls(name: str, attention: str) -> None:
    subject = subject_of(name, attention)
    steps = 12 if settings.default.derandomize else 40
    run_state_machine_as_test(lambda: Machine(subject), settings=settings(stateful_step_count=steps, max_examples=8))


HALF_WRITTEN = Fault(place=0, error=2, late=True)  # Ctrl-C behind the first layer


@pytest.mark.parametrize("before", [None, HALF_WRITTEN], ids=["", "interrupted"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "proportional"), [("qwen2", False), ("qwen2_vl", False), ("qwen2_vl", True)])
def test_one_order_of_calls(name: str, proportional: bool, side: str, before: Fault | None) -> None:
    """What a few examples draw too seldom: samples of different lengths in caches that are changed."""
    state = Machine(subject_of(name, "sdpa"))
    state.enter(replace(SCRIPTS[0], proportional=proportional))
    try:
        conversation = state.prompt([1, 2], side, None)
        copied = state.fork(conversation, before, 1)
        state.repeat(copied, before, 2, 1)
        state.crop(copied, before, 2, True, 3)
        state.crop(copied, before, 2, True, 1)
        state.say_unequally(copied, [1, 3, 2, 1], 7, "left")
        state.select(copied, before, [3, 0, 2], "batch_select_indices", 1)
        state.say_unequally(conversation, [3, 1], 5, side)
        state.select(conversation, before, [1, 0], "reorder_cache", 2)
        state.leave_and_enter(SCRIPTS[1], 0, 1)
        state.crop(conversation, before, 1, False, 1)
        state.reset(copied, before, 2)
        state.caches_agree()
    finally:
        state.teardown()


@pytest.mark.parametrize("kept", ["itself", "a copy", "a pickle"])
@pytest.mark.parametrize("place", ["first layer", "head"])
@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_interrupted_forward_is_gone_for_whoever_asks(name: str, place: str, kept: str) -> None:
    """generate asks a cache for its length before any module is called."""
    state = Machine(subject_of(name, "sdpa"))
    state.enter(SCRIPTS[0])
    try:
        conversation = state.prompt([1], "left", None)
        owner = state.model.lm_head if place == "head" else decoder_of(state.model).layers[0]
        number = state.places.index((owner, "forward"))
        state.settle(conversation, Fault(number, 2, late=True))
        if kept != "itself":
            copied = {"a copy": copy.deepcopy, "a pickle": lambda cache: pickle.loads(pickle.dumps(cache))}
            conversation.cache = copied[kept](conversation.cache)
        state.go_on_generating(conversation, 1, 2, 2)
        assert conversation.length > state.subject.samples[1].inputs["input_ids"].shape[1]
    finally:
        state.teardown()


@pytest.mark.parametrize("name", ["qwen2", "qwen2_vl"])
def test_head_may_call_the_model(name: str) -> None:
    """The decoder is through by then, and what it wrote stays."""
    state = Machine(subject_of(name, "sdpa"))
    state.enter(SCRIPTS[0])
    try:
        conversation = state.prompt([1], "left", None)
        modules = state.callers(state.model)
        for decoding in (False, True):
            state.call_inside(conversation, 1, 2, None, 1, modules.index(state.model.lm_head), decoding)
        state.caches_agree()
    finally:
        state.teardown()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_5"])
def test_refusal_outside_changes_nothing(name: str) -> None:
    """Recurrent layers change their states before the first attention layer is reached."""
    state = Machine(subject_of(name, "sdpa"))
    state.enter(SCRIPTS[0])
    try:
        conversation = state.prompt([1], "left", None)
        assert conversation.reduced
        state.leave_and_enter(SCRIPTS[0], 0, 0)
        state.go_on(conversation, 2)
        assert conversation.length > state.subject.samples[1].inputs["input_ids"].shape[1]
    finally:
        state.teardown()


@pytest.mark.parametrize("error", [0, 2], ids=["exception", "interrupt"])
def test_failed_prompt_leaves_a_cache_for_any_batch(error: int) -> None:
    """Recurrent states keep the size of their batch when they are reset."""
    state = Machine(subject_of("qwen3_5", "sdpa"))
    state.enter(SCRIPTS[0])
    try:
        number = state.places.index((state.model.lm_head, "forward"))
        conversation = state.prompt([1, 2], "left", Fault(number, error, repeated=False))
        assert conversation.length == 0
        for count in (3, 1):
            state.say(conversation, count, 0, False, None)
        assert (conversation.batch, conversation.length) == (1, 4)
    finally:
        state.teardown()
