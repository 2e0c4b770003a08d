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

import obc.toolkit.starting  # noqa: F401  # isort: skip

import argparse
import copy
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import quant
from modelutils import find_layers, other_weights
from obc.inputs import files
from obc.inputs.batches import Batches
from obc.solver.errors import UserError, log
from obc.solver.levels import sparsity_grid
from obc.toolkit import cli, records
from obc.toolkit.calibrate import activation_grids, attach_activation_grids
from obc.toolkit.checking import compare, fresh_images, measured_errors
from obc.toolkit.compress import Compression, Database
from obc.toolkit.fingerprints import content_hash
from obc.toolkit.leveldb import level_names, model_tag, stray_levels, write_levels
from obc.toolkit.planning import show_plan
from obc.toolkit.resume import RunState, SharedCache, open_state, state_folder
from obc.toolkit.session import Session, load_compressed
from obc.toolkit.task import Task

NO_QUANTISATION = 32  # bits
CALIBRATION_OPTIONS = ("seed", "nrounds", "noaug", "batchsize", "shards")
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
    cli.add_resume_options(parser)
    parser.add_argument(
        "mode",
        metavar="MODE",
        choices=["quant", "nmprune", *SPARSITY_GRIDS],
        help="quant, nmprune, unstr, struct or blocked",
    )
    add = parser.add_argument
    add("--load", metavar="FILE", help="compressed checkpoint to start from (zeros stay zero)")
    add("--save", metavar="FILE", help="where quant and nmprune save the compressed model")
    add(
        "--shards",
        metavar="N",
        type=cli.positive_int,
        help="sum Hessians as N processes of torchrun would (default: as many as there are)",
    )
    add("--plan", action="store_true", help="print what the run needs and how long it takes; stop")
    add(
        "--rel-damp",
        metavar="F",
        type=cli.nonnegative_float,
        default=0.0,
        help="fraction of mean(diag H) added to the diagonal of H",
    )
    add("--cache", metavar="DIR", help="keep calibrated Hessians here, for later runs to share")
    add(
        "--check",
        action="store_true",
        help="measure every layer's squared error again, on calibration and on fresh images",
    )
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
        files.check_writable(args.save)
    if record := record_file(args):
        files.check_writable(record)


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
    world = session.world
    if args.shards and world.size not in (1, args.shards):
        raise UserError(f"--shards {args.shards}: {world.size} processes make as many")
    args.shards = args.shards or world.size  # sums depend on it, by rounding
    dense, compressed = session.model, load_start(args, session.model)
    start = {"--load": content_hash(compressed.state_dict())} if args.load else {}
    marks = session.fingerprint(build_parser(), start, threads=False)
    records.check_repeat(args.repeat, marks)
    batches = session.calibration(augment=not args.noaug, nrounds=args.nrounds)
    folder = partial_folder(args)
    if show_plan(session, compressed, task_of(args), folder and folder.parent) and args.plan:
        return world.leave()
    if args.mode == "quant" and args.abits < NO_QUANTISATION:
        images = next(iter(batches))[0].to(session.device)
        grids = activation_grids(dense, images, args.abits, args.asym, not args.aminmax)
        for model in (dense, compressed):
            attach_activation_grids(model, grids)
    with open_state(folder, marks, args.restart, world) if folder else RunState() as state:
        figures = compress(session, compressed, batches, state)
        if args.save:
            files.save_checkpoint(compressed.state_dict(), args.save)
        accuracy = None if args.sparse_dir else session.accuracy(compressed)
        if record := record_file(args):
            seconds = time.perf_counter() - started
            records.write_run(
                record,
                "main_trueobs.py",
                vars(args),
                fingerprint=marks,
                seconds=seconds,
                top1=accuracy,
                **figures,
            )
        state.finish()
    if accuracy is not None:
        cli.print_result(f"top-1 {accuracy:.2f}")
    world.leave()


def partial_folder(args: argparse.Namespace) -> Path | None:
    """Where finished layers are kept: beside the output, if there is to be one."""
    if args.sparse_dir:
        return Path(args.sparse_dir) / f".{model_tag(args.model)}.partial"
    return state_folder(args.save) if args.save else None


def open_cache(session: Session) -> RunState:
    """Where calibrated Hessians are kept: a folder for each calibration, below --cache."""
    args = session.args
    if not args.cache:
        return RunState()
    options = {name: str(getattr(args, name)) for name in CALIBRATION_OPTIONS}
    marks = session.fingerprint(None, options, threads=False)  # of dense with activation grids
    return SharedCache(args.cache, marks)


def compress(
    session: Session,
    compressed: nn.Module,  # in place
    batches: Batches,
    state: RunState,
) -> dict[str, Any]:
    """All layers, in place or as levels into --sparse-dir; figures for the record."""
    args, world, database = session.args, session.world, None
    tell_other_weights(compressed)
    if args.mode == "quant" and args.wbits == NO_QUANTISATION:
        log.info("weights left as they are (--wbits 32); activations: %d bits", args.abits)
        return {"layers": []}
    if args.mode in SPARSITY_GRIDS:
        grid = sparsity_grid(args.min_sparsity, args.max_sparsity, args.delta_sparse)
        database = Database(grid, partial_folder(args))
        if not database.folder.is_dir():
            raise UserError(f"{args.sparse_dir}: has to be a folder that all processes share")
    before = {
        name: layer.weight.detach().clone()
        for name, layer in find_layers(compressed).items()
        if args.check
    }
    with open_cache(session) as cache:
        task = Compression(session.model, compressed, args, state, cache, database, world)
        layers = [asdict(report) for report in task.run(batches)]
    if args.check:
        check(
            session,
            batches,
            layers,
            {
                name: before[name] - weight.to(session.device)
                for name, weight in task.results.items()
            },
        )
    if database and world.first:
        made = {
            name: database.file(name, layer.weight)
            for name, layer in find_layers(compressed).items()
            if not task.reports[name].dense
        }
        tag, folder = model_tag(args.model), Path(args.sparse_dir)
        files = write_levels(folder, tag, database.sparsities, compressed.state_dict(), made)
        cli.print_result(f"{len(files)} levels in {args.sparse_dir}")
    return {"layers": layers}


def tell_other_weights(model: nn.Module) -> None:
    """Say what is in no convolution of two dimensions and in no linear layer, and stays dense."""
    if others := other_weights(model):
        share = sum(others.values()) / sum(p.numel() for p in model.parameters())
        first, more = next(iter(others)), f" and {len(others) - 1} more" if len(others) > 1 else ""
        log.info(
            "left dense, in no Conv2d or Linear: %s%s (%.2g %% of all parameters)",
            first,
            more,
            100 * share,
        )


def check(
    session: Session,
    batches: Batches,
    layers: list[dict[str, Any]],  # reports, which get two figures more
    changes: dict[str, Tensor],  # layer → W − Ŵ
) -> None:
    """Measure all squared errors again, on the calibration images and on fresh ones."""
    args = session.args
    data, what = fresh_images(session.data, args.seed)
    others = replace(session, data=data).calibration(augment=not args.noaug)
    log.info("checking on the calibration images and on %s", what)
    measured, fresh = (
        measured_errors(session.model, changes, images, session.device)
        for images in (batches, others)
    )
    for report in layers:
        if (name := report["name"]) in changes:
            report["checked_error"], report["fresh_error"] = measured[name], fresh[name]
            compare(name, report["squared_error"], measured[name], fresh[name])


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, records.repeated(build_parser, argv))


if __name__ == "__main__":
    sys.exit(main())
