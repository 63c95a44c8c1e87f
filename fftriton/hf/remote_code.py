"""The models of remote code whose videos are found without a layout: LLaVA-Video, NVILA, MiniCPM-V and InternVL2.5."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layouts.expansion import Block, ExpandedRow, row_of
from ..layouts.layout import VideoLayout
from ..layouts.remote_code import internvl_chat, llava_block, llava_side, minicpm_v, nvila_block
from .follower import Follower, Noted, by_name, named
from .hooks import Undo, wrap

_LLAVA_PLACEHOLDER = -200  # for images and videos


class LlavaQwen(Follower):
    """LLaVA-Video and the other models of its repository: `prepare_inputs_labels_for_multimodal` makes the embeddings.

    Newlines after each row or frame always count as patches.
    """

    part = None
    methods: ClassVar = {
        "prepare_inputs_labels_for_multimodal": ("input_ids", "attention_mask", "images", "modalities"),
        "get_vision_tower": (),
    }

    def install(self, undo: Undo) -> None:
        wrap(self.model, "prepare_inputs_labels_for_multimodal", self._follow(self._prepared), undo)
        wrap(self.model, "generate", self._within_generate, undo)

    def _within_generate(self, generate: Callable) -> Callable:
        """Without images, `generate` embeds the text by itself."""
        signature = inspect.signature(generate)

        def scoped(*args: Any, **kwargs: Any) -> Any:
            given = named(by_name(signature, args, kwargs))
            ids = given.get("input_ids") if given.get("inputs") is None else given.get("inputs")
            text = None
            if given.get("images") is None and isinstance(ids, Tensor):
                text = Noted(ids.shape, [], has_vision=False)
            with self._expecting(text):
                return generate(*args, **kwargs)

        return scoped

    def _prepared(self, given: Mapping[str, Any], output: Any) -> Any:
        _, _, mask, _, embeddings, labels = output
        if embeddings is None:  # no images, or a single token
            return output
        labels = None if labels is None else labels.clone()
        self._note(embeddings, Noted(embeddings.shape[:2], self._layouts(given, embeddings, mask), True, labels))
        return (*output[:5], labels)

    def _layouts(self, given: Mapping[str, Any], embeddings: Tensor, mask: Tensor | None) -> list[VideoLayout]:
        images, modalities = given["images"], given["modalities"]
        modalities = [modalities] if isinstance(modalities, str) else list(modalities)
        if isinstance(images, Tensor) and images.ndim < 5:
            if "video" in modalities:
                raise ValueError(
                    f"reduce: images must be a list of videos [F, 3, H, W] for modalities {modalities}, got a tensor "
                    f"of shape {list(images.shape)}, each row of which {type(self.model).__name__} takes for an image"
                )
            return []
        videos = {index for index, modality in enumerate(modalities[: len(images)]) if modality == "video"}
        if not videos:
            return []
        frames = [1 if image.ndim == 3 else len(image) for image in images]
        blocks = [self._video(count) if at in videos else Block(None) for at, count in enumerate(frames)]
        ids = _without_padding(given["input_ids"], given["attention_mask"])
        found = [row == _LLAVA_PLACEHOLDER for row in ids]
        rows = [row_of(at, own) for at, own in zip(found, _deal(found, blocks), strict=True)]
        text = [row[~at] for row, at in zip(ids, found, strict=True)]
        side = getattr(self.model.config, "tokenizer_padding_side", "right")
        cut = getattr(self.model.config, "tokenizer_model_max_length", None)
        return _place(self, rows, text, embeddings, _rows_of(embeddings, mask, rows, side, cut), cut)

    def _video(self, frames: int) -> Block:
        config = self.model.config
        side = llava_side(self.model.get_vision_tower().num_patches_per_side, config.mm_spatial_pool_mode)
        newlines = getattr(config, "mm_newline_position", "one_token")
        return llava_block(frames, side, newlines, getattr(config, "mm_patch_merge_type", "flat"))


class Nvila(Follower):
    """NVILA: `_embed` makes the embeddings."""

    part = "llm"
    methods: ClassVar = {"_embed": ("input_ids", "media", "attention_mask"), "encode_images": ()}
    attributes = ("encoders", "tokenizer")

    def install(self, undo: Undo) -> None:
        wrap(self.model, "encode_images", self._listen, undo)
        wrap(self.model, "_embed", self._embedding, undo)

    def _embedding(self, embed: Callable) -> Callable:
        followed = self._follow(self._embedded)(embed)

        def listening(*args: Any, **kwargs: Any) -> Any:
            outer, self._thread.encoded = self._thread.encoded, []
            try:
                return followed(*args, **kwargs)
            finally:
                self._thread.encoded = outer

        return listening

    def _listen(self, encode: Callable) -> Callable:
        """Note how many images are encoded, and into how many tokens each."""

        def heard(*args: Any, **kwargs: Any) -> Any:
            features = encode(*args, **kwargs)
            if self._thread.encoded is not None:
                self._thread.encoded.append((len(features), {len(of_image) for of_image in features}))
            return features

        return heard

    def _embedded(self, given: Mapping[str, Any], output: Any) -> Any:
        embeddings, _, mask = output
        layouts, has_vision = self._layouts(given, embeddings, mask), any(map(len, (given["media"] or {}).values()))
        self._note(embeddings, Noted(embeddings.shape[:2], layouts, has_vision))
        return output

    def _layouts(self, given: Mapping[str, Any], embeddings: Tensor, mask: Tensor) -> list[VideoLayout]:
        media, tokenizer = given["media"] or {}, self.model.tokenizer
        videos = [len(video) for video in media.get("video") or ()]
        if not videos:
            return []
        names = {token: name for name, token in tokenizer.media_token_ids.items()}
        left = {"video": iter(self._blocks(videos))}
        ids = _without_padding(given["input_ids"], given["attention_mask"])
        found = [torch.isin(row, row.new_tensor([*names])) for row in ids]
        rows = []
        for row, at in zip(ids, found, strict=True):
            kinds = [names[token] for token in row[at].tolist()]
            rows.append(row_of(at, [next(left["video"]) if kind == "video" else Block(None) for kind in kinds]))
        text = [row[~at] for row, at in zip(ids, found, strict=True)]
        cut = tokenizer.model_max_length if self.model.training else None
        return _place(self, rows, text, embeddings, _rows_of(embeddings, mask, rows, tokenizer.padding_side, cut), cut)

    def _blocks(self, frames: Sequence[int]) -> list[Block]:
        encoder = self.model.encoders["video"]
        sizes = set().union(*(made for count, made in self._thread.encoded or () if count in (sum(frames), *frames)))
        if len(sizes) != 1:
            raise ValueError(
                f"layout: must be given if encode_images of {type(self.model).__name__} does not make the same number "
                f"of tokens of each of {sum(frames)} frames, got {sorted(sizes)}"
            )
        pool_sizes = getattr(encoder, "pool_sizes", None) or ((1, 1, 1),)
        words = encoder.start_tokens, encoder.end_tokens, getattr(encoder, "sep_tokens", None)
        before, after, last = (0 if text is None else len(self.model.tokenizer(text).input_ids) for text in words)
        return [nvila_block(count, min(sizes), pool_sizes, (before, after, last), self.separators) for count in frames]


class MiniCPMV(Follower):
    """MiniCPM-V 2.6: `get_vllm_embedding` makes the embeddings, and is told where images go."""

    part = "llm"
    methods: ClassVar = {"get_vllm_embedding": ("data",)}

    def install(self, undo: Undo) -> None:
        wrap(self.model, "get_vllm_embedding", self._follow(self._embedded), undo)

    def _embedded(self, given: Mapping[str, Any], output: Any) -> Any:
        data, embeddings = given["data"], output[0]
        bounds, ids = data["image_bound"], data["input_ids"]
        layouts = minicpm_v(bounds, ids, separators=self.separators)
        self._note(embeddings, Noted(embeddings.shape[:2], layouts, any(map(len, bounds))))
        return output


class InternVLChat(Follower):
    """InternVL2.5 as remote code: `generate` and `forward` make the embeddings of ids of the same length.

    With separators, too, the text between frames is no part of them: the published code of FrameFusion merges none.
    """

    part = "language_model"
    methods: ClassVar = {"generate": ("pixel_values", "input_ids"), "forward": ("pixel_values", "input_ids")}
    attributes = ("img_context_token_id", "num_image_token")

    def install(self, undo: Undo) -> None:
        wrap(self.model, "generate", self._around, undo)
        wrap(self.model, "forward", self._around, undo)

    def _around(self, call: Callable) -> Callable:
        signature = inspect.signature(call)

        def followed(*args: Any, **kwargs: Any) -> Any:
            bound = by_name(signature, args, kwargs)
            ids, labels = bound.arguments["input_ids"], bound.arguments.get("labels")
            if ids is None:  # the model refuses it
                return call(*args, **kwargs)
            if labels is not None:
                bound.arguments["labels"] = labels = labels.clone()
            has_pixels = bound.arguments["pixel_values"] is not None
            has_vision = has_pixels or bound.arguments.get("visual_features") is not None
            with self._expecting(Noted(ids.shape, self._layouts(ids) if has_pixels else [], has_vision, labels)):
                return call(*bound.args, **bound.kwargs)

        return followed

    def _layouts(self, ids: Tensor) -> list[VideoLayout]:
        token = self.model.img_context_token_id
        if token is None:
            raise ValueError(
                f"reduce: img_context_token_id of {type(self.model).__name__} must be set before generate or forward "
                "is called with images; chat sets it"
            )
        return internvl_chat(ids, context_token=token, patches=self.model.num_image_token)


FOLLOWERS: dict[str, type[Follower]] = {
    "internvl_chat": InternVLChat,
    "llava_llama": Nvila,
    "llava_qwen": LlavaQwen,
    "minicpmv": MiniCPMV,
}
"""By config.model_type. Other models share some of these: the class must have what is read of it, too."""


def find_follower(root: nn.Module, separators: bool = False) -> Follower | None:
    """A follower for the outermost model of a known class in `root`, or None if there is none."""
    for module in root.modules():
        kind = FOLLOWERS.get(_model_type(module))
        if kind is not None and not missing(kind, module):
            return kind(module, separators)
    return None


def why_unknown(root: nn.Module) -> str:
    """What a model lacks to be one that is followed, if its model_type says that it is one; else nothing."""
    for module in root.modules():
        kind = FOLLOWERS.get(_model_type(module))
        if kind is not None:
            return f"{type(module).__name__} lacks {', '.join(missing(kind, module))}"
    return ""


def missing(kind: type[Follower], module: nn.Module) -> list[str]:
    """What a module lacks of what a follower reads."""
    lacking = []
    for name, parameters in kind.methods.items():
        method = getattr(type(module), name, None)
        if method is None:
            lacking.append(f"a method {name!r}")
            continue
        known = inspect.signature(method).parameters
        lacking += [f"a parameter {parameter!r} of {name!r}" for parameter in parameters if parameter not in known]
    wanted = (*kind.attributes, *([] if kind.part is None else [kind.part]))
    return lacking + [f"an attribute {name!r}" for name in wanted if not hasattr(module, name)]


def _model_type(module: nn.Module) -> str:
    return str(getattr(getattr(module, "config", None), "model_type", ""))


def _without_padding(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    return list(ids) if mask is None else [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]


def _deal(found: Sequence[Tensor], blocks: Sequence[Block]) -> list[list[Block]]:
    """The blocks of each sample, whose placeholders found [n] bool marks. They are dealt out in their order.

    A sample without a placeholder takes one, too, for nothing, and one placeholder more than there are blocks gets the
    last one again.
    """
    counts = [int(at.sum()) for at in found]
    idle = sum(counts) != len(blocks)
    dealt, first = [], 0
    for count in counts:
        dealt.append([blocks[min(first + offset, len(blocks) - 1)] for offset in range(count)])
        first += count or idle
    return dealt


def _rows_of(
    embeddings: Tensor, mask: Tensor | None, rows: Sequence[ExpandedRow], side: str, cut: int | None
) -> list[Tensor]:
    """[n] int64: which of the embeddings [B, N, D] of each sample are not padding.

    mask: [B, N]; None if the model has made none, though it pads the rows of a batch.
    """
    batch, length = embeddings.shape[:2]
    if mask is not None:
        if mask.shape != embeddings.shape[:2]:
            raise ValueError(_ELSEWHERE.format(f"a mask of shape {list(mask.shape)} for {[batch, length]} tokens"))
        return [row.bool().nonzero()[:, 0] for row in mask]
    if batch == 1:
        return [torch.arange(length)]
    lengths = [row.length if cut is None else min(row.length, cut) for row in rows[:batch]]
    if max(lengths) != length:
        raise ValueError(_ELSEWHERE.format(f"{length} tokens instead of {max(lengths)}"))
    return [torch.arange(length - own, length) if side == "left" else torch.arange(own) for own in lengths]


def _place(
    follower: Follower, rows: Sequence[ExpandedRow], text: Sequence[Tensor], embeddings: Tensor,
    places: Sequence[Tensor], cut: int | None,
) -> list[VideoLayout]:  # fmt: skip
    """The layouts of the videos in embeddings [B, N, D], once their text has been found where it has to be.

    Args:
        follower: of the model that made them.
        rows: what has been put together; there may be more of them than embeddings.
        text: [t], the ids of each row without those of placeholders.
        places: [n] int64, which of each sample's embeddings are not padding.
        cut: the most tokens that a row may have; the model drops those after them.

    Raises:
        ValueError: the model has put the tokens together in another way.
    """
    layouts, embed = [], follower.language_model.get_input_embeddings()
    for sample, (row, ids, where) in enumerate(zip(rows, text, places, strict=False)):
        found = embeddings[sample, where]
        words = embed(ids).to(found)
        row = row.resolved(words, found)
        length = row.length if cut is None else min(row.length, cut)
        if length != len(found):
            raise ValueError(_ELSEWHERE.format(f"{len(found)} tokens instead of {length} in sample {sample}"))
        at = row.text_positions
        at = at[at < length]
        if not torch.equal(found[at.to(found.device)], words[: len(at)]):
            raise ValueError(_ELSEWHERE.format(f"another order of text and videos in sample {sample}"))
        where = where.cpu()
        layouts += [
            VideoLayout(where[positions].where(positions >= 0, -1), sample, embeddings.shape[1], columns)
            for positions, columns in row.videos(length)
        ]
    return layouts


_ELSEWHERE = "layout: must be given if a model puts videos among the text in a way of its own, got {}"
