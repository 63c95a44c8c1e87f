"""The judgement of recorded comparisons: what is recommended, what is stopped, and how certain it is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from fftriton.evaluate.calibration import Comparison, Race, Results, judge, percent
from fftriton.evaluate.statistics import clustered_interval, wilson_interval

RECORDED = Path(__file__).parents[1] / "bench" / "results" / "needle-calibrate.npz"


class Way(NamedTuple):
    name: str
    budget: float


DENSE, BLANK = Way("keep-all", 1.0), Way("blank", 1.0)
FUSION = [Way("fusion", budget) for budget in (0.7, 0.5, 0.3)]
UNIFORM = [Way("uniform", budget) for budget in (0.7, 0.5)]
MS = {DENSE: 100.0, **{way: 100 * way.budget for way in FUSION}, UNIFORM[0]: 40.0, UNIFORM[1]: 20.0}


def comparisons(overlaps, ms: float = 1.0, rights=None) -> dict[str, Comparison]:
    """One record per request, whose answer is the same if the distributions overlap by half or more."""
    rights = rights or [None] * len(overlaps)
    return {
        str(i): Comparison("", str(i), overlap >= 0.5, overlap=overlap, seconds=ms / 1e3, right=right)
        for i, (overlap, right) in enumerate(zip(overlaps, rights, strict=True))
    }


def judged(found: dict[Way, list[float]], keep=0.95, videos=None, blind=0.2, **others) -> Results:
    """The judgement of settings with these overlaps, and a control with another."""
    count = len(next(iter(found.values())))
    records = {way: comparisons(overlaps, MS.get(way, 1.0)) for way, overlaps in found.items()}
    records |= {DENSE: comparisons([1.0] * count, MS[DENSE]), BLANK: comparisons([blind] * count)}
    of_video = {str(i): videos[i] if videos else str(i) for i in range(count)}
    return judge(list(found), records | others, DENSE, [BLANK], of_video, keep, {})


def test_the_quickest_setting_that_keeps_enough_is_recommended():
    results = judged({FUSION[0]: [0.99] * 100, FUSION[1]: [0.97] * 100, FUSION[2]: [0.94] * 100})
    assert results.chosen is not None
    assert (results.chosen.method, results.chosen.budget) == FUSION[1]
    assert [row.keeps for row in results.rows] == [True, True, False]
    slow = judged({FUSION[1]: [0.97] * 100, UNIFORM[1]: [0.96] * 100})
    assert slow.chosen is not None
    assert slow.chosen.method == "uniform"  # the measured time decides, not the budget
    assert "Use uniform at a budget of 0.5: 100 of 100 answers stay the same (95 % interval" in slow.advice
    assert "20 ms instead of 100 (5.00 times faster)" in slow.advice


def test_the_guarantee_is_the_share_of_answers_that_changed():
    results = judged({FUSION[0]: [0.99] * 97 + [0.4] * 3})
    assert "97 of 100 answers stay the same" in results.advice
    assert "cannot have fallen by more than 3 points" in results.advice


def test_a_budget_is_recommended_only_if_the_higher_ones_keep_enough():
    """Otherwise a lucky draw among many would be."""
    results = judged({FUSION[0]: [0.9] * 100, FUSION[1]: [0.97] * 100})
    assert results.chosen is None
    assert results.advice == "Nothing is recommended: no setting keeps 95.0 %."
    by_controls = judged({FUSION[0]: [0.96] * 100, FUSION[1]: [0.99] * 100}, blind=0.9)  # these ask for more than 95 %
    assert [row.keeps for row in by_controls.rows] == [False, False]


@pytest.mark.parametrize(("blind", "keep"), [(0.97, 0.95), (0.985, 0.98), (0.93, 0.95)])
def test_requests_that_do_not_need_the_video_get_no_advice(blind, keep):
    """Also if the control is a little below `keep`: that may be chance."""
    results = judged({FUSION[0]: [1.0] * 100}, keep, blind=blind)
    assert results.chosen is None
    assert "do not need the video" in results.advice
    assert "'blank'" in results.advice


def test_a_setting_must_lose_much_less_than_a_control():
    found = {FUSION[0]: [0.96] * 1000}
    assert judged(found, 0.95, blind=0.75).chosen is not None
    results = judged(found, 0.95, blind=0.85)
    assert results.chosen is None
    assert "hardly tell them from a model that sees nothing" in results.advice
    assert judged({FUSION[0]: [0.98] * 1000}, 0.95, blind=0.85).chosen is not None


def test_a_control_that_failed_forbids_advice():
    broken = {str(i): Comparison("", str(i), error="out of memory") for i in range(60)}
    records = {
        FUSION[0]: comparisons([1.0] * 60), DENSE: comparisons([1.0] * 60), BLANK: broken,
    }  # fmt: skip
    results = judge([FUSION[0]], records, DENSE, [BLANK], {str(i): str(i) for i in range(60)}, 0.95, {})
    assert results.chosen is None
    assert "control 'blank' was not answered" in results.advice


def test_few_requests_are_said_to_be_few():
    assert not judged({FUSION[0]: [1.0] * 60}).warnings
    assert "60 requests are few" in judged({FUSION[0]: [1.0] * 60}, keep=0.98).warnings[0]
    assert "49 requests are few" in judged({FUSION[0]: [1.0] * 49}).warnings[0]
    repeated = judged({FUSION[0]: [1.0] * 60}, videos=[str(i // 6) for i in range(60)])
    assert "60 requests about 10 videos" in repeated.warnings[0]
    assert "one video" in judged({FUSION[0]: [1.0] * 60}, videos=["a"] * 60).warnings[0]


def test_nothing_was_answered():
    results = judge(FUSION, {}, DENSE, [BLANK], {}, 0.95, {})
    assert results.advice == "Nothing is recommended: no request was answered."


def test_labels_give_accuracy_and_the_paired_test():
    dense = comparisons([1.0] * 60, rights=[True] * 54 + [False] * 6)
    own = comparisons([0.99] * 60, rights=[True] * 44 + [False] * 16)
    records = {DENSE: dense, FUSION[0]: own, BLANK: comparisons([0.1] * 60)}
    (row,) = judge([FUSION[0]], records, DENSE, [BLANK], {str(i): str(i) for i in range(60)}, 0.95, {}).rows
    assert (row.accuracy, row.dense_accuracy) == (44 / 60, 54 / 60)
    assert row.p_value == pytest.approx(2 / 2**10)  # ten lost, none won


def test_a_setting_is_stopped_once_it_cannot_reach_keep_any_more():
    race = Race([*FUSION, *UNIFORM], requests=100, keep=0.95)
    for number in range(1, 11):
        race.add({way: Comparison("", "", overlap=0.4 if way == FUSION[1] else 0.99) for way in race.live})
        assert (FUSION[1] in race.live) == (number <= 8)  # 9 times .6 is more than 5
    assert race.live == [FUSION[0], *UNIFORM]  # FUSION[2] went with it, although it was better
    assert race.stopped[FUSION[1]] == "stopped: cannot reach 0.95"
    assert race.stopped[FUSION[2]] == "stopped: 0.5 of this method cannot reach 0.95"


def test_a_setting_that_may_lose_exactly_as_much_goes_on():
    race = Race(FUSION[:1], requests=100, keep=0.95)
    for _ in range(50):
        race.add({FUSION[0]: Comparison("", "", overlap=0.9)})
    assert race.live


def test_a_setting_that_fails_is_stopped():
    race = Race(FUSION, requests=100, keep=0.95)
    race.add({way: Comparison("", "", overlap=1.0, error="no memory" if way == FUSION[0] else None) for way in FUSION})
    assert race.live == FUSION[1:]
    assert race.stopped[FUSION[0]] == "failed: no memory"


def test_a_stopped_setting_gets_no_percentage():
    """It would be biased; and a lower budget that was lucky is not recommended in its place."""
    records = {
        DENSE: comparisons([1.0] * 100, 50.0),
        FUSION[0]: comparisons([0.99] * 100),
        BLANK: comparisons([0.1] * 100),
    }
    records[UNIFORM[0]] = comparisons([0.3] * 8)
    results = judge([FUSION[0], UNIFORM[0]], records, DENSE, [BLANK], {str(i): str(i) for i in range(100)}, 0.95, {})
    assert (results.rows[1].same, results.rows[1].requests) == (None, 8)
    assert results.rows[1].note == "stopped: cannot reach 0.95"
    assert results.chosen is results.rows[0]


@pytest.mark.parametrize(("videos", "each"), [(20, 5), (60, 5), (100, 1)])
@pytest.mark.parametrize(("share", "correlation"), [(0.9, 0.3), (0.95, 0.6), (0.98, 0.3)])
def test_intervals_cover_with_several_questions_per_video(videos, each, share, correlation):
    """Answers about one video agree with each other more than chance; the plain interval takes them for independent."""
    rng, covered, plain = np.random.default_rng(0), 0, 0
    a, b = (part * (1 / correlation - 1) for part in (share, 1 - share))
    for _ in range(400):
        own = rng.beta(a, b, videos)
        values = (rng.random((videos, each)) < own[:, None]).astype(float)
        clusters = np.repeat(np.arange(videos), each).tolist()
        low, high = clustered_interval(values.ravel().tolist(), clusters)
        covered += low <= share <= high
        low, high = wilson_interval(values.sum(), values.size)
        plain += low <= share <= high
    assert covered / 400 >= 0.91
    if each > 1:
        assert plain < covered


def test_intervals_of_independent_values_are_wilsons_but_for_students_t():
    values = [1.0] * 190 + [0.0] * 10
    assert clustered_interval(values, range(200)) == pytest.approx(wilson_interval(190, 200), abs=0.002)
    same_again = clustered_interval(
        [value for value in values for _ in range(4)], [i for i in range(200) for _ in range(4)]
    )
    assert same_again == pytest.approx(clustered_interval(values, range(200)), abs=0.001)  # copies say nothing new
    assert clustered_interval([1.0] * 50, [0] * 50) == pytest.approx(wilson_interval(1, 1))


def test_percentages_are_not_rounded_to_all_or_none():
    assert [percent(share) for share in (1, 0.9999, 0.5, 0.0001, 0, None)] == [
        "100 %", "99.9 %", "50.0 %", "0.1 %", "0 %", "-",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def recorded():
    """Answers of the shipped model in every setting; see bench/needle/calibrate.py."""
    with np.load(RECORDED) as arrays:
        return dict(arrays)


def comparisons_of(recorded, split: str) -> dict[Way, dict[str, Comparison]]:
    """The recorded requests of a split as records without labels."""
    overlap, same = recorded[f"{split}/overlap"], recorded[f"{split}/same"]
    return {
        Way(str(name), float(budget)): {
            str(i): Comparison("", str(i), bool(same[row, i]), overlap=float(overlap[row, i]), seconds=float(seconds))
            for i in range(overlap.shape[1])
        }
        for row, (name, budget, seconds) in enumerate(
            zip(recorded["methods"], recorded["budgets"], recorded["seconds"], strict=True)
        )
    }


def judge_some(records: dict[Way, dict[str, Comparison]], drawn: np.ndarray, keep: float) -> Results:
    """The judgement of the requests with these numbers."""
    dense, *controls = list(records)[:3]
    return judge(list(records)[3:], records, dense, controls, {str(i): str(i) for i in drawn}, keep, {})


SPLITS = ("easy", "hard", "blended", "real")


@pytest.mark.parametrize("split", SPLITS)
def test_the_recommended_setting_keeps_the_accuracy_on_other_samples(recorded, split):
    """Five methods, 100 requests, no labels, 200 draws; the samples that were not drawn are the judge."""
    rng, kept, budgets, right = np.random.default_rng(1), [], [], recorded[f"{split}/right"]
    records = comparisons_of(recorded, split)
    for _ in range(200):
        drawn, others = np.split(rng.permutation(right.shape[1]), [100])
        results = judge_some(records, drawn, keep=0.95)
        if results.chosen is not None:
            row = list(records).index(Way(results.chosen.method, results.chosen.budget))
            kept.append(right[row, others].mean() >= 0.95 * right[0, others].mean())
        own = [row for row in results.rows if row.method == "framefusion" and row.keeps]
        budgets.append(min(own, key=lambda row: row.prefill_ms).budget if own else 1.0)
    assert len(kept) >= 190  # something is recommended
    assert np.mean(kept) >= 0.9
    assert np.mean(np.array(budgets) < 0.6) >= 0.9


def test_requests_that_do_not_need_the_video(recorded):
    rng, records = np.random.default_rng(1), comparisons_of(recorded, "unneeded")
    for keep in (0.95, 0.98):
        for _ in range(20):
            results = judge_some(records, rng.permutation(60)[:50], keep)
            assert results.chosen is None
            assert "do not need the video" in results.why_not


@pytest.mark.parametrize("split", SPLITS)
def test_a_request_takes_few_forwards(recorded, split):
    """All settings are forwards; so are the dense answer and the two controls."""
    records = comparisons_of(recorded, split)
    settings, requests = list(records)[3:], [str(i) for i in random.Random(0).sample(range(200), 100)]
    assert len(settings) >= 37
    race, forwards = Race(settings, 100, 0.95), 0
    for request in requests:
        forwards += 3 + len(race.live)
        race.add({way: records[way][request] for way in race.live})
    assert forwards / 100 <= 20
