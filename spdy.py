"""Choose a level per layer for a target: `python spdy.py MODEL DATASET TARGET DATABASE` (--help).

OBC (arXiv 2208.11580), with the search of SPDY (Frantar & Alistarh, arXiv 2201.13096).

    minimise  Σ_i error_i(level_i)   where  Σ_i cost_i(level_i) ≤ Σ_i dense cost_i / TARGET

--dp solves this (`dp.py`). Without, coefficients of the errors are searched for whose solution,
stitched from the database and with its norms corrected, has the least mean cross-entropy on the
calibration images, not augmented (`search.py`). An interrupted search is continued by the same
command: its state is in a hidden folder beside the profile until the profile is written.

Batch norms of a candidate are re-estimated in one pass, as plain averages over the calibration
batches (`corrections.py`). Deviation from OBC: moving averages over 100 batches, which
`post_proc.py --bnt` takes too, would cost many times as much as the evaluation.
"""

from __future__ import annotations

import obc.toolkit.starting  # noqa: F401  # isort: skip

import argparse
import copy
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from modelutils import mean_loss, placed
from obc.inputs import files
from obc.solver import dp
from obc.solver.errors import UserError, log
from obc.solver.search import Problem, State, make_problem, picks_key, search
from obc.toolkit import cli, profiles
from obc.toolkit.corrections import batchnorm_averages, correct_statistics, norm_moments
from obc.toolkit.costs import CONSTRAINTS, layer_costs
from obc.toolkit.fingerprints import content_hash
from obc.toolkit.leveldb import KINDS, Database, model_tag
from obc.toolkit.records import check_repeat, repeated, write_run
from obc.toolkit.resume import RunState, open_state, state_folder
from obc.toolkit.session import Session

ERRORS = ("squared", "loss", "spdy")
DEFAULT_CONSTRAINTS = {"mixed": "bops", "4block": "flops", "unstr": "flops", "4block_8w8a": "bops"}

SEARCH = "search"  # the one thing in the state of a search


# -- evaluation ------------------------------------------------------------------------------------


class Evaluator:
    """Calibration loss of a profile; the decoded images and the dense model stay in memory.

    Of several processes, each has its share of the images.
    """

    def __init__(self, session: Session, db: Database, args: argparse.Namespace) -> None:
        self.session, self.db, device = session, db, session.device
        self.world = world = session.world
        own = session.calibration().shard(world.rank, world.size)
        images = tqdm(own, desc="reading images", leave=False, disable=None)
        self.batches = [(placed(x, device) if device.type == "cpu" else x, y) for x, y in images]
        if args.statcorr:
            first = world.share(self.batches[0][0].cpu() if world.first else None)
            first = placed(first, device) if device.type == "cpu" else first
            self.correct = partial(
                correct_statistics,
                images=first,
                device=device,
                wanted=norm_moments(session.model, first, device),
            )
        elif args.nobatchnorm:
            self.correct = lambda model: None
        else:
            self.correct = partial(
                batchnorm_averages, batches=self.batches, device=device, world=world
            )

    def __call__(self, profile: Mapping[str, str]) -> float:
        model = copy.deepcopy(self.session.model)
        self.db.stitch(model, profile)
        self.correct(model)
        return mean_loss(model, self.batches, self.session.device, self.world)


def fingerprint(
    args: argparse.Namespace, problem: Problem, session: Session, db: Database
) -> dict[str, str]:
    """All that a profile depends on; of the database itself only if there is a search in it."""
    tables = {"scores": problem.errors, "costs": problem.costs}
    contents = {
        name: content_hash({str(i): torch.as_tensor(x) for i, x in enumerate(table)})
        for name, table in tables.items()
    }
    if not args.dp:
        contents["database"] = db.hash
    return session.fingerprint(build_parser(), contents)


# -- the command -----------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="spdy.py", description=__doc__.splitlines()[0])
    cli.add_common_options(parser)
    cli.add_resume_options(parser)
    add = parser.add_argument
    add(
        "target",
        metavar="TARGET",
        type=cli.positive_float,
        help="how many times less the layers shall cost than at 32 bits and dense",
    )
    add("database", metavar="DATABASE", choices=list(KINDS), help=" ".join(KINDS))
    add("--dp", action="store_true", help="one solve of the dynamic programme, no search")
    add("--errors", choices=ERRORS, default="loss", help="scores of database.py to add up")
    add(
        "--constr",
        choices=CONSTRAINTS,
        help="what the target is about (default: flops for unstr and 4block, bops for mixed and "
        "4block_8w8a, timingsq with --timings)",
    )
    add("--timings", metavar="FILE", help="seconds per layer and level, for timingsq")
    add(
        "--dpbuckets",
        metavar="N",
        type=cli.positive_int,
        default=dp.BUCKETS,
        help="steps that the budget is divided into",
    )
    add(
        "--nobatchnorm",
        action="store_true",
        help="evaluate without re-estimating the batch norms' statistics",
    )
    add("--statcorr", action="store_true", help="evaluate after statistics correction instead")
    add("--score", metavar="FILE", help="score this profile instead of making one")
    add(
        "--prefix",
        metavar="DIR",
        default=".",
        help="where models_unstr/ etc. are and where the profile goes",
    )
    add("--score_path", metavar="DIR", default="scores", help="folder of scores")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """What argparse cannot see by itself."""
    if args.score and args.dp:
        raise UserError("--score FILE scores a profile, --dp makes one: choose")
    args.constr = args.constr or (
        "timingsq" if args.timings else DEFAULT_CONSTRAINTS[args.database]
    )
    if (args.constr == "timingsq") != bool(args.timings):
        raise UserError("--timings FILE goes with --constr timingsq, which needs it")


