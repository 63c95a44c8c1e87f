"""The parts that every method is made of.

A `Method` says what to keep and never changes. Its `begin` returns a `MethodState`, which answers the calls of one
prefill. A method never sees Hugging Face; the code that drives it (fftriton.hf) never decides what to keep.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fftriton_kernels import gather_rows, merge_mean, topk_keep

from ..checks import check_count
from ..layouts.layout import VideoLayout, frame_ids, previous_of_patch


@dataclass(frozen=True)
class Prompt:
    """One sample of the batch, as it is before the first layer.

    Args:
        num_layers: number of decoder layers.
        length: number of tokens, including text and excluding padding.
        layouts: where its videos stand among these tokens.
        attends: whether each layer has attention scores; empty if all layers do.
        video_numbers: the number of each video in the batch, counted sample by sample; empty if they are 0, 1, ...
        videos_in_batch: how many videos the batch has; 0 if that is not known.
    """

    num_layers: int
    length: int
    layouts: Sequence[VideoLayout]
    attends: Sequence[bool] = ()
    video_numbers: Sequence[int] = ()
    videos_in_batch: int = 0

    @cached_property
    def num_video_tokens(self) -> int:
        """Number of video tokens in the prompt, over all its videos."""
        return sum(len(layout.tokens) for layout in self.layouts)

    def number_of(self, video: int) -> int:
        """The number in the batch of one of the sample's videos."""
        return self.video_numbers[video] if self.video_numbers else video

    def next_attention(self, layer: int) -> int:
        """The first layer, from `layer` on, that has attention scores; num_layers if there is none."""
        return next((i for i in range(layer, self.num_layers) if not self.attends or self.attends[i]), self.num_layers)

    @cached_property
    def frame(self) -> Tensor:
        """[length] int64 on the CPU: the frame of each token, counted across videos; -1 for tokens outside videos."""
        layouts = [replace(layout, sample=0) for layout in self.layouts]
        return frame_ids(layouts, 1, self.length, torch.device("cpu"))[0]


@dataclass(frozen=True)
class FrameScores:
    """How relevant a method took the frames of one video to be, for reports.

    Args:
        video: number of the video in the batch.
        scores: [F] fp32, higher for more.
        seconds: what it took a predictor to find them out before the forward.
        macs: its multiply-accumulates, each of which counts once.
    """

    video: int
    scores: Tensor
    seconds: float = 0.0
    macs: float = 0.0


@dataclass(frozen=True)
class Window:
    """Which earlier tokens a token may attend to.

    Args:
        sinks: number of tokens at the start of the sequence.
        recent: number of most recent tokens, including the token itself; at least 1.
    """

    sinks: int
    recent: int

    def __post_init__(self) -> None:
        check_count("Window", "sinks", self.sinks, 0)
        check_count("Window", "recent", self.recent, 1)


@dataclass(frozen=True)
class Merge:
    """The groups that one merge formed, as positions of the prompt."""

    roots: Tensor  # [B, N] int64: for each row before compaction, the row that it merged into
    position: Tensor  # [B, N] int64: the position of each of these rows in the prompt

    @cached_property
    def merged(self) -> Tensor:
        """[m] int64: the positions that left the sequence."""
        return self.position[self._leaves]

    @cached_property
    def into(self) -> Tensor:
        """[m] int64: the position that each of `merged` merged into."""
        return self.position.gather(1, self.roots)[self._leaves]

    @cached_property
    def _leaves(self) -> Tensor:
        return self.roots != torch.arange(self.roots.shape[1], device=self.roots.device)


FirstLayers = Callable[["VideoTokens", int, int | None], tuple[Tensor, float]]


