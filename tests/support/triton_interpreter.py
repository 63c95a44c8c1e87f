"""Whether Triton's interpreter works beside the NumPy at hand."""

from functools import cache

import numpy
import triton


@triton.jit
def _loop_kernel(count):
    for _ in range(count):
        pass


@cache
def trouble() -> str | None:
    """Why no kernel can be interpreted, or None. TRITON_INTERPRET must have been 1 when Triton was imported.

    Triton 3.6 and older read loop bounds and conditions by int(array), with arrays of one element, which newer NumPys
    refuse.
    """
    try:
        _loop_kernel[(1,)](2)
    except Exception as error:
        return f"Triton {triton.__version__}'s interpreter does not work with NumPy {numpy.__version__}: {error}"
    return None
