"""Machine code is that of the sources as they are now, whichever file was changed."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.registry import CPUDispatcher

ROOT = Path(__file__).resolve().parents[1]
KERNEL_FILES = [
    path.relative_to(ROOT)
    for folder in ("obc", "pruning_vs_quantization")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "\n@compile" in path.read_text()
]
OWN_KERNEL = """
import numpy as np
from obc.solver.elimination_cpu import compiled, target

@compiled
def twice_the_target(weight, grid):
    return 2 * target(weight, grid)

print(twice_the_target(3.4, np.array([1.0, -8.0, 7.0])))
"""


def test_a_changed_kernel_runs_and_so_does_the_old_one_put_back(tmp_path: Path) -> None:
    """The change is in another file than the kernel that is called, and has the same size."""
    shutil.copytree(ROOT / "obc", tmp_path / "obc", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "obc" / "solver" / "elimination_cpu.py"
    (tmp_path / "own_kernel.py").write_text(OWN_KERNEL)
    before = source.read_text()
    after = before.replace("np.rint(weight / grid[0])", "np.ceil(weight / grid[0])")
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    printed = []
    for text in (before, after, before, after):
        source.write_text(text)
        done = subprocess.run(
            [sys.executable, "own_kernel.py"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        printed.append(float(done.stdout))
    assert printed == [6, 8, 6, 8]
    kept = list((tmp_path / "__pycache__").glob("kernels-*"))
    assert len(kept) == 2 and all(list(folder.glob("*.nbc")) for folder in kept)


@pytest.mark.parametrize("path", KERNEL_FILES, ids=str)
def test_kernels_contain_nothing_from_files_that_their_cache_does_not_see(path: Path) -> None:
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    kernels = {k: v for k, v in vars(module).items() if isinstance(v, CPUDispatcher)}
    assert kernels
    for kernel in kernels.values():
        sources = [Path(source).resolve() for source in kernel._cache.sources]
        text = "\n".join(source.read_text() for source in sources)
        assert (ROOT / path) in sources
        for name in kernel.py_func.__code__.co_names:
            value = kernel.py_func.__globals__.get(name)
            if isinstance(value, CPUDispatcher):
                assert Path(value.py_func.__code__.co_filename).resolve() in sources
            elif isinstance(value, (int, float)):
                assert f"\n{name} = " in text, f"{name} comes from a file that is not hashed"
