"""What the result of a run depends on, as text by name: its *fingerprint*.

Hashes of contents (weights, images, a database, the code), options, versions. Two runs of one
fingerprint have the same result, to the bit; of two that differ, `difference` says in what.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

HASH_BYTES = 16
ROOT = Path(__file__).resolve().parents[2]  # of all our modules
VERSIONS = ("torch", "torchvision", "numpy", "numba", "pillow")
SURROUNDINGS = ("code", *VERSIONS, "threads", "device")  # they change results by rounding only
NO_PART_OF_A_RESULT = {  # options: where and how to work, or files whose contents count
    "help",
    "skip_bad_images",
    "device",
    "workers",
    "memory",
    "restart",
    "repeat",
    "check",
    "cache",
    "weights",
    "datapath",
    "load",
    "save",
    "sparse_dir",
    "prefix",
    "score_path",
    "profile",
    "file",
    "timings",
    "image_size",
    "plan",
}


def content_hash(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """A hash of tensors, whatever their order: names, types, shapes and bytes; and of a text."""
    content = hashlib.blake2b(text.encode(), digest_size=HASH_BYTES)
    for name, tensor in sorted(tensors.items()):
        content.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        content.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return content.hexdigest()


def bytes_hash(parts: Iterable[bytes]) -> str:
    """A hash of byte strings, in order."""
    content = hashlib.blake2b(digest_size=HASH_BYTES)
    for part in parts:
        content.update(b"%d " % len(part))
        content.update(part)
    return content.hexdigest()


def text_hash(marks: Mapping[str, str]) -> str:
    """A hash of a fingerprint."""
    return content_hash({}, json.dumps(sorted(marks.items())))


def code_hash(*modules: str) -> str:
    """A hash of our own modules of these names (a.b) and of all that they import."""
    found, wanted = {}, set(modules)
    while wanted:
        path = ROOT.joinpath(*wanted.pop().split(".")).with_suffix(".py")
        if path not in found and path.is_file():
            found[path] = path.read_bytes()
            wanted |= imported(ast.parse(found[path]))
    return bytes_hash(found[path] for path in sorted(found))


def imported(code: ast.Module) -> set[str]:
    """The modules that code imports, anywhere in it; names from a module may be modules, too."""
    names = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def surroundings(device: torch.device, *modules: str, threads: bool = True) -> dict[str, str]:
    """The part of a fingerprint that tells on what, and by which code, a run is done.

    threads: whether the result depends, in its last digits, on how many there are.
    """
    versions = {}
    for package in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    marks = {"code": code_hash(*modules), **versions, "device": device.type}
    return marks | {"threads": str(torch.get_num_threads())} if threads else marks


def chosen_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, str]:
    """Words and options of a command by the names its user knows, those that change results."""
    return {
        action.option_strings[-1]
        if action.option_strings
        else str(action.metavar or action.dest): str(getattr(args, action.dest))
        for action in parser._actions
        if action.dest not in NO_PART_OF_A_RESULT
    }


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[str, str] | None:
    """The first thing that differs, in words: as it was, as it is; None if nothing does."""
    for name in (*new, *(name for name in old if name not in new)):
        was, now = old.get(name), new.get(name)
        if was == now:
            continue
        if {was, now} <= {"True", "False"}:
            return tuple(f"with{'' if value == 'True' else 'out'} {name}" for value in (was, now))
        if re.fullmatch(rf"[0-9a-f]{{{2 * HASH_BYTES}}}", was or now or ""):
            return f"with other {name}", "with what is found now"
        return tuple(f"with {name} {value}" for value in (was, now))
    return None
