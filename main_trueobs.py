"""Compress a model with ExactOBS: `python main_trueobs.py MODEL DATASET MODE` (see --help).

OBC (arXiv 2208.11580). A run has four steps: the dense model sees the calibration images and the
Hessian of every layer is collected; each layer is compressed by its own Hessian, independently of
the others; the result is saved; and, for the modes that yield one model, its accuracy is measured.
What each mode does, and which options belong to it, is in the table of `obc/toolkit/modes.py`.

    quant, nmprune             one model                  → --save
    unstr, blocked, struct     a database of levels       → --sparse-dir
    … with --sparsity F        one model                  → --save

With --sequential the layers are not independent: each makes up for those before it. --skip, --only
and --first-last leave layers dense. Two words in place of a mode compress nothing:

    layers                     what each mode would do to each layer, and why not
    dense                      the accuracy of the dense model
"""

from __future__ import annotations

import obc.toolkit.starting  # noqa: F401  # isort: skip

import argparse
import copy
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from torch import nn

import quant
from modelutils import find_layers, other_weights
from obc.inputs import files
from obc.inputs.attention import layer_names, torch_names
from obc.inputs.batches import Batches
from obc.solver.errors import UserError, log
from obc.solver.layers import view
from obc.toolkit import cli, records
from obc.toolkit.calibrate import attach_activation_grids, calls_of_layers, prove_layers
from obc.toolkit.compress import Compression, compare, warn_of_doubtful_claims
from obc.toolkit.fingerprints import content_hash
from obc.toolkit.leveldb import (
    check_checkpoint,
    level_names,
    model_tag,
    origin_marks,
    stray_levels,
    write_levels,
)
from obc.toolkit.listing import listing
from obc.toolkit.modes import MODES, Mode, make_mode, mode_options
from obc.toolkit.planning import is_long, make_plan, plan_lines
from obc.toolkit.resume import RunState, SharedCache, open_state, state_folder
from obc.toolkit.selection import add_layer_options, check_ends, select_layers
from obc.toolkit.sequential import SequentialCompression
from obc.toolkit.session import (
    CommonOptions,
    Invocation,
    Session,
    common_options,
    default_rounds,
    dense_files,
    load_compressed,
    model_without_images,
)

LAYERS_BY_NAME = "layers by name (globs)"  # title of a group of options
REPORTS = {
    "layers": "a list of the layers, and what each mode would do",
    "dense": "the accuracy of the dense model",
}
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".th", ".safetensors")


# -- options ---------------------------------------------------------------------------------------


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="main_trueobs.py",
        usage="main_trueobs.py MODEL DATASET MODE [options]",
        description=__doc__.splitlines()[0],
    )
    for title in (
        cli.FIRST,
        LAYERS_BY_NAME,
        *(x.owners for x in mode_options().values()),
        cli.INPUTS,
    ):
        parser.group(title)  # in this order
    cli.add_common_options(parser)
    texts = {name: mode.text for name, mode in MODES.items()} | REPORTS
    parser.add_argument(
        "mode",
        metavar="MODE",
        choices=list(texts),
        help="; ".join(f"{name}: {text}" for name, text in texts.items()),
    )
    add = parser.group(cli.FIRST).add_argument
    add("--save", metavar="FILE", help="where modes that yield one model save it")
    add("--sparse-dir", metavar="DIR", help="folder for the database of the other modes (made)")
    add("--plan", action="store_true", help="print passes, memory and division of work, then stop")
    for option in mode_options().values():
        group = parser.group(cli.FIRST if option.first else option.owners)
        group.add_argument(option.flag, **option.arguments())
    add_layer_options(parser.group(LAYERS_BY_NAME))
    add = parser.group(cli.INPUTS).add_argument
    add("--load", metavar="FILE", help="compressed checkpoint to start from (zeros stay zero)")
    add = parser.group(cli.RUN).add_argument
    add("--cache", metavar="DIR", help="save calibrated Hessians here, for later runs to share")
    cli.add_damping_option(parser.group(cli.RUN))
    add(
        "--check",
        action="store_true",
        help="measure the squared error of every layer again, on calibration and on fresh images",
    )
    cli.add_shards_option(parser.group(cli.RUN))
    cli.add_resume_options(parser)
    return parser


