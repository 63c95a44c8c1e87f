"""A torchvision that cannot be imported, such as PyPI's beside a CPU build of torch, counts as not installed."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys

_LOG = logging.getLogger(__name__)


def torchvision_works() -> bool:
    """Whether torchvision can be imported."""
    try:
        importlib.import_module("torchvision")
    except Exception:  # RuntimeError if it was built for another torch; ImportError, OSError for a missing library
        return False
    return True


def hide_unusable_torchvision() -> None:
    """Hide a torchvision that cannot be imported from this process, before transformers is imported.

    transformers imports a torchvision that it finds with each model, and fails if that fails.
    """
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") and not torchvision_works():
        _LOG.info("torchvision cannot be imported and is left out: install the build for this torch")
        sys.modules["torchvision"] = None  # type: ignore[assignment]
