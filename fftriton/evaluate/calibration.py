"""Which setting keeps the dense model's answers, judged from recorded comparisons; nothing here runs a model.

Answers need no labels: on requests whose score depends on the answer alone, accuracy cannot fall by more than the share
of answers that change. Settings are chosen by the overlap of the next-token distributions, which says more with few
requests than whether the answers are equal. Both say nothing if the answers do not depend on the video. So two controls
go along: the video blanked, and 2 % of the tokens, drawn at random.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from .statistics import clustered_interval, mcnemar_exact

CONTROL_FACTOR = 5  # a control must lose this many times as much as a setting that is recommended
FEW, FEW_STRICT, STRICT = 50, 100, 0.95  # requests below which a warning is due; the second for `keep` above STRICT

_ROUNDING = 1e-9
_STOPPED = "stopped: "


class Way(Hashable, Protocol):
    """A method at a budget; see `Setting`."""

    @property
    def name(self) -> str: ...

    @property
    def budget(self) -> float: ...


W = TypeVar("W", bound=Way)


@dataclass(frozen=True)
class Comparison:
    """A setting's answer to one request, compared with the dense model's; see `Agreement`.

    Attributes:
        key: digest of everything but the request that the record depends on.
        index: name of the request.
        same, first_difference, tokens, overlap, kl, loss: as in `Agreement`.
        right: whether the answer is right; None without a label.
        budget_achieved: mean over layers of the video tokens in attention, as a fraction of the prompt's.
        flops, dense_flops: multiply-accumulates of the prefill, in this setting and with all tokens.
        seconds: time of the prefill, relevance predictor included, vision encoder not; the answer goes along if it was
            appended.
        peak_memory: peak bytes above those in use before; None if it was not measured.
        error: why there is no answer; everything else is then meaningless.
    """

    key: str
    index: str
    same: bool = False
    first_difference: int | None = None
    tokens: int = 0
    overlap: float = 0.0
    kl: float = 0.0
    loss: float = 0.0
    right: bool | None = None
    budget_achieved: float = 1.0
    flops: float = 0.0
    dense_flops: float = 0.0
    seconds: float = 0.0
    peak_memory: int | None = None
    error: str | None = None


class Race(Generic[W]):
    """Stops settings that cannot be recommended any more.

    After every request, a setting is stopped if what it lost so far exceeds what it may lose on all requests; so are
    the lower budgets of the same method, since a setting is recommended only if the higher budgets keep enough, too. A
    setting that failed on a request is stopped as well.

    Args:
        settings: those that take part.
        requests: number of all requests.
        keep: overlap that a setting must keep, in (0, 1].
    """

    def __init__(self, settings: Sequence[W], requests: int, keep: float) -> None:
        self._lost = dict.fromkeys(settings, 0.0)
        self._limit, self._keep = requests * (1 - keep), keep
        self.stopped: dict[W, str] = {}

    @property
    def live(self) -> list[W]:
        """The settings that are not stopped, in their order."""
        return [setting for setting in self._lost if setting not in self.stopped]

    def add(self, records: Mapping[W, Comparison]) -> None:
        """Take in the records of one request."""
        for setting in self.live:
            record = records.get(setting)
            if record is None:
                continue
            if record.error is not None:
                self.stopped[setting] = f"failed: {record.error}"
                continue
            self._lost[setting] += 1 - record.overlap
            if self._lost[setting] > self._limit + _ROUNDING:
                self._stop(setting)

    def _stop(self, setting: W) -> None:
        self.stopped[setting] = f"{_STOPPED}cannot reach {self._keep:.4g}"
        for other in self.live:
            if other.name == setting.name and other.budget < setting.budget:
                self.stopped[other] = f"{_STOPPED}{setting.budget:.4g} of this method cannot reach {self._keep:.4g}"


@dataclass(frozen=True)
class Row:
    """What was found about one setting.

    Attributes:
        method, budget: the setting.
        requests: number of requests that it answered.
        same: share of answers that are the dense model's; None if it was stopped, like all that follows.
        same_low, same_high: 95 % interval of `same`, which knows that the requests about a video belong together.
        overlap: 1 minus the total variation of the next-token distributions, mean over tokens and requests.
        overlap_low, overlap_high: its 95 % interval.
        kl: Kullback-Leibler divergence from the dense distributions, in nats, mean.
        loss: accuracy that the dense model's confidence lets one expect to be lost; mean of `Comparison.loss`.
        accuracy, dense_accuracy, p_value: with labels, the shares of right answers with this setting and with all
            tokens, and the p-value of McNemar's exact test between the two.
        budget_achieved: mean over requests.
        relative_flops: multiply-accumulates of the prefill relative to all tokens, mean.
        prefill_ms, dense_ms: median time of the prefill, without the vision encoder; of this setting and with all
            tokens.
        peak_mib, dense_peak_mib: peak memory above rest, median.
        keeps: whether it may be recommended.
        note: why there are no figures.
    """

    method: str
    budget: float
    requests: int = 0
    same: float | None = None
    same_low: float | None = None
    same_high: float | None = None
    overlap: float | None = None
    overlap_low: float | None = None
    overlap_high: float | None = None
    kl: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    dense_accuracy: float | None = None
    p_value: float | None = None
    budget_achieved: float | None = None
    relative_flops: float | None = None
    prefill_ms: float | None = None
    dense_ms: float | None = None
    peak_mib: float | None = None
    dense_peak_mib: float | None = None
    keeps: bool = False
    note: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether the race stopped it, because it cannot keep enough."""
        return self.note is not None and self.note.startswith(_STOPPED)


