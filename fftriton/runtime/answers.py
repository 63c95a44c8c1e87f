"""Greedy generation, the time of each new token, and whether an answer is right."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

_ENDS = ".!?\u3002\uff01\uff1f"
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_LETTER = rf"[^\W{_UNSPACED}]"  # of a word between spaces


class TokenClock(BaseStreamer):
    """A streamer that records when each new token arrives.

    `generate` copies the token to the host first, so that the device has finished computing it.

    Args:
        on_token: called with the number of new tokens so far.
    """

    def __init__(self, on_token: Callable[[int], None] | None = None):
        self.times: list[float] = []
        self._on_token = on_token
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, then with each token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.times.append(time.perf_counter())
        if self._on_token is not None:
            self._on_token(len(self.times))

    def end(self) -> None:
        """Called by `generate` at the end."""


def generate(model: Any, inputs: dict[str, Tensor], clock: TokenClock, most: int, least: int = 0) -> Tensor:
    """Generate new tokens greedily.

    Args:
        model: a Hugging Face generation model.
        inputs: the model's inputs for one prompt.
        clock: records the time of every token.
        most, least: maximum and minimum number of new tokens.

    Returns:
        [n] int64: the new tokens.
    """
    output = model.generate(
        **inputs, streamer=clock, do_sample=False, num_beams=1, max_new_tokens=most, min_new_tokens=least
    )
    return output[0, inputs["input_ids"].shape[1] :]


def generate_batch(model: Any, inputs: dict[str, Tensor], most: int, padding: int) -> list[Tensor]:
    """Generate new tokens greedily for each row of a batch.

    Args:
        model: a Hugging Face generation model.
        inputs: the model's inputs, padded on the left.
        most: maximum number of new tokens.
        padding: token that follows the end of an answer that is shorter than others.

    Returns:
        One [n] int64 per row: its new tokens, with padding.
    """
    output = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=most, pad_token_id=padding)
    return list(output[:, inputs["input_ids"].shape[1] :])


def is_right(answer: str, expected: str) -> bool:
    """Whether the answer contains the expected text, not as a part of a longer word or number.

    Letter case does not matter, nor a full stop, an exclamation or a question mark behind the text. Scripts without
    spaces between words (Chinese, Japanese, Thai, ...) and Korean, which appends particles, have no such boundaries.
    """
    whole = expected.strip().casefold()
    text = whole.rstrip(_ENDS).rstrip() or whole
    before = rf"(?<!{_LETTER})(?<!\d[.,])" if re.match(r"\w", text) else ""
    behind = rf"(?!{_LETTER}|[.,]\d)" if re.search(r"\w$", text) else ""
    return re.search(before + re.escape(text) + behind, answer.casefold()) is not None
