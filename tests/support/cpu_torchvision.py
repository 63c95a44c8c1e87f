"""Lets the torchvision of PyPI import beside a CPU build of torch, so that Hugging Face's own processors run.

PyPI has only the build for CUDA, whose library of operators does not load there. The transforms, which are all that
processors need, are plain PyTorch; the import itself only asks that two operators are declared.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import torch

OPERATORS = [f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")]


class Finder:
    """Declares the operators right before torchvision is imported, unless torchvision's own library can be loaded."""

    _declared: torch.library.Library | None = None  # declarations end with this object

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "torchvision" or cls._declared is not None:
            return None
        spec = PathFinder.find_spec(name)
        if spec is not None and spec.origin is not None and not loads(Path(spec.origin).with_name("_C.so")):
            cls._declared = torch.library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                cls._declared.define(operator)
        return spec


def loads(library: Path) -> bool:
    """Whether torch can load a library of operators."""
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


def install() -> None:
    """From now on, torchvision can be imported."""
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)