@dataclass(frozen=True)
class Results:
    """Everything that was found.

    Attributes:
        rows: one per setting.
        controls: one row per control.
        chosen: the recommended row; None if there is none.
        why_not: the reason, if none is recommended.
        keep: the overlap asked for.
        requests, videos: how many there were.
        warnings: what a reader must know besides.
    """

    rows: list[Row]
    controls: list[Row]
    chosen: Row | None
    why_not: str
    keep: float
    requests: int
    videos: int
    warnings: list[str] = field(default_factory=list)

    @property
    def advice(self) -> str:
        """The recommendation, in one sentence, with the guarantee that holds."""
        row = self.chosen
        if row is None or row.same is None or row.same_low is None or row.same_high is None:
            return f"Nothing is recommended: {self.why_not}."
        same = round(row.same * row.requests)
        return (
            f"Use {row.method} at a budget of {row.budget:.4g}: {same} of {row.requests} answers stay the same (95 % "
            f"interval {percent(row.same_low)} to {percent(row.same_high)}) and the next-token distributions overlap "
            f"by {percent(row.overlap)}, so on these requests the accuracy of answers that are right or wrong as a "
            f"whole cannot have fallen by more than {100 * (1 - row.same):.3g} points; {_savings(row)}."
        )


def percent(share: float | None) -> str:
    """A share as text; 100 % means all, and 0 % none."""
    if share is None:
        return "-"
    text = f"{100 * share:.1f}"
    if share < 1 and text == "100.0":
        text = "99.9"
    if share > 0 and text == "0.0":
        text = "0.1"
    return f"{text.removesuffix('.0') if share in (0, 1) else text} %"


def judge(
    settings: Sequence[W],
    records: Mapping[W, Mapping[str, Comparison]],
    dense: W,
    controls: Sequence[W],
    videos: Mapping[str, str],
    keep: float,
    problems: Mapping[W, str],
) -> Results:
    """Judge all settings and recommend one.

    Args:
        settings: the settings, in the order of the rows.
        records: for each setting, control and `dense`, its records by request. A request counts if it has one of
            `dense`.
        dense: the setting that keeps all tokens.
        controls: the settings whose agreement shows that requests do not need the video.
        videos: the video that each request is about.
        keep: overlap that a setting must keep, in (0, 1].
        problems: for settings that cannot work, the reason.
    """
    answered = [index for index in videos if index in records.get(dense, {})]
    race = Race([setting for setting in settings if setting not in problems], len(answered), keep)
    for index in answered:
        race.add({setting: own[index] for setting, own in records.items() if index in own})
    notes = dict(problems) | race.stopped
    rows = [_row(setting, records, dense, answered, videos, notes.get(setting)) for setting in settings]
    blind = [_row(control, records, dense, answered, videos, None) for control in controls]
    least = _least(blind, keep) - _ROUNDING
    short = [row for row in rows if row.overlap is not None and row.overlap < least]
    rows = [
        replace(
            row,
            keeps=row.overlap is not None
            and not any(other.method == row.method and other.budget >= row.budget for other in short),
        )
        for row in rows
    ]
    why_not = _why_not(rows, blind, keep, len(answered))
    kept = [row for row in rows if row.keeps]
    chosen = min(kept, key=lambda row: (row.prefill_ms, row.budget)) if kept and not why_not else None
    different = len({videos[index] for index in answered})
    return Results(
        rows, blind, chosen, why_not, keep, len(answered), different, _warnings(keep, len(answered), different)
    )


