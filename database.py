"""Per-layer databases: every layer at every level, and models stitched from them.

OBC (arXiv 2208.11580), section 4, "non-uniform compression": a database holds each layer of a model
at many levels of compression; a profile names a level for each layer; stitching puts the model
together. `python database.py MODEL DATASET KIND ACTION` measures what each level costs in accuracy.

    kind         files, a full state dict each                     level
    unstr        models_unstr/<model>_<level>.pth                  sparsity × 10⁴, 0000 … 9900
    4block       models_4block/<model>_<level>.pth                 the same
    4block_8w8a  models_4block_8w8a/<model>_<level>.pth            the same
    mixed        models_quant/<model>_<level>.pth and              8w8a, 4w4a, …
                 models_nm_quant/<model>_<level>.pth               24_8w8a, 24_4w4a, …

A level is what stands between the model's name and the suffix: to add a level, add a file. Files
are mapped into memory (.safetensors are read), so that opening a database reads names and shapes
only, and stitching reads the layers it stitches. Which bits and how many zeros a level has is read
off its tensors.
"""

from __future__ import annotations

import obc.toolkit.starting  # noqa: F401  # isort: skip

import argparse
import sys
import time
from pathlib import Path

from obc.inputs import files
from obc.solver.errors import UserError, log
from obc.toolkit import cli, records, sensitivity
from obc.toolkit.leveldb import KINDS, Database, model_tag
from obc.toolkit.profiles import read_profile, score_file, write_scores
from obc.toolkit.resume import Notes, RunState, open_state, state_folder
from obc.toolkit.session import Session, images_hash

# -- the command -----------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="database.py", description=__doc__.splitlines()[0])
    cli.add_common_options(parser)
    cli.add_resume_options(parser)
    parser.add_argument("kind", metavar="KIND", choices=list(KINDS), help=" ".join(KINDS))
    parser.add_argument(
        "action",
        metavar="ACTION",
        choices=["loss", "squared", "spdy", "stitch", "eval"],
        help="loss, squared, spdy: write scores; stitch, eval: measure accuracy",
    )
    parser.add_argument("--prefix", metavar="DIR", default=".", help="where models_unstr/ etc. are")
    parser.add_argument("--profile", metavar="FILE", help="profile to stitch (stitch)")
    parser.add_argument("--score_path", metavar="DIR", default="scores", help="folder of scores")
    return parser


def write_errors(args: argparse.Namespace, db: Database, session: Session) -> None:
    """Measure errors per layer and level and write them where spdy.py looks for them."""
    path, started = score_file(args.score_path, db.model, db.kind, args.action), time.perf_counter()
    files.check_writable(path)
    marks = session.fingerprint(build_parser(), {"database": db.hash})
    records.check_repeat(args.repeat, marks)
    world = session.world
    with open_state(state_folder(path), marks, args.restart, world) as state:
        if args.action == "spdy":
            scores = sensitivity.quadratic_prior(db)
        else:
            measure = {"loss": sensitivity.losses, "squared": sensitivity.squared_errors}
            batches = session.calibration().shard(world.rank, world.size)
            notes = Notes(state)
            with notes:
                scores = measure[args.action](session.model, db, batches, session.device, notes)
        seconds = time.perf_counter() - started
        records.write_run(
            path.with_suffix(".json"), "database.py", vars(args), fingerprint=marks, seconds=seconds
        )
        write_scores(path, scores)
        state.finish()
    cli.print_result(f"{len(scores)} layers at {len(db.levels)} levels: {path}")


def evaluate_levels(db: Database, session: Session) -> None:
    """Accuracy with every layer at the same level, for every level; in the end, of the last."""
    with open_evaluation(db, session) as state:
        notes = Notes(state)
        if notes.known:
            log.info("resuming: %d of %d levels are done", len(notes.known), len(db.levels))
        with notes:
            for level in db.levels:
                if (accuracy := notes.get(level)) is None:
                    db.stitch(session.model, dict.fromkeys(db.layers, level))
                    accuracy = session.accuracy(session.model)
                    notes.add(level, accuracy)
                cli.print_result(f"{level} {accuracy:.2f}")
        state.finish()
    cli.print_result(f"top-1 {accuracy:.2f}")


def open_evaluation(db: Database, session: Session) -> RunState:
    """Where accuracies are kept while an evaluation is at work: beside the database."""
    args = session.args
    contents = {"database": db.hash, "test images": images_hash(session.data.test)}
    marks = session.fingerprint(build_parser(), contents)
    folder = Path(args.prefix) / f".{db.model}_{db.kind}_eval.partial"
    try:
        return open_state(folder, marks, args.restart, session.world)
    except OSError as error:
        log.warning(
            "%s: cannot be written (%s): an interrupt would lose what is evaluated",
            folder,
            error.strerror,
        )
        return RunState()


def run(args: argparse.Namespace) -> None:
    if (args.action == "stitch") != bool(args.profile):
        raise UserError("--profile FILE goes with stitch, and stitch needs it")
    profile = read_profile(args.profile) if args.profile else None
    db = Database.open(args.kind, model_tag(args.model), args.prefix)
    session = Session.of(args)
    db.check(session.model)
    if args.action == "eval":
        evaluate_levels(db, session)
    elif profile is not None:
        db.stitch(session.model, profile)
        cli.print_result(f"top-1 {session.accuracy(session.model):.2f}")
    else:
        write_errors(args, db, session)
    session.world.leave()


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, records.repeated(build_parser, argv))


if __name__ == "__main__":
    sys.exit(main())
