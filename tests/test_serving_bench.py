"""What the bench of a server makes of its answers; the server itself runs in `make serving`."""

import pytest

from bench.serving.__main__ import quantile, row_of
from bench.serving.load import Answered, Load, mix
from fftriton.runtime.shipped import BUNNY, NEEDLE

SOURCE = {
    "device": "a", "vllm": "b", "torch": "c", "triton": "d", "transformers": "e", "commit": "f", "date": "g",
}  # fmt: skip


def test_quantiles_are_values_that_were_measured():
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [quantile(values, percent) for percent in (0, 20, 21, 50, 95, 100)] == [1.0, 1.0, 2.0, 3.0, 5.0, 5.0]


def test_figures_of_a_load():
    answered = [Answered(0.1, 0.5, 100, 5), Answered(0.3, 0.9, 60, 4), Answered(0.2, 0.2, 31, 1)]
    row = row_of(Load(answered, 2.0, 0.25), "temporalmerge", 0.3, 2, 32, SOURCE)
    assert (row.requests, row.concurrency, row.peak_cache_percent) == (3, 2, 25)
    assert row.prompt_tokens == pytest.approx(191 / 3)
    assert row.blocks == pytest.approx((4 + 2 + 1) / 3)  # of 105, 64 and 32 tokens
    assert (row.requests_per_s, row.tokens_per_s) == (1.5, 5)
    assert (row.first_p50_ms, row.first_p95_ms) == (200, 300)
    assert (row.token_p50_ms, row.token_p95_ms) == pytest.approx((100, 200))
    alone = row_of(Load(answered[2:], 2.0, 0.0), "dense", None, 1, 32, SOURCE)
    assert alone.token_p50_ms is None


def test_videos_come_again_with_other_questions():
    requests = mix([NEEDLE.path, BUNNY.path], ["a", "b", "c"], 40, 7, seed=1)
    assert requests == mix([NEEDLE.path, BUNNY.path], ["a", "b", "c"], 40, 7, seed=1)
    asked = {
        (str(one["messages"][0]["content"][0])[-40:], one["messages"][0]["content"][1]["text"]) for one in requests
    }
    assert len(asked) == 6
    assert {one["max_tokens"] for one in requests} == {7}
