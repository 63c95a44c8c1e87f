"""Loading the parts of a checkpoint, with one-line errors and without running its own code unless trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from ..checks import first_line


def load_part(
    part: Any, checkpoint: str | Path, trust_remote_code: bool, revision: str | None = None, **arguments: Any
) -> Any:
    """Call `part.from_pretrained` without a prompt about the checkpoint's code.

    Args:
        part: one of transformers' Auto classes.
        checkpoint: folder, or name on the Hugging Face hub.
        trust_remote_code: whether to run the checkpoint's own code if it has any.
        revision: branch, tag or commit of a checkpoint on the hub; None for its main branch.
        arguments: passed to `from_pretrained`.

    Raises:
        ValueError: the checkpoint cannot be loaded, or needs code that is not trusted.
    """
    if revision is not None:
        arguments["revision"] = revision
    try:
        return part.from_pretrained(checkpoint, trust_remote_code=trust_remote_code, **arguments)
    except (ImportError, OSError, ValueError) as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise _needs_code(checkpoint) from error
        reason = first_line(error)
        rule = "the folder or the hub name of a video language model that transformers can load"
        at = "" if revision is None else f" at revision '{revision}'"
        raise ValueError(f"model must be {rule}, got '{checkpoint}'{at}: {reason}") from error


def load_config(checkpoint: str | Path, trust_remote_code: bool, revision: str | None = None) -> Any:
    """Load the configuration of a checkpoint.

    Raises:
        ValueError: as for `load_part`; or the code of its model is neither in transformers nor in the checkpoint, or
            cannot be called like a model of transformers; or the checkpoint names an attention kernel on the hub, which
            is code, and is not trusted.
    """
    _check_code(checkpoint, trust_remote_code, revision)
    config = load_part(AutoConfig, checkpoint, trust_remote_code, revision)
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    if not trust_remote_code and any("/" in (getattr(part, "_attn_implementation", None) or "") for part in parts):
        raise _needs_code(checkpoint)
    return config


def _check_code(checkpoint: str | Path, trust_remote_code: bool, revision: str | None) -> None:
    """Raise a ValueError if there is no code for the checkpoint's type of model that could be run here."""
    try:
        settings, _ = PretrainedConfig.get_config_dict(checkpoint, revision=revision)
    except OSError:
        return  # the checkpoint cannot be read, which loading it will say
    kind, own = settings.get("model_type"), settings.get("auto_map") or {}
    if kind is None or kind in CONFIG_MAPPING:
        return
    if own and not trust_remote_code:
        raise _needs_code(checkpoint)
    if "AutoModelForImageTextToText" not in own:
        where = "has methods of its own to be called by" if own else "is in a package of its own"
        raise ValueError(
            f"model must be a video language model that transformers can call, got '{checkpoint}' of type {kind}, "
            f"whose code {where}: load it in a program of yours, and call it inside fftriton.reduce(model, method)"
        )


def _needs_code(checkpoint: str | Path) -> ValueError:
    rule = "model must not need its own code unless trust_remote_code (--trust-remote-code) is given"
    return ValueError(f"{rule}, got '{checkpoint}', which does")
