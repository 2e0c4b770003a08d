"""Correct a compressed model: `python post_proc.py MODEL DATASET FILE` (see --help).

FILE is a checkpoint saved by main_trueobs.py or, with --database, a profile to stitch. The
requested corrections are made, always in this order; then the model is saved and its accuracy
measured.

    --resolve    all layers solved anew, one after the other        resolving.py
    --gap        outputs of all layers back to the dense model's    training.py
    --bnt        running statistics of batch norms                  corrections.py
    --statcorr   mean and deviation of norm outputs                 corrections.py
    --lintune    biases and norms trained on the logits             training.py
    --finetune   all parameters trained on the labels               training.py

Why this order. Solving anew replaces all weights: it comes before whatever corrects them. Global
AdaPrune aims at the dense model's outputs before the norms, for which the dense statistics, still
present in the norms, are the right ones: it follows at once. Statistics are collected after that;
the correction follows the tuning, because tuning would replace the statistics that the correction
was folded for. Training on logits or labels comes last and starts from good statistics: it keeps
them fixed, so changing them afterwards would undo what was learned.

A training epoch is one pass over the calibration images, in a new order and, unless --noaug, with
new augmentation. Statistics correction takes the first N of them, never augmented.
"""

from __future__ import annotations

import obc.toolkit.starting  # noqa: F401  # isort: skip

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from modelutils import find_layers, first_and_last
from obc.inputs import files
from obc.inputs.tasks import Task
from obc.solver.errors import UserError, log
from obc.toolkit import cli, records
from obc.toolkit.calibrate import prove_layers
from obc.toolkit.compress import warn_of_doubtful_claims
from obc.toolkit.corrections import batchnorm_tune, statistics_correction
from obc.toolkit.fingerprints import bytes_hash, content_hash
from obc.toolkit.leveldb import Database, check_checkpoint, model_tag, origin_marks
from obc.toolkit.modes import Mode
from obc.toolkit.profiles import read_profile
from obc.toolkit.resolving import ResolveMode, modes_of
from obc.toolkit.resume import RunState, open_state, state_folder
from obc.toolkit.selection import skipped
from obc.toolkit.sequential import SequentialCompression
from obc.toolkit.session import (
    Invocation,
    Session,
    common_options,
    default_rounds,
    dense_files,
    load_compressed,
)
from obc.toolkit.stitching import add_file_options, stitched
from obc.toolkit.training import TrainingTask, finetune, global_adaprune, train_vectors
from quant import put_layer

DEPENDENT = {  # option: the option that it requires
    "statcorr_samples": "statcorr",
    "lintune_loss": "lintune",
    "finetune_mse": "finetune",
    "prefix": "database",
    "resolve": "database",
    "remask": "resolve",
    "rel_damp": "resolve",
    "shards": "resolve",
}


# -- options ---------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="post_proc.py", description=__doc__.splitlines()[0])
    cli.add_common_options(parser)
    cli.add_resume_options(parser)
    add_file_options(parser)
    add = parser.add_argument
    add("--skip-firstlast", action="store_true", help="leave first and last layer dense")
    add(
        "--skip",
        metavar="PATTERN",
        action="append",
        help="leave dense the layers whose names match this glob; repeatable",
    )
    add("--save", metavar="FILE", help="where to save the corrected model")
    group = parser.add_argument_group("layers solved anew")
    add = group.add_argument
    add(
        "--resolve",
        action="store_true",
        help="compress each layer again at its level of the profile, in order of execution, to "
        "make up for the layers before it",
    )
    add("--remask", action="store_true", help="… with zeros chosen anew, as many as at the level")
    cli.add_damping_option(group)
    cli.add_shards_option(group)
    add_correction_options(parser)
    return parser


