"""Compress a model with ExactOBS: `python main_trueobs.py MODEL DATASET MODE` (see --help).

OBC (arXiv 2208.11580). One run has four steps: the dense model sees the calibration images and
every layer's Hessian is collected; each layer is compressed by its own Hessian, apart from all
others; the result is saved; and, for the modes that yield one model, its accuracy is measured.

    quant     OBQ, weights and, with --abits, activations       → one model
    nmprune   N:M sparsity along input channels                  → one model
    unstr     unstructured sparsity, a database of levels       → --sparse-dir
    blocked   sparsity in blocks along input channels, levels   → --sparse-dir
    struct    whole input channels, levels                      → --sparse-dir
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import cli
import quant
from batches import Batches
from calibration import activation_grids, attach_activation_grids, calibrate
from cli import UserError, log
from database import LevelWriter, level_names, model_tag, stray_levels
from distributed import ALONE, World
from hessian import SingularHessian
from levels import sparsity_grid
from modelutils import find_layers, share_layers
from planning import Plan, Task, make_plan, show_plan
from records import write_run
from session import Session, load_compressed
from trueobs import TrueOBS

NO_QUANTISATION = 32  # bits
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".th", ".safetensors")
SPARSITY_GRIDS = {  # min, max, delta (DESIGN.md section 3)
    "unstr": (0.0, 0.99, 0.1),
    "blocked": (0.0, 0.95, 0.1),
    "struct": (0.0, 0.9, 0.05),
}


# -- options ---------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="main_trueobs.py", description=__doc__.splitlines()[0])
    cli.add_common_options(parser)
    parser.add_argument(
        "mode", metavar="MODE", choices=["quant", "nmprune", *SPARSITY_GRIDS],
        help="quant, nmprune, unstr, struct or blocked",
    )  # fmt: skip
    add = parser.add_argument
    add("--load", metavar="FILE", help="compressed checkpoint to start from (zeros stay zero)")
    add("--save", metavar="FILE", help="where quant and nmprune save the compressed model")
    add("--shards", metavar="N", type=cli.positive_int,
        help="sum Hessians as N processes of torchrun would (default: as many as there are)")
    add("--plan", action="store_true", help="print what the run needs and how long it takes; stop")
    add("--rel-damp", metavar="F", type=cli.nonnegative_float, default=0.0,
        help="fraction of mean(diag H) added to the diagonal of H")  # fmt: skip
    group = parser.add_argument_group("quant")
    group.add_argument("--wbits", type=cli.bits, default=32, help="bits of weights, 1-16; 32: none")
    group.add_argument("--abits", type=cli.bits, default=32, help="bits of activations; 32: none")
    for flag, text in (
        ("--wperweight", "one weight scale per layer instead of per output channel"),
        ("--wasym", "asymmetric weight grid"),
        ("--wminmax", "min-max weight range instead of the search"),
        ("--asym", "symmetric activation grid (a-sym)"),
        ("--aminmax", "min-max activation range instead of the search"),
    ):
        group.add_argument(flag, action="store_true", help=text)
    group = parser.add_argument_group("nmprune and blocked")
    group.add_argument("--prunen", type=cli.nonnegative_int, default=2, help="zeros per group")
    group.add_argument("--prunem", type=cli.positive_int, default=4, help="weights per group")
    group.add_argument("--blocked_size", type=cli.positive_int, default=4, help="weights per block")
    group = parser.add_argument_group("unstr, blocked and struct")
    for flag, text in (
        ("--min-sparsity", "fraction of zeros at the first level (default: 0)"),
        ("--max-sparsity", "at the last level (default: 0.99; blocked 0.95, struct 0.9)"),
        ("--delta-sparse", "by which density shrinks per level (default: 0.1; struct 0.05)"),
    ):
        group.add_argument(flag, metavar="F", type=cli.fraction, help=text)
    group.add_argument("--sparse-dir", metavar="DIR", help="folder for the database (made)")
    return parser


OPTIONS_OF = {
    "quant": ("wbits", "abits", "wperweight", "wasym", "wminmax", "asym", "aminmax"),
    "nmprune": ("prunen", "prunem"),
    "blocked": ("blocked_size",),
    "unstr, blocked and struct": ("min_sparsity", "max_sparsity", "delta_sparse"),
}


def check_options(args: argparse.Namespace) -> None:
    """What argparse cannot see by itself; raises UserError before any work is done."""
    check_belonging(args)
    if args.mode == "quant" and args.wbits == args.abits == NO_QUANTISATION:
        raise UserError("quant needs --wbits or --abits below 32")
    if args.prunen > args.prunem:
        raise UserError(f"--prunen {args.prunen} is more than --prunem {args.prunem}")
    if args.mode in SPARSITY_GRIDS:
        fill_sparsity_grid(args)
    args.nrounds = args.nrounds or (1 if args.noaug else 10)
    if args.save:
        if Path(args.save).suffix not in CHECKPOINT_SUFFIXES:
            raise UserError(f"--save {args.save}: name a file in {' '.join(CHECKPOINT_SUFFIXES)}")
        cli.check_writable(args.save)
    if record := record_file(args):
        cli.check_writable(record)


def check_belonging(args: argparse.Namespace) -> None:
    """Raise a UserError for an option of another mode: nothing is skipped in silence."""
    parser = build_parser()
    for mode, options in OPTIONS_OF.items():
        for option in options:
            if args.mode not in mode and getattr(args, option) != parser.get_default(option):
                flag = "--" + (option if option == "blocked_size" else option.replace("_", "-"))
                raise UserError(f"{flag} belongs to {mode}, not to {args.mode}")
    if args.save == "" or args.sparse_dir == "":
        raise UserError("--save and --sparse-dir need a name")
    if args.mode in SPARSITY_GRIDS:
        if args.save:
            raise UserError(f"{args.mode} yields many models: name a --sparse-dir, not --save")
        if not args.sparse_dir:
            raise UserError(f"{args.mode} needs --sparse-dir DIR for its database")
    elif args.sparse_dir:
        raise UserError(f"{args.mode} yields one model: name --save FILE, not --sparse-dir")


def fill_sparsity_grid(args: argparse.Namespace) -> None:
    """The mode's own grid, where none is given; raises UserError if it is no grid."""
    default = SPARSITY_GRIDS[args.mode]
    given = (args.min_sparsity, args.max_sparsity, args.delta_sparse)
    low, high, delta = (d if g is None else g for d, g in zip(default, given, strict=True))
    if low > high:
        raise UserError(f"--min-sparsity {low:g} is above --max-sparsity {high:g}")
    if delta == 0:
        raise UserError("--delta-sparse must be above 0")
    args.min_sparsity, args.max_sparsity, args.delta_sparse = low, high, delta
    names = level_names(sparsity_grid(low, high, delta))
    others = stray_levels(Path(args.sparse_dir), model_tag(args.model), names)
    if others:
        raise UserError(f"{others[0]} is a level of another grid: move it, or name another folder")


