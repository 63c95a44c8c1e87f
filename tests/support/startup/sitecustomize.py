"""Lets the torchvision of PyPI import beside a CPU build of torch, so that Hugging Face's own processors run in tests.

PyPI has only the build for CUDA, whose library of operators does not load there. The transforms, which are all that
processors need, are plain PyTorch; the import itself only asks that two operators are declared. conftest.py runs this
file, and puts its folder on PYTHONPATH: Python runs a module of this name when it starts.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class Finder:
    """Declares the operators right before torchvision is imported, if its own library cannot be loaded."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name)
        if spec is not None and spec.origin is not None:
            import torch

            try:
                torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
            except OSError:
                for operator in ("nms", "qnms"):
                    if hasattr(torch.ops.torchvision, operator):
                        continue  # whoever asked before did not import it
                    torch.library.define(f"torchvision::{operator}", SCHEMA)
        return spec


sys.meta_path.insert(0, Finder())
