"""Layers by name: which are left dense, and which have a width of their own.

    --skip PATTERN            these layers are left dense; may be repeated
    --only PATTERN            all others are left dense; may be repeated
    --first-last dense        so are those that an image reaches first and last
    --first-last B            these two have B bits (quant), as by --bits NAME=B
    --bits PATTERN=B          these layers have B bits (quant; `modes.py`)

Patterns are globs over the names of layers, in which `*` stands for any characters, dots included.
A pattern that no layer matches is an error. That a layer is left dense is noted in the layer itself
(`layers.leave_dense`): whatever compresses layers sees the reason there, and so do copies.
"""

from __future__ import annotations

import argparse
import glob
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from modelutils import Example, example, find_layers, first_and_last
from obc.solver.errors import UserError
from obc.solver.layers import leave_dense, view
from obc.toolkit.costs import DENSE
from obc.toolkit.modes import Mode, mode_options


def ends_type(text: str) -> str:
    """An argparse type for what happens to the first and the last layer."""
    if text != DENSE and not re.fullmatch(r"[1-9]|1[0-6]", text):
        raise argparse.ArgumentTypeError(f"must be dense, or 1 to 16 bits; got {text}")
    return text


def add_layer_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that choose layers for any mode."""
    pattern = {"metavar": "PATTERN", "action": "append"}
    group.add_argument(
        "--skip", **pattern, help="leave dense the layers whose names match this glob; repeatable"
    )
    group.add_argument(
        "--only", **pattern, help="leave dense all layers but those that match; repeatable"
    )
    group.add_argument(
        "--first-last",
        metavar="B|dense",
        type=ends_type,
        help="leave dense the layers that an image reaches first and last, or give them B bits",
    )


def check_ends(first_last: str | None, mode: Mode) -> None:
    """Raise a UserError if --first-last gives bits to a mode that has none."""
    owners = mode_options()["bits"]
    if first_last not in (None, DENSE) and mode.name not in owners.modes:
        raise UserError(f"--first-last {first_last} is for {owners.owners}: pass dense, or --skip")


def select_layers(
    model: nn.Module,  # its layers are marked
    mode: Mode,
    options: Mapping[str, Any],
    image_shape: Example,
) -> Mode:  # with the bits of layers
    """Apply the options of a command to a model. Raises UserError for names that match nothing."""
    names = list(find_layers(model))
    reasons = skipped(names, options["skip"] or (), options["only"] or ())
    ends, bits = options["first_last"], options.get("bits") or []
    for text in bits:
        matching(text.rpartition("=")[0], names, f"--bits {text}")
    if ends:
        ends_names = first_and_last(model, example(model, image_shape, 2))
        if ends == DENSE:
            reasons |= {name: f"--first-last {ends}" for name in ends_names if name not in reasons}
        else:
            bits = [f"{glob.escape(name)}={ends}" for name in ends_names] + bits
    for name, reason in reasons.items():
        leave_dense(model.get_submodule(name), reason)
    if all(view(layer).left_dense for layer in find_layers(model).values()):
        raise UserError(f"every layer is left dense by {', '.join(sorted(set(reasons.values())))}")
    return replace(mode, bits=bits) if bits else mode


def skipped(
    names: Sequence[str], skip: Sequence[str], only: Sequence[str] = ()
) -> dict[str, str]:  # layer -> the option that leaves it dense
    """The layers that patterns leave dense."""
    reasons: dict[str, str] = {}
    for pattern in skip:
        for name in matching(pattern, names, f"--skip {pattern}"):
            reasons.setdefault(name, f"--skip {pattern}")
    chosen = {name for x in only for name in matching(x, names, f"--only {x}")}
    for name in names if only else ():
        if name not in chosen:
            reasons.setdefault(name, f"--only {' '.join(only)}")
    return reasons


def matching(pattern: str, names: Collection[str], option: str) -> list[str]:
    """The names that match a glob; raises UserError, with a hint, if none does."""
    if matches := [name for name in names if fnmatchcase(name, pattern)]:
        return matches
    inside = [name for name in names if name.startswith(f"{pattern.rstrip('.')}.")]
    if inside:
        hint = f"{pattern.rstrip('.')}.* are the {len(inside)} layers in it"
    else:
        modules = {name[: place.start()] for name in names for place in re.finditer(r"\.", name)}
        known = [*names, *(f"{module}.*" for module in sorted(modules))]
        close = get_close_matches(pattern, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "the mode layers lists them"
    raise UserError(f"{option}: no layer of that name; {hint}")
