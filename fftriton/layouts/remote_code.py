"""Layouts for models loaded by remote code: what `fftriton.reduce` takes as `layout`.

`fftriton.reduce(model, method)` finds the videos of these models without a layout. The functions here are for what it
does not know: a language model that you call yourself with the embeddings that such a model makes, or a class of your
own that arranges its tokens in the same way. Each takes outputs of the model's own preprocessing and returns a list of
VideoLayout, which fits a prompt of one length only; any other is refused. docs/bring-your-own-model.md has an example.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..checks import check_bool, check_choice, check_count
from .expansion import Block, Section, row_of
from .layout import VideoLayout

NEWLINES = ("grid", "frame", "one_token", "no_token")
SIDES = ("left", "right")


def evenly_spaced(start: int, frames: int, patches: int, gap: int = 0, sample: int = 0) -> VideoLayout:
    """The layout of a video whose frames are at equal distances.

    Args:
        start: position of the first patch in the prompt.
        frames, patches: number of frames, and of tokens per frame.
        gap: number of other tokens between the last patch of a frame and the first patch of the next.
        sample: row of the batch.

    Raises:
        TypeError, ValueError: an argument is not an integer, or is out of range.
    """
    for name, value, least in [("start", start, 0), ("frames", frames, 1), ("patches", patches, 1), ("gap", gap, 0)]:
        check_count("evenly_spaced", name, value, least)
    return VideoLayout(Section(0, frames, patches, gap).positions(start), sample)


def llava_video(
    input_ids: Tensor,
    frames: Sequence[int],
    *,
    side: int = 14,
    newlines: str = "grid",
    merge_type: str = "spatial_unpad",
    placeholder: int = -200,
    attention_mask: Tensor | None = None,
    padding_side: str = "right",
) -> list[VideoLayout]:
    """Layouts for LLaVA-Video and the video models of the LLaVA-NeXT repository.

    One placeholder becomes all frames of a video, and a frame has side x side tokens. Newlines after every row ("grid",
    14 x 15 = 210 tokens per frame) or after every frame ("frame") are the same in all frames and count as patches; a
    single newline after the video ("one_token") does not.

    Args:
        input_ids: [B, n] int64 as given to the model, with one placeholder per video and no images.
        frames: number of frames of each video, in the order of the placeholders.
        side: tokens along the side of a frame after pooling: 14 if the checkpoint's mm_spatial_pool_mode is "bilinear",
            otherwise 13, which lmms-eval's defaults choose, too. See `llava_side`.
        newlines: the checkpoint's mm_newline_position: "grid", "frame", "one_token" or "no_token".
        merge_type: its mm_patch_merge_type. With "flat" there are no newlines at all, and without "unpad" in it the one
            of "one_token" is missing.
        placeholder: token id that represents a video.
        attention_mask: [B, n], 0 for padding, which the model removes before it inserts the videos.
        padding_side: the checkpoint's tokenizer_padding_side, on which the model pads afterwards.

    Raises:
        TypeError, ValueError: an argument is invalid, or the numbers of placeholders and videos differ.
    """
    for count in frames:
        check_count("llava_video", "frames", count, 1)
    blocks = [llava_block(count, side, newlines, merge_type) for count in frames]
    return _expanded("llava_video", input_ids, blocks, placeholder, attention_mask, padding_side)


def llava_side(patches_per_side: int, pool_mode: str) -> int:
    """Tokens along the side of a frame of LLaVA-Video after pooling.

    Args:
        patches_per_side: num_patches_per_side of the vision tower.
        pool_mode: the checkpoint's mm_spatial_pool_mode.
    """
    check_count("llava_side", "patches_per_side", patches_per_side, 2)
    return math.ceil(patches_per_side / 2) if pool_mode == "bilinear" else patches_per_side // 2


def llava_block(frames: int, side: int, newlines: str, merge_type: str) -> Block:
    """What a placeholder of LLaVA-Video becomes; the arguments are those of `llava_video`."""
    check_count("llava_video", "side", side, 1)
    check_choice("llava_video", "newlines", newlines, NEWLINES)
    if merge_type != "flat" and not merge_type.startswith("spatial"):
        raise ValueError(f"llava_video: merge_type must be 'flat' or start with 'spatial', got {merge_type!r}")
    if merge_type == "flat":
        newlines = "no_token"
    patches = side * side + {"grid": side, "frame": 1}.get(newlines, 0)
    behind = int(newlines == "one_token" and "unpad" in merge_type)
    columns = {"grid": side + 1, "frame": None}.get(newlines, side)
    return Block(frames * patches + behind, (Section(0, frames, patches, columns=columns),))


def nvila(
    input_ids: Tensor,
    frames: Sequence[int],
    *,
    placeholder: int,
    patches: int = 256,
    pool_sizes: Sequence[Sequence[int]] = ((1, 1, 1),),
    before_frame: int = 0,
    after_frame: int = 1,
    after_pool: int = 0,
    separators: bool = False,
    attention_mask: Tensor | None = None,
    padding_side: str = "right",
) -> list[VideoLayout]:
    """Layouts for NVILA: one placeholder becomes all frames of a video, each followed by a newline.

    Args:
        input_ids: [B, n] int64 as given to the model, with one placeholder per video and no images.
        frames: number of frames of each video, in the order of the placeholders, before pooling.
        placeholder: token id that represents a video: tokenizer.media_token_ids["video"].
        patches: tokens per frame as the projector makes them: 256, or 121 for NVILA Lite.
        pool_sizes: those of a video encoder that pools, [[8, 1, 1]] for NVILA-8B-Video: each [frames, rows, columns]
            pools so many into one, and gives a layout of its own.
        before_frame, after_frame: numbers of the encoder's start_tokens and end_tokens, around every frame.
        after_pool: number of its sep_tokens, after the frames of each pool size.
        separators: whether the tokens around a frame count as patches of it. The published code of FrameFusion merges
            them, too, so its results can only be had with them; they are text to NVILA, and stay otherwise.
        attention_mask: [B, n], 0 for padding, which the model removes before it inserts the videos.
        padding_side: the tokenizer's, on which the model pads afterwards; NVILA sets it to "right".

    Raises:
        TypeError, ValueError: an argument is invalid, the numbers of placeholders and videos differ, or frames or
            patches do not form whole groups.
    """
    for count in frames:
        check_count("nvila", "frames", count, 1)
    around = (before_frame, after_frame, after_pool)
    blocks = [nvila_block(count, patches, pool_sizes, around, separators) for count in frames]
    return _expanded("nvila", input_ids, blocks, placeholder, attention_mask, padding_side)


def nvila_block(
    frames: int, patches: int, pool_sizes: Sequence[Sequence[int]], around: tuple[int, int, int], separators: bool
) -> Block:
    """What a placeholder of NVILA becomes; the arguments are those of `nvila`."""
    check_bool("nvila", "separators", separators)
    check_count("nvila", "patches", patches, 1)
    for name, value in zip(("before_frame", "after_frame", "after_pool"), around, strict=True):
        check_count("nvila", name, value, 0)
    before, after, last = around
    sections, size = [], 0
    for pool in pool_sizes:
        if len(pool) != 3:
            raise ValueError(f"nvila: pool_sizes must have three numbers each, got {list(pool)}")
        for number in pool:
            check_count("nvila", "pool_sizes", number, 1)
        time, rows, columns = pool
        if frames % time:
            raise ValueError(f"nvila: frames must be a multiple of the pool size {time}, got {frames}")
        side = math.isqrt(patches)
        if rows * columns > 1 and (side * side != patches or side % rows or side % columns):
            raise ValueError(f"nvila: patches must form a square that {rows} x {columns} divide, got {patches}")
        own = patches // (rows * columns)
        whole, width = before + own + after, side // columns if side * side == patches else None
        section = (
            Section(size, frames // time, whole)
            if separators
            else Section(size + before, frames // time, own, before + after, width)
        )
        sections.append(section)
        size += frames // time * whole + last
    return Block(size, tuple(sections))


def minicpm_v(image_bound: Sequence[Tensor], input_ids: Tensor, *, separators: bool = False) -> list[VideoLayout]:
    """Layouts for MiniCPM-V 2.6: frames are images, whose positions are in the processor's image_bound.

    An image is one unit of tokens, or several if it has been cut into slices, which count as patches of their frame:
    the id before a unit tells a slice from an image. Two or more images in a row that have as many tokens each are one
    video. Images elsewhere, and a single one, are no video: text that stands out from what is between the frames
    divides two videos.

    Args:
        image_bound: for each sample, [n, 2] int64: start and end (exclusive) of each unit, as the processor returns it.
        input_ids: [B, N], as the processor returns them.
        separators: whether the tokens between a frame and the next, </image> and <image> among them, count as patches
            of it. The published code of FrameFusion merges them, too, so its results can only be had with them; they
            are text to MiniCPM-V, and stay otherwise.

    Raises:
        TypeError, ValueError: image_bound or input_ids are invalid, or, with separators, the frames of a video are not
            at equal distances.
    """
    check_bool("minicpm_v", "separators", separators)
    if len(image_bound) != len(input_ids):
        raise ValueError(
            f"minicpm_v: image_bound must have an entry per sample, of which there are {len(input_ids)}, got "
            f"{len(image_bound)}"
        )
    layouts, length = [], input_ids.shape[1]
    for sample, bounds in enumerate(image_bound):
        frames = _frames_of_units(input_ids[sample].tolist(), [(int(start), int(end)) for start, end in bounds])
        for video in _videos(frames):
            positions = _with_separators(video, length) if separators else torch.stack(video)
            layouts.append(VideoLayout(positions, sample, length))
    return layouts


def internvl_chat(input_ids: Tensor, *, context_token: int, patches: int = 256) -> list[VideoLayout]:
    """Layouts for InternVL2.5 as remote code: frames and images share a token, and each is a run of it.

    A run has `patches` tokens, or several times as many if the image has been cut into tiles. Two or more runs in a row
    that have as many tokens each are one video. Images elsewhere, and a single one, are no video: text that stands out
    from what is between the frames divides two videos.

    Args:
        input_ids: [B, N] int64: the tokenized prompt, with its image tokens filled in.
        context_token: token id of <IMG_CONTEXT>.
        patches: tokens per tile: the model's num_image_token.

    Raises:
        TypeError, ValueError: patches is not an integer of at least 1, or a run is not a multiple of it.
    """
    check_count("internvl_chat", "patches", patches, 1)
    layouts = []
    for sample, row in enumerate((input_ids == context_token).cpu()):
        runs = runs_of(row)
        for run in runs:
            if len(run) % patches:
                raise ValueError(
                    f"internvl_chat: patches must divide the {len(run)} tokens of a frame or image, got {patches}"
                )
        layouts += [VideoLayout(torch.stack(video), sample, input_ids.shape[1]) for video in _videos(runs)]
    return layouts


def frames_of_runs(found: Tensor, patches: int, columns: int | None = None) -> list[VideoLayout]:
    """A layout for each row of found [B, N] bool that has two or more runs of exactly `patches` tokens.

    columns: as in a VideoLayout.
    """
    layouts = []
    for sample, row in enumerate(found):
        frames = [run for run in runs_of(row) if len(run) == patches]
        if len(frames) > 1:
            layouts.append(VideoLayout(torch.stack(frames), sample, columns=columns))
    return layouts


def runs_of(found: Tensor) -> list[Tensor]:
    """The runs of consecutive positions that found [N] bool marks: [n] int64 each."""
    places = found.nonzero()[:, 0]
    breaks = (places.diff() != 1).nonzero()[:, 0] + 1
    return [run for run in places.tensor_split(breaks) if len(run)]


def _frames_of_units(ids: Sequence[int], units: Iterable[tuple[int, int]]) -> list[Tensor]:
    """[n] int64 positions of each frame, with its slices, which another id opens than the one that opens a frame."""
    frames: list[list[Tensor]] = []
    opener, end = None, 0
    for start, stop in units:
        if not end < start < stop <= len(ids):
            raise ValueError(
                f"minicpm_v: image_bound must ascend, leave a token before each unit and lie within the {len(ids)} "
                f"ids, got {[start, stop]} after {end}"
            )
        opener = ids[start - 1] if opener is None else opener
        if ids[start - 1] == opener:
            frames.append([])
        frames[-1].append(torch.arange(start, stop))
        end = stop
    return [torch.cat(frame) for frame in frames]


def _videos(frames: Sequence[Tensor]) -> list[list[Tensor]]:
    """Frames [n] int64 in a row that belong together: as many tokens in each, and about as many between them.

    What is between two frames may be a token longer than next to it, since frames are numbered, but not more.
    """
    gaps = [
        int(after[0] - before[-1]) if torch.equal(after - after[0], before - before[0]) else None
        for before, after in itertools.pairwise(frames)
    ]
    videos = [list(frames[:1])]
    for index, gap in enumerate(gaps):
        nearby = [other for other in gaps[max(0, index - 1) : index + 2] if other is not None]
        if gap is not None and gap <= min(nearby) + 1:
            videos[-1].append(frames[index + 1])
        else:
            videos.append([frames[index + 1]])
    return [video for video in videos if len(video) > 1]


def _with_separators(video: Sequence[Tensor], length: int) -> Tensor:
    """[F, P] int64: all from the first patch of a frame up to that of the next.

    The last frame ends two tokens after its last patch, as in the published code; holes are -1.
    """
    starts = torch.stack([frame[0] for frame in video])
    steps = starts.diff().unique()
    if len(steps) > 1:
        raise ValueError(
            f"minicpm_v: separators must be False unless the frames are at equal distances, got {steps.tolist()}"
        )
    positions = starts[:, None] + torch.arange(int(steps[0]))
    return positions.where(positions < min(int(video[-1][-1]) + 3, length), -1)


def _expanded(
    name: str, input_ids: Tensor, blocks: Sequence[Block], placeholder: int, mask: Tensor | None, padding_side: str
) -> list[VideoLayout]:
    """The layouts of the videos in blocks, one per placeholder, after the rows have been expanded and padded anew."""
    check_choice(name, "padding_side", padding_side, SIDES)
    rows, left = [], iter(blocks)
    for sample, ids in enumerate(input_ids.cpu()):
        found = (ids if mask is None else ids[mask[sample].cpu().bool()]) == placeholder
        own = [block for _, block in zip(range(int(found.sum())), left, strict=False)]
        rows.append(row_of(found, own))
    count = sum(len(row.text) - 1 for row in rows)
    if count != len(blocks):
        raise ValueError(f"{name}: frames must have an entry for each of the {count} placeholders, got {len(blocks)}")
    length = max(row.length for row in rows)
    shifts = [length - row.length if padding_side == "left" else 0 for row in rows]
    return [
        VideoLayout(positions + shift, sample, length, columns)
        for sample, (row, shift) in enumerate(zip(rows, shifts, strict=True))
        for positions, columns in row.videos()
    ]