def profile_file(args: argparse.Namespace) -> Path:
    """<model>_<database>_<100·target>x_dp.txt, or _spdy.

    >>> words = ["rn18", "imagenet", "2.3", "unstr", "--dp"]
    >>> str(profile_file(build_parser().parse_args(words)))
    'rn18_unstr_230x_dp.txt'
    """
    target, method = f"{100 * args.target:.10g}", "dp" if args.dp else "spdy"
    name = f"{model_tag(args.model)}_{args.database}_{target}x_{method}.txt"
    return Path(args.prefix) / name


def read_problem(args: argparse.Namespace, db: Database, session: Session) -> Problem:
    """Costs and scores of the database."""
    path = profiles.score_file(args.score_path, db.model, db.kind, args.errors)
    if not path.exists():
        raise UserError(
            f"{path}: no such file; make it with python database.py {args.model} "
            f"{args.dataset} {args.database} {args.errors}"
        )
    costs = layer_costs(db, session.model, session.image_shape, args.constr, args.timings)
    scores = profiles.read_scores(path)
    return make_problem(db.levels, costs, scores, path, args.target, args.dpbuckets)


def run_search(
    args: argparse.Namespace, problem: Problem, evaluator: Evaluator, kept: RunState
) -> State:
    """Start the search, or continue it."""
    entry = kept.load(SEARCH)
    state = State(**entry.figures) if entry else State.start(len(problem.levels), args.seed)
    if entry:
        log.info("resuming: after %d candidates", state.candidates)
    return search(
        problem,
        lambda picks: evaluator(problem.profile(picks)),
        state,
        lambda state: kept.save(SEARCH, {}, asdict(state)),
    )


def open_search(
    path: Path, marks: dict[str, str], restart: bool, evaluator: Evaluator | None
) -> RunState:
    """Where a search is kept while it is at work; nowhere, if there is none."""
    if evaluator is None:
        return RunState()
    return open_state(state_folder(path), marks, restart, evaluator.world)


def report(problem: Problem, picks: list[int]) -> dict[str, float]:
    """Print what a choice reaches; the same for the record."""
    cost, error = problem.cost(picks), problem.error(picks)
    reached = problem.dense / cost if cost else math.inf
    for line in (f"target {problem.target:g}", f"reached {reached:.4f}", f"objective {error:.6g}"):
        cli.print_result(line)
    return {
        "target": problem.target,
        "reached": reached,
        "dense_cost": problem.dense,
        "budget": problem.budget,
        "cost": cost,
        "objective": error,
    }


def score(args: argparse.Namespace, problem: Problem, evaluator: Evaluator) -> None:
    """Print what the profile --score reaches, its objective and its calibration loss."""
    picks = problem.picks(profiles.read_profile(args.score), args.score)
    loss = evaluator(problem.profile(picks))
    if report(problem, picks)["cost"] > problem.budget:
        log.warning("%s misses the target %g", args.score, problem.target)
    cli.print_result(f"calibration loss {loss:.6f}")


def choose(
    args: argparse.Namespace, problem: Problem, marks: dict[str, str], evaluator: Evaluator | None
) -> None:
    """Make a profile, by a search if there is an evaluator; write and report it."""
    started, path = time.perf_counter(), profile_file(args)
    choice, found = problem.solve(), {}
    with open_search(path, marks, args.restart, evaluator) as kept:
        if evaluator is not None:
            plain = picks_key(choice.levels)
            state = run_search(args, problem, evaluator, kept)
            choice = problem.solve(state.coefficients)
            found = {
                "loss": state.loss,
                "dp_loss": state.losses[plain],
                "candidates": state.candidates,
                "evaluations": len(state.losses),
                "coefficients": state.coefficients,
                "history": state.history,
            }
        figures = report(problem, choice.levels)
        figures |= {"discretisation_error": choice.gap, "bucket": choice.bucket, **found}
        cli.print_result(f"discretisation error at most {choice.gap:.3g}")
        if found:
            of_plain = math.nan if found["dp_loss"] is None else found["dp_loss"]
            cli.print_result(f"calibration loss {found['loss']:.6f} (--dp: {of_plain:.6f})")
        figures |= {"fingerprint": marks, "seconds": time.perf_counter() - started}
        write_record(args, problem, choice.levels, figures)
        profiles.write_profile(path, problem.profile(choice.levels))
        kept.finish()
    cli.print_result(f"profile {path}")


def write_record(
    args: argparse.Namespace, problem: Problem, picks: list[int], figures: dict[str, Any]
) -> None:
    """Arguments, environment and figures of the run, as JSON beside the profile."""
    rows = zip(problem.profile(picks).items(), problem.costs, problem.errors, picks, strict=True)
    layers = [
        {"name": layer, "level": level, "cost": cost[pick], "error": error[pick]}
        for (layer, level), cost, error, pick in rows
    ]
    write_run(
        profile_file(args).with_suffix(".json"), "spdy.py", vars(args), **figures, layers=layers
    )


def run(args: argparse.Namespace) -> None:
    check_options(args)
    if not args.score:
        files.check_writable(profile_file(args))
    db = Database.open(args.database, model_tag(args.model), args.prefix)
    session = Session.of(args)
    db.check(session.model)
    problem = read_problem(args, db, session)
    if args.score:
        score(args, problem, Evaluator(session, db, args))
    else:
        problem.solve()  # says that a target cannot be reached before any image is read
        marks = fingerprint(args, problem, session, db)
        check_repeat(args.repeat, marks)
        choose(args, problem, marks, None if args.dp else Evaluator(session, db, args))
    session.world.leave()


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, repeated(build_parser, argv))


if __name__ == "__main__":
    sys.exit(main())