def record_file(args: argparse.Namespace) -> Path | None:
    """Where the record of a run goes: beside its output."""
    if args.sparse_dir:
        return Path(args.sparse_dir) / f"{model_tag(args.model)}.json"
    return Path(args.save).with_suffix(".json") if args.save else None


def task_of(args: argparse.Namespace) -> Task:
    """What there is to do, for the plan."""
    grid = (args.min_sparsity, args.max_sparsity, args.delta_sparse)
    return Task.of(args, len(sparsity_grid(*grid)) if args.mode in SPARSITY_GRIDS else 0)


# -- compression -----------------------------------------------------------------------------------


@dataclass
class LayerReport:
    """What became of a layer; a line in the log and an entry in the record."""

    name: str
    shape: tuple[int, ...]
    result: str = ""  # e.g. "4 bits", "sparsity 0.5000"; why, if left dense
    dense: bool = False
    seconds: float = 0.0
    squared_error: float = 0.0  # Σ (w−ŵ)H(w−ŵ)ᵀ/2
    relative_error: float = 0.0  # the same, relative to Σ wHwᵀ/2
    damping: float = 0.0  # × mean(diag H)
    rank_deficit: int = 0

    def line(self) -> str:
        shape = "×".join(map(str, self.shape))
        if self.dense:
            return f"{self.name} {shape} left dense: {self.result}"
        text = (
            f"{self.name} {shape} {self.seconds:.2f} s  squared error {self.squared_error:.4g} "
            f"({100 * self.relative_error:.3g} %)  {self.result}"
        )
        if self.damping:
            text += f"  damping {self.damping:g}"
        if self.rank_deficit:
            text += f"  rank deficit {self.rank_deficit}"
        return text


