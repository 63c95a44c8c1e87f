"""Conversations with a reduced model, each with what it takes to compute it by hand: no cache, no hooks.

What a decoder gets is seen on an untouched copy of the model; which tokens are left, and what comes out, is written out
by `by_hand.ByHand`, here for turns that had different scripts.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from by_hand import SPECIAL, ByHand, Scripted, ScriptedState, decoder_of, patches
from families import FAMILIES, collate
from models import tiny_qwen2, video_embeddings
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import fftriton

TOLERANCE = 1e-4
OF_RECURRENT = 3e-3  # rounding alone: single tokens were 6e-4 off, their neighbours 1e-6; mistakes were above 1


@dataclass(frozen=True)
class Script(Scripted):
    """A scripted reduction that also asks for attention, and does what the test tells it.

    Args:
        listens: the layers whose attention it asks for.
        probes: called before each layer's attention.
    """

    listens: tuple = ()
    probes: list = field(default_factory=list, compare=False)

    def begin(self, prompt):
        return ScriptState(self, prompt)


class ScriptState(ScriptedState):
    def wants_attention(self, layer):
        return layer in self.method.listens

    def before_attention(self, layer, tokens):
        for probe in self.method.probes:
            probe()
        return super().before_attention(layer, tokens)

    def after_attention(self, layer, tokens):
        if tokens.attention is not None and layer in self.method.listens:
            received = tokens.attention(None)
            assert received.shape == tokens.position.shape
            assert 0 < received.sum() <= tokens.length * 1.001
        return super().after_attention(layer, tokens)


NOTHING = Script((), (), ())
SCRIPTS = [
    Script(listens=(1,)),
    Script((), (), (1,)),
    Script((2,), (), (), listens=(0, 3)),
    Script((0,), (3,), (2,)),
    Script((1, 2), (0,), (4,)),
    Script(listens=(1,), proportional=True),
    Script((0,), (3,), (2,), proportional=True),
    NOTHING,
]


@dataclass(frozen=True)
class Sample:
    """One prompt, without padding.

    Args:
        inputs: a forward's arguments.
        patch: of each place, -1 for text.
    """

    inputs: dict[str, Tensor]
    patch: list[int]

    @property
    def has_video(self) -> bool:
        return max(self.patch) >= 0


class Subject:
    """What is reduced: a model, its untouched copy, samples of it, and where their videos stand."""

    def __init__(self, name: str, attention: str) -> None:
        self.name = name
        self.model = tiny_qwen2(attention=attention) if name == "qwen2" else FAMILIES[name].model(attention)
        self.untouched = copy.deepcopy(self.model)
        self.decoder = decoder_of(self.untouched)
        self.layout: Callable | None = self._find if name == "qwen2" else None
        self._known: dict[float, list[fftriton.VideoLayout]] = {}
        self.samples = self._embedded() if name == "qwen2" else self._with_pixels()
        self.is_recurrent = not all(hasattr(layer, "self_attn") for layer in self.decoder.layers)
        self.tolerance = OF_RECURRENT if self.is_recurrent else TOLERANCE
        self.is_seen = True  # whether `see` takes notice of a call
        self.has_axes = hasattr(self._inner(self.model), "rope_deltas")

    @staticmethod
    def _inner(model: Any) -> Any:
        return getattr(model, "model", model)

    # ---- samples

    def _embedded(self) -> list[Sample]:
        """Embeddings of 0, 1 and 2 videos; the first channel of the first token says which."""
        shapes = [(), ((4, 5),), ((3, 4), (4, 3)), ((2, 6),)]
        samples = []
        for seed, videos in enumerate(shapes):
            text = torch.randn(1, 6 + seed, 64, generator=torch.Generator().manual_seed(seed))
            parts, layouts, start = [text], [], text.shape[1]
            for frames, count in videos:
                video, (layout,) = video_embeddings(frames, count, seed=seed)
                layouts.append(fftriton.VideoLayout(layout.positions + start))
                parts.append(video)
                start += video.shape[1]
            embeddings = torch.cat(parts, 1)
            self._known[float(embeddings[0, 0, 0])] = layouts
            inputs = {"inputs_embeds": embeddings, "attention_mask": torch.ones(1, start, dtype=torch.int64)}
            samples.append(Sample(inputs, patches(layouts, start)))
        return samples

    def _find(self, model: Any, arguments: dict[str, Any]) -> list[fftriton.VideoLayout]:
        embeddings = arguments.get("inputs_embeds")
        found = []
        for row, tokens in enumerate(() if embeddings is None else embeddings):
            first = int(tokens[:, 0].nonzero()[0])
            for layout in self._known.get(float(tokens[first, 0]), ()):
                found.append(fftriton.VideoLayout(layout.positions + first, row))
        return found

    @torch.no_grad()
    def _with_pixels(self) -> list[Sample]:
        family, samples = FAMILIES[self.name], []
        frames = 4 if self.name.startswith("llava") else 3  # whose batches cannot mix numbers of frames
        for seed, (videos, image) in enumerate([((), False), ((4,), False), ((4, frames), True), ((), True)]):
            inputs = family.inputs(videos, image, seed)
            layouts = []
            if videos:
                with fftriton.reduce(self.model, fftriton.KeepAll()) as reduction:
                    self.model(**inputs)
                layouts = reduction.report.layouts
            samples.append(Sample(inputs, patches(layouts, inputs["input_ids"].shape[1])))
        return samples

    # ---- what a decoder gets

    @contextmanager
    def with_deltas(self, conversation: Conversation) -> Iterator[None]:
        """The M-RoPE models keep the offset of their last prompt's positions: each conversation has its own."""
        for model in (self.model, self.untouched):
            if self.has_axes:
                self._inner(model).rope_deltas = conversation.deltas
        yield

    def see(self, run: Callable[[Any, DynamicCache], Any], conversation: Conversation) -> Turn:
        """What the decoder of the untouched copy gets in run(model, cache), and the copy's cache behind it."""
        cache, calls = copy.deepcopy(conversation.dense), []

        def note_input(_: Any, args: tuple, given: dict[str, Any]) -> None:
            if self.is_seen:
                calls.append(dict(given))

        def note_positions(_: Any, args: tuple, given: dict[str, Any]) -> None:
            if self.is_seen:
                calls[-1].update(rotary=given.get("position_ids", args[-1]))

        hooks = [
            self.decoder.register_forward_pre_hook(note_input, with_kwargs=True),
            self.decoder.rotary_emb.register_forward_pre_hook(note_positions, with_kwargs=True),
        ]
        try:
            with torch.no_grad(), self.with_deltas(conversation):
                run(self.untouched, cache)
        finally:
            for hook in hooks:
                hook.remove()
        parts = []
        for call in calls:
            embeddings = call.get("inputs_embeds")
            if embeddings is None:
                embeddings = self.decoder.embed_tokens(call["input_ids"])
            batch, length = embeddings.shape[:2]
            axes = (3,) if self.has_axes else ()
            positions = call["rotary"].expand(*axes, batch, length)
            additions = []
            for features in call.get("deepstack_visual_embeds") or ():
                additions.append(torch.zeros_like(embeddings))
                additions[-1][call["visual_pos_masks"]] = features
            parts.append((embeddings, positions, additions))
        depth = max(len(additions) for _, _, additions in parts)
        deltas = self._inner(self.untouched).rope_deltas if self.has_axes else None
        return Turn(
            torch.cat([embeddings for embeddings, _, _ in parts], 1).detach(),
            torch.cat([positions for _, positions, _ in parts], -1),
            [
                torch.cat([_level(additions, level, embeddings) for embeddings, _, additions in parts], 1)
                for level in range(depth)
            ],
            cache, None if deltas is None else deltas.clone(),
        )  # fmt: skip

    def new_conversation(self) -> Conversation:
        config = self.decoder.config
        return Conversation(DynamicCache(config=config), DynamicCache(config=config))

    def batch(self, numbers: Sequence[int], side: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The inputs of some samples together, which places [B, N] are no padding, and their patches [B, N]."""
        samples = [self.samples[number % len(self.samples)] for number in numbers]
        inputs = collate([sample.inputs for sample in samples], side)
        valid = inputs["attention_mask"].bool()
        patch = torch.full(valid.shape, -1)
        for row, sample in enumerate(samples):
            patch[row, valid[row]] = torch.tensor(sample.patch)
        return inputs, valid, patch


def _level(additions: list[Tensor], level: int, embeddings: Tensor) -> Tensor:
    return additions[level] if level < len(additions) else torch.zeros_like(embeddings)


@dataclass
class Turn:
    """What the decoder got: embeddings [B, N, D], position ids, additions; and what the untouched copy keeps."""

    embeddings: Tensor
    positions: Tensor
    additions: list[Tensor]
    dense: DynamicCache
    deltas: Tensor | None


@dataclass
class Conversation:
    """A KV cache and all that its tokens have been.

    Args:
        cache: of the model that is reduced.
        dense: of the untouched copy.
        embeddings, positions, additions: [B, T, D], [..., B, T] and [B, T, D] each, what the decoder got.
        valid, patch, ids: [B, T]; ids are -1 where embeddings were given.
        turns: where each forward began, and with which script.
        deltas: of the M-RoPE models.
        reduced: whether a layer holds fewer tokens than there were.
        fixed: the length that it cannot be cropped to less than.
        interrupted: whether a KeyboardInterrupt has left the cache as it is until the next forward.
        alone: whether nothing was ever padded, nor other samples beside it.
    """

    cache: DynamicCache
    dense: DynamicCache
    embeddings: Tensor | None = None
    positions: Tensor | None = None
    additions: list[Tensor] = field(default_factory=list)
    valid: Tensor = field(default_factory=lambda: torch.ones(1, 0, dtype=torch.bool))
    patch: Tensor = field(default_factory=lambda: torch.ones(1, 0, dtype=torch.int64))
    ids: Tensor = field(default_factory=lambda: torch.ones(1, 0, dtype=torch.int64))
    turns: list[tuple[int, Script]] = field(default_factory=list)
    deltas: Tensor | None = None
    reduced: bool = False
    fixed: int = 0
    interrupted: bool = False
    alone: bool = True

    @property
    def batch(self) -> int:
        return len(self.valid)

    @property
    def length(self) -> int:
        return self.valid.shape[1]

    @property
    def is_padded(self) -> bool:
        return not bool(self.valid.all())

    def behind(self, turn: Turn, valid: Tensor, patch: Tensor, ids: Tensor | None, script: Script) -> Conversation:
        """The conversation with one more forward of [B, N] tokens. Where it stood alone before, it gets its batch."""
        if self.length == 0:
            self = replace(self, valid=valid[:, :0], patch=patch[:, :0], ids=patch[:, :0])
        embeddings = turn.embeddings[:, :0] if self.embeddings is None else self.embeddings
        positions = turn.positions[..., :0] if self.positions is None else self.positions
        depth = max(len(self.additions), len(turn.additions))
        additions = [
            (_level(self.additions, level, embeddings), _level(turn.additions, level, turn.embeddings))
            for level in range(depth)
        ]
        has_video = bool((patch >= 0).any())
        tail = _tail(valid, patch) if has_video else 0
        return replace(
            self,
            dense=turn.dense, deltas=turn.deltas,
            embeddings=torch.cat([embeddings, turn.embeddings], 1),
            positions=torch.cat([positions, turn.positions], -1),
            additions=[torch.cat(pair, 1) for pair in additions],
            valid=torch.cat([self.valid, valid], 1), patch=torch.cat([self.patch, patch], 1),
            ids=torch.cat([self.ids, torch.full_like(patch, -1) if ids is None else ids], 1),
            alone=self.alone and len(valid) == 1 and bool(valid.all()),
            turns=[*self.turns, (self.length, script if has_video else NOTHING)],
            fixed=self.length + valid.shape[1] - tail if has_video and script != NOTHING else self.fixed,
        )  # fmt: skip

    def select(self, rows: Tensor) -> None:
        """Keep these samples, [n] int64."""
        self.embeddings, self.valid, self.patch, self.ids = (
            part[rows] for part in (self.embeddings, self.valid, self.patch, self.ids)
        )
        self.positions, self.alone = self.positions[..., rows, :], self.alone and len(rows) == 1
        self.additions = [part[rows] for part in self.additions]
        if self.deltas is not None and len(self.deltas) > 1:
            self.deltas = self.deltas[rows]

    def crop(self, length: int) -> None:
        """Forget all from `length` on."""
        self.embeddings, self.valid, self.patch, self.ids = (
            part[:, :length] for part in (self.embeddings, self.valid, self.patch, self.ids)
        )
        self.positions = self.positions[..., :length]
        self.additions = [part[:, :length] for part in self.additions]
        self.turns = [(start, script) for start, script in self.turns if start < length]

    def next_positions(self, valid: Tensor) -> Tensor:
        """The position ids of [B, N] more text tokens: each sample counts on from its last."""
        last = self.positions.masked_fill(~self.valid, -1).amax(-1)
        last = last.amax(0) if last.ndim == 2 else last
        more = (last[:, None] + valid.cumsum(1)).clamp_min(0)
        return more.expand(*self.positions.shape[:-2], *more.shape)

    def check_lengths(self) -> None:
        """That every layer of the cache stands for all tokens."""
        lengths = [layer.get_seq_length() for layer in self.cache.layers if isinstance(layer, DynamicLayer)]
        assert set(lengths) <= {self.length}, f"{self.length} tokens, but the layers stand for {lengths}"
        assert self.cache.get_seq_length() == self.length


def _tail(valid: Tensor, patch: Tensor) -> int:
    """How many tokens at the end follow the last video of every sample."""
    tails = []
    for row in range(len(valid)):
        places = (patch[row] >= 0).nonzero()
        last = int(places[-1]) + 1 if len(places) else 0
        tails.append(valid.shape[1] - last if valid[row, -1] else 0)
    return min(tails)


# ---- by hand


class ByTurns(ByHand):
    """The same by hand, where each turn has its own script."""

    def __init__(self, model, patch, scripts):
        super().__init__(model, patch, sorted(scripts))
        self.scripts, self.active = scripts, frozenset()

    def patch_of(self, place):
        return super().patch_of(place) if self.start_of(place) in self.active else -1

    def is_proportional(self, place):
        """Whether what merges in a turn has a size."""
        return self.scripts[self.start_of(place)].proportional

    def __call__(self, embeddings, position_ids, additions):
        """[1, N, D] -> the hidden states [n, D] behind the last layer, their positions, and those in each attention."""
        hidden, position, additions = embeddings, list(range(embeddings.shape[1])), list(additions)
        rotary, seen, sizes = self.decoder.rotary_emb(embeddings, position_ids), [], [1] * len(position)

        def reduce(where, change):
            nonlocal hidden, position, additions, sizes
            self.active = frozenset(start for start, script in self.scripts.items() if where(script))
            if not self.active:
                return
            groups = change(position)
            hidden, *additions = (
                torch.stack([part[0, rows].mean(0) for rows in groups])[None] for part in (hidden, *additions)
            )
            sizes = [
                sum(sizes[row] for row in rows) if self.is_proportional(position[rows[0]]) else sizes[rows[0]]
                for rows in groups
            ]
            position = [position[rows[0]] for rows in groups]

        for index, layer in enumerate(self.decoder.layers):
            reduce(lambda script, at=index: at in script.merge_before, self.merge)
            seen.append(position)
            hidden = hidden + self.mix(layer, layer.input_layernorm(hidden), position, rotary, sizes)
            reduce(lambda script, at=index: at in script.merge_after, self.merge)
            reduce(lambda script, at=index: at in script.drop_after and at not in script.merge_after, self.drop)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            if index < len(additions):
                hidden = hidden + additions[index]
        return hidden[0], position, seen


@dataclass(frozen=True)
class Expected:
    """One sample of a forward by hand.

    Args:
        places: [n] where its tokens stand in the forward's padded row.
        logits: [n, V], zeros for tokens that left.
        seen: for each layer, the places in the forward of the tokens in its attention.
        left: the places that are left in the end.
        rows: for each layer, how many rows its cache has for the sample, all turns together.
        patch: [n].
    """

    places: Tensor
    logits: Tensor
    seen: list[list[int]]
    left: list[int]
    rows: list[int]
    patch: list[int]


@torch.no_grad()
def expected_of(subject: Subject, conversation: Conversation, row: int) -> Expected:
    """One sample of the conversation's last turn."""
    valid = conversation.valid[row]
    start = conversation.turns[-1][0]
    counts = [int(valid[:begin].sum()) for begin, _ in conversation.turns]
    scripts = {count: script for count, (_, script) in zip(counts, conversation.turns, strict=True)}
    rotary = conversation.positions[..., row : row + 1, :][..., valid]
    patch = conversation.patch[row, valid].tolist()
    hidden, position, seen = ByTurns(subject.untouched, patch, scripts)(
        conversation.embeddings[row : row + 1, valid], rotary,
        [part[row : row + 1, valid] for part in conversation.additions],
    )  # fmt: skip
    first = counts[-1]
    places = valid[start:].nonzero()[:, 0]
    logits = subject.untouched.lm_head(subject.decoder.norm(hidden))
    full = torch.zeros(len(places), logits.shape[-1])
    new = [number for number, place in enumerate(position) if place >= first]
    full[[position[number] - first for number in new]] = logits[new]

    def in_forward(positions):
        return [int(places[place - first]) for place in positions if place >= first]

    return Expected(
        places, full, [in_forward(layer) for layer in seen], in_forward(position), [*map(len, seen)], patch[first:]
    )


def check_forward(
    subject: Subject, conversation: Conversation, logits: Tensor, report: Any, cache: DynamicCache | None
) -> None:
    """That logits [B, N, V], the cache and, where the turn had a video, the report are as by hand."""
    start = conversation.turns[-1][0]
    has_video = bool((conversation.patch[:, start:] >= 0).any())
    every = [expected_of(subject, conversation, row) for row in range(conversation.batch)]
    for row, expected in enumerate(every):
        error = (logits[row, expected.places] - expected.logits).abs().max()
        assert error < subject.tolerance, f"sample {row} is {error:.2g} off what comes out by hand"
    if cache is not None:
        conversation.check_lengths()
        for number, layer in enumerate(cache.layers):
            if isinstance(layer, DynamicLayer):
                rows = [expected.rows[number] for expected in every]
                conversation.reduced |= any(
                    count < int(valid.sum()) for count, valid in zip(rows, conversation.valid, strict=True)
                )
                held = layer.keys.shape[-2]
                assert held == rows[0] or not conversation.alone
                assert held >= max(rows)
    if has_video and report is not False:
        samples = getattr(report, "samples", [report])
        assert len(samples) == len(every)
        for sample, expected in zip(samples, every, strict=True):
            check_report(sample, expected)


def check_report(report: Any, expected: Expected) -> None:
    """That the report says of one sample what happened by hand."""
    assert report is not None
    patch = {int(place): number for place, number in zip(expected.places, expected.patch, strict=True)}
    video = sum(number >= 0 for number in expected.patch)
    assert (report.num_tokens, report.num_video_tokens) == (len(patch), video)
    assert [kept.tolist() for kept in report.kept_positions] == expected.seen
    counts = [sum(patch[place] >= 0 for place in layer) for layer in expected.seen]
    assert report.vision_tokens_per_layer == counts
    assert report.rows_per_layer == report.tokens_per_layer == [*map(len, expected.seen)]
    assert abs(report.budget_achieved - (sum(counts) / (len(counts) * video) if video else 1)) < 1e-6
    gone = [place for step in report.merge_steps for place in step.merged.tolist()] + report.pruned.tolist()
    assert sorted(gone + expected.left) == sorted(patch)


# ---- faults


class InjectedError(RuntimeError):
    """A RuntimeError that the test has put somewhere."""


class InjectedMemoryError(torch.OutOfMemoryError):
    """As if a device were full."""


class InjectedInterrupt(KeyboardInterrupt):
    """As if the user had pressed Ctrl-C."""


ERRORS = [InjectedError, InjectedMemoryError, InjectedInterrupt]


@dataclass(frozen=True)
class Fault:
    """An error in the middle of a forward.

    Args:
        place: which one, of all that a subject has.
        error: which of ERRORS.
        call: at the how many-th call of the place.
        late: when its work is done rather than before.
        repeated: whether the forward is tried again at once.
    """

    place: int
    error: int
    call: int = 0
    late: bool = False
    repeated: bool = True


@functools.cache
def subject_of(name: str, attention: str) -> Subject:
    return Subject(name, attention)


def more_text(seed: int, batch: int, count: int) -> Tensor:
    """[B, N] ids of words."""
    return torch.randint(2, min(SPECIAL) - 10, (batch, count), generator=torch.Generator().manual_seed(seed))