def add_correction_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of corrections by statistics and by training."""
    group = parser.add_argument_group("corrections of statistics")
    add = group.add_argument
    add("--bnt", action="store_true", help="batch-norm tuning")
    add(
        "--bnt-batches",
        metavar="N",
        type=cli.positive_int,
        default=100,
        help="batches to tune batch norms on",
    )
    add("--statcorr", action="store_true", help="match norm outputs' statistics to the dense ones")
    add(
        "--statcorr-samples",
        metavar="N",
        type=cli.positive_int,
        help="images in the one batch used for statistics (default: --nsamples)",
    )
    group = parser.add_argument_group("corrections by training")
    add = group.add_argument
    add("--gap", action="store_true", help="global AdaPrune: match all layers' outputs at once")
    add("--lintune", action="store_true", help="train biases and norms on the dense logits")
    add("--lintune-loss", action="store_true", help="… on the labels instead, by cross-entropy")
    add("--finetune", action="store_true", help="train all parameters on the labels")
    add("--finetune-mse", action="store_true", help="… on the dense logits instead")
    for name, epochs, lr in (("gap", 100, 1e-5), ("lintune", 100, 1e-4), ("finetune", 2, 1e-5)):
        count = {"metavar": "N", "type": cli.positive_int, "default": epochs}
        rate = {"metavar": "F", "type": cli.positive_float, "default": lr}
        add(f"--{name}-epochs", **count, help="passes over the calibration images")
        add(f"--{name}-lr", **rate, help="Adam's learning rate")


def check_options(options: Mapping[str, Any], file: str, save: str | None) -> None:
    """Checks beyond argparse's; raises UserError before any work is done."""
    dense = dense_files(options["model"], options["dataset"], options["weights"])
    for option, required in DEPENDENT.items():
        if options[option] and not options[required]:
            flag, needed = (f"--{name.replace('_', '-')}" for name in (option, required))
            raise UserError(f"{flag} has no effect without {needed}")
    if not Path(file).exists():
        raise UserError(f"{file}: no such file")
    if save:
        if Path(save).suffix == ".json":
            raise UserError(f"--save {save}: .json is for the record; name a .pth")
        files.check_writable(save)
        files.check_keeps("--save", save, {"the input": file, **dense})


# -- the model and its images ----------------------------------------------------------------------


def load_model(
    session: Session,
    args: argparse.Namespace,
    left_dense: Mapping[str, str],  # layer -> the option that leaves it dense
) -> tuple[nn.Module, dict[str, Mode]]:
    """The model in a checkpoint, or stitched from a database by a profile.

    For --resolve, its layers' modes as well.
    """
    dense, path, modes = session.model, args.file, dict[str, Mode]()
    if args.database is None:
        model = copy.deepcopy(dense)
        load_compressed(model, path)
        logits = (args.lintune and not args.lintune_loss) or args.finetune_mse
        if left_dense or args.gap or args.statcorr or logits:  # these use the dense model
            check_checkpoint(path, dense, session.weights_name)
    else:
        profile = read_profile(path)
        db = Database.open(args.database, model_tag(args.model), args.prefix or ".")
        model = stitched(session, db, profile, left_dense)
        if args.resolve:
            modes = modes_of(profile, db, model, args.remask)
    for name, option in left_dense.items():
        put_layer(model.get_submodule(name), dense.get_submodule(name).state_dict())
        log.info("%s left dense: %s", name, option)
        modes[name] = ResolveMode(excluded=option)
    return model, modes


# -- the corrections -------------------------------------------------------------------------------


def resolve(
    session: Session,
    model: nn.Module,
    modes: Mapping[str, Mode],
    state: RunState,  # finished layers
    rel_damp: float,
    shards: int,
) -> None:
    """Solve all layers of a stitched model anew, in order of execution."""
    augment, rounds = not session.options.noaug, session.options.nrounds
    batches = session.calibration(augment, rounds)
    prove_layers(session.model, model, batches, session.device)
    compression = SequentialCompression(
        session.model,
        model,
        ResolveMode(sequential=True),
        state,
        RunState(),
        rel_damp=rel_damp,
        memory_gb=session.options.memory,
        shards=shards,
        repeats=1 if augment else rounds,
        world=session.world,
        modes=modes,
    )
    reports = [asdict(report) for report in compression.run(batches)]
    warn_of_doubtful_claims(compression, reports, session.task, augment)


@dataclass
class StepReport:
    """What a correction did: a line in the log and an entry in the record."""

    name: str
    seconds: float
    losses: list[float] | None  # mean per epoch, of a training

    def line(self) -> str:
        text = f"{self.name} {self.seconds:.2f} s"
        if self.losses:
            text += f"  loss {self.losses[0]:.4g} in the first epoch, {self.losses[-1]:.4g} in the "
            text += f"last of {len(self.losses)}"
        return text


