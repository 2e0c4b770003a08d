"""torchvision beside any PyTorch, imported when it is first used.

The problem. PyPI's torchvision wheel is built for CUDA. Next to a CPU-only PyTorch its compiled
extension ``_C`` cannot be loaded (a CUDA library is missing), and torchvision then dies in its own
``import`` with

    RuntimeError: operator torchvision::nms does not exist

because ``torchvision/_meta_registrations.py`` describes the shapes of two operators, ``nms`` and
``qnms``, whether or not the extension has brought them.

The cure. Find ``_C`` without importing torchvision and try to load it. Where that works, nothing
else is done: this is a matching pair. Where it does not, declare the two operators (names and
signatures, no code), so that their descriptions have something to attach to. Datasets, transforms
and classification models need none of the extension's operators; box operators keep raising
torchvision's own error when they are called.

Everybody writes ``from obc.inputs.vision import torchvision`` and never ``import torchvision``. The
import itself takes seconds (it loads PyTorch's compiler) and happens when the first attribute is
used, so that the CIFAR networks and the embedded data do not wait for what they do not use. A file
of the user's own does write ``import torchvision``: `make_importable` is called before it is run.
"""

from __future__ import annotations

import importlib
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
    """Whether torchvision's compiled extension works with this PyTorch; imports nothing."""
    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        return True  # not installed: let the import below say so
    folder = Path(package.submodule_search_locations[0])
    for candidate in (*sorted(folder.glob("_C*.so")), *sorted(folder.glob("_C*.pyd"))):
        try:
            torch.ops.load_library(str(candidate))
        except OSError:
            continue
        return True
    return False


def declare_operators() -> torch.library.Library:
    """Declare what torchvision's import refers to; this lasts as long as the result."""
    library = torch.library.Library("torchvision", "DEF")
    for signature in MISSING_OPERATORS:
        library.define(signature)
    return library


@cache
def make_importable() -> torch.library.Library | None:
    """Let `import torchvision` work from now on; imports nothing.

    Returns the declarations, if there had to be any. They vanish with the object that made them,
    which the cache keeps.
    """
    return None if extension_loads() else declare_operators()


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
