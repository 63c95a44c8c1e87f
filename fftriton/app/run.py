"""Ask a model about a video with its vision tokens reduced and, for comparison, with all of them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluate.agreement import Agreement, DenseAnswer
from ..hf import Report, reduce
from ..methods import Chain, Method
from ..runtime.answers import TokenClock, generate
from ..runtime.measure import Cost, time_call, time_generation
from ..runtime.progress import OnProgress, OpenBar
from ..runtime.target import to_model
from .fates import patch_fates, patch_grid
from .request import Job, Options

_DECODE_TOKENS = 8
_REPEATS = 5


@dataclass
class Way:
    """One way of running the model, dense or reduced, with its answer and its cost.

    Attributes:
        name: name to print.
        method: the method; None for the unreduced model.
        answer: text of the new tokens.
        cost: measurements over repeated runs.
    """

    name: str
    method: Method | None
    answer: str = ""
    cost: Cost = field(default_factory=Cost)
    _report: Report | None = None

    @property
    def report(self) -> Report:
        """The report of the last prompt's reduction."""
        if self._report is None:
            raise RuntimeError(f"'{self.name}' has not run a reduction")
        return self._report

    @property
    def first_token(self) -> float:
        """Seconds to the first token: the relevance predictor if there is one, and the prefill."""
        return self.cost.prefill + (0.0 if self._report is None else self.report.relevance_seconds)

    @contextmanager
    def running(self, model: Any) -> Iterator[None]:
        """Run the model in this way inside the block."""
        if self.method is None:
            yield
            return
        with reduce(model, self.method) as reduction:
            yield
        self._report = reduction.report


@dataclass
class Result:
    """The result of one job.

    Attributes:
        job: the job.
        dense: the unreduced model; None if not compared.
        reduced: the reduced model.
        agreement: how far the reduced model's answer is from the dense one's; None if not compared.
        vision_seconds: time of the vision encoder, included in both prefills; None if it could not be timed separately.
        pictures: the files of the pictures.
    """

    job: Job
    dense: Way | None
    reduced: Way
    agreement: Agreement | None
    vision_seconds: float | None
    pictures: list[Path]


@torch.no_grad()
def run(options: Options, model: Any, job: Job, open_bar: OpenBar) -> Result:
    """Run one job: answer the question, measure the cost, draw the pictures.

    Args:
        options: the options of the run.
        model: the model from `Target.load_model`.
        job: a job from `prepare`.
        open_bar: opens a progress bar for each step.

    Returns:
        The result. Its pictures are in options.out.
    """
    with options.target.own_threads():
        return _run(options, model, job, open_bar)


def _run(options: Options, model: Any, job: Job, open_bar: OpenBar) -> Result:
    inputs = to_model(job.inputs, model)
    with open_bar("Encoding the frames") as on_progress:
        vision_seconds = _encode(model, inputs, on_progress)

    reduced = Way(_name(job.method), job.method)
    dense = Way("all tokens", None) if options.compare else None
    ways = [way for way in (dense, reduced) if way is not None]
    for way in ways:
        with open_bar(f"Generating, {way.name}") as on_progress:
            way.answer = _answer(options.target.answer_length(model), model, inputs, way, job.tokenizer, on_progress)
    agreement = None
    if dense is not None:
        with open_bar("Comparing") as on_progress:
            answer = DenseAnswer(model, inputs, options.target.answer_length(model))
            agreement = answer.compare(answer.under(job.method)[0])
            on_progress(1, 1)
    with open_bar("Timing") as on_progress:
        for done in range(_REPEATS):
            for way in ways:  # in turn, so that other load on the machine affects all ways alike
                time_generation(model, inputs, way.running(model), _DECODE_TOKENS, way.cost)
            on_progress(done + 1, _REPEATS)

    pictures = _draw(options.out, job, reduced, inputs)
    return Result(job, dense, reduced, agreement, vision_seconds, pictures)


def _name(method: Method) -> str:
    """As printed: the class, or those of a chain."""
    return " + ".join(map(_name, method.methods)) if isinstance(method, Chain) else type(method).__name__


def _encode(model: Any, inputs: dict[str, Tensor], on_progress: OnProgress) -> float | None:
    """Run the vision encoder once, showing each block on the bar, then time it."""
    encode = getattr(model.base_model, "get_video_features", None)  # has the full signature
    known = inspect.signature(encode).parameters if encode else {}
    if encode is None or "pixel_values_videos" not in known:
        on_progress(1, 1)
        return None
    arguments = {name: value for name, value in inputs.items() if name in known}
    blocks = _vision_blocks(model)
    done = itertools.count(1)

    def advance(*_: Any) -> None:
        on_progress(min(next(done), len(blocks)), len(blocks))

    hooks = [block.register_forward_hook(advance) for block in blocks]
    try:
        encode(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return time_call(lambda: encode(**arguments), model.device)


def _vision_blocks(model: Any) -> list[nn.Module]:
    """The longest list of modules outside the decoder: the vision encoder's blocks."""
    inside = set(model.get_decoder().modules())
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and m not in inside]
    return list(max(lists, key=len, default=[]))


def _answer(most: int, model: Any, inputs: dict[str, Tensor], way: Way, tokenizer: Any, on_progress: OnProgress) -> str:
    clock = TokenClock(lambda done: on_progress(done, most))
    with way.running(model):
        tokens = generate(model, inputs, clock, most)
    on_progress(most, most)  # an answer may end before the maximum
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def _draw(out: Path, job: Job, way: Way, inputs: dict[str, Tensor]) -> list[Path]:
    from .pictures import draw_merges, draw_tokens_per_layer  # needs matplotlib; models run without it

    clip, video, report = job.clip.path, job.video, way.report
    merges, tokens = out / f"{job.name}-merges.png", out / f"{job.name}-tokens.png"
    fates = patch_fates(report)
    title = f"{clip.name}: {way.name} at a budget of {report.budget:.0%}"
    draw_merges(merges, video.frames, list(video.times), fates, patch_grid(fates.root.shape[1], inputs), title)
    draw_tokens_per_layer(tokens, report, way.name, f"{clip.name}: vision tokens in each layer's attention")
    return [merges, tokens]