def check_report_options(args: argparse.Namespace) -> None:
    """Raise a UserError for options that do not belong to what compresses nothing."""
    fitting = {"model", "dataset", "mode", *(item.name for item in fields(CommonOptions))}
    if args.mode == "layers":
        fitting |= {"skip", "only", "first_last", *mode_options()}
    for action in build_parser()._actions:
        given = getattr(args, action.dest, action.default) != action.default
        if given and action.dest not in fitting:
            raise UserError(f"{action.option_strings[0]} has no effect on {args.mode}")


def check_options(args: argparse.Namespace) -> Mode:
    """The mode with its options; fills in defaults. Raises UserError before any work is done."""
    mode = make_mode(args.mode, vars(args))
    vars(args).update(asdict(mode))
    check_ends(args.first_last, mode)
    if mode.sequential and args.cache:
        raise UserError("--sequential has no use for --cache: its Hessians fit one run only")
    args.nrounds = default_rounds(args)
    check_outputs(args, mode)
    check_inputs_stay(args, mode)
    if record := output_files(args.save, args.sparse_dir, model_tag(args.model))[0]:
        files.check_writable(record)
    return mode


def check_outputs(args: argparse.Namespace, mode: Mode) -> None:
    """Raise a UserError if what the mode yields cannot be saved where it is to go."""
    if args.save == "" or args.sparse_dir == "":
        raise UserError("--save and --sparse-dir need a name")
    if mode.yields_levels:
        if args.save:
            raise UserError(
                f"{mode.name} yields many models: name a --sparse-dir, not --save; "
                "or one level, by --sparsity"
            )
        if not args.sparse_dir:
            raise UserError(f"{mode.name} needs --sparse-dir DIR for its database")
        names = level_names(mode.sparsities)
        if stray := stray_levels(Path(args.sparse_dir), model_tag(args.model), names):
            raise UserError(
                f"{stray[0]} is a level of another grid: move it, or name another folder"
            )
    elif args.sparse_dir:
        raise UserError(f"{mode.name} yields one model: name --save FILE, not --sparse-dir")
    if args.save:
        if Path(args.save).suffix not in CHECKPOINT_SUFFIXES:
            raise UserError(f"--save {args.save}: name a file in {' '.join(CHECKPOINT_SUFFIXES)}")
        files.check_writable(args.save)


def check_inputs_stay(args: argparse.Namespace, mode: Mode) -> None:
    """Raise a UserError if what is saved would overwrite what the run starts from."""
    inputs = {"--load": args.load, **dense_files(args.model, args.dataset, args.weights)}
    if args.save:
        files.check_keeps("--save", args.save, inputs)
    elif args.sparse_dir:
        folder, tag = Path(args.sparse_dir), model_tag(args.model)
        for name in level_names(mode.sparsities):
            files.check_keeps("--sparse-dir: level", folder / f"{tag}_{name}.pth", inputs)


def output_files(
    save: str | None, sparse_dir: str | None, tag: str
) -> tuple[Path | None, Path | None]:
    """The record of a run and the folder of its finished layers, next to its output if any."""
    if sparse_dir:
        return Path(sparse_dir) / f"{tag}.json", Path(sparse_dir) / f".{tag}.partial"
    return (Path(save).with_suffix(".json"), state_folder(save)) if save else (None, None)


# -- the command -----------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    report(args) if args.mode in REPORTS else compress_model(args)


