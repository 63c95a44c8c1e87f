"""Runs a plan: every setting answers every sample, in one process or several."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from .. import __version__
from ..app.request import OpenBar, Options, load_model
from ..app.run import answer_length, is_right, threads, to_model
from ..hf import Report, reduce
from ..methods import Method
from ..needle import KINDS, Sample, generate_sample
from ..needle.vocabulary import COLOURS, DIGITS
from ..runtime.files import check_out
from ..runtime.measure import TokenClock, generate, memory_before, peak_memory
from ..runtime.processing import Processor, load_processor
from ..runtime.video import Video
from .digests import digest_of_weights
from .flops import prefill_flops
from .plan import Plan, Setting
from .records import Record, RecordFolder
from .rows import Row, summarise

_MEMORY_SAMPLES = 3  # for which peak memory is measured: that takes longer than the answer of a small model


def evaluate(plan: Plan, open_bar: OpenBar) -> tuple[list[Row], dict[Setting, list[Record]]]:
    """Answer every sample in every setting, apart from what the folder of the plan holds already.

    Under `accelerate launch` or `torchrun` the processes share the samples; each returns all results.

    Args:
        plan: what to evaluate.
        open_bar: shows the progress.

    Returns:
        The rows, one a setting, and the records of each setting that can work, in the order of the samples.

    Raises:
        ValueError, TypeError: a model or a folder that cannot be used. OSError: a record cannot be written.
    """
    check_out(plan.out)
    process, processes, wait = _processes()
    device = plan.device or (f"cuda:{process}" if processes > 1 and torch.cuda.is_available() else None)
    options = Options(
        model=plan.model, device=device, max_new_tokens=plan.max_new_tokens, trust_remote_code=plan.trust_remote_code
    )
    with threads(options.threads):
        with open_bar("Loading the model") as on_progress:
            processor = load_processor(options.checkpoint, trust_remote_code=options.trust_remote_code)
            answerer = Answerer(load_model(options), processor, options.max_new_tokens)
            on_progress(1, 1)
        layers = answerer.config.num_hidden_layers
        problems = {setting: why for setting in plan.settings if (why := setting.problem(layers)) is not None}
        origin = answerer.describe() | {"samples": _digest_of_samples(plan)}
        keys = {setting: _key(origin, setting) for setting in plan.settings if setting not in problems}
        folder = RecordFolder(plan.out, process)
        done = folder.read(keys.values())
        own = range(process, plan.samples, processes)
        with open_bar(f"Answering {len(own)} samples in {len(keys)} ways") as on_progress:
            for count, index in enumerate(own, 1):
                missing = {setting: key for setting, key in keys.items() if (key, index) not in done}
                if missing:
                    told = _other_question(plan, index) if any(setting.is_control for setting in missing) else ""
                    folder.append(answerer.answer(_sample(plan, index), missing, told))
                on_progress(count, len(own))
    wait()
    found = folder.read(keys.values())
    records = {setting: [found[key, index] for index in range(plan.samples)] for setting, key in keys.items()}
    return summarise(plan, records, problems), records


class Answerer:
    """A model and its processor, and what they make of a sample.

    Args:
        model: a Hugging Face generation model for videos.
        processor: makes its inputs.
        max_new_tokens: longest answer; None for the checkpoint's own.
    """

    def __init__(self, model: Any, processor: Processor, max_new_tokens: int | None = None) -> None:
        self.model, self.processor = model, processor
        self.config = model.config.get_text_config()
        self._longest = answer_length(model, max_new_tokens)

    @torch.no_grad()
    def answer(self, sample: Sample, settings: dict[Setting, str], other_question: str = "") -> list[Record]:
        """Ask about a sample in each of the settings; the video is encoded once.

        Args:
            sample: what to ask.
            settings: each with the key of its records.
            other_question: what the methods of control settings are told.
        """
        frames = len(sample.frames)
        inputs = self.processor(Video(sample.frames, list(range(frames)), frames, sample.fps), sample.question)
        inputs = to_model(inputs, self.model)
        with encoded_once(self.model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fftriton: the budget")  # the rows say what was met
            records = []
            for setting, key in settings.items():
                told = other_question if setting.is_control else sample.question
                method = setting.method(sample.index).about(sample.frames, told)
                records.append(self._record(sample, inputs, method, key))
            return records

    def describe(self) -> dict[str, Any]:
        """Everything about the model that an answer depends on."""
        kind = type(self.model)  # code of a checkpoint's own may answer otherwise with the same weights
        return {
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "weights": digest_of_weights(self.model),
            "dtype": str(self.model.dtype),
            "device": self.model.device.type,
            "attention": self.config._attn_implementation,
            "longest answer": self._longest,
            "fftriton": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def _record(self, sample: Sample, inputs: dict[str, Tensor], method: Method, key: str) -> Record:
        clock, device = TokenClock(), self.model.device
        memory = memory_before(device) if sample.index < _MEMORY_SAMPLES else None
        with reduce(self.model, method) as reduction:
            tokens = generate(self.model, inputs, clock, self._longest)
        peak = None if memory is None else max(0, peak_memory(device) - memory)
        report = reduction.report
        assert isinstance(report, Report)  # the prompt holds a video
        answer = self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        all_tokens = [report.num_tokens] * len(report.tokens_per_layer)
        return Record(
            key,
            sample.index,
            sample.kind,
            len(sample.frames),
            sample.needle_depth,
            answer,
            sample.answer,
            is_right(answer, sample.answer),
            report.budget_achieved,
            prefill_flops(self.config, report.rows_per_layer, report.tokens_per_layer),
            prefill_flops(self.config, all_tokens, all_tokens),
            report.seconds["prefill"],
            peak,
            report.vision_tokens_per_layer,
        )


@contextmanager
def encoded_once(model: Any) -> Iterator[None]:
    """Inside, the vision encoder of `model` runs once for the same video, and later calls get the same features."""
    inner = getattr(model, "base_model", model)
    encode = getattr(inner, "get_video_features", None)
    if encode is None:
        yield
        return
    signature = inspect.signature(encode)
    seen: list[tuple[Tensor, Any]] = []

    @functools.wraps(encode)  # generate reads the signature
    def once(*args: Any, **kwargs: Any) -> Any:
        pixels = signature.bind(*args, **kwargs).arguments["pixel_values_videos"]
        for known, features in seen:
            if known is pixels:
                return features
        seen.append((pixels, encode(*args, **kwargs)))
        return seen[-1][1]

    inner.__dict__["get_video_features"] = once
    try:
        yield
    finally:
        del inner.__dict__["get_video_features"]


def _sample(plan: Plan, index: int) -> Sample:
    lengths = plan.num_frames
    frames = lengths[index // len(KINDS) % len(lengths)] if lengths else None  # each kind of question gets each length
    return generate_sample(plan.split, plan.seed, index, held_out=True, num_frames=frames)


def _other_question(plan: Plan, index: int) -> str:
    """A question that has nothing to do with the sample's: it names another needle."""
    sample = _sample(plan, index)
    named = _needles_named_in(f"{sample.question} {sample.answer}")
    while True:
        index += 1
        other = _needles_named_in(question := _sample(plan, index).question)
        if other and not other & named:
            return question


def _needles_named_in(text: str) -> set[str]:
    return set(text.replace("?", " ").split()) & {*COLOURS, *DIGITS}


def _digest_of_samples(plan: Plan) -> str:
    """Of the first sample and all that picks the others."""
    first = _sample(plan, 0)
    picked = f"{plan.task} {plan.split} {plan.seed} {plan.num_frames} {first.question} {first.answer}"
    return hashlib.sha256(picked.encode() + first.frames.tobytes()).hexdigest()


def _key(origin: dict[str, Any], setting: Setting) -> str:
    """A digest of everything that the answers of this setting depend on."""
    everything = origin | {"method": str(setting.method()), "name": setting.name, "budget": setting.budget}
    if setting.relevance is not None:
        everything["relevance"] = setting.relevance.digest
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


def is_main_process() -> bool:
    """Whether this process is the one that writes results."""
    return int(os.environ.get("RANK", "0")) == 0


def _processes() -> tuple[int, int, Callable[[], object]]:
    """Number of this process, how many there are, and what waits for all of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, lambda: None
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError("several processes need accelerate: pip install 'fftriton[eval]'") from error
    state = PartialState(cpu=not torch.cuda.is_available())
    return state.process_index, state.num_processes, state.wait_for_everyone
