"""Model classes for lmms-eval. Needs lmms-eval 0.7 or newer."""

from __future__ import annotations

from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models import get_model

from ..checks import check_choice, check_count
from ..evaluate import Setting
from ..hf import apply
from ..runtime.answers import TokenClock, generate
from ..runtime.target import Target, to_model
from ..runtime.video import Video, read_video
from .asking import AskedRelevance, noting, with_asked

PROCESSING = ("base", "fftriton")


class FFTriton(lmms):
    """A model of lmms-eval with its vision tokens reduced.

    Args:
        base: name of the model in lmms-eval: qwen2_vl, qwen2_5_vl, llava_onevision, llava_vid, vila, internvl2, ... It
            must be a model for simple tasks (`models/simple`) with a model in `.model` that needs no layout.
        method: method as text, as for `fftriton eval` ("framefusion:similarity_threshold=0.9"). kvtp with a relevance
            is told each question, and the frames that the base passes to its processor.
        budget: fraction of the vision tokens to keep, in (0, 1].
        processing: "base" leaves loading, frame sampling and prompts to lmms-eval's model. "fftriton" does them itself,
            see `VideoModel`, for machines on which lmms-eval's model cannot run (it needs torchvision and decord).
        arguments: arguments of the base: pretrained, max_num_frames, ...; with processing=fftriton, trust_remote_code
            is False unless given.

    Raises:
        ValueError, TypeError: the method, the budget or the base cannot be used.
    """

    is_simple = True

    def __init__(
        self, base: str, method: str = "framefusion", budget: float = 0.3, processing: str = "base", **arguments: Any
    ) -> None:
        super().__init__()
        check_choice("fftriton", "processing", processing, PROCESSING)
        setting = Setting(method, float(budget))
        if setting.is_control:
            raise ValueError(f"fftriton: method must be told the question that is asked, got '{method}'")
        chosen, self.asked = with_asked(setting.method())
        if processing == "base":
            self.base = get_model(base, force_simple=True)(**arguments)
        else:
            self.base = VideoModel(base, **arguments)
            self.base.asked = self.asked
        for relevance in setting.relevances:
            relevance.to(self.base.model.device)
        self.reduction = apply(self.base.model, chosen)
        self._rank, self._world_size = self.base.rank, self.base.world_size

    def __getattr__(self, name: str) -> Any:
        """Look up other attributes, which the evaluator may ask for, in the base."""
        if name == "base":  # not set yet
            raise AttributeError(name)
        return getattr(self.base, name)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answer each request, as in lmms-eval; one after the other if a method has to know the question.

        Raises:
            ValueError: the base does not tell its processor the frames.
        """
        if not self.asked:
            return self._base().generate_until(requests)
        with noting(self.base, self.asked):
            return [self._ask(request) for request in requests]

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Answer each request over several rounds, as in lmms-eval.

        Raises:
            ValueError: a method has to know the question, which differs from round to round.
        """
        if self.asked:
            raise ValueError("fftriton: kvtp with relevance answers single questions only")
        return self._base().generate_until_multi_round(requests)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """The log-likelihoods of given answers, as in lmms-eval.

        Raises:
            ValueError: a method has to know the question, which is not told apart from the answer here.
        """
        if self.asked:
            raise ValueError("fftriton: kvtp with relevance generates answers only")
        return self._base().loglikelihood(requests)

    def _ask(self, request: Any) -> str:
        """Answer one request, whose question the method is told."""
        for relevance in self.asked:
            relevance.ask(request.args[0])
        return self._base().generate_until([request])[0]

    def _base(self) -> Any:
        self.base.task_dict, self.base.cache_hook = self.task_dict, self.cache_hook
        return self.base


class VideoModel(lmms):
    """A video model of transformers with inputs from fftriton: evenly sampled frames, one video per question.

    Args:
        family: the checkpoint's config.model_type.
        pretrained: folder of a checkpoint, or its name on the Hugging Face hub; None for the shipped model.
        max_num_frames: number of frames to sample from a video file.
        device: a torch device; None for the GPU if there is one.
        batch_size: must be 1.
        trust_remote_code: whether to run the checkpoint's own code if it has any.

    Raises:
        ValueError: the checkpoint is of another family or cannot be used, or the batch size is above 1.
    """

    def __init__(
        self, family: str, pretrained: str | None = None, max_num_frames: int = 16, device: str | None = None,
        batch_size: int | str = 1, trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if int(batch_size) != 1:
            raise ValueError(f"fftriton: batch_size must be 1 with processing=fftriton, got {batch_size}")
        self.target = Target(pretrained, device, trust_remote_code=trust_remote_code)
        self.processor, self.model = self.target.load_processor(), self.target.load_model()
        if self.model.config.model_type != family:
            raise ValueError(
                f"fftriton: base must be {self.model.config.model_type}, as the checkpoint is, got {family}"
            )
        self.asked: list[AskedRelevance] = []
        self._frames = int(max_num_frames)
        check_count("fftriton", "max_num_frames", self._frames, 1)

    @torch.no_grad()
    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answer each request greedily."""
        return [self._answer(*request.args) for request in requests]

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("fftriton: processing=fftriton answers single questions only")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("fftriton: processing=fftriton generates answers only")

    def _answer(
        self, question: str, settings: dict[str, Any], doc_to_visual: Any, doc_id: Any, task: str, split: str
    ) -> str:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        if len(visuals) != 1:
            raise ValueError(f"fftriton: a question must be about one video, got {len(visuals)} of '{task}'")
        video = visuals[0] if isinstance(visuals[0], Video) else read_video(visuals[0], self._frames)
        most = settings.get("max_new_tokens") or self.target.answer_length(self.model)
        for relevance in self.asked:
            relevance.see(video.frames)
        inputs = to_model(self.processor(video, question), self.model)
        tokens = generate(self.model, inputs, TokenClock(), most)
        answer = str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True))
        for stop in settings.get("until") or ():
            answer = answer.partition(stop)[0]
        return answer.strip()
