"""The options that commands share, each defined once.

A group of options is a dataclass. A command with a parameter of such a class gets an option for each of its fields:

    @app.command()
    @with_options
    def run(model: ModelOptions, common: CommonOptions) -> None: ...
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ..methods.registry import names
from .config import read_config

if TYPE_CHECKING:
    from .sampling import Sampling
    from .target import Target


METHOD, BUDGET = "framefusion", "0.3"
"""What runs where neither --method and --budget nor --settings say otherwise."""

MaxPixels = Annotated[int | None, typer.Option(help="Maximum pixels per frame (default: checkpoint's).")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded; see `Target`."""

    model: Annotated[str | None, typer.Option(help="Checkpoint: a folder or a name on the Hugging Face hub.")] = None
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a checkpoint on the hub (default: main).")
    ] = None
    device: Annotated[str | None, typer.Option(help="Torch device (default: the GPU if there is one).")] = None
    device_map: Annotated[
        str | None,
        typer.Option(help="Spread the model over devices, instead of --device: auto, balanced, sequential, or JSON."),
    ] = None
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: bfloat16 on a GPU, else float32).")
    ] = None
    attention: Annotated[
        str | None,
        typer.Option(
            "--attention",
            "--attn",
            help="Attention implementation: sdpa, eager, flash_attention_2 (default: the model's).",
        ),
    ] = None
    max_new_tokens: Annotated[int | None, typer.Option(help="Maximum answer length (default: checkpoint's).")] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow the checkpoint to run its own code.")
    ] = False

    def target(self) -> Target:
        """The model that these options describe.

        Raises:
            ValueError, TypeError: an option cannot be met.
        """
        from .target import Target

        return Target(**asdict(self))


@dataclass(frozen=True)
class SamplingOptions:
    """Which frames to take; see `Sampling`."""

    frames: Annotated[int | None, typer.Option(help="Number of frames to sample (default: checkpoint's rule).")] = None
    fps: Annotated[float | None, typer.Option(help="Frames to sample per second of video.")] = None
    min_frames: Annotated[int | None, typer.Option(help="Minimum number of frames to sample.")] = None
    max_frames: Annotated[int | None, typer.Option(help="Maximum number of frames to sample.")] = None
    start: Annotated[float | None, typer.Option(help="Second of the video to start from.")] = None
    end: Annotated[float | None, typer.Option(help="Second of the video to end at.")] = None

    def sampling(self) -> Sampling:
        """What these options ask for.

        Raises:
            ValueError, TypeError: a value is out of range, or two exclude each other.
        """
        from .sampling import Sampling

        return Sampling(**asdict(self))


@dataclass(frozen=True)
class ReductionOptions:
    """How the vision tokens are reduced."""

    method: Annotated[
        str | None, typer.Option(metavar="NAME", show_default=METHOD, help=f"How to reduce: {', '.join(names())}.")
    ] = None  # fmt: skip
    budget: Annotated[
        str | None,
        typer.Option(metavar="FLOAT", show_default=BUDGET, help="Vision tokens to keep: a fraction in (0, 1]."),
    ] = None
    settings: Annotated[
        Path | None, typer.Option(help="File of fftriton calibrate, which chooses method, budget and frames.")
    ] = None
    max_pixels: MaxPixels = None


@dataclass(frozen=True)
class CommonOptions:
    """What every command takes."""

    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", is_eager=True, callback=read_config,
            help="YAML file of options; those on the command line come first.",
        ),
    ] = None  # fmt: skip
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what is done, and the traceback of each failure.")
    ] = False


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command in which each parameter that is a dataclass of options stands for its fields."""
    own = inspect.signature(function, eval_str=True).parameters
    groups: dict[str, Any] = {
        name: parameter.annotation for name, parameter in own.items() if is_dataclass(parameter.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in own.items():
        alone = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        parameters += _parameters(groups[name]) if name in groups else [alone]

    @functools.wraps(function)
    def command(**values: Any) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        function(**values, **made)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameters(group: Any) -> list[inspect.Parameter]:
    """One parameter per field of a dataclass of options."""
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]
