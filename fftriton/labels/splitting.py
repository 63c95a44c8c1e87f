"""The sparsity rule, and the split into questions to train on and questions to evaluate."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checks import check_count, check_real
from .questions import CLIP, Question

LEAST_FRAMES = 64
"""Frames of a video that counts as long enough for sparse relevance."""

PEAK = 2.0
"""The largest share of a frame, in shares of equal counts, from which on relevance counts as sparse."""

_TEMPERATURE = 2.0  # of the softmax over labels, as KVTP's over scores


@dataclass(frozen=True)
class Split:
    """Questions for training and evaluation, whose videos are disjoint.

    Attributes:
        train: to train on: their clips differ in relevance.
        sparse: to evaluate: answered, and relevant in few places.
        dense: to evaluate: answered, and relevant in many places or none.
        unused: the others: level labels in the half for training, or no answer in the other.
    """

    train: list[Question]
    sparse: list[Question]
    dense: list[Question]
    unused: list[Question]


def is_sparse(question: Question) -> bool:
    """Whether few clips are relevant: at least 64 frames, of which one gets twice the share of equal counts.

    The shares are the softmax of the frames' labels divided by 2.

    Source:
        The authors' evaluation code of KVTP, which writes 0.1 F max_f softmax(label / 2)_f >= 0.2.
    """
    if question.frames is None or question.relevance is None:
        raise ValueError(f"labels: relevance must be known to call a question sparse, got None for '{question.id}'")
    if question.frames < LEAST_FRAMES:
        return False
    labels = [question.relevance[frame // CLIP] / _TEMPERATURE for frame in range(question.frames)]
    largest = max(labels)
    return question.frames >= PEAK * math.fsum(math.exp(label - largest) for label in labels)


def split(questions: Sequence[Question], share: float = 0.5, seed: int = 0) -> Split:
    """Split labelled questions by their videos.

    A video whose questions are all without an answer can only be trained on; the others are drawn.

    Args:
        questions: labelled questions.
        share: of the other videos, that are trained on, from 0 to 1.
        seed: of the draw.

    Raises:
        ValueError, TypeError: a parameter is out of range, or a question has no relevance.
    """
    check_real("labels", "share", share, 0.0, 1.0)
    check_count("labels", "seed", seed, 0)
    if lacking := [question.id for question in questions if question.relevance is None]:
        raise ValueError(f"labels: relevance must be known before a split, got {len(lacking)} without: '{lacking[0]}'")
    videos = sorted({_same(question.video) for question in questions if question.is_answered})
    random.Random(seed).shuffle(videos)
    evaluated = set(videos[round(share * len(videos)) :])
    found = Split([], [], [], [])
    for question in questions:
        if _same(question.video) not in evaluated:
            part = found.train if question.tells_clips_apart else found.unused
        elif not question.is_answered:
            part = found.unused
        else:
            part = found.sparse if is_sparse(question) else found.dense
        part.append(question)
    return found


def _same(video: Path) -> Path:
    return video.resolve()
