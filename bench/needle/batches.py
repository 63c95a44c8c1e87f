"""What the needle model is trained on: batches that follow from the seed, the phase and the step alone."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bench.needle.make_assets import PIXELS, make_tokenizer
from bench.needle.model import PATCHES
from fftriton.needle.digits import PATCH
from fftriton.needle.needles import Appearance, Needle, add_needle, draw_needles
from fftriton.needle.samples import Recipe, ask, draw, draw_video, finish
from fftriton.needle.scenes import GRID, add_flashes, textured_scenes
from fftriton.needle.vocabulary import BOS, COLOURS, HARDER_IDS, IDS, QUESTION, SYSTEM, VIDEO, VISION_END, VISION_START
from fftriton.runtime.processing import QwenPixels

NO_DIGIT = -1
NO_COLOUR = len(COLOURS)

_PREFIX = [IDS[token] for token in (BOS, SYSTEM, SYSTEM, VISION_START)]
_KIND_SHARES = {"what": 0.2, "when": 0.3, "where": 0.1, "how many": 0.15, "which colour": 0.25}
_SCENE = 4  # frames of one scene in an alignment batch
_PIXELS = QwenPixels(
    patch_size=PATCH,
    temporal_patch_size=1,
    merge_size=1,
    min_pixels=PIXELS["min_pixels"],
    max_pixels=PIXELS["max_pixels"],
)


@dataclass
class Batch:
    """Tensors that move to a device together."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return type(self)(*(getattr(self, one.name).to(device, non_blocking=True) for one in fields(self)))


@dataclass
class Frames(Batch):
    """Frames with needles pasted on, and what each patch shows.

    Attributes:
        pixels: [N * PATCHES, D] float32.
        digit: [N, PATCHES] int64, NO_DIGIT if there is none.
        colour: [N, PATCHES] int64, NO_COLOUR if there is none.
    """

    pixels: Tensor
    digit: Tensor
    colour: Tensor


@dataclass
class Questions(Batch):
    """Videos with several questions each, packed after their video so that none sees another.

    Attributes:
        pixels: [B * F * PATCHES, D] float32.
        grid: [B, 3] int64.
        input_ids: [B, T] int64.
        mask: [1, 1, T, T] bool, True where a row may look.
        positions: [3, B, T] int64.
        asked_at: [Q] int64, the places in T whose next token is an answer.
        answers: [B, Q] int64.
        named_at: [K] int64, the places in T where a question names the colour of a box; K may be 0.
        named: [B, K] int64, the digits on these boxes.
    """

    pixels: Tensor
    grid: Tensor
    input_ids: Tensor
    mask: Tensor
    positions: Tensor
    asked_at: Tensor
    answers: Tensor
    named_at: Tensor
    named: Tensor


