"""Tiles: the table, the cache file, and that every candidate gives the same results. test_aot.py compiles them."""

import json
import warnings

import pytest
import torch

import fftriton_kernels
from fftriton_kernels import _tiles, attention_column_sum, connected_components, linked_cosine_similarity, merge_mean
from fftriton_kernels._tiles import Tile


@pytest.fixture
def cache_file(tmp_path, monkeypatch):
    """An empty cache folder, on a GPU that the tests make up."""
    monkeypatch.delenv("FFTRITON_TILES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_tiles, "_device", lambda device: ("Some GPU", "default"))
    monkeypatch.setattr(_tiles, "_has_gpu", lambda: True)
    _tiles._tuned.cache_clear()
    _tiles._settled.cache_clear()
    yield tmp_path / "fftriton" / "tiles.json"
    _tiles._tuned.cache_clear()
    _tiles._settled.cache_clear()


@pytest.fixture
def inputs(device):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 40, 16, generator=generator).to(device, torch.bfloat16) for heads in (4, 2))
    return q, k


@pytest.mark.parametrize("family", [*_tiles.TABLE, "sm75", "gfx1100"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("op", "widths"), {"attention": (1, 64, 128, 129, 256), "cosine": (1, 3584, 4097, 99999),
                                            "mean": (1, 896, 99999)}.items())  # fmt: skip
def test_table_has_a_tile_for_everything(op, widths, size, family, monkeypatch):
    monkeypatch.setattr(_tiles, "_device", lambda device: ("", family))
    x = torch.empty(0, dtype={2: torch.float16, 4: torch.float32}[size])
    for width in widths:
        assert _tiles.lookup(op, x, width) in _tiles.candidates(op, size)


def test_table_rows():
    x = torch.empty(0, dtype=torch.bfloat16)
    assert _tiles.lookup("attention", x, 128) == Tile(4, 2, still=128, streamed=64)
    assert _tiles.lookup("attention", x, 129) == Tile(8, 2, still=64, streamed=64)
    assert _tiles.lookup("cosine", x, 4096).num_warps == 4
    assert _tiles.lookup("cosine", x, 4097).num_warps == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_queries", [None, 3])
def test_every_candidate_gives_the_same(num_queries, dtype, inputs):
    q, k = (x.to(dtype) for x in inputs)
    expected = attention_column_sum(q, k, num_queries=num_queries)
    with _tiles.trial({}) as asked:
        attention_column_sum(q, k, num_queries=num_queries)
    ((key, tiles),) = asked.asked.items()
    for still, streamed in {(tile.still, tile.streamed) for tile in tiles}:
        with _tiles.trial({key: Tile(4, 2, still, streamed)}):
            out = attention_column_sum(q, k, num_queries=num_queries)
        torch.testing.assert_close(out, expected, rtol=3e-6, atol=1e-7)


def test_tuned_tiles_are_found_again(inputs, cache_file, monkeypatch, device):
    best = Tile(8, 3, still=64, streamed=32)
    monkeypatch.setattr(_tiles, "_milliseconds", lambda run: 1.0 if best in forced().values() else 2.0)
    chosen = fftriton_kernels.tune(attention_column_sum, *inputs, num_queries=1)
    assert list(chosen.values()) == [best]
    entry = {"num_warps": 8, "num_stages": 3, "still": 64, "streamed": 32, "width": 0}
    assert json.loads(cache_file.read_text())["tiles"] == dict.fromkeys(chosen, entry)
    assert _tiles.lookup("attention", inputs[0], 16) == best
    assert _tiles.lookup("attention", inputs[0], 17) != best  # the next power of two
    x, links = torch.ones(1, 4, 33, device=device), torch.tensor([[0, 0, 2, 2]], device=device)
    more = fftriton_kernels.tune(lambda: merge_mean(x, links) and linked_cosine_similarity(x, links))
    assert len(more) == 2
    assert json.loads(cache_file.read_text())["tiles"].keys() == {*chosen, *more}  # what was there stays
    assert [file.name for file in cache_file.parent.iterdir()] == ["tiles.json"]
    assert _tiles._TRIAL.get() is None


def forced():
    return _tiles._TRIAL.get().forced


def test_an_op_without_tiles_has_none(cache_file):
    assert fftriton_kernels.tune(connected_components, torch.zeros(1, 2, dtype=torch.int64), 2) == {}


def test_tiles_that_do_not_fit_are_passed_over(inputs, cache_file, monkeypatch):
    fitting = Tile(4, 2, still=64, streamed=64)

    def time(run):
        if fitting in forced().values():
            return 5.0
        raise _tiles.OutOfResources(300_000, 100_000, "shared memory")

    monkeypatch.setattr(_tiles, "_milliseconds", time)
    assert list(fftriton_kernels.tune(attention_column_sum, *inputs).values()) == [fitting]
    fitting = None
    with pytest.raises(RuntimeError, match="tune: no tile runs on this GPU for Some GPU"):
        fftriton_kernels.tune(attention_column_sum, *inputs)


def test_environment_names_the_file(tmp_path, monkeypatch, cache_file):
    assert _tiles.cache_file() == cache_file
    monkeypatch.setenv("FFTRITON_TILES", str(tmp_path / "mine.json"))
    assert _tiles.cache_file() == tmp_path / "mine.json"


KEY = "Some GPU|triton 3|attention|2|64"
ENTRY = Tile(4, 2, still=128, streamed=64)._asdict()


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", "{}", '{"format": 0, "tiles": {}}', '{"format": 2, "tiles": []}', "\udcff",
        json.dumps({"format": 1, "tiles": {KEY: [[128, 64], 4, 2]}}),  # of a release before
        json.dumps({"format": 2, "tiles": {KEY: [[128, 64], 4, 2]}}),
        json.dumps({"format": 2, "tiles": {KEY: {"still": 128, "streamed": 64, "num_warps": 4}}}),
        json.dumps({"format": 2, "tiles": {KEY: ENTRY | {"still": 127}}}),
        json.dumps({"format": 2, "tiles": {KEY: ENTRY | {"blocks": 1}}}),
        json.dumps({"format": 2, "tiles": {"key": ENTRY}}),
        json.dumps({"format": 2, "tiles": {"a|b|nothing|2|64": ENTRY}}),
    ],
)  # fmt: skip
def test_a_broken_file_is_ignored_with_one_warning(content, cache_file):
    cache_file.parent.mkdir()
    cache_file.write_bytes(content.encode("utf8", "surrogateescape"))
    x = torch.empty(0, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"tiles\.json holds no tiles of this version, ignored"):
        assert _tiles.lookup("attention", x, 64) == Tile(4, 2, still=128, streamed=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _tiles.lookup("attention", x, 64)


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(_tiles, "_has_gpu", lambda: False)
    with pytest.raises(RuntimeError, match="tune: needs an NVIDIA or AMD GPU to measure on, got none"):
        fftriton_kernels.tune(attention_column_sum)
