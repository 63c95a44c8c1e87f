"""Pictures and the README's tables from what bench/gpu.py left in bench/results/<device>/: make gpu-plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.first_contact import findings
from bench.first_contact.findings import KERNELS
from bench.generated import README, updated
from bench.kernels.picture import draw
from bench.kernels.results import Row, by_case, comparable, read_csv

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- made by make gpu-plots -->", "<!-- end of gpu-plots -->"
NOTHING = "Nothing: it has not run on a GPU yet."
FRAMES = "F64-"  # the length of video that the table shows; the picture has all
OTHERS = ("eager", "torch.compile", "flash-colreduce")
SPEED_UPS = ("faster", "faster_by_flops")  # missing where the dense prefill has failed


def main() -> None:
    """Draw every device's picture, and write all tables into the README."""
    folders = sorted(path.parent for path in RESULTS.glob(f"*/{KERNELS}"))
    for folder in folders:
        draw(read_csv(folder / KERNELS), folder / "kernels.png")
    text = README.read_text(encoding="utf-8")
    new = "\n\n".join(section(folder) for folder in folders)
    README.write_text(updated(text, new or NOTHING, BEGIN, END), encoding="utf-8")


def section(folder: Path) -> str:
    """One device's tables. What was not measured stays empty."""
    rows = read_csv(folder / KERNELS)
    first = rows[0]
    about = f"{first.device}, torch {first.torch}, triton {first.triton}, commit {first.commit}, {first.date}"
    picture = f"[all shapes](bench/results/{folder.name}/kernels.png)"
    return f"{about}; {picture}:\n\n{kernels(rows)}\n\n{prefills(findings.read(folder))}"


def kernels(rows: Sequence[Row]) -> str:
    """Markdown: an op and its shape per line."""
    lines = []
    for (op, shape, _), providers in by_case(rows).items():
        if not f"{shape}-".startswith(FRAMES):
            continue
        ours = providers.get("fftriton")
        if ours is None:
            lines.append([f"`{op}`", shape, "", "", *[""] * len(OTHERS)])
            continue
        waits = " (waits)" if ours.waits else ""
        others = comparable(ours, providers)
        faster = [f"{others[name].p50 / ours.p50:.1f}" if name in others else "" for name in OTHERS]
        lines.append([f"`{op}`", shape, f"{ours.p50:.3g}{waits}", f"{ours.percent_of_ceiling:.0f} %", *faster])
    return table(["op", "shape", "ms", "of the ceiling", *(f"faster than {name}" for name in OTHERS)], lines)


def prefills(found: Sequence[dict]) -> str:
    """Markdown: a method per line."""
    lines = [
        [f["method"], f"{f['prefill_ms']:.0f}", *(f"{f[name]:.2f}" if name in f else "" for name in SPEED_UPS)]
        for f in found
        if f["kind"] == "prefill"
    ]
    return table(["prefill of a random decoder of a 7B model's shape", "ms", "times faster", "by FLOPs"], lines)


def table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(heading)
    return "\n".join(f"| {' | '.join(line)} |" for line in (heading, rule, *lines))


if __name__ == "__main__":
    main()
