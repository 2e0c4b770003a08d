"""How many real subproblems are solved to proven optimality, how fast, and how near OBC comes.

    python -m benchmarks.bench_bounds --images cifar10 --out bench_bounds.json

For rn20 and rn18 with the weights in --data: from every layer, `--channels` output channels and
`--chunks` chunks of 32 inputs each, evenly spread, with the second moments of the layer's inputs on
`--nsamples` images (pruning_vs_quantization/layer_problem.py). At every bit width

* quantising: one grid for the layer, of least squared error; quantisation_search.closest
* pruning: a share of bits/16 kept; pruning_search.best_subset

each started from the heuristics (OBQ, GPTQ, nearest; ExactOBS, magnitude), limited to
`--time-limit` seconds on one core. The search alone is timed, as processor time of its thread, so
that other load on the machine does not count. Heuristics, the relaxation and compilation are
excluded.

Every result is checked, and the benchmark ends with an error otherwise: certified bound of the
semidefinite relaxation ≤ error of the solution, bound of the search ≤ that error, and that error ≤
the error of every heuristic. "Proven" means that the search's own bound is within 10⁻⁵ of the
error. A relaxation takes half a second, a hundred times as long as the search: `--relax-every N`
solves only that of every N-th subproblem, and the table says how many were solved.

Expected: milliseconds. 32 unknowns are few for lattice enumeration once the basis is reduced, and
for leaps and bounds, which becomes hard at 60 to 100 unknowns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not __package__:  # run by its path, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datautils import calibration_batches, load_data
from modelutils import find_layers, get_model
from obc.inputs import files
from obc.solver.layers import view
from obc.solver.progress import progress
from obc.toolkit import cli, records
from obc.toolkit.calibrate import prove_layers
from pruning_vs_quantization.layer_problem import (
    Subproblem,
    grid_steps,
    pruned,
    quantised,
    rows_and_chunks,
    second_moments,
    subproblems,
)
from pruning_vs_quantization.proof import PROVEN, SearchLimits

UNKNOWNS = 32
NETWORKS = {"rn20": ("rn20_cifar10.pth", 32), "rn18": ("rn18_cifar10_64px.pth", 64)}  # pixels
OWN = {"quantisation": "obq", "pruning": "exact_obs"}
RELATIVE_ROUNDING = 1e-9  # relative; errors are compared up to this


# -- subproblems -----------------------------------------------------------------------------------


def real_subproblems(
    args: argparse.Namespace, network: str
) -> Iterator[tuple[str, torch.nn.Module, Subproblem]]:
    """Subproblems of 32 unknowns of every layer: its name, the layer, the subproblem."""
    weights, size = NETWORKS[network]
    data = load_data(
        "cifar10", datapath=args.images, image_size=size, nsamples=args.nsamples, seed=args.seed
    )
    model = get_model(network, "cifar10", args.data / weights, len(data.classes))
    batches, cpu = calibration_batches(data, batchsize=16), torch.device("cpu")
    prove_layers(model, model, batches, cpu)
    layers = {name: x for name, x in find_layers(model).items() if not view(x).proof.flaw}
    rows_and_chunks_of = {
        name: [
            (row, chunk)
            for row, chunk in rows_and_chunks(layer, UNKNOWNS, args.channels, args.chunks)
            if chunk.stop - chunk.start == UNKNOWNS
        ]
        for name, layer in layers.items()
    }
    chunks = {
        name: [chunk for _, chunk in pairs] for name, pairs in rows_and_chunks_of.items() if pairs
    }
    moments = second_moments(model, chunks, batches, cpu)
    for name in chunks:
        for sub in subproblems(layers[name], rows_and_chunks_of[name], moments[name]):
            if sub.signal > 0:
                yield name, layers[name], sub


# -- one subproblem --------------------------------------------------------------------------------


def solved(
    args: argparse.Namespace,
    layer: torch.nn.Module,
    sub: Subproblem,
    bits: int,
    kind: str,
    method: str,  # both, or exact: without the relaxation
) -> dict[str, Any]:
    """Its record, checked."""
    limits = SearchLimits(args.time_limit)
    if kind == "pruning":
        record = pruned(sub.G, sub.w, bits, method, limits)
    else:
        step = float(grid_steps(layer.weight, bits)[sub.row])
        generator = np.random.default_rng([args.seed, bits, sub.row, sub.chunk.start])
        record = quantised(sub.G, sub.w, step, bits, False, method, limits, generator)
    least = min(record.errors.values())
    relaxed = record.relaxation or 0.0
    between = (
        relaxed <= record.error * (1 + RELATIVE_ROUNDING) <= least * (1 + 2 * RELATIVE_ROUNDING)
    )
    if not between or record.lower > record.error:
        raise ArithmeticError(f"{record}: error, bounds and heuristics are out of order")
    return {
        "kind": kind,
        "bits": bits,
        "row": sub.row,
        "start": sub.chunk.start,
        "proven": record.finished and record.lower >= record.error * (1 - PROVEN),
        "seconds": record.seconds,
        "nodes": record.nodes,
        "own_gap_db": decibels(record.errors[OWN[kind]] / record.error),
        "limit_gap_db": decibels(record.error / record.lower) if record.lower > 0 else None,
        "relaxation_gap_db": (decibels(record.error / relaxed) if relaxed > 0 else None),
    }


def decibels(ratio: float) -> float:
    return float(10 * np.log10(ratio))


# -- report ----------------------------------------------------------------------------------------

HEADER = """\
| | bits | subproblems | proven optimal | median s | 95th percentile s | worst s | nodes, median \
| nodes, worst | {own} below optimum, dB: mean | worst | relaxed \
| relaxation to optimum, dB: median |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def bounds_table(results: list[dict[str, Any]]) -> str:
    """A row per study and bit width."""
    lines = [HEADER.format(own="OBQ or ExactOBS")]
    for kind, bits in sorted({(r["kind"], -r["bits"]) for r in results}, reverse=True):
        part = [r for r in results if r["kind"] == kind and r["bits"] == -bits]
        seconds, nodes, gaps, relaxed = (
            np.array([r[key] for r in part if r[key] is not None])
            for key in ("seconds", "nodes", "own_gap_db", "relaxation_gap_db")
        )
        proven = sum(r["proven"] for r in part)
        lines.append(
            f"| {kind} | {-bits} | {len(part)} | {proven} ({100 * proven / len(part):.1f} %) "
            f"| {np.median(seconds):.4f} | {np.percentile(seconds, 95):.4f} "
            f"| {seconds.max():.3f} | {np.median(nodes):.0f} | {nodes.max()} "
            f"| {gaps.mean():.2f} | {gaps.max():.2f} | {len(relaxed)} "
            f"| {f'{np.median(relaxed):.2f}' if len(relaxed) else '–'} |"
        )
    return "\n".join(lines)


