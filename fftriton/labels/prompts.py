"""What captioner, rewriter and scorer are asked, and strict parsers of what they reply."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from .questions import LEAST, MOST, Question

Clips = Sequence[tuple[float, float]]
"""Start and end of each clip in seconds."""

CAPTION = (
    "Describe what happens in this short clip of a video. Say who does what, in which order, and where. Tell people "
    "apart by their clothes. Name colours, objects and actions. Quote all writing that can be read, and translate it "
    "into English if it is in another language. Describe only what is visible."
)
"""What a captioner is asked about a clip. It is not told any question, so that a caption serves for all of them."""

QUERY_TOKENS = 64
"""Tokens of a text in SigLIP."""

_REWRITE = """\
A search engine finds frames of a video by a short description. Rewrite the question below for it. Keep the meaning.
Include every choice in as few words as possible. Leave out instructions to the reader, such as to choose the best
answer. Use fewer than 40 words. Reply with the rewritten question on one line, and nothing else.

{question}"""

_SCORE = """\
Below are a question about a video and a caption of each of its clips, with the times of the clips in seconds. Say how
much of what is needed to answer the question each clip shows, as an integer from {least} (nothing) to {most} (all that
is needed). Mind the order of events: if the question asks what happens before or after something, the clips with either
matter. If the captions do not allow to tell, or the question is about the video as a whole, give all clips {least}.

Question: {question}

Captions:
{captions}

Reply with one JSON object and nothing else. It has each of the {count} clips exactly once, as in
{example}"""

_THOUGHTS = re.compile(r"^.*?</think>", re.DOTALL)  # a template may have opened them
_FENCE = re.compile(r"^```(?:json)?\s*\n(.*)\n\s*```$", re.DOTALL)
_SEGMENT = re.compile(r"^\s*\[\s*([0-9.]+)\s*,\s*([0-9.]+)\s*\]\s*$")


class ReplyError(ValueError):
    """A model's reply is not what it was asked for."""


def rewriting_prompt(question: Question) -> str:
    """Asks for a short form of the question."""
    return _REWRITE.format(question=question.text)


def scoring_prompt(question: Question, captions: Sequence[str], clips: Clips) -> str:
    """Asks for the relevance of each clip."""
    lines = [f"{_segment(clip)}: {' '.join(caption.split())}" for clip, caption in zip(clips, captions, strict=True)]
    example = ", ".join(f'"{_segment(clip)}": {LEAST}' for clip in clips[:2]) + (", ..." if len(clips) > 2 else "")
    return _SCORE.format(
        least=LEAST, most=MOST, question=question.text, captions="\n".join(lines), count=len(clips),
        example=f"{{{example}}}",
    )  # fmt: skip


def parse_caption(reply: str) -> str:
    """The caption.

    Raises:
        ReplyError: it is empty.
    """
    caption = _THOUGHTS.sub("", reply).strip()
    if not caption:
        raise ReplyError("a caption must not be empty")
    return caption


def query_parser(count: Callable[[str], int]) -> Callable[[str], str]:
    """A parser of rewritten questions.

    Args:
        count: the tokens of a text in SigLIP.
    """

    def parse(reply: str) -> str:
        text = _THOUGHTS.sub("", reply).strip()
        if not text or "\n" in text:
            raise ReplyError(f"a rewritten question must be one line, got {text[:80]!r}")
        if (length := count(text)) > QUERY_TOKENS:
            raise ReplyError(f"a rewritten question must have at most {QUERY_TOKENS} tokens, got {length}")
        return text

    return parse


def count_words(text: str) -> int:
    """Words and marks of a text, a third more, as tokens are mostly shorter than words."""
    return -(-4 * len(re.findall(r"\w+|[^\w\s]", text)) // 3)


def score_parser(clips: Clips) -> Callable[[str], list[int]]:
    """A parser of scores: a JSON object that has each clip once, and an integer from 0 to 5 for it."""

    def parse(reply: str) -> list[int]:
        text = _THOUGHTS.sub("", reply).strip()
        fenced = _FENCE.match(text)
        pairs = _load(fenced[1] if fenced else text)
        scores: dict[int, int] = {}
        for key, value in pairs:
            index = _index(key, clips)
            if index in scores:
                raise ReplyError(f"each clip must be there once, got {key} again")
            if type(value) is not int or not LEAST <= value <= MOST:
                raise ReplyError(f"a score must be an integer from {LEAST} to {MOST}, got {value!r} for {key}")
            scores[index] = value
        if missing := [_segment(clip) for index, clip in enumerate(clips) if index not in scores]:
            raise ReplyError(f"all {len(clips)} clips must be there, {', '.join(missing)} is missing")
        return [scores[index] for index in range(len(clips))]

    return parse


def _segment(clip: tuple[float, float]) -> str:
    return f"[{round(clip[0], 1):g}, {round(clip[1], 1):g}]"


def _index(key: str, clips: Clips) -> int:
    found = _SEGMENT.match(key)
    try:
        times = None if found is None else (float(found[1]), float(found[2]))
    except ValueError:  # 1.2.3
        times = None
    known = [(round(start, 1), round(end, 1)) for start, end in clips]
    if times not in known:
        raise ReplyError(f"a key must be the times of a clip, such as {_segment(clips[0])}, got {key[:40]!r}")
    return known.index(times)


def _load(text: str) -> list[tuple[str, Any]]:
    """The pairs of a JSON object, so that keys that stand there twice are seen."""
    pairs: list[list[tuple[str, Any]]] = []

    def note(found: list[tuple[str, Any]]) -> None:
        pairs.append(found)

    try:
        whole = json.loads(text, object_pairs_hook=note)
    except ValueError as error:
        raise ReplyError(f"a reply must be one JSON object and nothing else, got {text[:80]!r}: {error}") from None
    if whole is not None or len(pairs) != 1:  # an object has become None
        raise ReplyError(f"a reply must be one flat JSON object, got {text[:80]!r}")
    return pairs[0]
