"""Layer by layer: the command of part 3 behind both of its scripts.

Kuzmin et al. (arXiv 2307.02973), section 5.1: for real inputs of real layers, how well can b-bit
weights do at all, and how well weights of sparsity 1 − b/16? Subproblems are those of
layer_problem.py, one for each output channel and chunk of inputs that is looked at. A layer at a
bit width is one result file,

    <out>/<model>_<layer>_<b>_bits_<quantisation|pruning>.json
        subproblems   a record each (layer_methods.Record), with row and columns
        summary       of the layer (`summary`)

and is skipped when it is there. SQNRs are those of the chunks together: 10·log₁₀ of the sum of the
signals over the sum of the errors, so that sums of proven bounds bound the whole:

    sqnr_best = that of the best solutions found  ≤  the optimum's  ≤  sqnr_limit, of the bounds

The gap of a heuristic is what an optimal solution would gain over it, in dB: at least
error / best error, at most error / bound; with all subproblems proven the two are the same.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from modelutils import find_layers
from obc.inputs import files
from obc.solver.errors import UserError, log
from obc.solver.layers import view
from obc.toolkit import cli
from obc.toolkit.leveldb import model_tag
from obc.toolkit.session import Session, common_options
from pruning_vs_quantization.expected_error import sqnr_db
from pruning_vs_quantization.layer_methods import Record, pruned, quantised
from pruning_vs_quantization.layer_options import settle
from pruning_vs_quantization.layer_problem import (
    Chunk,
    Subproblem,
    grid_steps,
    rows_and_chunks,
    second_moments,
    subproblems,
)
from pruning_vs_quantization.layer_report import draw, header, table_row
from pruning_vs_quantization.proof import Limits, Reals
from pruning_vs_quantization.study_files import finished, write_result

Solver = Callable[[argparse.Namespace, nn.Module, int], Callable[[Subproblem], Record]]


@dataclass(frozen=True)
class Study:
    """What the two scripts differ in."""

    kind: str  # quantisation or pruning
    own: str  # the toolkit's own heuristic
    solver: Solver
    settings: tuple[str, ...]  # options that only it hangs on


# -- the two studies -------------------------------------------------------------------------------


def quantiser(
    args: argparse.Namespace, layer: nn.Module, bits: int
) -> Callable[[Subproblem], Record]:
    """All quantisers, on the layer's grid."""
    steps = grid_steps(
        layer.weight, bits, args.balanced, args.per_channel, args.range_search_method
    )

    def solve(sub: Subproblem) -> Record:
        seed = [args.seed, bits, sub.row, sub.chunk.start]
        return quantised(
            sub.G,
            sub.w,
            float(steps[sub.row]),
            bits,
            args.balanced,
            args.method,
            limits_of(args),
            np.random.default_rng(seed),
        )

    return solve


def pruner(args: argparse.Namespace, layer: nn.Module, bits: int) -> Callable[[Subproblem], Record]:
    """All pruners, at the size of so many bits."""
    return lambda sub: pruned(sub.G, sub.w, bits, args.method, limits_of(args))


QUANTISATION = Study(
    "quantisation", "obq", quantiser, ("range_search_method", "per_channel", "balanced")
)
PRUNING = Study("pruning", "exact_obs", pruner, ())


def limits_of(args: argparse.Namespace) -> Limits:
    return Limits(args.time_limit, args.node_limit or math.inf)


# -- a layer ---------------------------------------------------------------------------------------


def layer_figures(
    study: Study,
    args: argparse.Namespace,
    name: str,
    layer: nn.Module,
    bits: int,
    moments: Mapping[Chunk, Reals],
) -> dict[str, Any]:
    """Every subproblem of a layer at a bit width, and their summary."""
    solve, records, silent = study.solver(args, layer, bits), [], 0
    parts = subproblems(layer, wanted_parts(layer, args), moments)
    for sub in tqdm(parts, desc=f"{name}, {bits} bits", leave=False, disable=None):
        if not sub.signal > 0:
            silent += 1
            continue
        record = solve(sub)
        where = {"row": sub.row, "start": sub.chunk.start, "stop": sub.chunk.stop}
        records.append(where | record.as_json())
        if args.verbose_solvers:
            log.info("%s", solver_line(name, bits, records[-1]))
    if silent:
        log.info(
            "%s: %d of %d chunks left out, their output is always zero", name, silent, len(parts)
        )
    return {
        "kind": study.kind,
        "layer": name,
        "bits": bits,
        "summary": summary(records, study.own),
        "silent": silent,
        "subproblems": records,
    }


def wanted_parts(layer: nn.Module, args: argparse.Namespace) -> list[tuple[int, Chunk]]:
    return rows_and_chunks(
        layer, args.opt_dim, args.num_output_channels, args.num_chunks or view(layer).columns
    )