def _row(
    setting: W,
    records: Mapping[W, Mapping[str, Comparison]],
    dense: W,
    answered: Sequence[str],
    videos: Mapping[str, str],
    note: str | None,
) -> Row:
    own = records.get(setting, {})
    good = [index for index in answered if index in own and own[index].error is None]
    if note is not None or len(good) < len(answered) or not good:
        return Row(setting.name, setting.budget, len(good), note=note or "failed")
    found, whole = [own[index] for index in good], [records[dense][index] for index in good]
    clusters = [videos[index] for index in good]
    same_low, same_high = clustered_interval([float(record.same) for record in found], clusters)
    overlap_low, overlap_high = clustered_interval([record.overlap for record in found], clusters)
    labelled = [
        (a.right, b.right) for a, b in zip(whole, found, strict=True) if a.right is not None and b.right is not None
    ]
    return Row(
        setting.name,
        setting.budget,
        len(good),
        same=statistics.fmean(record.same for record in found),
        same_low=same_low,
        same_high=same_high,
        overlap=statistics.fmean(record.overlap for record in found),
        overlap_low=overlap_low,
        overlap_high=overlap_high,
        kl=statistics.fmean(record.kl for record in found),
        loss=statistics.fmean(record.loss for record in found),
        accuracy=statistics.fmean(own for _, own in labelled) if labelled else None,
        dense_accuracy=statistics.fmean(other for other, _ in labelled) if labelled else None,
        p_value=mcnemar_exact(labelled.count((True, False)), labelled.count((False, True))) if labelled else None,
        budget_achieved=statistics.fmean(record.budget_achieved for record in found),
        relative_flops=_mean_ratio(found),
        prefill_ms=1e3 * statistics.median(record.seconds for record in found),
        dense_ms=1e3 * statistics.median(record.seconds for record in whole),
        peak_mib=_median_mib(found),
        dense_peak_mib=_median_mib(whole),
    )


def _least(controls: Sequence[Row], keep: float) -> float:
    """The overlap that a setting must have so that the controls lose CONTROL_FACTOR times as much."""
    lost = min((1 - row.overlap for row in controls if row.overlap is not None), default=1.0)
    return max(keep, 1 - lost / CONTROL_FACTOR)


def _why_not(rows: Sequence[Row], controls: Sequence[Row], keep: float, requests: int) -> str:
    """Why nothing may be recommended; empty if something may."""
    if not requests:
        return "no request was answered"
    for row in controls:
        if row.overlap is None or row.overlap_high is None:
            return f"the control '{row.method}' was not answered"
        if row.overlap_high >= keep:
            return (
                f"these requests do not need the video, or are too few to tell: with the control '{row.method}' the "
                f"distributions overlap by {percent(row.overlap)} (95 % interval up to {percent(row.overlap_high)}), "
                f"so that any setting would seem to keep {percent(keep)}"
            )
    if any(row.keeps for row in rows):
        return ""
    if any(row.overlap is not None for row in rows):  # the race stopped those that do not keep enough
        return (
            f"some settings keep {percent(keep)}, but lose more than 1/{CONTROL_FACTOR} of what the controls lose, so "
            "that these requests hardly tell them from a model that sees nothing"
        )
    return f"no setting keeps {percent(keep)}"


def _warnings(keep: float, requests: int, videos: int) -> list[str]:
    needed = FEW_STRICT if keep > STRICT else FEW
    found = []
    if requests < needed:
        found.append(
            f"{requests} requests are few: the recommendation for other requests is reliable from {needed} on."
        )
    if 1 < videos < requests / 2:
        found.append(f"{requests} requests about {videos} videos say less than as many about different ones.")
    if videos == 1 and requests > 1:
        found.append("All requests are about one video: nothing is known about others.")
    return found


def _savings(row: Row) -> str:
    """What the row saves, in words."""
    parts = []
    if row.prefill_ms and row.dense_ms:
        ratio = row.dense_ms / row.prefill_ms
        faster = f"{ratio:.2f} times faster" if ratio >= 1 else f"{1 / ratio:.2f} times slower"
        parts.append(f"the prefill takes {row.prefill_ms:.3g} ms instead of {row.dense_ms:.3g} ({faster})")
    if row.budget_achieved is not None:
        parts.append(f"the cache holds {percent(1 - row.budget_achieved)} fewer video tokens")
    if row.peak_mib and row.dense_peak_mib:
        parts.append(f"peak memory is {row.peak_mib:.3g} MiB instead of {row.dense_peak_mib:.3g}")
    return ", ".join(parts)


def _mean_ratio(records: Sequence[Comparison]) -> float | None:
    ratios = [record.flops / record.dense_flops for record in records if record.dense_flops]
    return statistics.fmean(ratios) if ratios else None


def _median_mib(records: Sequence[Comparison]) -> float | None:
    peaks = [record.peak_memory for record in records if record.peak_memory is not None]
    return statistics.median(peaks) / 2**20 if peaks else None
