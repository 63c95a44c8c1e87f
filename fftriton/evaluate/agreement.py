"""How far a reduced model's answer is from the dense model's: the same tokens? how far apart are the distributions?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hf import Report, reduce
from ..methods import KeepAll, Method
from ..runtime.forcing import Steps, append_answer, can_append, generate_steps, process

_ALIKE = 0.95  # overlap of one forward with token-by-token generation, above which they differ by rounding only


@dataclass(frozen=True)
class Agreement:
    """A reduced answer compared with the dense one, after the same tokens at each step.

    Attributes:
        same: whether greedy generation gives the same tokens.
        first_difference: the step of the first token that differs, from 0; None if none does.
        tokens: number of steps, those of the dense answer.
        overlap: 1 minus the total variation of the two next-token distributions, in [0, 1], mean over the steps.
        kl: Kullback-Leibler divergence of the reduced distribution from the dense one, in nats, mean over the steps.
        loss: how much less probable, to the dense model, the reduced model's tokens are; mean over the steps.
    """

    same: bool
    first_difference: int | None
    tokens: int
    overlap: float
    kl: float
    loss: float


def compare_steps(dense: Steps, reduced: Steps) -> Agreement:
    """Compare the steps of a reduced model, forced along the dense answer, with those of the dense model."""
    p_log, q_log = (steps.logits.double().log_softmax(-1) for steps in (dense, reduced))  # [n, V]
    p, q = p_log.exp(), q_log.exp()
    kl = torch.where(p > 0, p * (p_log - q_log), 0.0).sum(-1)
    own, other = (p.gather(-1, steps.tokens[:, None]) for steps in (dense, reduced))
    different = (dense.tokens != reduced.tokens).nonzero().flatten().tolist()
    return Agreement(
        same=not different,
        first_difference=different[0] if different else None,
        tokens=len(dense.tokens),
        overlap=_overlap(p, q),
        kl=max(0.0, kl.mean().item()),
        loss=(own - other).mean().item(),
    )


def _overlap(p: Tensor, q: Tensor) -> float:
    """1 minus the total variation of distributions [n, V], mean over n."""
    return min(1.0, max(0.0, 1 - 0.5 * (p - q).abs().sum(-1).mean().item()))


class DenseAnswer:
    """The dense model's greedy answer to one prompt, which reduced answers are compared with.

    Args:
        model: a Hugging Face generation model.
        inputs: the model's inputs for one prompt.
        most: maximum number of new tokens.

    Raises:
        ValueError: the prompt has no video that can be reduced.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], most: int) -> None:
        self.model, self.inputs = model, inputs
        with reduce(model, KeepAll()) as reduction:
            self.steps = generate_steps(model, inputs, most)
        self.report = _report(reduction.report)

    def under(self, method: Method, one_forward: bool = False) -> tuple[Steps, Report]:
        """The steps that the model takes under a method, forced along this answer, and the report of its prefill.

        Args:
            method: the method.
            one_forward: whether to run a single forward instead of one per token; see `OneForward`.
        """
        with reduce(self.model, method) as reduction:
            steps = self.forced(self.inputs, one_forward)
        return steps, _report(reduction.report)

    def forced(self, inputs: dict[str, Tensor], one_forward: bool = False) -> Steps:
        """The steps that the model takes for any prompt, forced along this answer."""
        if one_forward:
            return append_answer(self.model, inputs, self.steps.tokens)
        return generate_steps(self.model, inputs, 0, forced=self.steps.tokens)

    def compare(self, steps: Steps) -> Agreement:
        """Compare the steps of another model, forced along this answer, with its own."""
        return compare_steps(self.steps, steps)

    @property
    def is_plain(self) -> bool:
        """Whether `append_answer` knows all logits processors that had a part in this answer."""
        ids = torch.cat([self.inputs["input_ids"], self.steps.tokens[None, :-1]], 1)
        return torch.equal(process(self.model, ids, self.steps.logits), self.steps.scores)


class OneForward:
    """Takes one forward with the answer appended if that says the same as one forward per token.

    A method, or a model, may treat an answer that is there differently from one that is being generated. So the first
    answer of more than one token is run in both ways, and a method for which they differ by more than rounding
    generates from then on.

    Args:
        model: the model of the answers.
    """

    def __init__(self, model: Any) -> None:
        self._can, self._found = can_append(model), dict[str, bool]()

    def under(self, dense: DenseAnswer, name: str, method: Method) -> tuple[Steps, Report]:
        """As `dense.under`; what was found is remembered under the method's name."""
        if not self._can or not dense.is_plain or not self._found.get(name, True):
            return dense.under(method)
        quick = dense.under(method, one_forward=True)
        if name in self._found or len(dense.steps.tokens) == 1:
            return quick
        slow = dense.under(method)
        self._found[name] = compare_steps(slow[0], quick[0]).overlap >= _ALIKE
        return quick if self._found[name] else slow


def _report(report: Any) -> Report:
    if report is None:
        raise ValueError("model must get a prompt with a video that can be reduced, got one without")
    return report
