"""Next-token distributions along an answer: by greedy generation, or by one forward with the answer appended."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor


@dataclass(frozen=True)
class Steps:
    """The steps of one answer.

    Attributes:
        tokens: [n] int64: the token that greedy generation takes at each step.
        logits: [n, V] float32: the model's logits at each step, on its device.
        scores: [n, V] float32: what the generation's logits processors, such as a repetition penalty, make of them.
    """

    tokens: Tensor
    logits: Tensor
    scores: Tensor


class _Recorder(LogitsProcessor):
    """The last logits processor: records the scores, and replaces them so that given tokens are generated."""

    def __init__(self, forced: Tensor | None) -> None:
        self.scores: list[Tensor] = []
        self._forced = forced

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores[0].float())
        if self._forced is None:
            return scores
        only = torch.full_like(scores, -torch.inf)
        only[:, self._forced[len(self.scores) - 1]] = 0
        return only


def generate_steps(model: Any, inputs: dict[str, Tensor], most: int, forced: Tensor | None = None) -> Steps:
    """Generate greedily, token by token.

    Args:
        model: a Hugging Face generation model.
        inputs: the model's inputs for one prompt.
        most: maximum number of new tokens.
        forced: [n] int64: tokens to generate instead of the model's own; then `most` is not read.

    Returns:
        The steps. With `forced`, step i is what the model would do after the first i of these tokens.
    """
    recorder, length = _Recorder(forced), inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs, do_sample=False, num_beams=1, max_new_tokens=most if forced is None else len(forced),
        logits_processor=LogitsProcessorList([recorder]), output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    taken = output.sequences[0, length:]
    if len(recorder.scores) != len(taken) or len(output.logits) != len(taken):
        raise RuntimeError(
            f"model must call the logits processors once per token, got {len(recorder.scores)} calls for {len(taken)}"
        )
    scores = torch.stack(recorder.scores)
    return Steps(taken if forced is None else scores.argmax(-1), torch.cat(output.logits).float(), scores)


def can_append(model: Any) -> bool:
    """Whether `append_answer` works: the model's forward can be told which tokens are the answer's."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def append_answer(model: Any, inputs: dict[str, Tensor], tokens: Tensor) -> Steps:
    """One forward over the prompt and an answer.

    Args:
        model: a Hugging Face generation model whose forward takes `logits_to_keep`.
        inputs: the model's inputs for one prompt.
        tokens: [n] int64: the answer, of which the last token is not needed.

    Returns:
        What `generate_steps(..., forced=tokens)` returns, to rounding, if the generation's only logits processor is a
        repetition penalty and what the model keeps of the prompt does not depend on what follows.
    """
    ids = torch.cat([inputs["input_ids"], tokens[None, :-1]], 1)
    length, more = inputs["input_ids"].shape[1], len(tokens) - 1
    longer = {
        name: F.pad(value, (0, more), value=1 if name == "attention_mask" else 0)
        if value.shape == (1, length) else value
        for name, value in inputs.items()
    }  # fmt: skip
    logits = model(**longer | {"input_ids": ids}, logits_to_keep=len(tokens)).logits[0].float()
    if len(logits) != len(tokens):
        raise RuntimeError(f"model must return the logits of {len(tokens)} tokens, got {len(logits)}")
    scores = process(model, ids, logits)
    return Steps(scores.argmax(-1), logits, scores)


def process(model: Any, ids: Tensor, logits: Tensor) -> Tensor:
    """Apply the model's repetition penalty to the logits of the last tokens.

    Args:
        model: with a generation configuration.
        ids: [1, N] int64: the tokens before the last one that the logits predict.
        logits: [n, V] float32: those after the last n of these tokens.

    Returns:
        [n, V] float32.
    """
    penalty = model.generation_config.repetition_penalty
    if penalty is None or penalty == 1:
        return logits
    processor, start = RepetitionPenaltyLogitsProcessor(penalty), ids.shape[1] - len(logits) + 1
    return torch.cat([processor(ids[:, : start + i], row[None]) for i, row in enumerate(logits)])