def why_dense(solver: TrueOBS, args: argparse.Namespace) -> str:
    """The reason to leave a layer as it is, or nothing."""
    size = {"nmprune": args.prunem, "blocked": args.blocked_size}.get(args.mode, 1)
    if solver.columns % size:
        letter = "M" if args.mode == "nmprune" else "block size"
        return f"{solver.columns} columns are not a multiple of {letter} = {size}"
    if solver.nsamples == 0:
        return "it saw no calibration image (the model does not call it)"
    return ""


def quantise_layer(solver: TrueOBS, args: argparse.Namespace) -> str:
    weight = solver.layer.weight.detach().flatten(1)
    solver.quantizer = quant.fit_weight_grid(
        weight, args.wbits, not args.wasym, not args.wminmax, not args.wperweight
    )
    solver.quantize()
    quant.set_weight_grid(solver.layer, solver.quantizer)
    return f"{args.wbits} bits"


def nmprune_layer(solver: TrueOBS, args: argparse.Namespace) -> str:
    solver.nmprune(args.prunen, args.prunem)
    return f"sparsity {sparsity(solver.layer.weight):.4f} ({args.prunen}:{args.prunem})"


def write_levels(
    name: str, solver: TrueOBS, args: argparse.Namespace, writer: LevelWriter
) -> Tensor:
    """Write the layer's weights at all levels, a few rows at a time; those at the last level."""
    if args.mode == "unstr":
        solver.prepare_unstr()
    elif args.mode == "blocked":
        solver.prepare_blocked(args.blocked_size)
    else:
        solver.prepare_struct(size=solver.layer.weight[0, 0].numel())
    file = writer.file(name, solver.layer.weight)
    for rows, weights in solver.level_parts(writer.sparsities):
        file.write(rows, weights)
    solver.world.meet()
    return file.read(len(writer.sparsities) - 1).to(solver.layer.weight.device)


def sparsity(weight: Tensor) -> float:
    return float((weight == 0).float().mean())


def compress_layer(
    name: str, solver: TrueOBS, args: argparse.Namespace, writer: LevelWriter | None
) -> LayerReport:
    """Compress one layer in place, or write all its levels; its report, logged."""
    report = LayerReport(name, tuple(solver.layer.weight.shape), why_dense(solver, args))
    report.dense = bool(report.result)
    if not report.dense:
        before = solver.layer.weight.detach().clone()
        started = time.perf_counter()
        if writer is None:
            method = quantise_layer if args.mode == "quant" else nmprune_layer
            report.result = method(solver, args)
            after = solver.layer.weight.detach()
        else:
            after = write_levels(name, solver, args, writer)
            levels = len(writer.sparsities)
            report.result = f"{levels} levels to sparsity {sparsity(after):.4f}"
        report.seconds = time.perf_counter() - started
        report.squared_error = solver.squared_error(after, before)
        energy = solver.squared_error(torch.zeros_like(before), before)
        report.relative_error = report.squared_error / energy if energy else 0.0
        report.damping, report.rank_deficit = solver.damping, solver.rank_deficit
    solver.free()
    if solver.world.first:
        log.info(report.line())
    return report


def compress(
    dense: nn.Module,
    compressed: nn.Module,
    batches: Batches,
    args: argparse.Namespace,
    writer: LevelWriter | None = None,
    world: World = ALONE,
) -> list[LayerReport]:
    """Calibrate and compress all layers, in as many passes over the images as memory asks for.

    Of several processes, each does its share; all of them have the result.
    """
    layers, reports = find_layers(compressed), {}
    plan = make_plan(layers, task_of(args), args.memory, world)
    for number, names in enumerate(plan.passes, 1):
        if (count := len(plan.passes)) > 1:
            log.info("pass %d of %d over the images: %d layers", number, count, len(names))
        solvers = {
            name: TrueOBS(layers[name], args.rel_damp, plan.memory, plan.sharing(name, world))
            for name in names
        }
        device = next(dense.parameters()).device
        calibrate(dense, solvers, batches, device, world, args.shards or 1)
        reports |= compress_pass(plan, solvers, args, writer, world)
    reports = [reports[name] for name in layers]
    if all(report.dense for report in reports):
        raise UserError(f"{args.model}: no layer can be compressed; {reports[0].line()}")
    if writer is not None:
        writer.layers = [report.name for report in reports if not report.dense]
    return reports


