"""The output of `fftriton doctor`: one screen, or JSON."""

from __future__ import annotations

import json
import math
import platform
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..runtime.provenance import commit
from ..runtime.terminal import say
from .doctor import Diagnosis, Finding, Ops

if TYPE_CHECKING:
    from fftriton_kernels import OpCheck

_IMPLEMENTATIONS = {
    "Triton": "Triton kernel",
    "Triton interpreter": "Triton kernel, interpreted",
    "PyTorch": "CPU code (PyTorch)",
}


def as_json(diagnosis: Diagnosis) -> str:
    """Everything that was found, for programs."""
    ops = diagnosis.ops
    content = {
        "healthy": not diagnosis.faults,
        "faults": diagnosis.faults,
        "platform": platform.platform(),
        "commit": commit(),
        "python": _described(diagnosis.python),
        "packages": [_described(one) for one in diagnosis.packages],
        "device": ops.device,
        "processor": ops.processor,
        "capability": ops.capability,
        "implementation": ops.implementation,
        "why": ops.why,
        "dtype": ops.dtype,
        "ops": [_checked(check) for check in ops.checks],
        "notes": [*diagnosis.notes, *ops.notes],
        "install": [{"for": use, "command": command} for use, command in diagnosis.installs],
    }
    return json.dumps(content, indent=2)


def print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """Print one screen: packages, ops, what to install for what, and the verdict."""
    python = diagnosis.python
    say(console, f"Python {python.version} on {platform.platform()}{_marked(python)}")
    console.print(_packages_table(diagnosis))
    _print_ops(console, diagnosis.ops)
    for note in (*diagnosis.notes, *diagnosis.ops.notes):
        console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if diagnosis.installs:
        say(console, "To install:")
    for use, command in diagnosis.installs:
        say(console, f"  {command}  # for {use}")
    faults = diagnosis.faults
    if not faults:
        console.print("Nothing is wrong.", style="bold green", highlight=False)
    for fault in faults:
        console.print(f"Wrong: {fault}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def _described(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.package.name,
        "version": finding.version,
        "requirement": finding.requirement or None,
        "installed": finding.version is not None,
        "supported": finding.is_supported if finding.version else None,
        "needed": finding.package.needed,
        "use": finding.package.use,
        "fault": finding.fault or None,
    }


def _checked(check: OpCheck) -> dict[str, Any]:
    def finite(value: float) -> float | None:  # JSON has no NaN
        return value if math.isfinite(value) else None

    return check._asdict() | {
        "error": finite(check.error),
        "seconds": finite(check.seconds),
        "fault": check.fault or None,
    }


def _marked(finding: Finding) -> str:
    return f": {finding.fault}" if finding.fault else ""


def _packages_table(diagnosis: Diagnosis) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 0))
    for heading in ("package", "version", "supported", "", "for"):
        table.add_column(heading, overflow="fold")
    for one in diagnosis.packages:
        version = "-" if one.version is None else one.version or "unknown"
        supported = one.requirement.removeprefix(one.package.name)
        table.add_row(one.package.name, version, supported, _state(one), Text(one.package.use))
    return table


def _state(finding: Finding) -> Text:
    if finding.version is None:
        return Text("missing", "red") if finding.package.needed else Text("not installed", "dim")
    if finding.broken:
        return Text("broken", "red")
    if not finding.is_supported:
        return Text("unsupported", "red")
    return Text("works", "green") if finding.package.module else Text("not used", "dim")


def _print_ops(console: Console, ops: Ops) -> None:
    if ops.fault:
        say(console, f"The ops were not tested: {ops.fault}")
        return
    name = "" if ops.capability is None else f", compute capability {ops.capability}"
    served = _IMPLEMENTATIONS[ops.implementation or ""]
    say(console, f"Ops on {ops.processor}{name}, in {ops.dtype}: {served}, because {ops.why}")
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 0))
    table.add_column("op", no_wrap=True)
    table.add_column("runs as", overflow="fold")
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for check in ops.checks:
        figures = (
            ("-", "-")
            if check.fault
            else (f"{check.error:.1e}" if check.error else "0", f"{check.seconds * 1e3:.2f} ms")
        )
        state = Text("wrong", "red") if check.fault else Text("right", "green")
        table.add_row(check.op, _IMPLEMENTATIONS[check.implementation], *figures, state)
    console.print(table)
