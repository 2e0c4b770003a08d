"""The layers of a model in a table: what each mode would do to each of them, and why not.

No calibration: one forward pass on noise gives the shapes, the order of execution, and whether
layers do what their class says (`layers.prove`).

    kind, shape, columns   of the layer's weight; columns are the weights in a row (d of the paper)
    patches                columns of input that an image gives the layer: with fewer patches from
                           all images than columns, its Hessian is singular
    MFLOP                  10⁶ floating-point operations for an image, two for a multiply-add
    dense bits             of its weights, at 32 each
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from modelutils import Example, evaluating, example, find_layers, other_weights
from obc.inputs.tasks import call
from obc.solver.layers import first_input, forward_hooks, prove, view
from obc.toolkit.kinds import FULL_BITS
from obc.toolkit.modes import MODES, Mode, QuantMode, mode_options
from obc.toolkit.planning import why_dense
from obc.toolkit.selection import select_layers

LISTED = ("layer", "kind", "shape", "columns", "patches", "MFLOP", "dense bits")


@dataclass
class Calls:
    """What a layer does for an image."""

    count: int = 0
    patches: int = 0
    flops: int = 0


def listing(
    model: nn.Module,
    options: Mapping[str, Any],  # of main_trueobs.py
    image_shape: Example,
) -> Iterator[str]:
    """The table, a line at a time: layers in order of execution; then the reasons; then sums."""
    calls = calls_for_an_image(model, image_shape)
    modes = {mode.name: mode for mode in requested_modes(options)}
    modes |= {"quant": select_layers(model, modes["quant"], options, image_shape)}
    layers = {name: model.get_submodule(name) for name in calls}
    named = bool({*changed_options(options)} & {"wbits", "abits", "bits", "first_last"})
    rows, reasons = [(*LISTED, *modes)], {}
    for name, layer in layers.items():
        seen, calls_seen, words, dense_in = view(layer), calls[name], [], {}
        for mode in modes.values():
            reason = why_dense(layer, mode, calls_seen.count)
            aim = mode.for_layer(name).aim if named or not isinstance(mode, QuantMode) else "yes"
            words.append("no" if reason else aim)
            if reason:
                dense_in.setdefault(reason, []).append(mode.name)
        for reason, names in dense_in.items():
            which = "every mode" if len(names) == len(modes) else " and ".join(names)
            reasons.setdefault((which, reason), []).append(name)
        shape = "×".join(map(str, layer.weight.shape))
        figures = (f"{seen.columns:,}", f"{calls_seen.patches:,}", f"{calls_seen.flops / 1e6:.3g}")
        bits = f"{FULL_BITS * layer.weight.numel():,}"
        rows.append((name, type(layer).__name__, shape, *figures, bits, *words))
    yield from aligned(rows)
    for (which, reason), names in reasons.items():
        yield f"left dense by {which}: {', '.join(names)}: {reason}"
    weights = sum(layer.weight.numel() for layer in layers.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    flops = sum(found.flops for found in calls.values())
    yield (
        f"{len(layers)} layers, {weights:,} weights ({100 * weights / total:.3g} % of all "
        f"parameters), {flops / 1e6:.4g} MFLOP an image"
    )
    for name, count in other_weights(model).items():
        yield f"in no layer: {name}, {count:,} ({100 * count / total:.2g} % of all parameters)"


def calls_for_an_image(
    model: nn.Module, image_shape: Example
) -> dict[str, Calls]:  # in order of execution; layers that are not called come last
    """Show the model an image of noise, or a batch of its task; layers are proven by it."""
    inputs = example(model, image_shape, noise=True)
    layers, calls = find_layers(model), {}

    def see(name: str, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        if not (x := first_input(args, kwargs)).numel():
            return
        prove(layer, args, kwargs, output)
        seen = calls.setdefault(name, Calls())
        seen.count += 1
        if not view(layer).proof.flaw:
            seen.patches += view(layer).positions(torch.empty(x.shape, device="meta"))
            seen.flops += view(layer).flops(output)

    with evaluating(model), forward_hooks(layers, see):
        call(model, inputs)
    for found in calls.values():
        found.patches, found.flops = found.patches // len(inputs), found.flops // len(inputs)
    return calls | {name: Calls() for name in layers if name not in calls}


def changed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of modes that were given; --first-last, too."""
    defaults = {name: item.field.default for name, item in mode_options().items()}
    defaults["first_last"] = None
    return {name: options[name] for name in defaults if options[name] != defaults[name]}


def requested_modes(options: Mapping[str, Any]) -> Iterator[Mode]:
    """Every mode, with those of its options that were given."""
    given = {k: x for k, x in changed_options(options).items() if k not in ("order", "sequential")}
    for mode in MODES.values():
        own = {item.name: given[item.name] for item in fields(mode) if item.name in given}
        if mode is QuantMode and not own.keys() & {"wbits", "abits"}:
            own["wbits"] = 16  # whichever
        yield mode(**own)


def aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """A table; figures are flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if index < 3 or index >= len(LISTED) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
