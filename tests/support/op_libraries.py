"""The ops in each of their implementations."""

from collections.abc import Callable
from typing import Any

import pytest

import fftriton_kernels
from fftriton_kernels import reference


class _OnACpu:
    """The public ops as they run on CPU tensors without the interpreter."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def op(*arguments: Any, **options: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fftriton_kernels._dispatch.INTERPRET", False)
                return getattr(fftriton_kernels, name)(*arguments, **options)

        return op


ON_A_CPU = _OnACpu()
LIBRARIES = {"kernel": fftriton_kernels, "cpu": ON_A_CPU, "reference": reference}
libraries = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
