"""Layouts for models loaded by remote code: what `fftriton.reduce` takes as `layout`.

Each function takes outputs of the model's own preprocessing and returns a list of VideoLayout.
docs/bring-your-own-model.md says which module to reduce and has an example.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_choice, check_count
from .layout import VideoLayout

_NEWLINES = ("grid", "frame", "one_token", "no_token")
_SIDES = ("left", "right")


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
    first = start + torch.arange(frames) * (patches + gap)
    return VideoLayout(first[:, None] + torch.arange(patches), sample)


def llava_video(
    input_ids: Tensor,
    frames: Sequence[int],
    *,
    side: int = 14,
    newlines: str = "grid",
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
        side: tokens along the side of a frame after pooling.
        newlines: the checkpoint's mm_newline_position: "grid", "frame", "one_token" or "no_token".
        placeholder: token id that represents a video.
        attention_mask: [B, n], 0 for padding, which the model removes before it inserts the videos.
        padding_side: the checkpoint's tokenizer_padding_side, on which the model pads afterwards.

    Raises:
        TypeError, ValueError: an argument is invalid, or the numbers of placeholders and videos differ.
    """
    check_count("llava_video", "side", side, 1)
    check_choice("llava_video", "newlines", newlines, _NEWLINES)
    for count in frames:
        check_count("llava_video", "frames", count, 1)
    patches = side * side + {"grid": side, "frame": 1}.get(newlines, 0)
    behind = int(newlines == "one_token")
    sizes = [count * patches + behind for count in frames]
    starts = _fill_in("llava_video", input_ids, sizes, placeholder, attention_mask, padding_side)
    return [
        evenly_spaced(start, count, patches, sample=sample)
        for (sample, start), count in zip(starts, frames, strict=True)
    ]


def nvila(
    input_ids: Tensor,
    frames: Sequence[int],
    *,
    placeholder: int,
    patches: int = 256,
    frames_pooled: int = 1,
    before_frame: int = 0,
    after_frame: int = 1,
    attention_mask: Tensor | None = None,
    padding_side: str = "left",
) -> list[VideoLayout]:
    """Layouts for NVILA: one placeholder becomes all frames of a video, each followed by a newline that is text.

    Args:
        input_ids: [B, n] int64 as given to the model, with one placeholder per video and no images.
        frames: number of frames of each video, in the order of the placeholders.
        placeholder: token id that represents a video: tokenizer.media_token_ids["video"].
        patches: tokens per frame.
        frames_pooled: frames that the video encoder pools into one: first of its pool_sizes (8 for NVILA-8B-Video).
        before_frame, after_frame: numbers of the encoder's start_tokens and end_tokens, around every frame.
        attention_mask: [B, n], 0 for padding, which the model removes before it inserts the videos.
        padding_side: the tokenizer's, on which the model pads afterwards.

    Raises:
        TypeError, ValueError: an argument is invalid, the numbers of placeholders and videos differ, or the frames do
            not form whole groups.
    """
    check_count("nvila", "before_frame", before_frame, 0)
    check_count("nvila", "after_frame", after_frame, 0)
    check_count("nvila", "frames_pooled", frames_pooled, 1)
    check_count("nvila", "patches", patches, 1)
    for count in frames:
        check_count("nvila", "frames", count, 1)
    uneven = [count for count in frames if count % frames_pooled]
    if uneven:
        raise ValueError(f"nvila: frames must be multiples of frames_pooled {frames_pooled}, got {uneven[0]}")
    gap = before_frame + after_frame
    counts = [count // frames_pooled for count in frames]
    sizes = [count * (patches + gap) for count in counts]
    starts = _fill_in("nvila", input_ids, sizes, placeholder, attention_mask, padding_side)
    return [
        evenly_spaced(start + before_frame, count, patches, gap, sample)
        for (sample, start), count in zip(starts, counts, strict=True)
    ]


def minicpm_v(image_bound: Sequence[Tensor], *, slices: int = 0) -> list[VideoLayout]:
    """Layouts for MiniCPM-V 2.6: frames are images, whose positions are in the processor's image_bound.

    Args:
        image_bound: for each sample, [n, 2] int64: start and end (exclusive) of each frame or slice, as returned by the
            processor. A sample without rows has no video. Leave out the rows of images that are not frames.
        slices: number of slices after each frame; the demo sets max_slice_nums so that there are none or a few. Slices
            count as patches of their frame.

    Raises:
        TypeError, ValueError: slices is not an integer of at least 0; or image_bound is invalid, gives the frames
            different lengths, or does not form whole frames.
    """
    check_count("minicpm_v", "slices", slices, 0)
    layouts = []
    for sample, bounds in enumerate(image_bound):
        if len(bounds) == 0:
            continue
        if len(bounds) % (slices + 1):
            raise ValueError(
                f"minicpm_v: image_bound must have a row for each frame and its {slices} slices, got {len(bounds)} rows"
            )
        spans = [torch.arange(int(start), int(end)) for start, end in bounds]
        frames = [torch.cat(spans[first : first + slices + 1]) for first in range(0, len(spans), slices + 1)]
        lengths = sorted({len(frame) for frame in frames})
        if len(lengths) > 1:
            raise ValueError(f"minicpm_v: image_bound must give every frame the same number of tokens, got {lengths}")
        layouts.append(VideoLayout(torch.stack(frames), sample))
    return layouts


def internvl_chat(input_ids: Tensor, *, context_token: int, patches: int = 256) -> list[VideoLayout]:
    """Layouts for InternVL2.5 as remote code: frames and images share a token; a frame is a run of exactly `patches`.

    The tiles of one image form one longer run, which is ignored. Two or more frames in a sample are one video; a single
    one is an image.

    Args:
        input_ids: [B, N] int64: the tokenized prompt, with its image tokens filled in.
        context_token: token id of <IMG_CONTEXT>.
        patches: tokens per frame: the model's num_image_token.

    Raises:
        TypeError, ValueError: patches is not an integer of at least 1.
    """
    check_count("internvl_chat", "patches", patches, 1)
    return frames_of_runs((input_ids == context_token).cpu(), patches)


def frames_of_runs(found: Tensor, patches: int) -> list[VideoLayout]:
    """A layout for each row of found [B, N] bool that has two or more runs of exactly `patches` tokens."""
    layouts = []
    for sample, row in enumerate(found):
        places = row.nonzero()[:, 0]
        breaks = (places.diff() != 1).nonzero()[:, 0] + 1
        frames = [run for run in places.tensor_split(breaks) if len(run) == patches]
        if len(frames) > 1:
            layouts.append(VideoLayout(torch.stack(frames), sample))
    return layouts


def _fill_in(
    name: str, input_ids: Tensor, sizes: Sequence[int], placeholder: int, mask: Tensor | None, padding_side: str
) -> list[tuple[int, int]]:
    """(sample, position of the first token) of each placeholder, after expansion to its size and renewed padding."""
    check_choice(name, "padding_side", padding_side, _SIDES)
    found = int((input_ids == placeholder).sum())
    if found != len(sizes):
        raise ValueError(f"{name}: frames must have an entry for each of the {found} placeholders, got {len(sizes)}")
    left = iter(sizes)
    starts, lengths = [], []
    for sample, row in enumerate(input_ids.cpu()):
        kept = row if mask is None else row[mask[sample].cpu().bool()]
        length = 0
        for token in kept.tolist():
            if token == placeholder:
                starts.append((sample, length))
                length += next(left)
            else:
                length += 1
        lengths.append(length)
    if padding_side == "right":
        return starts
    return [(sample, start + max(lengths) - lengths[sample]) for sample, start in starts]
