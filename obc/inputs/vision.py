"""torchvision next to any PyTorch, imported when it is first used.

The problem: PyPI's torchvision wheel is built for CUDA. Next to a CPU-only PyTorch its compiled
extension ``_C`` cannot be loaded (a CUDA library is missing), and ``import torchvision`` fails with

    RuntimeError: operator torchvision::nms does not exist

because ``torchvision/_meta_registrations.py`` registers the output shapes of two operators, ``nms``
and ``qnms``, whether or not the extension has defined them.

The solution: find ``_C`` without importing torchvision and try to load it. If that works, the two
packages match and nothing else is done. If not, declare the two operators (names and signatures,
no code). Datasets, transforms and classification models need none of the extension's operators;
operators on boxes still raise torchvision's own error when they are called.

All our code writes ``from obc.inputs.vision import torchvision``, never ``import torchvision``. The
import takes seconds (it loads PyTorch's compiler) and happens when the first attribute is used, so
the CIFAR networks and the embedded data do not wait for it. A user's model file may contain
``import torchvision``: call `make_importable` before running it.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

__all__ = ["torchvision"]

# Signatures as in torchvision's own registrations (torchvision/csrc/ops).
MISSING_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def extension_loads() -> bool:
    """Whether torchvision's compiled extension works with this PyTorch. Imports nothing."""
    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        return True  # not installed: the import reports it
    folder = Path(package.submodule_search_locations[0])
    for candidate in (*sorted(folder.glob("_C*.so")), *sorted(folder.glob("_C*.pyd"))):
        try:
            torch.ops.load_library(str(candidate))
        except OSError:
            continue
        return True
    return False


@cache  # keeps the declarations, which last as long as the object that made them
def make_importable() -> torch.library.Library | None:
    """Make `import torchvision` work from now on. Returns the declarations if any are needed."""
    if extension_loads():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for signature in MISSING_OPERATORS:
        library.define(signature)
    return library


@cache
def imported() -> ModuleType:
    """torchvision."""
    make_importable()
    return importlib.import_module("torchvision")


class _Torchvision:
    """Stands for the package; see the module docstring."""

    def __getattr__(self, name: str) -> Any:
        return getattr(imported(), name)


torchvision = _Torchvision()
