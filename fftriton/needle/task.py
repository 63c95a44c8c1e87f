"""The needle task for `fftriton eval`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import Tensor

from ..checks import check_choice, check_count
from ..runtime.answers import is_right
from ..runtime.processing import Processor
from ..runtime.shipped import HARDER_MODEL
from .samples import HARDER_SPLITS, SPLITS, Recipe, Sample, generate_sample, recipe_of
from .vocabulary import COLOURS, DIGITS, UNKNOWN


@dataclass(frozen=True)
class NeedleTask:
    """Questions about digits on coloured boxes that appear for a moment; training saw none of the samples.

    Args:
        split: one of SPLITS or HARDER_SPLITS; None for "easy".
        seed: selects the samples.
        num_frames: lengths of the videos, multiples of 4 (8 in HARDER_SPLITS), used in turn; empty for the split's own.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    split: str | None = None
    seed: int = 0
    num_frames: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.split is None:
            object.__setattr__(self, "split", SPLITS[0])
        check_choice("needle", "split", self.split, (*SPLITS, *HARDER_SPLITS))
        check_count("needle", "seed", self.seed, 0)
        multiple = self._recipe.multiple
        for frames in self.num_frames:
            check_count("needle", "frames", frames, multiple)
            if frames % multiple:
                raise ValueError(f"needle: frames must be multiples of {multiple}, got {frames}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of question, which take turns."""
        return self._recipe.kinds

    @property
    def checkpoint(self) -> str | None:
        """The shipped model that knows the words of the split; None for the one that always is the default."""
        return str(HARDER_MODEL) if self.split in HARDER_SPLITS else None

    @property
    def _recipe(self) -> Recipe:
        assert self.split is not None  # set by __post_init__
        return recipe_of(self.split)

    @property
    def digest(self) -> str:
        """Digest of the first sample and of everything that selects the others."""
        first = self.sample(0)
        picked = f"needle {self.split} {self.seed} {self.num_frames} {first.question} {first.answer}"
        return hashlib.sha256(picked.encode() + first.frames.tobytes()).hexdigest()

    def sample(self, index: int) -> Sample:
        """Sample `index` of the split."""
        assert self.split is not None  # set by __post_init__
        length = self.num_frames[index // len(self.kinds) % len(self.num_frames)] if self.num_frames else None
        return generate_sample(self.split, self.seed, index, num_frames=length)

    def inputs(self, sample: Sample, processor: Processor) -> dict[str, Tensor]:
        """The arguments of the model's `generate`.

        Raises:
            ValueError: the model's vocabulary lacks a word of the question.
        """
        tokenizer = processor.tokenizer
        unknown = tokenizer.unk_token_id
        if tokenizer.unk_token == UNKNOWN and unknown in tokenizer(sample.question)["input_ids"]:
            raise ValueError(
                f"needle: split must be one whose questions the model knows; {self.split!r} has words that its "
                f"vocabulary lacks: {sample.question!r}"
            )
        return processor(sample.video, sample.question)

    def score(self, sample: Sample, answer: str) -> bool:
        """Whether the answer contains the right word."""
        return is_right(answer, sample.answer)

    def unrelated_question(self, sample: Sample) -> str:
        """The question of the next sample that names another needle."""
        named, index = _needles_named_in(f"{sample.question} {sample.answer}"), sample.index
        while True:
            index += 1
            other = _needles_named_in(question := self.sample(index).question)
            if other and not other & named:
                return question


def _needles_named_in(text: str) -> set[str]:
    return set(text.replace("?", " ").split()) & {*COLOURS, *DIGITS}