def compress_model(args: argparse.Namespace) -> None:
    """Compress a model, layer by layer; save it, and measure it if it is one."""
    mode = check_options(args)
    started = time.perf_counter()
    session = Session.of(common_options(args))
    world = session.world
    args.shards = session.shard_count(args.shards)
    mode = select_layers(session.model, mode, vars(args), session.task.example)
    dense, compressed = session.model, start_model(session, args.load, mode)
    origin = origin_marks(dense)
    start = {"--load": content_hash(compressed.state_dict())} if args.load else {}
    invocation = Invocation.of(build_parser(), args)
    marks = session.fingerprint(invocation, start, threads=False)
    batches = session.calibration(augment=not args.noaug, nrounds=args.nrounds)
    prove_layers(dense, compressed, batches, session.device)
    show_plan(session, compressed, mode, asked=args.plan)
    if args.plan:
        return world.leave()
    dense = with_grids(dense, compressed, mode.activation_grids(dense, batches, session.device))
    record, folder = output_files(args.save, args.sparse_dir, model_tag(args.model))
    uses_cache = args.cache and not mode.nothing_to_solve
    with (
        open_state(folder, marks, args.restart, world) as state,
        open_cache(args.cache, session, args.shards) if uses_cache else RunState() as cache,
    ):
        dense_figures = session.dense_figures()
        compression = (SequentialCompression if mode.sequential else Compression)(
            dense,
            compressed,
            mode,
            state,
            cache,
            levels_folder=folder if mode.yields_levels else None,
            rel_damp=args.rel_damp,
            memory_gb=args.memory,
            shards=args.shards,
            repeats=args.nrounds if args.noaug else 1,
            keep_results=args.check,
            world=world,
        )
        layers = compress(session, compression, batches)
        save(compression, args, origin)
        evaluation = None if mode.yields_levels else session.evaluation(compressed)
        if record:
            records.write_run(
                record,
                invocation.command,
                invocation.arguments,
                fingerprint=marks,
                seconds=time.perf_counter() - started,
                **(evaluation.record() if evaluation else {"top1": None}),
                **session.task.record(),
                **dense_figures,
                layers=layers,
            )
        state.finish()
    warn_of_doubtful_claims(compression, layers, session.task, not args.noaug)
    if evaluation:
        cli.print_result(str(evaluation))
    world.leave()


def with_grids(
    dense: nn.Module,
    compressed: nn.Module,  # gets the grids
    grids: Mapping[str, quant.Grid],  # of layers' inputs; of none in most modes
) -> nn.Module:
    """The dense model with the same grids: a copy, since the session's one rounds nothing."""
    if not grids:
        return dense
    dense = copy.deepcopy(dense)
    for model in (dense, compressed):
        attach_activation_grids(model, grids)
    return dense


def report(args: argparse.Namespace) -> None:
    """List the layers of the dense model, or measure it."""
    check_report_options(args)
    options = common_options(args)
    if args.mode == "layers":
        model, image_shape = model_without_images(options)
        for line in listing(model, vars(args), image_shape):
            cli.print_result(line)
    else:
        session = Session.of(options)
        session.dense_figures()
        cli.print_result(str(session.evaluation(session.model)))
        session.world.leave()


def open_cache(folder: str, session: Session, shards: int) -> SharedCache:
    """Where Hessians are saved for runs with the same images and the same activation grids."""
    names = ("seed", "nrounds", "noaug", "batchsize")
    contents = {name: str(getattr(session.options, name)) for name in names}
    contents["shards"] = str(shards)
    return SharedCache(folder, session.fingerprint(None, contents, threads=False))


def start_model(session: Session, path: str | None, mode: Mode) -> nn.Module:
    """The model to compress: a copy of the dense one, or what the checkpoint of --load holds."""
    compressed = copy.deepcopy(session.model)
    if path:
        state = load_compressed(compressed, path)
        quantised = any(f".{quant.WEIGHT_GRID}." in key for key in state)
        if quantised and not mode.nothing_to_solve:
            raise UserError(
                f"{path}: its weights are quantised already: start from one before that "
                "(prune first, then quantise once)"
            )
        check_checkpoint(path, session.model, session.weights_name)
    return compressed


