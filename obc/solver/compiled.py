"""Modules of ours that numba compiles, where numba is installed.

`elimination_cpu` and `levels_cpu` are faster forms of what stands in `elimination.py` and
`levels.py` in torch. They are imported when they are first asked for: compiling takes seconds.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

log = logging.getLogger("trueobs")


@cache
def compiled(name: str) -> ModuleType | None:
    """A module of this package, or None (and a warning) where it cannot be compiled."""
    try:
        return importlib.import_module(f"obc.solver.{name}")
    except (ImportError, RuntimeError) as error:  # not installed; no folder to cache in
        log.warning("%s, compiled for CPUs, is not available (%s): pip install numba", name, error)
        return None