class AlignmentBatches(Dataset):
    """Frames whose every patch is labelled; needles are denser than in a video.

    Args:
        seed: of the whole training.
        size: frames in a batch, a multiple of 4.
        held_out: True for the handwritings that training never sees.
        small: share of needles that are half as wide and high as a patch.
        faint: share of needles that shine through.
        phase: its number, so that no two phases see the same frames.
    """

    def __init__(
        self, seed: int, size: int, held_out: bool = False, small: float = 0.0, faint: float = 0.5, phase: int = 0
    ):
        self._seed, self._size, self._held_out, self._phase = seed, size, held_out, phase
        self._small, self._faint = small, faint

    def __getitem__(self, step: int) -> Frames:
        rng = np.random.default_rng([self._seed, self._phase, step, self._held_out])
        scenes = [textured_scenes(_SCENE, (0.0, 3.0), 0.3, rng) for _ in range(self._size // _SCENE)]
        video = np.concatenate(scenes)
        add_flashes(video, int(0.08 * self._size * PATCHES), rng)
        density = np.where(rng.random(self._size) < 0.5, 0.1, rng.uniform(0.1, 0.7, self._size))
        digit = np.full((self._size, PATCHES), NO_DIGIT)
        colour = np.full((self._size, PATCHES), NO_COLOUR)
        for frame, patch in zip(*(rng.random((self._size, PATCHES)) < density[:, None]).nonzero(), strict=True):
            digit[frame, patch], colour[frame, patch] = rng.integers(10), rng.integers(len(COLOURS))
            row, column = divmod(int(patch), GRID)
            opacity = 1.0 if rng.random() < 1 - self._faint else float(rng.uniform(0.25, 1))
            top, left, side = row * PATCH, column * PATCH, PATCH
            if self._small and rng.random() < self._small:
                side = PATCH // 2
                top, left = top + int(rng.integers(2)) * side, left + int(rng.integers(2)) * side
            shown = Appearance(int(frame), ((top, left),), (opacity,), side)
            needle = Needle(int(digit[frame, patch]), COLOURS[colour[frame, patch]], shown)
            add_needle(video, needle, self._held_out, rng)
        return Frames(_patchify(finish(video, rng)), torch.from_numpy(digit), torch.from_numpy(colour))


@dataclass(frozen=True)
class Length:
    """Videos of one length: how many frames, how many videos a batch, how often (a weight)."""

    num_frames: int
    batch: int
    weight: float = 1.0


@dataclass(frozen=True)
class Asked:
    """A video and questions about it.

    Attributes:
        video: [F, H, W, 3] uint8.
        questions: Q pairs of a question and its answer.
        shown: the digit on the box of each colour; if given, the questions name colours at the same places in
            every video of a batch.
    """

    video: np.ndarray
    questions: list[tuple[str, str]]
    shown: dict[str, int] = field(default_factory=dict)


class QuestionBatches(Dataset):
    """Packed questions about videos of these recipes and lengths.

    Args:
        seed: of the whole training.
        phase: its number, so that no two phases see the same videos.
        recipes: one is drawn for each video.
        lengths: one is drawn for each batch.
        questions: asked about each video.
        resume_after: text goes on, behind a video, after as many positions as its frames ("time", transformers 4) or
            as its side has patches ("space", transformers 5); one is drawn for each batch.
    """

    def __init__(
        self,
        seed: int,
        phase: int,
        recipes: tuple[Recipe, ...],
        lengths: tuple[Length, ...],
        questions: int,
        resume_after: tuple[str, ...],
    ):
        self._seed, self._phase, self._recipes, self._lengths = seed, phase, recipes, lengths
        self._questions, self._resume_after = questions, resume_after

    def __getitem__(self, step: int) -> Questions:
        rng = np.random.default_rng([self._seed, self._phase, step])
        weights = np.array([length.weight for length in self._lengths])
        length = self._lengths[rng.choice(len(weights), p=weights / weights.sum())]
        resume_after = self._resume_after[rng.integers(len(self._resume_after))]
        return pack([self._draw(length.num_frames, rng) for _ in range(length.batch)], resume_after)

    def _draw(self, num_frames: int, rng: np.random.Generator) -> Asked:
        """A video, and questions about needles in it."""
        recipe = self._recipes[rng.integers(len(self._recipes))]
        count = int(rng.integers(*recipe.needles, endpoint=True))
        needles = draw_needles(count, recipe.styles, num_frames, rng)
        video = draw_video(recipe, num_frames, needles, False, rng)
        asked = []
        for kind in rng.choice(list(_KIND_SHARES), self._questions, p=list(_KIND_SHARES.values())):
            about = int(rng.integers(count))
            asked.append(ask(str(kind), needles[about:] + needles[:about], num_frames))
        return Asked(video, asked)


class HarderBatches(QuestionBatches):
    """Packed questions about what needles show and how they are related.

    Args:
        seed, phase, recipes, lengths, resume_after: as for QuestionBatches.
        kinds: of the questions about each video, in this order.
        two_digits: share of the videos whose boxes show two digits at most, so that many pairs are the same.
    """

    def __init__(
        self,
        seed: int,
        phase: int,
        recipes: tuple[Recipe, ...],
        lengths: tuple[Length, ...],
        kinds: tuple[str, ...],
        resume_after: tuple[str, ...],
        two_digits: float,
    ):
        super().__init__(seed, phase, recipes, lengths, len(kinds), resume_after)
        self._kinds, self._two_digits = kinds, two_digits

    def _draw(self, num_frames: int, rng: np.random.Generator) -> Asked:
        recipe = self._recipes[rng.integers(len(self._recipes))]
        needles = draw(recipe, num_frames, rng)
        if self._two_digits and rng.random() < self._two_digits:
            digits = rng.permutation(10)[:2]
            needles = [replace(needle, digit=int(digits[rng.integers(2)])) for needle in needles]
        video = draw_video(recipe, num_frames, needles, False, rng)
        asked = [ask(kind, _about(kind, needles, rng, bool(self._two_digits)), num_frames) for kind in self._kinds]
        return Asked(video, asked, {needle.colour: needle.digit for needle in needles})


def _about(kind: str, needles: list[Needle], rng: np.random.Generator, any_pair: bool) -> list[Needle]:
    """The needles in an order that makes a question of this kind about a random one or two of them.

    Unless any pair will do, most questions for the same digit are about the first two, which show it in half of the
    videos.
    """
    shuffled = [needles[i] for i in rng.permutation(len(needles))]
    if kind == "after" and shuffled[0] is max(needles, key=lambda needle: needle.appearance.start):
        return shuffled[1:] + shuffled[:1]
    if kind == "same" and not any_pair and rng.random() < 0.8:
        return needles if rng.random() < 0.5 else [needles[1], needles[0], *needles[2:]]
    return shuffled


def pack(asked: list[Asked], resume_after: str) -> Questions:
    """Pack Q questions about each of B videos behind it; each sees the video and itself.

    Args:
        asked: B videos; the tokenizer makes as many words of the questions of one place.
        resume_after: see QuestionBatches.
    """
    videos = np.stack([one.video for one in asked])
    batch, num_frames = videos.shape[:2]
    questions = [[_encode(question) for question, _ in one.questions] for one in asked]
    lengths = [len(question) for question in questions[0]]
    tail = torch.tensor([[token for question in row for token in question] for row in questions])
    head = _PREFIX + [IDS[VIDEO]] * (num_frames * PATCHES)
    segment = torch.tensor([-1] * len(head) + [i for i, length in enumerate(lengths) for _ in range(length)])
    visible = (segment[None] == -1) | (segment[None] == segment[:, None])
    named_at = torch.tensor([i for i, token in enumerate(tail[0].tolist()) if token in _named(asked[0])]).long()
    return Questions(
        pixels=_patchify(videos.reshape(-1, *videos.shape[2:])),
        grid=torch.tensor([[num_frames, GRID, GRID]] * batch),
        input_ids=torch.cat([torch.tensor(head).expand(batch, -1), tail], dim=1),
        mask=visible.tril()[None, None],
        positions=_positions(num_frames, lengths, resume_after)[:, None].expand(-1, batch, -1),
        asked_at=len(head) + torch.tensor(lengths).cumsum(0) - 1,
        answers=torch.tensor([[HARDER_IDS[answer] for _, answer in one.questions] for one in asked]),
        named_at=len(head) + named_at,
        named=torch.tensor(
            [[_named(one)[token] for token in row[named_at].tolist()] for one, row in zip(asked, tail, strict=True)]
        ).long(),
    )


def _named(asked: Asked) -> dict[int, int]:
    """From the token of a colour to that of the digit on its box."""
    return {IDS[colour]: IDS[str(digit)] for colour, digit in asked.shown.items()}


def _positions(num_frames: int, lengths: list[int], resume_after: str) -> Tensor:
    """[3, T] int64: time, row and column of each token, restarting with each question."""
    prefix = torch.arange(len(_PREFIX)).expand(3, -1)
    axes = (torch.arange(num_frames), torch.arange(GRID), torch.arange(GRID))
    video = torch.cartesian_prod(*axes).T + len(_PREFIX)
    resume = len(_PREFIX) + (max(num_frames, GRID) if resume_after == "time" else GRID)
    questions = [torch.arange(resume, resume + length).expand(3, -1) for length in lengths]
    return torch.cat([prefix, video, *questions], dim=1)


def _patchify(frames: np.ndarray) -> Tensor:
    """[N, H, W, 3] uint8 -> [N * PATCHES, D] float32, as the processor makes them."""
    return _PIXELS.patchify(torch.from_numpy(frames).permute(0, 3, 1, 2))[0]


@lru_cache
def _tokenizer():
    return make_tokenizer(HARDER_IDS)  # which reads plain questions as IDS does


@lru_cache
def _encode(question: str) -> tuple[int, ...]:
    return (IDS[VISION_END], IDS[QUESTION], *_tokenizer().encode(question).ids)