@dataclass(frozen=True)
class VideoTokens:
    """All tokens of a sample at one point of the prefill, including text, and the ways to shorten them.

    Args:
        hidden: [B, N, D] hidden states.
        position: [B, N] int64, the position of each row in the prompt, not counting padding.
        patch: [B, N] int64, which patch of which video a row shows, the same number in every frame; -1 for tokens
            outside videos.
        num_video: number of rows whose patch is not -1.
        companions: tensors [B, N, ...] that are gathered together with the rows, such as rotary embeddings.
        additions: tensors [B, N, D] that later layers add to the hidden states (Qwen3-VL's deepstack features). They
            are gathered together with the rows, and averaged when rows merge.
        attention: after attention, `attention(n)` returns the attention that each row received in this layer, [B, N]
            fp32, summed over the last n queries (None: all queries) and averaged over the heads. None before attention.
        merge: the merge that produced these tokens, or None.
        sizes: [B, N] fp32, how many tokens each row stands for: log(size) is added to the scores of its key in the
            layers that follow and in decode. None if each stands for itself. Only for a method with `proportional`.
        first_layers: before the first layer, `first_layers(rows, layer, n)` runs the layers up to the attention of
            `layer` on some of the sample's tokens, given as VideoTokens. It returns the attention that each of them
            received there from the last n of them (None: from all), [1, M] fp32, the mean over the heads, and the
            multiply-accumulates that this took. None elsewhere.
    """

    hidden: Tensor
    position: Tensor
    patch: Tensor
    num_video: int
    companions: tuple[Tensor, ...] = ()
    attention: Callable[[int | None], Tensor] | None = None
    merge: Merge | None = None
    additions: tuple[Tensor, ...] = ()
    first_layers: FirstLayers | None = None
    sizes: Tensor | None = None
    _links: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of rows, including text."""
        return self.position.shape[1]

    @cached_property
    def predecessor(self) -> Tensor:
        """[B, N] int64: the row of the same patch in the nearest earlier frame that still has it, or -1."""
        return previous_of_patch(self.patch) if self._links is None else self._links

    def merge_groups(self, roots: Tensor, proportional: bool = False) -> VideoTokens:
        """Replace each group of rows by their mean, at the group's root.

        Args:
            roots: [B, N] int64, the root of each row.
            proportional: whether a group's size becomes the sum of the sizes of its rows; otherwise it is the root's.
        """
        rows = torch.cat([self.hidden, *self.additions], -1) if self.additions else self.hidden
        sizes = self.sizes_at(roots) if proportional else self.sizes
        others = (self.position, self.patch, *self.companions)
        merged = merge_mean(rows, roots, (*others, *_present(sizes)), predecessor=self.predecessor)
        position, patch, *companions = merged.companions[: len(others)]
        (sizes,) = merged.companions[len(others) :] or (None,)
        hidden, *additions = merged.x.split(self.hidden.shape[-1], -1)
        hidden = hidden if hidden.shape[1] < self.length else self.hidden  # nothing merged: nothing new
        return VideoTokens(
            hidden, position, patch, self.num_video - (self.length - hidden.shape[1]), tuple(companions),
            merge=Merge(roots, self.position), additions=tuple(additions), first_layers=self.first_layers,
            sizes=sizes if hidden.shape[1] < self.length else self.sizes, _links=merged.predecessor,
        )  # fmt: skip

    def sizes_at(self, roots: Tensor) -> Tensor:
        """[B, N] fp32: at each root, the sum of the sizes of the rows [B, N] int64 whose root it is; 0 elsewhere."""
        own = self.position.new_ones(self.position.shape, dtype=torch.float32) if self.sizes is None else self.sizes
        return torch.zeros_like(own).scatter_add_(1, roots.clamp_min(0), own.masked_fill(roots < 0, 0.0))

    def keep_top(self, scores: Tensor, count: int) -> VideoTokens:
        """Keep the `count` video tokens with the highest scores [B, N], and all other tokens, in their order."""
        count = min(count, self.num_video)
        rows = self.length - self.num_video + count  # known beforehand, so there is no need to wait for a GPU
        kept, _ = topk_keep(scores, count, candidates=self.patch >= 0, capacity=rows)
        return self.keep(kept, count)

    def keep(self, rows: Tensor, num_video: int) -> VideoTokens:
        """Keep these rows [B, K] int64, which ascend and contain `num_video` video tokens."""
        hidden, position, patch, *others = gather_rows(
            rows, self.hidden, self.position, self.patch, *self.companions, *self.additions, *_present(self.sizes)
        )
        (sizes,) = others[len(self.companions) + len(self.additions) :] or (None,)
        companions = others[: len(self.companions)]
        additions = others[len(self.companions) : len(self.companions) + len(self.additions)]
        return VideoTokens(
            hidden, position, patch, num_video, tuple(companions), additions=tuple(additions),
            first_layers=self.first_layers, sizes=sizes,
        )  # fmt: skip

    def at(
        self, hidden: Tensor, attention: Callable[[int | None], Tensor] | None, first_layers: FirstLayers | None = None
    ) -> VideoTokens:
        """The same tokens at a later point, with other hidden states, which may be on another device."""
        links = self.__dict__.get("predecessor", self._links)
        there = replace(self, hidden=hidden, attention=attention, merge=None, first_layers=first_layers, _links=links)
        return there if self.position.device == hidden.device else there._follow()

    def _follow(self) -> VideoTokens:
        """Move everything to the device of the hidden states: the next layer may be on another one."""

        def move(part: Tensor) -> Tensor:
            return part.to(self.hidden.device)

        return replace(
            self, position=move(self.position), patch=move(self.patch),
            companions=tuple(map(move, self.companions)), additions=tuple(map(move, self.additions)),
            sizes=None if self.sizes is None else move(self.sizes),
            _links=None if self._links is None else move(self._links),
        )  # fmt: skip


def _present(sizes: Tensor | None) -> tuple[Tensor, ...]:
    return () if sizes is None else (sizes,)


Steps = list[VideoTokens] | VideoTokens | None
"""What a call may return: a list of the tokens after each step, or the tokens after a single step, or None."""

_CALLS = ("window", "wants_attention", "before_attention", "after_attention")
_FORMER_RULE = "is deprecated: `begin` must return a MethodState, which answers the calls of one prefill"


class Method:
    """What to keep. Subclasses are small frozen dataclasses; `begin` starts the work on one sample.

    Attributes:
        budget: the video tokens in a layer's attention, averaged over layers, as a fraction of the prompt's.
        proportional: whether its tokens may have sizes, which attention then takes into account.
    """

    budget: float = 1.0
    proportional: bool = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if own := [name for name in _CALLS if callable(vars(cls).get(name))]:
            warnings.warn(
                f"{cls.__name__}: a Method that defines {', '.join(own)} {_FORMER_RULE}", DeprecationWarning, 2
            )

    @property
    def renumbers(self) -> bool:
        """Whether the method changes the positions of the tokens that stay; they must be single numbers then."""
        return False

    def check(self, num_layers: int) -> None:
        """Raise a ValueError if the method cannot work on a decoder of `num_layers` layers."""

    def about(self, frames: Any, question: str) -> Method:
        """The method for one video, [T, H, W, 3] uint8 as the model gets it, and one question.

        It is the method itself, unless the method needs to look at them before the model does.
        """
        return self

    def count(self, frames: int, patches: int) -> int | None:
        """How many tokens are left of a video of `frames` frames of `patches` tokens before the first layer.

        None if its pixels or the question decide that, or if the method works in later layers, too, as sizes do. A
        serving engine has to know the number before it sees the video.
        """
        return None

    def begin(self, prompt: Prompt) -> MethodState:
        """The state of one prefill, which answers its calls."""
        return MethodState(self, prompt)


class MethodState:
    """What a method does in one prefill of one sample. This one keeps all tokens; subclasses override the calls.

    `before_attention` and `after_attention` return a list of the tokens after each step, so that a merge that is
    followed by a pruning is two; an empty list changes nothing. A single VideoTokens stands for a list of one, and None
    for an empty list.

    Args:
        method: what to keep.
        prompt: the sample.
    """

    def __init__(self, method: Method, prompt: Prompt) -> None:
        self.method, self.prompt = method, prompt

    @property
    def least_budget(self) -> float:
        """The lowest budget that this prefill could have met; asked after the prefill."""
        return self.method.budget

    @property
    def frame_scores(self) -> Sequence[FrameScores]:
        """The scores by which this prefill shared its budget among frames, one per video; asked after the prefill."""
        return ()

    def window(self, length: int) -> Window | None:
        """Which tokens a token may attend to, or None if it may attend to all of them.

        Asked after `before_attention` of layer 0. The window holds in every layer, and for the tokens after the prompt.

        Args:
            length: number of tokens in the prompt and everything before it.
        """
        return None

    def wants_attention(self, layer: int) -> bool:
        """Whether `after_attention` of this layer may use attention scores. Layers without attention have none."""
        return False

    def before_attention(self, layer: int, tokens: VideoTokens) -> Steps:
        """Called before the attention of each layer, from layer 0 on."""
        return []

    def after_attention(self, layer: int, tokens: VideoTokens) -> Steps:
        """Called between each layer's attention and its feed-forward block."""
        return []


