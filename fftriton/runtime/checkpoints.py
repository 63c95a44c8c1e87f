"""Loading the parts of a checkpoint, with one-line errors and without running its own code unless trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig


def load_part(part: Any, checkpoint: str | Path, trust_remote_code: bool, **arguments: Any) -> Any:
    """Call `part.from_pretrained` without a prompt about the checkpoint's code.

    Args:
        part: one of transformers' Auto classes.
        checkpoint: folder, or name on the Hugging Face hub.
        trust_remote_code: whether to run the checkpoint's own code if it has any.
        arguments: passed to `from_pretrained`.

    Raises:
        ValueError: the checkpoint cannot be loaded, or needs code that is not trusted.
    """
    try:
        return part.from_pretrained(checkpoint, trust_remote_code=trust_remote_code, **arguments)
    except (ImportError, OSError, ValueError) as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise _needs_code(checkpoint) from error
        reason = str(error).strip().splitlines()[0]
        rule = "the folder or the hub name of a video language model that transformers can load"
        raise ValueError(f"model must be {rule}, got '{checkpoint}': {reason}") from error


def load_config(checkpoint: str | Path, trust_remote_code: bool) -> Any:
    """Load the configuration of a checkpoint.

    Raises:
        ValueError: as for `load_part`, or the checkpoint names an attention kernel on the hub, which is code, and is
            not trusted.
    """
    config = load_part(AutoConfig, checkpoint, trust_remote_code)
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    if not trust_remote_code and any("/" in (getattr(part, "_attn_implementation", None) or "") for part in parts):
        raise _needs_code(checkpoint)
    return config


def _needs_code(checkpoint: str | Path) -> ValueError:
    rule = "model must not need its own code unless trust_remote_code (--trust-remote-code) is given"
    return ValueError(f"{rule}, got '{checkpoint}', which does")