def show_plan(session: Session, compressed: nn.Module, mode: Mode, asked: bool) -> None:
    """Print the plan if asked for it; log that of a long run."""
    layers, options = find_layers(compressed), session.options
    images = options.nrounds * session.task.count
    if asked or is_long(layers, images):
        plan = make_plan(layers, mode, options.memory, session.world)
        calls = calls_of_layers(session.model, session.task.example)
        for line in plan_lines(plan, layers, mode, calls, session.world):
            cli.print_result(line) if asked else log.info(line)


def compress(
    session: Session, compression: Compression, batches: Batches
) -> list[dict]:  # a report per layer, for the record
    """Compress all layers and, for --check, measure their squared errors again."""
    compressed, mode = compression.compressed, compression.mode
    report_other_weights(compressed)
    for line in mode.advice(find_layers(compressed)):
        log.warning(line)
    if reason := mode.nothing_to_solve:
        log.info(reason)
        for name, layer in find_layers(compressed).items():
            if reason := view(layer).left_dense:
                log.info("%s left dense: %s", name, reason)
        if mode.sequential:
            compression.fit_grids(batches)
        return []
    if mode.yields_levels and not compression.levels_folder.is_dir():
        raise UserError(f"{compression.levels_folder.parent}: all processes must share this folder")
    reports = [asdict(report) for report in compression.run(batches)]
    if compression.keep_results:
        check(session, compression, batches, reports)
    return reports


def check(
    session: Session, compression: Compression, batches: Batches, reports: list[dict]
) -> None:
    """Measure the squared errors of all layers again, and note them in the reports."""
    other, images = session.task.fresh(session.options.seed) or (None, "no others")
    log.info("checking on the calibration images and on %s", images)
    errors, fresh_errors = compression.measured_errors(batches), dict[str, float]()
    if other is not None:
        fresh = other.batches(augment=not session.options.noaug)
        fresh_errors = compression.measured_errors(fresh)
    for report in reports:
        if (name := report["name"]) in errors:
            report["checked_error"], fresh_error = errors[name], fresh_errors.get(name)
            report |= {} if fresh_error is None else {"fresh_error": fresh_error}
            compare(name, report["squared_error"], errors[name], fresh_error)


def save(compression: Compression, args: argparse.Namespace, origin: dict[str, str]) -> None:
    """Write the model, or the database of its levels."""
    if compression.mode.yields_levels and compression.world.first:
        write_database(compression, Path(args.sparse_dir), model_tag(args.model), origin)
    if args.save:
        files.save_checkpoint(compression.compressed.state_dict(), args.save, origin)


def write_database(
    compression: Compression, folder: Path, tag: str, origin: dict[str, str]
) -> None:
    """Write the checkpoints of all levels; layers that were left dense are in them as they are."""
    reports = compression.reports
    made = {name: compression.level_file(name) for name in reports if not reports[name].dense}
    model = compression.compressed
    state, named = layer_names(model.state_dict(), model), partial(torch_names, model=model)
    levels = write_levels(folder, tag, compression.mode.sparsities, state, made, origin, named)
    cli.print_result(f"{len(levels)} levels in {folder}")


def report_other_weights(model: nn.Module) -> None:
    """Log which weights are in no layer that can be compressed, and so stay dense."""
    if others := other_weights(model):
        share = sum(others.values()) / sum(p.numel() for p in model.parameters())
        first, more = list(others)[:3], f" and {len(others) - 3} more" if len(others) > 3 else ""
        log.info(
            "left dense, in no layer to compress: %s%s (%.2g %% of all parameters)",
            ", ".join(first),
            more,
            100 * share,
        )


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, records.repeated(build_parser, argv))


if __name__ == "__main__":
    sys.exit(main())
