"""Layouts for models loaded by remote code, on stand-ins that arrange their tokens as those do."""

import re
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


def test_llava_video_has_210_tokens_a_frame():
    ids = torch.full((1, 20), 5)
    ids[0, 14] = VIDEO  # behind the 14 tokens of its prompt
    (layout,) = layouts.llava_video(ids, [3])
    assert torch.equal(layout.positions, (14 + torch.arange(630)).view(3, 210))


@pytest.mark.parametrize(("before", "after", "pooled"), [(0, 1, 1), (2, 1, 2), (0, 0, 1)])
def test_nvila(before, after, pooled):
    model = StandIn()
    ids, token = torch.full((2, 7), 5), 77
    for sample, (start, frames) in enumerate([(2, 4), (5, 6)]):
        ids[sample, start] = token
        video = model.patches(frames // pooled, 4)
        around = [torch.cat([model.embed([3] * before), frame, model.embed([4] * after)]) for frame in video]
        model.add([model.embed([5] * start), *around, model.embed([5] * (6 - start))], video)
    found = layouts.nvila(
        ids, [4, 6], placeholder=token, patches=4, frames_pooled=pooled, before_frame=before, after_frame=after
    )
    model.check(found, "left")


@pytest.mark.parametrize("slices", [0, 2])
def test_minicpm_v(slices):
    """<image> 4 tokens </image>, then <slice> 4 tokens </slice> as often; bounds of the padded rows."""
    model = StandIn()
    bounds = []
    for frames in (4, 0, 3):
        parts, spans, length = [model.embed([5] * 6)], [], 6
        video = model.patches(frames, 4 * (slices + 1)) if frames else None
        for unit in [] if video is None else video.reshape(-1, 4, 64):
            parts += [model.embed([START]), unit, model.embed([END])]
            spans.append([length + 1, length + 5])
            length += 6
        model.add([*parts, model.embed([5] * 3)], video)
        bounds.append(torch.tensor(spans, dtype=torch.int64).view(-1, 2))
    longest = max(map(len, model.rows))
    bounds = [span + longest - len(row) for span, row in zip(bounds, model.rows, strict=True)]
    model.check(layouts.minicpm_v(bounds, slices=slices), "left")


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
BOUNDS = [torch.tensor([[1, 5], [7, 11], [13, 16]])]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layouts.llava_video(IDS, [4, 4]), ValueError, "frames must have an entry for each of the 1 .* got 2"),
        (lambda: layouts.llava_video(IDS, [0]), ValueError, "llava_video: frames must be at least 1, got 0"),
        (lambda: layouts.llava_video(IDS, [4], side=0), ValueError, "side must be at least 1, got 0"),
        (lambda: layouts.llava_video(IDS, [4], newlines="no"), ValueError, "newlines must be one of .* got 'no'"),
        (lambda: layouts.llava_video(IDS, [4], padding_side="up"), ValueError, "padding_side must be one .* got 'up'"),
        (lambda: layouts.nvila(IDS, [9], placeholder=VIDEO, frames_pooled=8), ValueError, "multiples of .* 8, got 9"),
        (lambda: layouts.nvila(IDS, [8], placeholder=1), ValueError, "each of the 0 placeholders, got 1"),
        (lambda: layouts.nvila(IDS, [1.5], placeholder=VIDEO), TypeError, "frames must be an integer .* got 1.5"),
        (lambda: layouts.minicpm_v(BOUNDS, slices=1), ValueError, "a row for each frame and its 1 slices, got 3 rows"),
        (lambda: layouts.minicpm_v(BOUNDS), ValueError, r"every frame the same number of tokens, got \[3, 4\]"),
        (lambda: layouts.internvl_chat(IDS, context_token=5, patches=0), ValueError, "must be at least 1, got 0"),
        (lambda: layouts.evenly_spaced(-1, 2, 3), ValueError, "start must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    exec("\n".join(blocks), {"__name__": "page"})
    assert capsys.readouterr().out.startswith("[")


def test_the_page_names_every_function():
    text = PAGE.read_text(encoding="utf-8")
    for name in ("llava_video", "nvila", "minicpm_v", "internvl_chat", "evenly_spaced"):
        assert f"fftriton.layouts.{name}(" in text
