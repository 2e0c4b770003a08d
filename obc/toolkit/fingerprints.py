"""The fingerprint of a run: what its result depends on, as text by name.

Hashes of contents (weights, images, a database, the code), options, versions. Two runs with the
same fingerprint have the same result to the bit; for two that differ, `difference` says how.

A finished result depends on the whole solver, on the flat libraries, and on whatever else its
command imports; a cached Hessian only on the code that makes Hessians. Code is compared as Python
parses it, so comments, docstrings and formatting do not count.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obc.inputs.names import without_shells

HASH_BYTES = 16
CODE_ROOT = Path(__file__).resolve().parents[2]  # of all our modules
OUR_NAMES = {  # which an installed package shares CODE_ROOT with others
    *("obc", "pruning_vs_quantization", "datautils", "modelutils", "quant", "trueobs"),
    *("main_trueobs", "database", "spdy", "post_proc", "export"),
}
HESSIAN_CODE = (
    *("datautils.py", "modelutils.py", "quant.py", "trueobs.py"),
    *("obc/inputs/*.py", "obc/toolkit/calibrate.py"),
    *("obc/solver/hessian.py", "obc/solver/layers.py", "obc/solver/distributed.py"),
)
SOLVER_CODE = "obc/solver/*.py"  # all of it, since compiled kernels are imported by name
WITHOUT_NUMBERS = {  # the code around a result; any other file that is imported counts
    f"obc/toolkit/{name}.py" for name in ("cli", "fingerprints", "records", "resume", "starting")
}
VERSIONS = ("torch", "torchvision", "numpy", "numba", "pillow")
VARIABLES = (  # of the environment: they choose the kernels or the precision of matrix products
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "OPENBLAS_CORETYPE"),
    *("ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"),
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
)
SURROUNDINGS = (
    "python",
    *VERSIONS,
    "timm",
    "device",
    "threads",
    *VARIABLES,
    "code",
)  # rounding only
NOT_IN_A_RESULT = {  # options: where and how to work, or files whose contents are hashed
    *("help", "restart", "repeat", "check", "plan", "cache", "device", "workers", "memory"),
    *("weights", "datapath", "image_size", "skip_bad_images", "load", "save", "sparse_dir"),
    *("prefix", "score_path", "profile", "file", "timings", "weights_key", "classes", "labels"),
    *("resize", "crop", "interpolation", "mean", "std"),  # "preprocessing" has what they result in
}


def content_hash(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """A hash of tensors in any order (names, types, shapes, bytes) and of a text."""
    content = hashlib.blake2b(text.encode(), digest_size=HASH_BYTES)
    for name, tensor in sorted(tensors.items()):
        content.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        content.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return content.hexdigest()


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """A hash of a network's weights, the same inside and outside of DataParallel and its like.

    The counts of batches, which some files lack, do not count.
    """
    counted = {k: x for k, x in state.items() if not k.endswith("num_batches_tracked")}
    bare = {without_shells(k): x for k, x in counted.items()}
    return content_hash(bare if len(bare) == len(counted) else counted)


def bytes_hash(strings: Iterable[bytes]) -> str:
    """A hash of byte strings, in order."""
    content = hashlib.blake2b(digest_size=HASH_BYTES)
    for string in strings:
        content.update(b"%d " % len(string))
        content.update(string)
    return content.hexdigest()


def text_hash(fingerprint: Mapping[str, str]) -> str:
    """A hash of a fingerprint."""
    return content_hash({}, json.dumps(sorted(fingerprint.items())))


# -- code ------------------------------------------------------------------------------------------


@cache
def parsed(path: Path) -> tuple[bytes, frozenset[str]]:
    """A file of Python as it is parsed, without docstrings; and the modules that it imports.

    A name that is imported from a module may itself be a module.
    """
    tree, imports = ast.parse(path.read_bytes()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
    return ast.dump(tree).encode(), frozenset(imports)


def hessian_code() -> str:
    """A hash of the code that Hessians depend on."""
    paths = sorted(path for pattern in HESSIAN_CODE for path in CODE_ROOT.glob(pattern))
    return bytes_hash(parsed(path)[0] for path in paths)


def result_code(module: str) -> str:
    """A hash of the code that the results of a module (a.b) depend on: what it imports."""
    excluded = {CODE_ROOT / name for name in WITHOUT_NUMBERS}
    paths, unread = set(), {module_file(module), *CODE_ROOT.glob(SOLVER_CODE)}
    while unread := {path for path in unread - paths - excluded if path.is_file()}:
        paths |= unread
        names = {name for path in unread for name in parsed(path)[1]}
        unread = {module_file(name) for name in names if name.partition(".")[0] in OUR_NAMES}
    return bytes_hash(parsed(path)[0] for path in sorted(paths))


def module_file(name: str) -> Path:
    """The file of a module, if it is one of ours."""
    return CODE_ROOT.joinpath(*name.split(".")).with_suffix(".py")


# -- fingerprints ----------------------------------------------------------------------------------


def surroundings(device: torch.device, code: str, threads: bool = True) -> dict[str, str]:
    """The entries of a fingerprint that say on what, and by which code, a result is computed.

    threads: whether the last digits of the result depend on the number of threads.
    """
    return {
        "python": platform.python_version(),
        **installed_versions(VERSIONS),
        "device": device.type,
        **({"threads": str(torch.get_num_threads())} if threads else {}),
        **{name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        "code": code,
    }


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def chosen_options(parser: argparse.ArgumentParser, arguments: Mapping[str, Any]) -> dict[str, str]:
    """The words and options of a command that change its results, under the user's names."""
    texts = {}
    for action in parser._actions:
        if action.dest not in NOT_IN_A_RESULT:
            value, flags = arguments[action.dest], action.option_strings
            text = " ".join(value) if isinstance(value, list) else str(value)
            texts[flags[0] if flags else str(action.metavar or action.dest)] = text
    return texts


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> str | None:
    """The first difference between two fingerprints in words, or None.

    An option that one of them does not know is one that was not given.
    """
    words = {"True": "on", "False": "off", None: "not set", "None": "not set"}
    for name in (*new, *(name for name in old if name not in new)):
        before, now = old.get(name), new.get(name)
        if before == now or (None in (before, now) and {before, now} & {"None", "False"}):
            continue
        if re.fullmatch(rf"[0-9a-f]{{{2 * HASH_BYTES}}}", before or now or ""):
            return f"{name} changed"
        return f"{name} was {words.get(before, before)}, is now {words.get(now, now)}"
    return None
