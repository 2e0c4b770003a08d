"""Per-layer databases: `python database.py MODEL DATASET KIND ACTION` (see --help).

OBC (arXiv 2208.11580), section 4, "non-uniform compression". A database holds every layer of a
model at many levels of compression; a profile names a level for each layer. The kinds of database,
their files and their levels are described in `obc/toolkit/leveldb.py`.

    loss, squared, spdy    write what each level of each layer costs in accuracy (sensitivity.py)
    timings                writes how many seconds it takes in a runtime (timings.py)
    stitch                 the accuracy of the model that --profile describes
    eval                   the accuracy with all layers at the same level, for every level
"""

from __future__ import annotations

import obc.toolkit.starting  # noqa: F401  # isort: skip

import argparse
import copy
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

from obc.inputs import files
from obc.solver.errors import UserError, log
from obc.toolkit import cli, export_onnx, origins, records, sensitivity, timings
from obc.toolkit.evaluation import Evaluation
from obc.toolkit.export_measure import RUNTIMES
from obc.toolkit.kinds import KINDS
from obc.toolkit.leveldb import Database, model_tag
from obc.toolkit.profiles import read_profile, score_file, write_scores
from obc.toolkit.resume import Notes, RunState, open_state, state_folder
from obc.toolkit.session import Invocation, Session, common_options
from obc.toolkit.stitching import stitched
from obc.toolkit.timings import TIMED, TimingOptions

MEASURES = {"loss": sensitivity.losses, "squared": sensitivity.squared_errors}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="database.py", description=__doc__.splitlines()[0])
    cli.add_common_options(parser)
    cli.add_resume_options(parser)
    parser.add_argument("kind", metavar="KIND", choices=list(KINDS), help=" ".join(KINDS))
    parser.add_argument(
        "action",
        metavar="ACTION",
        choices=[*MEASURES, "spdy", "timings", "stitch", "eval"],
        help="loss, squared, spdy, timings: write scores or seconds; stitch, eval: accuracy",
    )
    parser.add_argument("--prefix", metavar="DIR", default=".", help="where models_unstr/ etc. are")
    parser.add_argument("--profile", metavar="FILE", help="profile to stitch (stitch)")
    parser.add_argument("--score_path", metavar="DIR", default="scores", help="folder of scores")
    parser.add_argument(
        "--plan", action="store_true", help="loss: print how long it will take, then stop"
    )
    group = parser.add_argument_group("timings")
    add = group.add_argument
    add("--runtime", choices=list(timings.TIMED), default="ort", help="what runs the network")
    add("--batch", metavar="N", type=cli.positive_int, default=1, help="images at a time")
    add("--threads", metavar="N", type=cli.positive_int, default=1, help="threads of the runtime")
    add("--int8-sums", action="store_true", help="residual sums rounded, too, as in export.py")
    return parser


def write_errors(
    db: Database, session: Session, invocation: Invocation, action: str, path: Path
) -> None:
    """Measure errors per layer and level and write them where spdy.py looks for them."""
    started, world = time.perf_counter(), session.world
    files.check_writable(path)
    marks = session.fingerprint(invocation, {"database": db.hash})
    figures = session.task.record()
    with open_state(state_folder(path), marks, invocation.restart, world) as state:
        if action in MEASURES:
            figures |= session.dense_figures()
            batches = session.calibration().shard(world.rank, world.size)
            notes = Notes(state)
            with notes:
                known = (session.model, db, batches, session.device, notes)
                task = {"task": session.task} if action == "loss" else {}
                scores = MEASURES[action](*known, **task)
        else:
            scores = sensitivity.quadratic_prior(db)
        records.write_run(
            path.with_suffix(".json"),
            invocation.command,
            invocation.arguments,
            **figures,
            fingerprint=marks,
            seconds=time.perf_counter() - started,
        )
        write_scores(path, scores, origins.score_marks(db))
        state.finish()
    cli.print_result(f"{len(scores)} layers at {len(db.levels)} levels: {path}")


