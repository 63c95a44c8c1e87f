"""Blocks in the place of placeholders, some of whose sizes only the embeddings of the text around them tell."""

import pytest
import torch

from fftriton.layouts.expansion import Block, ExpandedRow, Section, row_of

WORDS = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))


def assembled(ids, sizes):
    """Ids with -1 for a block -> the embeddings of the row, and of its text."""
    left, parts = iter(sizes), []
    for word in ids:
        parts.append(WORDS[word][None] if word >= 0 else torch.randn(next(left), 8))
    return torch.cat(parts), WORDS[[word for word in ids if word >= 0]]


@pytest.mark.parametrize(
    ("ids", "sizes", "known"),
    [
        ([1, -1, 2, 3], [5], [None]),
        ([-1, 2, -1, 3], [5, 4], [None, 4]),
        ([1, -1, 2, -1, 3, -1, 4], [5, 6, 7], [None, 6, None]),
        ([-1, 2, -1, 2, 3, -1], [3, 4, 5], [None, None, 5]),
        ([1, -1, -1, 2, -1], [3, 4, 5], [3, None, 5]),
        ([-1, -1, 2], [3, 4], [None, 4]),
        ([1, -1, 1, -1, 2], [0, 0], [None, None]),
    ],
)
def test_sizes_are_found(ids, sizes, known):
    rows, text = assembled(ids, sizes)
    row = row_of(torch.tensor(ids) < 0, [Block(size) for size in known]).resolved(text, rows)
    assert [block.size for block in row.blocks] == sizes
    assert row.length == len(rows)
    assert torch.equal(rows[row.text_positions], text)


def test_a_block_may_begin_like_the_text_after_it():
    """Its newline is the word that follows, but not the word after that."""
    row = row_of(torch.tensor([-1, 9, 5, -1]) < 0, [Block(None), Block(None)])
    rows = torch.cat([WORDS[[7, 9, 9, 5]], torch.randn(2, 8)])  # the block: 7 and a newline
    assert [block.size for block in row.resolved(WORDS[[9, 5]], rows).blocks] == [2, 2]


def test_neighbours_share_what_is_between_two_texts():
    row = row_of(torch.tensor([-1, -1, 5, -1]) < 0, [Block(None)] * 3)
    rows = torch.cat([torch.randn(6, 8), WORDS[[5]], torch.randn(2, 8)])
    assert [block.size for block in row.resolved(WORDS[[5]], rows).blocks] == [0, 6, 2]


def test_what_cannot_be_found():
    rows, text = assembled([-1, 2, -1], [3, 4])
    lost = row_of(torch.tensor([-1, 2, -1]) < 0, [Block(None), Block(None)])
    with pytest.raises(ValueError, match="the text after an image was not found"):
        lost.resolved(text + 1, rows)
    beside = row_of(torch.tensor([-1, -1, -1, 2]) < 0, [Block(None), Block(4), Block(None)])
    with pytest.raises(ValueError, match="a video must not stand between images without any text"):
        beside.resolved(text, torch.randn(12, 8))
    with pytest.raises(ValueError, match="the size of a block must be known"):
        lost.length  # noqa: B018


def test_videos_of_a_row_that_is_cut():
    video = Block(7, (Section(0, 2, 3, columns=3), Section(6, 1, 1)))
    row = ExpandedRow([2, 1], [video])
    assert [positions.tolist() for positions, _ in row.videos()] == [[[2, 3, 4], [5, 6, 7]], [[8]]]
    assert [columns for _, columns in row.videos()] == [3, None]
    assert [positions.tolist() for positions, _ in row.videos(7)] == [[[2, 3, 4], [5, 6, -1]]]
    assert [positions.tolist() for positions, _ in row.videos(5)] == [[[2, 3, 4]]]
    assert list(row.videos(2)) == []