def compress_pass(
    plan: Plan, solvers: dict[str, TrueOBS], args: argparse.Namespace, writer: LevelWriter | None,
    world: World,
) -> dict[str, LayerReport]:  # fmt: skip
    """Compress the layers of `solvers`, which it empties: this process those that are its own."""
    done, layers = {}, {name: solver.layer for name, solver in solvers.items()}
    for name in sorted(layers, key=lambda name: plan.owners[name] is not None):
        solver = solvers.pop(name)
        solver.memory = plan.memory - sum(plan.needs[other].sums for other in solvers)
        if plan.owners[name] in (None, world.rank):
            try:
                done[name] = compress_layer(name, solver, args, writer)
            except (SingularHessian, ArithmeticError) as error:
                raise UserError(f"{name}: {error}") from error
    share_layers(layers, [name for name in done if plan.owners[name] is not None], world)
    reports = dict(done)
    for report in (one for theirs in world.gather(done) for one in theirs.values()):
        if report.name not in reports:
            log.info(report.line())
        reports.setdefault(report.name, report)
    return reports


# -- the command -----------------------------------------------------------------------------------


def load_start(args: argparse.Namespace, dense: nn.Module) -> nn.Module:
    """The model to compress: a copy of the dense one, or what --load holds."""
    compressed = copy.deepcopy(dense)
    if args.load:
        state = load_compressed(compressed, args.load)
        if args.mode != "quant" and any(f".{quant.WEIGHT_GRID}." in key for key in state):
            raise UserError(f"{args.load}: its weights are quantised; prune first, then quantise")
    return compressed


def run(args: argparse.Namespace) -> None:
    check_options(args)
    started = time.perf_counter()
    session = Session.of(args)
    if args.shards and session.world.size not in (1, args.shards):
        raise UserError(f"--shards {args.shards}: {session.world.size} processes make as many")
    dense, compressed = session.model, load_start(args, session.model)
    batches = session.calibration(augment=not args.noaug, nrounds=args.nrounds)
    if show_plan(session, compressed, task_of(args)) and args.plan:
        return session.world.leave()
    if args.mode == "quant" and args.abits < NO_QUANTISATION:
        images = next(iter(batches))[0].to(session.device)
        grids = activation_grids(dense, images, args.abits, args.asym, not args.aminmax)
        for model in (dense, compressed):
            attach_activation_grids(model, grids)
    if args.mode in SPARSITY_GRIDS:
        reports, accuracy = make_database(args, session, compressed, batches), None
    else:
        reports = []
        if args.mode != "quant" or args.wbits < NO_QUANTISATION:
            reports = compress(dense, compressed, batches, args, world=session.world)
        else:
            log.info("weights left as they are (--wbits 32); activations: %d bits", args.abits)
        if args.save:
            cli.save_checkpoint(compressed.state_dict(), args.save)
        accuracy = session.accuracy(compressed)
    if record := record_file(args):
        seconds = time.perf_counter() - started
        layers = [asdict(report) for report in reports]
        write_run(record, "main_trueobs.py", args, seconds=seconds, top1=accuracy, layers=layers)
    if accuracy is not None:
        cli.print_result(f"top-1 {accuracy:.2f}")
    session.world.leave()


def make_database(
    args: argparse.Namespace, session: Session, compressed: nn.Module, batches: Batches
) -> list[LayerReport]:
    """All layers at all levels of the sparsity grid, into --sparse-dir."""
    grid = sparsity_grid(args.min_sparsity, args.max_sparsity, args.delta_sparse)
    writer = LevelWriter(Path(args.sparse_dir), model_tag(args.model), grid, session.world)
    try:
        reports = compress(session.model, compressed, batches, args, writer, session.world)
        files = writer.finish(compressed.state_dict())
    finally:
        writer.discard()
    cli.print_result(f"{len(files)} levels in {args.sparse_dir}")
    return reports


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
