"""One screen of what a run found, and whether correctness held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.kernels.results import CEILINGS, Row, by_case, comparable, read_csv

from . import findings

MOST = 11_500  # characters
WORST = 3  # problems of a part that are spelled out
SHOWN = {  # what the summary has of the larger findings
    "prefill": (
        "method",
        "prefill_ms",
        "faster",
        "faster_by_flops",
        "ratio",
        "of_limit",
        "decode_ms",
        "peak_gib",
        "budget",
        "stages_ms",
    ),
    "profile": ("of", "N", "elapsed_ms", "span_ms", "busy_ms", "idle_ms", "kernels", "launches", "waits"),
    "graph": ("of", "N", "replay_ms", "device_ms", "host_ms", "elapsed_ms"),
    "compile": ("of", "mode", "compile_s", "elapsed_ms"),
}
Finding = dict[str, Any]


def problems(found: list[Finding]) -> dict[str, list[str]]:
    """By part, why correctness was not shown: what is wrong, and what had to end and did not."""
    out: dict[str, list[str]] = {}
    required = {f["part"] for f in found if f.get("required")}
    for finding in found:
        part, kind, code = finding["part"], finding["kind"], finding.get("code")
        must_end = part in required
        if kind in ("wrong", "error"):
            text = f"{kind}: {finding['case']}: {finding.get('why', '')}"
        elif kind == "ended" and code is None and must_end:
            text = f"stopped after {finding['limit']} s"
        elif kind == "ended" and code and code in (finding["wrong"] or [code]):
            text = f"exit status {code}, see {finding['log']}"
        elif kind == "not run" and must_end:
            text = f"not run: {finding.get('case', 'all of it')}, {finding['why']}"
        else:
            continue
        out.setdefault(part, []).append(f"{part}: {text}")
    return out


def correctness_holds(out: Path) -> bool:
    """Whether nothing was found wrong, and every part that has to end has ended."""
    return not problems(findings.read(out))


def summarise(out: Path) -> str:
    """Write the summary, and return it."""
    found = findings.read(out)
    rows = read_csv(out / findings.KERNELS) if (out / findings.KERNELS).exists() else []
    wrong = problems(found)
    lines = [*heading(found), "", *parts(found), "", *(kernels(rows) if rows else []), *steps(found)]
    lines += tests(out)
    for part, texts in wrong.items():
        lines += [text[:300] for text in texts[:WORST]]
        lines += [f"{part}: {len(texts) - WORST} more in {findings.FILE}"] if len(texts) > WORST else []
    lines += [verdict(found)]
    text = "\n".join(lines)
    (out / findings.SUMMARY).write_text(text + "\n")
    return text[-MOST:]


def verdict(found: list[Finding]) -> str:
    """The last line."""
    if problems(found):
        return "Correctness was NOT shown."
    required = {f["part"] for f in found if f.get("required")}
    unchecked = sorted({f["part"] for f in found if f["kind"] == "skipped"} & required)
    checked = sorted({f["part"] for f in found if f["kind"] == "ok"} & required)
    if unchecked or not checked:
        names = f": {', '.join(unchecked)}" if unchecked else ""
        return f"Nothing was found wrong, but correctness was not checked{names}."
    return "Correctness held."


def heading(found: list[Finding]) -> list[str]:
    about = [f for f in found if f["kind"] in ("device", "versions", "packages", "first launch")]
    return [values(finding) for finding in about]


def parts(found: list[Finding]) -> list[str]:
    """A line per part: how it ended, how long it took, what it checked."""
    out = []
    for name in dict.fromkeys(f["part"] for f in found):
        own = [f for f in found if f["part"] == name]
        kinds = Counter(f["kind"] for f in own)
        ended = next((f for f in own if f["kind"] == "ended"), None)
        reasons = [f["why"] for f in own if f["kind"] in ("skipped", "not run")]
        state = "" if ended is None else f"{ended['seconds']:.0f} s"
        if ended is not None and ended["code"] != 0:
            state += f", stopped at {ended['limit']} s" if ended["code"] is None else f", exit status {ended['code']}"
        counts = ", ".join(f"{kinds[k]} {k}" for k in ("ok", "wrong", "error", "skipped", "not run") if kinds[k])
        out.append(f"{name:28} {state:22} {counts}" + (f" ({reasons[0][:160]})" if reasons else ""))
    return out


def kernels(rows: list[Row]) -> list[str]:
    """A line per op and shape: ours, its share of the ceiling, and how many times faster it is than the others."""
    out = [f"{row.op} {row.dtype}: {row.gbps_or_tflops:.4g} {row.metric}" for row in rows if row.op in CEILINGS]
    out.append("op, shape: ms, % of the ceiling, times faster than eager and others; host ms (w: waits, elapsed time)")
    for (op, shape, _), providers in by_case(rows).items():
        ours = providers.get("fftriton")
        if ours is not None:
            others = comparable(ours, providers).items()
            faster = ", ".join(f"{row.p50 / ours.p50:.2f} {name}" for name, row in others)
            host = "" if ours.host_ms is None else f"; {ours.host_ms:.3f}{' w' if ours.waits else ''}"
            out.append(f"{op}, {shape}: {ours.p50:.4g}, {ours.percent_of_ceiling:.0f} %, {faster}{host}")
    return out


def steps(found: list[Finding]) -> list[str]:
    """Prefills, profiles, graphs and compilations."""
    return [values(finding, SHOWN[finding["kind"]]) for finding in found if finding["kind"] in SHOWN]


def tests(out: Path) -> list[str]:
    """What pytest and compute-sanitizer say in the end."""
    signs = (" passed", " failed", "ERROR SUMMARY", "RACECHECK SUMMARY")
    lines = [
        (log.name, line) for log in sorted(out.glob("*.log")) for line in log.read_text(errors="replace").splitlines()
    ]
    shown = [f"{name}: {line.strip('= ')[:200]}" for name, line in lines if any(sign in line for sign in signs)]
    return list(dict.fromkeys(shown))  # many tests fail for one reason


def values(finding: Finding, names: Sequence[str] = ()) -> str:
    """One line of a finding's values; of these alone, if names are given."""
    shown = {name: finding.get(name) for name in names or finding if name not in ("part", "kind")}
    texts = [f"{name} {short(value)}" for name, value in shown.items() if value not in (None, {}, [])]
    return f"{finding['kind']}: " + ", ".join(texts)


def short(value: Any) -> str:
    """Four digits; inside lists and dicts, too."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {short(entry)}" for name, entry in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:200]