def start(method: Method, prompt: Prompt) -> MethodState:
    """`method.begin(prompt)`, checked.

    Raises:
        TypeError: `begin` returns something else than a MethodState.
    """
    if any(callable(getattr(type(method), name, None)) for name in _CALLS):
        return _FormerState(method, prompt)  # it answers the calls itself
    state = method.begin(prompt)
    if isinstance(state, Method):
        warnings.warn(f"{method}: a `begin` that returns a Method {_FORMER_RULE}", DeprecationWarning, stacklevel=2)
        return _FormerState(state, prompt)
    if not isinstance(state, MethodState):
        raise TypeError(f"reduce: {method}: begin must return a MethodState, got {type(state).__name__}")
    return state


def list_steps(answer: Any) -> list[Any]:
    """What a call returned, as a list; nonsense is returned as it is, for `wrong_kind` to see."""
    if answer is None:
        return []
    return answer if isinstance(answer, list) else [answer]


def wrong_kind(step: Any) -> str | None:
    """Which rule a step of a call breaks by its type or the types of its fields; None if it breaks none."""
    if not isinstance(step, VideoTokens):
        return f"must return VideoTokens, a list of them or None, got {type(step).__name__}"
    for name in ("hidden", "position", "patch"):
        if not isinstance(value := getattr(step, name), Tensor):
            return f"{name} must be a tensor, got {type(value).__name__}"
    for name in ("companions", "additions"):
        value = getattr(step, name)
        if not isinstance(value, tuple) or not all(isinstance(part, Tensor) for part in value):
            return f"{name} must be a tuple of tensors, got {type(value).__name__}"
    if not isinstance(step.sizes, Tensor | None):
        return f"sizes must be a tensor or None, got {type(step.sizes).__name__}"
    if isinstance(step.num_video, bool) or not isinstance(step.num_video, int):
        return f"num_video must be an integer, got {type(step.num_video).__name__}"
    if not isinstance(step.merge, Merge | None):
        return f"merge must be a Merge or None, got {type(step.merge).__name__}"
    return None


class _FormerState(MethodState):
    """Passes the calls on to a method that answers them itself."""

    @property
    def least_budget(self) -> float:
        return getattr(self.method, "least_budget", self.method.budget)

    def window(self, length: int) -> Window | None:
        return self._ask("window", None, length)

    def wants_attention(self, layer: int) -> bool:
        return self._ask("wants_attention", False, layer)

    def before_attention(self, layer: int, tokens: VideoTokens) -> Steps:
        return self._ask("before_attention", None, layer, tokens)

    def after_attention(self, layer: int, tokens: VideoTokens) -> Steps:
        return self._ask("after_attention", None, layer, tokens)

    def _ask(self, call: str, default: Any, *arguments: Any) -> Any:
        answer = getattr(self.method, call, None)
        return default if answer is None else answer(*arguments)
