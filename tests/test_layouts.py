"""Layouts for models loaded by remote code, on stand-ins that arrange their tokens as those do."""

from pathlib import Path

import pytest
import torch
from by_hand import check_by_hand
from models import tiny_qwen2

import fftriton
from fftriton import layouts

PAGE = Path(__file__).parents[1] / "docs" / "bring-your-own-model.md"
VIDEO, CONTEXT, START, END = -200, 151, 152, 153


class StandIn:
    """Assembles embeddings token by token, and notes which patches it wrote: features[sample] is [F, P, 64]."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.rows, self.features = [], []

    def embed(self, ids):
        return tiny_qwen2().get_input_embeddings()(torch.as_tensor(ids, dtype=torch.int64)).detach()

    def patches(self, frames, patches):
        return torch.randn(frames, patches, 64, generator=self.generator)

    def add(self, parts, features):
        self.rows.append(torch.cat(parts))
        self.features.append(features)

    def batch(self, padding_side):
        """[B, N, 64] embeddings and [B, N] mask, padded."""
        length = max(map(len, self.rows))
        embeddings, mask = (
            torch.zeros(len(self.rows), length, 64),
            torch.zeros(len(self.rows), length, dtype=torch.int64),
        )
        for sample, row in enumerate(self.rows):
            place = slice(len(row)) if padding_side == "right" else slice(length - len(row), length)
            embeddings[sample, place], mask[sample, place] = row, 1
        return embeddings, mask

    def check(self, found, padding_side):
        """That the layouts name the patches' places, and that the last sample is reduced there as by hand."""
        embeddings, mask = self.batch(padding_side)
        assert [layout.sample for layout in found] == [i for i, video in enumerate(self.features) if video is not None]
        for layout in found:
            assert torch.equal(embeddings[layout.sample, layout.positions], self.features[layout.sample])
        self.check_last(found, padding_side, mask)

    def check_sections(self, found, padding_side, count):
        """As `check`, for features[sample] of several sections, each a video."""
        embeddings, mask = self.batch(padding_side)
        assert [layout.sample for layout in found] == [index for index in range(len(self.rows)) for _ in range(count)]
        for layout, features in zip(found, [part for of_row in self.features for part in of_row], strict=True):
            assert torch.equal(embeddings[layout.sample, layout.positions], features)
        if count == 1:
            self.check_last(found, padding_side, mask)

    def check_last(self, found, padding_side, mask):
        last = found[-1]
        shift = 0 if padding_side == "right" else int((mask[last.sample] == 0).sum())
        alone = fftriton.VideoLayout(last.positions - shift)
        check_by_hand(tiny_qwen2(), {"inputs_embeds": self.rows[last.sample][None]}, [alone])


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("newlines", ["grid", "frame", "one_token", "no_token"])
def test_llava_video(newlines, padding_side):
    model = StandIn()
    newline = model.embed([9])
    ids, side = torch.full((3, 9), 5), 2
    for sample, (start, frames) in enumerate([(4, 5), (1, 3), (None, 0)]):
        before, after = model.embed([5] * (start or 4)), model.embed([5] * (8 - sample - (start or 4)))
        if start is None:
            model.add([before, after], None)
            continue
        ids[sample, start] = VIDEO
        tokens = model.patches(frames, side * side).unflatten(1, (side, side))
        if newlines == "grid":
            tokens = torch.cat([tokens, newline.expand(frames, side, 1, -1)], 2)
        video = tokens.flatten(1, 2)
        if newlines == "frame":
            video = torch.cat([video, newline.expand(frames, 1, -1)], 1)
        behind = [newline] if newlines == "one_token" else []
        model.add([before, video.flatten(0, 1), *behind, after], video)
    mask = torch.ones_like(ids)
    for sample, length in enumerate([9, 8, 6]):
        mask[sample, length:] = 0
    found = layouts.llava_video(
        ids, [5, 3], side=side, newlines=newlines, attention_mask=mask, padding_side=padding_side
    )
    model.check(found, padding_side)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, 210),
        ({"side": 13}, 182),
        ({"newlines": "frame"}, 197),
        ({"newlines": "one_token"}, 196),
        ({"newlines": "no_token"}, 196),
        ({"merge_type": "flat"}, 196),
        ({"newlines": "one_token", "merge_type": "spatial"}, 196),
    ],
    ids=str,
)
def test_tokens_of_a_frame_of_llava_video(settings, size):
    ids = torch.full((1, 20), 5)
    ids[0, 14] = VIDEO  # behind the 14 tokens of its prompt
    (layout,) = layouts.llava_video(ids, [3], **settings)
    assert torch.equal(layout.positions, (14 + torch.arange(3 * size)).view(3, size))
    behind = settings == {"newlines": "one_token"}
    assert layout.length == 19 + 3 * size + behind