def write_timings(
    db: Database, session: Session, invocation: Invocation, options: TimingOptions, path: Path
) -> None:
    """Measure seconds per layer and level and write them for spdy.py --timings."""
    started = time.perf_counter()
    files.check_writable(path)
    marks = session.fingerprint(invocation, {"database": db.hash})
    images = session.image_data and next(iter(session.calibration()))[0]
    model = copy.deepcopy(session.model).cpu()
    with open_state(state_folder(path), marks, invocation.restart, session.world) as state:
        notes = Notes(state)
        with notes:
            seconds, wholes = timings.measure(db, model, images, options, notes)
        records.write_run(
            path.with_suffix(".json"),
            invocation.command,
            invocation.arguments,
            fingerprint=marks,
            seconds=time.perf_counter() - started,
            runtime=timings.runtime_version(options.runtime),
            levels=wholes,
        )
        write_scores(path, seconds, {"database": db.kind})
        state.finish()
    cli.print_result(f"{len(seconds)} layers at {len(db.levels)} levels: {path}")


def evaluate_levels(
    db: Database, session: Session, invocation: Invocation, prefix: str | Path
) -> None:
    """Evaluate the model with all layers at the same level, for every level."""
    model = copy.deepcopy(session.model)
    contents = {"database": db.hash} | session.task.test_marks()
    marks = session.fingerprint(invocation, contents)
    folder = Path(prefix) / f".{db.model}_{db.kind}_eval.partial"
    try:
        state = open_state(folder, marks, invocation.restart, session.world)
    except OSError as error:  # in all processes alike
        log.warning(
            "%s: cannot be written (%s): an interrupt would lose all results",
            folder,
            error.strerror,
        )
        state = RunState(None, session.world)
    with state:
        session.dense_figures()
        notes = Notes(state)
        if notes.known:
            log.info("resuming: %d of %d levels are done", len(notes.known), len(db.levels))
        with notes:
            for level in db.levels:
                if (note := notes.get(level)) is None:
                    db.stitch(model, dict.fromkeys(db.layers, level))
                    notes.add(level, note := asdict(session.evaluation(model)))
                evaluation = Evaluation(**note)
                texts = f"{level} {evaluation.line.removeprefix('top-1 ')}", evaluation.closeness
                cli.print_result("  ".join(filter(None, texts)))
        state.finish()
    cli.print_result(evaluation.line)


def timing_options(args: argparse.Namespace) -> TimingOptions:
    return TimingOptions(**{item.name: getattr(args, item.name) for item in fields(TimingOptions)})


def check_timing_options(args: argparse.Namespace) -> None:
    """Raise a UserError for options of timings elsewhere, or if their packages are missing."""
    if args.action == "timings":
        for name in ("onnx", "onnx_ir", "onnxscript", RUNTIMES[TIMED[args.runtime]][0]):
            export_onnx.package(name)
        if args.int8_sums:
            export_onnx.package("onnxruntime")
    for item in fields(TimingOptions) if args.action != "timings" else ():
        if getattr(args, item.name) != item.default:
            raise UserError(f"--{item.name.replace('_', '-')} belongs to timings")


def run(args: argparse.Namespace) -> None:
    if (args.action == "stitch") != bool(args.profile):
        raise UserError("--profile FILE goes with stitch, and stitch needs it")
    if args.plan and args.action != "loss":
        raise UserError("--plan goes with loss, the one action that can take long")
    check_timing_options(args)
    profile = read_profile(args.profile) if args.profile else None
    db = Database.open(args.kind, model_tag(args.model), args.prefix)
    session = Session.of(common_options(args))
    db.check(session.model, session.weights_name)
    invocation = Invocation.of(build_parser(), args)
    if args.action == "eval":
        evaluate_levels(db, session, invocation, args.prefix)
    elif args.plan:
        batches = session.calibration()
        cli.print_result(
            sensitivity.loss_plan(session.model, db, batches, session.device, session.task)
        )
    elif profile is not None:
        model = stitched(session, db, profile)
        session.dense_figures()
        cli.print_result(str(session.evaluation(model)))
    elif args.action == "timings":
        path = score_file(args.score_path, db.model, db.kind, args.action)
        write_timings(db, session, invocation, timing_options(args), path)
    else:
        path = score_file(args.score_path, db.model, db.kind, args.action)
        write_errors(db, session, invocation, args.action, path)
    session.world.leave()


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, records.repeated(build_parser, argv))


if __name__ == "__main__":
    sys.exit(main())