def comma_separated(results: list[dict[str, Any]]) -> list[str]:
    """A heading and a line per subproblem: a quarter of the size of JSON."""

    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    return [",".join(results[0]), *(",".join(map(text, one.values())) for one in results)]


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="bench_bounds.py", description=__doc__.splitlines()[0])
    add, positive = parser.add_argument, cli.positive_int
    text = "where the networks' weights are"
    add("--data", metavar="DIR", type=Path, default=Path("../shared/data"), help=text)
    add("--images", metavar="DIR", required=True, help="CIFAR-10: train/ and val/")
    add("--networks", choices=list(NETWORKS), nargs="+", default=list(NETWORKS), help="which")
    add("--bits", metavar="B", type=positive, nargs="+", default=[8, 4, 3, 2], help="bit widths")
    add("--channels", metavar="N", type=positive, default=2, help="output channels of each layer")
    add("--chunks", metavar="N", type=positive, default=3, help="chunks of each channel")
    text = "seconds on one core for a search"
    add("--time-limit", metavar="S", type=cli.positive_float, default=10.0, help=text)
    text = "solve the relaxation of every N-th subproblem"
    add("--relax-every", metavar="N", type=positive, default=1, help=text)
    add("--nsamples", metavar="N", type=positive, default=64, help="images")
    text = "seed of the choice of images"
    add("--seed", metavar="N", type=cli.nonnegative_int, default=0, help=text)
    add("--out", metavar="FILE", help="record of every subproblem, machine and versions, as JSON")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.out:
        files.check_writable(args.out)
    torch.set_num_threads(1)
    results = []
    for network in args.networks:
        work = list(real_subproblems(args, network))
        for name, layer, sub in progress(network, work):
            for kind in OWN:
                for bits in args.bits:
                    method = "exact" if len(results) % args.relax_every else "both"
                    record = solved(args, layer, sub, bits, kind, method)
                    results.append({"network": network, "layer": name, **record})
    cli.print_result(bounds_table(results))
    if args.out:
        content = comma_separated(results)
        records.write_run(args.out, "benchmarks/bench_bounds.py", vars(args), results=content)


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