def correct(
    model: nn.Module,
    corrections: Mapping[str, Callable[[], list[float] | None]],  # each changes `model`
    state: RunState,
) -> list[StepReport]:
    """Make corrections in their order, except those in `state`; log and return their reports."""
    reports = []
    for name, correction in corrections.items():
        if entry := state.load(name):
            model.load_state_dict(entry.tensors)
            reports.append(StepReport(**entry.figures))
            log.info("resuming: %s is done", name)
            continue
        started = time.perf_counter()
        losses = correction()
        reports.append(StepReport(name, time.perf_counter() - started, losses))
        log.info(reports[-1].line())
        state.save(name, model.state_dict(), vars(reports[-1]))
    return reports


def corrections(
    session: Session,
    args: argparse.Namespace,
    model: nn.Module,  # changed by them
    modes: Mapping[str, Mode],  # of its layers, for --resolve
    state: RunState,
) -> dict[str, Callable[[], list[float] | None]]:
    """The requested corrections, in their order; trainings return a loss per epoch."""
    models, device = (model, session.model), session.device

    def task(name: str, epochs: int) -> TrainingTask:
        images = session.task.epochs(not args.noaug, args.seed)
        return TrainingTask(name, images, device, epochs, f"--{name}-lr", state)

    def labelled(uses_loss: bool) -> Task | None:
        return session.task if uses_loss else None

    steps = {  # in the order of the module docstring
        "resolve": lambda: resolve(
            session, model, modes, state.part("resolve"), args.rel_damp, args.shards
        ),
        "gap": lambda: global_adaprune(*models, task("gap", args.gap_epochs), args.gap_lr),
        "bnt": lambda: batchnorm_tune(
            model, session.calibration(not args.noaug, args.nrounds), device, args.bnt_batches
        ),
        "statcorr": lambda: statistics_correction(
            *models, session.task.one_batch(args.statcorr_samples), device
        ),
        "lintune": lambda: train_vectors(
            *models,
            task("lintune", args.lintune_epochs),
            args.lintune_lr,
            labelled(args.lintune_loss),
        ),
        "finetune": lambda: finetune(
            *models,
            task("finetune", args.finetune_epochs),
            args.finetune_lr,
            labelled(not args.finetune_mse),
        ),
    }
    return {name: make for name, make in steps.items() if getattr(args, name)}


# -- the command -----------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    check_options(vars(args), args.file, args.save)
    args.nrounds = default_rounds(args)
    started = time.perf_counter()
    session = Session.of(common_options(args))
    if args.resolve:
        args.shards = session.shard_count(args.shards)
    left_dense = skipped(list(find_layers(session.model)), args.skip or ())
    if args.skip_firstlast:
        ends = first_and_last(session.model, session.task.one_batch(1))
        left_dense = dict.fromkeys(ends, "--skip-firstlast") | left_dense
    model, modes = load_model(session, args, left_dense)
    contents = {"compressed model": content_hash(model.state_dict())}
    if args.resolve:
        contents["levels"] = bytes_hash(f"{name} {modes[name]}".encode() for name in sorted(modes))
    invocation = Invocation.of(build_parser(), args)
    marks = session.fingerprint(invocation, contents)
    if (args.statcorr_samples or 0) > session.task.count:
        raise UserError(
            f"--statcorr-samples {args.statcorr_samples} is more than the {session.task.count} "
            "calibration images; pass --nsamples"
        )

    folder = state_folder(args.save) if args.save else None
    with open_state(folder, marks, args.restart, session.world) as state:
        dense_figures = session.dense_figures()
        reports = correct(model, corrections(session, args, model, modes, state), state)
        if args.save:
            files.save_checkpoint(model.state_dict(), args.save, origin_marks(session.model))
        evaluation = session.evaluation(model)
        if args.save:
            entries = (state.part("resolve").load(name) for name in modes)
            records.write_run(
                Path(args.save).with_suffix(".json"),
                invocation.command,
                invocation.arguments,
                fingerprint=marks,
                seconds=time.perf_counter() - started,
                **evaluation.record(),
                **session.task.record(),
                **dense_figures,
                corrections=[vars(report) for report in reports],
                layers=[entry.figures["report"] for entry in entries if entry],
            )
        state.finish()
    cli.print_result(str(evaluation))
    session.world.leave()


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, records.repeated(build_parser, argv))


if __name__ == "__main__":
    sys.exit(main())