def solver_line(name: str, bits: int, record: Mapping[str, Any]) -> str:
    """One subproblem's solvers on one line."""
    relaxation = record["relaxation"]
    parts = [
        f"{name}, {bits} bits, channel {record['row']}, inputs {record['start']}–{record['stop']}:",
        f"error {record['error']:.6g}, proven above {record['lower']:.6g}",
    ]
    if relaxation is not None:
        parts.append(f"(relaxation {relaxation:.6g})")
    if record["nodes"]:
        parts.append(f"{record['nodes']} nodes in {record['seconds']:.3f} s")
    return " ".join(parts) + ("" if record["proven"] else ", not proven optimal")


def summary(records: list[dict[str, Any]], own: str) -> dict[str, Any] | None:
    """SQNRs in dB of all chunks together, and how far from optimal the toolkit's answers are."""
    if not records:
        return None
    signal = sum(record["signal"] for record in records)
    best, bound = (sum(record[key] for record in records) for key in ("error", "lower"))
    errors = {
        name: sum(record["errors"][name] for record in records) for name in records[0]["errors"]
    }
    gaps = [sqnr_db(record["errors"][own], record["error"]) for record in records]
    gaps = [0.0 if math.isnan(gap) else gap for gap in gaps]  # both without error
    seconds = [record["seconds"] for record in records]
    return {
        "subproblems": len(records),
        "proven": sum(record["proven"] for record in records),
        "sqnr": {name: sqnr_db(signal, error) for name, error in errors.items()},
        "sqnr_best": sqnr_db(signal, best),
        "sqnr_limit": sqnr_db(signal, bound),
        "own": own,
        "own_gap_mean": sum(gaps) / len(gaps),
        "own_gap_worst": max(gaps),
        "seconds_median": float(np.median(seconds)),
        "seconds_95": float(np.percentile(seconds, 95)),
    }


# -- the command -----------------------------------------------------------------------------------


def run(study: Study, args: argparse.Namespace) -> None:
    """Every layer at every bit width that has no result yet; table and picture of all."""
    settle(args)
    session = Session.of(common_options(args))
    layers = chosen_layers(session.model, args)
    common = settings(study, args, session)
    work = [(name, bits) for name in layers for bits in args.bits]
    figures = {each: _earlier(study, args, common, *each) for each in work}
    pending = {name for (name, _), done in figures.items() if done is None}
    chunks = {
        name: [chunk for _, chunk in wanted_parts(layer, args)]
        for name, layer in layers.items()
        if name in pending
    }
    images = session.calibration() if chunks else ()
    moments = second_moments(session.model, chunks, images, session.device)
    cli.print_result(header(study.kind))
    for name, bits in work:
        done = figures[name, bits]
        if done is None:
            done = layer_figures(study, args, name, layers[name], bits, moments[name])
            path = result_path(args, study, name, bits)
            write_result(path, common | {"layer": name, "bits": bits}, done)
        cli.print_result(table_row(done))
    draw(args.out, model_tag(args.model), args.model, list(find_layers(session.model)))


def _earlier(
    study: Study, args: argparse.Namespace, common: Mapping[str, Any], name: str, bits: int
) -> dict[str, Any] | None:
    path = result_path(args, study, name, bits)
    files.check_writable(path)
    return finished(path, {**common, "layer": name, "bits": bits}, args.restart)


def result_path(args: argparse.Namespace, study: Study, name: str, bits: int) -> Path:
    return args.out / f"{model_tag(args.model)}_{name}_{bits}_bits_{study.kind}.json"


def settings(study: Study, args: argparse.Namespace, session: Session) -> dict[str, Any]:
    """Everything that a layer's figures depend on."""
    names = (
        "model",
        "dataset",
        "nsamples",
        "opt_dim",
        "num_output_channels",
        "num_chunks",
        "method",
        "time_limit",
        "node_limit",
        *study.settings,
    )
    chosen = {name: getattr(args, name) for name in names}
    return chosen | {
        "image_size": session.data.image_size,
        "calibration_seed": args.seed,
        "weights": fingerprint(session.model),
    }


def fingerprint(model: nn.Module) -> str:
    """What tells one set of weights from another."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def chosen_layers(model: nn.Module, args: argparse.Namespace) -> dict[str, nn.Module]:
    """The layers that --layer-name names, or all."""
    layers = find_layers(model)
    for name in args.layer_name or ():
        if name not in layers:
            close = difflib.get_close_matches(name, layers, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(layers)}"
            raise UserError(f"--layer-name {name}: no such layer in {args.model}; {hint}")
    return {name: layers[name] for name in dict.fromkeys(args.layer_name or layers)}
