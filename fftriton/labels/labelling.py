"""Labels: captions of clips, short questions, and scores, each of them kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import numpy as np

from ..runtime.progress import OnProgress
from ..runtime.sampling import sample_indices
from ..runtime.video import Video, read_video
from .cache import Cache
from .endpoint import EndpointError
from .models import Model
from .prompts import (
    CAPTION,
    ReplyError,
    count_words,
    parse_caption,
    query_parser,
    rewriting_prompt,
    score_parser,
    scoring_prompt,
)
from .questions import CLIP, MOST_FRAMES, Question, clip_seconds, num_frames

Value = TypeVar("Value")

_ATTEMPTS = 3  # at a reply that can be read


@dataclass(frozen=True)
class Failure:
    """A question that could not be labelled.

    Attributes:
        question: the question.
        reason: why.
    """

    question: Question
    reason: str


@dataclass
class Labeller:
    """Labels questions.

    Args:
        cache: keeps all replies.
        captioner: describes clips; None if all questions have their relevance.
        scorer: says how relevant clips are; as the captioner.
        rewriter: makes short forms of questions; None to leave them as they are.
        count: the tokens of a text in the predictor.
        counter: names what counts them.
        caption: what the captioner is asked.
    """

    cache: Cache
    captioner: Model | None
    scorer: Model | None
    rewriter: Model | None = None
    count: Callable[[str], int] = count_words
    counter: str = ""
    caption: str = CAPTION
    _stopped: Event = field(default_factory=Event, init=False, repr=False)

    def label(
        self, questions: Sequence[Question], on_progress: OnProgress, workers: int = 1
    ) -> tuple[list[Question], list[Failure]]:
        """The labelled questions, in their order, and those that failed.

        Args:
            questions: what to label. Questions that have their relevance keep it, and those with a query keep that.
            on_progress: called after each video with (done, total).
            workers: videos at a time. Models other than endpoints take turns.

        Raises:
            ValueError: a question needs a captioner or a scorer, and there is none.
            RefusedError: an endpoint would refuse any request.
        """
        lacking = [question for question in questions if question.relevance is None]
        for name in ("captioner", "scorer"):
            if lacking and getattr(self, name) is None:
                raise ValueError(
                    f"labels: {name} must be given for questions without relevance, got None and '{lacking[0].id}'"
                )
        videos: dict[Path, list[Question]] = {}
        for question in questions:
            videos.setdefault(question.video, []).append(question)
        models = [model for model in (self.captioner, self.scorer, self.rewriter) if model is not None]
        if not all(model.is_concurrent for model in models):
            workers = 1
        labelled: dict[int, Question] = {}
        failures: list[Failure] = []
        with ThreadPoolExecutor(workers) as pool:
            try:
                for done, found in enumerate(pool.map(self._label_video, videos.values()), 1):
                    for before, after in found:
                        if isinstance(after, Failure):
                            failures.append(after)
                        else:
                            labelled[id(before)] = after
                    on_progress(done, len(videos))
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [labelled[id(question)] for question in questions if id(question) in labelled], failures

    def _label_video(self, questions: Sequence[Question]) -> list[tuple[Question, Question | Failure]]:
        clips = Clips(questions[0].video)
        return [(question, self._label_one(question, clips)) for question in questions]

    def _label_one(self, question: Question, clips: Clips) -> Question | Failure:
        try:
            if question.relevance is None:
                question = self._scored(question, clips)
            if question.query is None and self.rewriter is not None:
                prompt, parse = rewriting_prompt(question), query_parser(self.count)
                question = replace(question, query=self._ask(self.rewriter, prompt, parse, self.counter))
            return question
        except (VideoError, ReplyError, EndpointError) as error:
            return Failure(question, str(error))

    def _scored(self, question: Question, clips: Clips) -> Question:
        assert self.captioner is not None
        assert self.scorer is not None
        frames, seconds = self.cache.get(["length", clips.state, MOST_FRAMES], lambda: clips.length)
        times = clip_seconds(frames, seconds)
        captions = [self._caption(self.captioner, clips, index) for index in range(len(times))]
        prompt = scoring_prompt(question, captions, times)
        scores = self._ask(self.scorer, prompt, score_parser(times))
        return replace(question, frames=frames, relevance=tuple(map(float, scores)))

    def _caption(self, captioner: Model, clips: Clips, index: int) -> str:
        source = ["caption", captioner.identity, self.caption, clips.state, MOST_FRAMES, CLIP, index]
        return self.cache.get(source, lambda: parse_caption(self._call(captioner, clips[index], self.caption)))

    def _call(self, model: Model, *arguments: Any) -> str:
        """What a model replies, unless the work is to stop: calls that are not begun would be waited for."""
        if self._stopped.is_set():
            raise InterruptedError("labels: stopped")
        return model.call(*arguments)

    def _ask(self, model: Model, prompt: str, parse: Callable[[str], Value], parser: str = "") -> Value:
        """A reply that can be read. After one that cannot, the model is told why and asked again, twice at most.

        Args:
            model, prompt: whom to ask what.
            parse: reads the reply, or raises a ReplyError.
            parser: what `parse` depends on besides the prompt.

        Raises:
            ReplyError: no reply can be read.
        """

        def ask() -> Value:
            asked = prompt
            for _ in range(_ATTEMPTS):
                try:
                    return parse(self._call(model, asked))
                except ReplyError as error:
                    complaint = str(error)
                    asked = f"{prompt}\n\nAn earlier reply could not be used: {complaint}. Reply again, as asked."
            raise ReplyError(f"none of {_ATTEMPTS} replies can be used, the last because {complaint}")

        return self.cache.get(["reply", model.identity, parser, prompt], ask)


class VideoError(ValueError):
    """A video cannot be read."""


class Clips:
    """The clips of a video, which is decoded once one of them is needed.

    Args:
        path: the video.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def state(self) -> list[Any]:
        """Name, size and date of the file.

        Raises:
            VideoError: there is none.
        """
        try:
            found = self._path.stat()
        except OSError as error:
            raise VideoError(f"video must be a file, got '{self._path}': {error.strerror}") from error
        return [self._path.name, found.st_size, found.st_mtime_ns]

    @cached_property
    def video(self) -> Video:
        """One frame a second, at most 128.

        Raises:
            VideoError: the file is no video, or damaged.
        """
        try:
            return read_video(self._path, rule=lambda total, fps: sample_indices(total, num_frames(total / fps)))
        except ValueError as error:
            raise VideoError(str(error)) from error

    @property
    def length(self) -> list[float]:
        """Number of frames, and seconds."""
        video = self.video
        return [len(video.frames), video.seconds or video.total_frames / video.fps]

    def __getitem__(self, index: int) -> np.ndarray:
        """[T, H, W, 3] uint8: the frames of a clip."""
        return self.video.frames[index * CLIP : (index + 1) * CLIP]