@pytest.mark.parametrize(("patches", "mode", "side"), [(27, "bilinear", 14), (27, "average", 13), (24, "bilinear", 12)])
def test_side_of_a_frame_of_llava_video(patches, mode, side):
    assert layouts.llava_side(patches, mode) == side


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(
    ("before", "after", "pool_sizes", "last"),
    [
        (0, 1, [[1, 1, 1]], 0), (2, 1, [[2, 1, 1]], 0), (0, 0, [[1, 2, 2]], 3), (1, 2, [[2, 2, 1], [1, 1, 1]], 1),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("separators", [False, True])
def test_nvila(before, after, pool_sizes, last, separators, padding_side):
    model = StandIn()
    ids, token = torch.full((2, 7), 5), 77
    for sample, (start, frames) in enumerate([(2, 4), (5, 6)]):
        ids[sample, start] = token
        parts, features = [], []
        for time, rows, columns in pool_sizes:
            video = model.patches(frames // time, 4 // (rows * columns))
            around = [model.embed([3] * before), model.embed([4] * after)]
            whole = torch.stack([torch.cat([around[0], frame, around[1]]) for frame in video])
            parts += [whole.flatten(0, 1), model.embed([6] * last)]
            features.append(whole if separators else video)
        model.add([model.embed([5] * start), *parts, model.embed([5] * (6 - start))], features)
    found = layouts.nvila(
        ids, [4, 6], placeholder=token, patches=4, pool_sizes=pool_sizes, before_frame=before, after_frame=after,
        after_pool=last, separators=separators, padding_side=padding_side,
    )  # fmt: skip
    model.check_sections(found, padding_side, len(pool_sizes))


def test_nvila_pads_on_the_right_unless_told_otherwise():
    ids = torch.tensor([[77, 5, 5, 5], [5, 77, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    first, second = layouts.nvila(ids, [2, 2], placeholder=77, attention_mask=mask)
    assert (int(first.positions[0, 0]), int(second.positions[0, 0])) == (0, 1)
    assert first.length == second.length == 2 * 257 + 3


IM_START, SLICE_START = 140, 142


def minicpm_row(frames, count, patches=4, between=()):
    """Ids and bounds of frames of `count` units, each between two marks; frames are divided by `between` and a word."""
    ids, bounds = [5, 6], []
    for number in range(frames):
        for unit in range(count):
            ids.append(SLICE_START if unit else IM_START)
            bounds.append([len(ids), len(ids) + patches])
            ids += [0] * patches + [141]
        ids += [*between, 9] if number < frames - 1 else []
    return ids, bounds


@pytest.mark.parametrize("separators", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_minicpm_v(count, separators):
    """<image> 4 tokens </image>, then <slice> 4 tokens </slice> as often; rows are padded on the left."""
    rows = [minicpm_row(4, count), ([5] * 9, []), minicpm_row(3, count)]
    longest = max(len(ids) for ids, _ in rows) + 2
    ids = torch.tensor([[0] * (longest - 2 - len(row)) + row + [7, 7] for row, _ in rows])
    bounds = [
        torch.tensor(of_row, dtype=torch.int64).view(-1, 2) + longest - 2 - len(row) for row, of_row in rows
    ]  # fmt: skip
    found = layouts.minicpm_v(bounds, ids, separators=separators)
    assert [layout.sample for layout in found] == [0, 2]
    for layout, frames in zip(found, (4, 3), strict=True):
        first = int(bounds[layout.sample][0, 0])
        size = count * 6 + 1  # with both marks of each unit, and the newline
        patches = [6 * unit + patch for unit in range(count) for patch in range(4)]
        columns = [*range(size)] if separators else patches
        expected = first + size * torch.arange(frames)[:, None] + torch.tensor(columns)
        if separators:  # the last frame ends with its mark and the token after it
            expected[-1, -1] = -1
        assert torch.equal(layout.positions, expected)
        assert layout.length == longest


def test_minicpm_v_tells_videos_from_images():
    """A single image, a video after text, one with slices, and an image that is alone; gaps grow with numbers."""
    parts = [minicpm_row(1, 1), minicpm_row(5, 1), minicpm_row(3, 2), minicpm_row(1, 1)]
    ids, bounds = [], []
    for row, of_row in parts:
        bounds += [[start + len(ids), end + len(ids)] for start, end in of_row]
        ids += row + [30] * 6
    found = layouts.minicpm_v([torch.tensor(bounds)], torch.tensor([ids]))
    assert [tuple(layout.positions.shape) for layout in found] == [(5, 4), (3, 8)]
    assert found[0].positions[0, 0] == bounds[1][0]


def test_internvl_chat():
    """Frame1: <img> 4 tokens </img> and so on; an image of two tiles, and one of a single tile, are no video."""
    model = StandIn()
    written = []
    for frames, tiles in [(4, 2), (0, 1), (3, 0)]:
        ids = [5] * 4 + ([START] + [CONTEXT] * 4 * tiles + [END] if tiles else [])
        image = model.patches(tiles, 4).flatten(0, 1)
        video = model.patches(frames, 4) if frames else None
        for number in range(frames):
            ids += [6] * (2 + number % 2) + [START] + [CONTEXT] * 4 + [END, 7]
        row = model.embed(ids + [8] * 5)
        row[[place for place, token in enumerate(ids) if token == CONTEXT]] = torch.cat(
            [image] if video is None else [image, video.flatten(0, 1)]
        )
        model.add([row], video)
        written.append(ids + [8] * 5)
    longest = max(map(len, written))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in written])
    model.check(layouts.internvl_chat(ids, context_token=CONTEXT, patches=4), "left")


IDS = torch.tensor([[5, VIDEO, 5]])
BOUNDS = torch.tensor([[1, 5], [7, 11], [13, 16]])
UNEVEN = torch.tensor([[1, 5], [7, 11], [14, 18]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layouts.llava_video(IDS, [4, 4]), ValueError, "frames must have an entry for each of the 1 .* got 2"),
        (lambda: layouts.llava_video(IDS, [0]), ValueError, "llava_video: frames must be at least 1, got 0"),
        (lambda: layouts.llava_video(IDS, [4], side=0), ValueError, "side must be at least 1, got 0"),
        (lambda: layouts.llava_video(IDS, [4], newlines="no"), ValueError, "newlines must be one of .* got 'no'"),
        (lambda: layouts.llava_video(IDS, [4], padding_side="up"), ValueError, "padding_side must be one .* got 'up'"),
        (lambda: layouts.llava_video(IDS, [4], merge_type="grid"), ValueError, "merge_type must be .* got 'grid'"),
        (lambda: layouts.nvila(IDS, [9], placeholder=VIDEO, pool_sizes=[[8, 1, 1]]), ValueError, "size 8, got 9"),
        (lambda: layouts.nvila(IDS, [8], placeholder=VIDEO, pool_sizes=[[8, 1]]), ValueError, "three numbers each"),
        (lambda: layouts.nvila(IDS, [8], placeholder=VIDEO, pool_sizes=[[1, 3, 1]]), ValueError, "3 x 1 divide"),
        (lambda: layouts.nvila(IDS, [8], placeholder=VIDEO, separators=1), TypeError, "separators must be True or"),
        (lambda: layouts.nvila(IDS, [8], placeholder=1), ValueError, "each of the 0 placeholders, got 1"),
        (lambda: layouts.nvila(IDS, [1.5], placeholder=VIDEO), TypeError, "frames must be an integer .* got 1.5"),
        (lambda: layouts.minicpm_v([BOUNDS], torch.zeros(2, 20)), ValueError, "entry per sample, of which .* 2, got 1"),
        (lambda: layouts.minicpm_v([BOUNDS], torch.zeros(1, 14)), ValueError, "within the 14 ids, got"),
        (lambda: layouts.minicpm_v([BOUNDS - 1], torch.zeros(1, 20)), ValueError, "leave a token before each unit"),
        (lambda: layouts.minicpm_v([UNEVEN], torch.zeros(1, 30), separators=True), ValueError, "equal distances.*6, 7"),
        (lambda: layouts.internvl_chat(IDS, context_token=5, patches=2), ValueError, "divide the 1 tokens of a frame"),
        (lambda: layouts.internvl_chat(IDS, context_token=5, patches=0), ValueError, "must be at least 1, got 0"),
        (lambda: layouts.evenly_spaced(-1, 2, 3), ValueError, "start must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_page_names_every_function():
    text = PAGE.read_text(encoding="utf-8")
    for name in ("llava_video", "nvila", "minicpm_v", "internvl_chat", "evenly_spaced"):
        assert f"fftriton.layouts.{name}(" in text
