"""The namespace of the operators: the package's own name, so that several copies in one process keep apart.

A copy that Hugging Face's `kernels` loads has a name of its own; kernel-builder writes its own version of this file.
"""

import re


def add_op_namespace_prefix(op_name: str) -> str:
    """The name that an operator of this copy is registered under."""
    return f"{re.sub(r'[^a-zA-Z0-9]', '_', str(__package__))}::{op_name}"
