"""Choose a level per layer for a target: `python spdy.py MODEL DATASET TARGET DATABASE` (--help).

OBC (arXiv 2208.11580), with the search of SPDY (Frantar & Alistarh, arXiv 2201.13096).

    minimise  Σ_i error_i(level_i)   where  Σ_i cost_i(level_i) ≤ Σ_i dense cost_i / TARGET

--dp solves this (`dp.py`). Without it, the command searches for coefficients of the errors whose
solution, stitched from the database and with its norms corrected, has the least mean cross-entropy
on the calibration images, not augmented (`search.py`). An interrupted search is continued by the
same command: its state is in a hidden folder next to the profile until the profile is written.

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
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelutils import placed
from obc.inputs import files
from obc.solver import dp
from obc.solver.errors import UserError, log
from obc.solver.progress import progress
from obc.solver.search import ProfileProblem, SearchState, picks_key, profile_problem, search
from obc.toolkit import cli, origins, profiles
from obc.toolkit.corrections import batchnorm_averages, correct_statistics, norm_moments
from obc.toolkit.costs import CONSTRAINTS, layer_costs
from obc.toolkit.evaluation import mean_loss
from obc.toolkit.fingerprints import content_hash
from obc.toolkit.kinds import KINDS
from obc.toolkit.leveldb import Database, model_tag
from obc.toolkit.records import repeated, write_run
from obc.toolkit.resume import RunState, open_state, state_folder
from obc.toolkit.session import Invocation, Session, common_options

ERRORS = ("squared", "loss", "spdy")
SEARCH = "search"  # the only entry in the state of a search


# -- evaluation ------------------------------------------------------------------------------------


class Evaluator:
    """Calibration loss of a profile; the decoded images and the dense model stay in memory.

    Of several processes, each has its share of the images. `correction` is how norms are corrected
    before the loss is measured: "averages", "statcorr" or "none".
    """

    def __init__(self, session: Session, db: Database, correction: str = "averages") -> None:
        self.session, self.db, device = session, db, session.device
        self.world = world = session.world
        shard = session.calibration().shard(world.rank, world.size)
        images = progress("reading images", shard)
        self.batches = [(placed(x, device) if device.type == "cpu" else x, y) for x, y in images]
        self.correct: Callable[[nn.Module], None] = lambda model: None
        if correction == "statcorr":
            first = world.share(self.batches[0][0].cpu() if world.first else None)
            first = placed(first, device) if device.type == "cpu" else first
            self.correct = partial(
                correct_statistics,
                images=first,
                device=device,
                targets=norm_moments(session.model, first, device),
            )
        elif correction == "averages":
            self.correct = partial(
                batchnorm_averages, batches=self.batches, device=device, world=world
            )

    def __call__(self, profile: Mapping[str, str]) -> float:
        model = copy.deepcopy(self.session.model)
        self.db.stitch(model, profile)
        self.correct(model)
        session = self.session
        return mean_loss(model, self.batches, session.device, self.world, session.task)


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
        help="by which factor the layers must cost less than dense at 32 bits",
    )
    add("database", metavar="DATABASE", choices=list(KINDS), help=" ".join(KINDS))
    add("--dp", action="store_true", help="one solve of the dynamic programme, no search")
    add("--errors", choices=ERRORS, default="loss", help="scores of database.py to add up")
    add(
        "--constr",
        choices=CONSTRAINTS,
        help="what the target limits (default: timingsq with --timings, otherwise "
        + ", ".join(f"{kind.constraint} for {name}" for name, kind in KINDS.items())
        + ")",
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
    """What argparse cannot see by itself; fills in defaults."""
    if args.score and args.dp:
        raise UserError("--score FILE scores a profile, --dp makes one: choose")
    default = "timingsq" if args.timings else KINDS[args.database].constraint
    args.constr = args.constr or default
    if (args.constr == "timingsq") != bool(args.timings):
        raise UserError("--timings FILE goes with --constr timingsq, which needs it")


def profile_file(prefix: str | Path, model: str, kind: str, target: float, method: str) -> Path:
    """<model>_<database>_<100·target>x_<method>.txt, the method being dp or spdy.

    >>> str(profile_file(".", "rn18", "unstr", 2.3, "dp"))
    'rn18_unstr_230x_dp.txt'
    """
    return Path(prefix) / f"{model_tag(model)}_{kind}_{100 * target:.10g}x_{method}.txt"


def run_search(
    problem: ProfileProblem,
    evaluator: Callable[[Mapping[str, str]], float],
    kept: RunState,
    seed: int,
) -> SearchState:
    """Start the search, or continue it."""
    entry = kept.load(SEARCH)
    state = SearchState(**entry.figures) if entry else SearchState.start(len(problem.levels), seed)
    if entry:
        log.info("resuming: after %d candidates", state.candidates)
    return search(
        problem,
        lambda picks: evaluator(problem.profile(picks)),
        state,
        lambda state: kept.save(SEARCH, {}, asdict(state)),
    )


def print_choice(problem: ProfileProblem, picks: list[int]) -> dict[str, float]:
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


def score(path: str, problem: ProfileProblem, evaluator: Evaluator) -> None:
    """Print what the profile in a file reaches, its objective and its calibration loss."""
    profile = profiles.read_profile(path)
    origins.check_profile(profile, evaluator.db)
    picks = problem.picks(profile, path)
    loss = evaluator(problem.profile(picks))
    if print_choice(problem, picks)["cost"] > problem.budget:
        log.warning("%s misses the target %g", path, problem.target)
    cli.print_result(f"calibration loss {loss:.6f}")


def choose(
    path: Path,  # of the profile
    problem: ProfileProblem,
    db: Database,
    invocation: Invocation,
    marks: dict[str, str],
    evaluator: Evaluator | None,  # None: no search
    seed: int,
    figures: dict[str, Any],  # for the record
) -> None:
    """Make a profile, by a search if there is an evaluator; write and report it."""
    started, choice = time.perf_counter(), problem.solve()
    kept = RunState()  # only a search has something to resume
    if evaluator is not None:
        kept = open_state(state_folder(path), marks, invocation.restart, evaluator.world)
    with kept:
        if evaluator is not None:
            figures |= evaluator.session.dense_figures(evaluator.batches)
            dp_picks = picks_key(choice.levels)
            state = run_search(problem, evaluator, kept, seed)
            choice = problem.solve(state.coefficients)
            figures |= {
                "loss": state.loss,
                "dp_loss": state.losses[dp_picks],
                "candidates": state.candidates,
                "evaluations": len(state.losses),
                "coefficients": state.coefficients,
                "history": state.history,
            }
        picks = choice.levels
        figures |= print_choice(problem, picks)
        figures |= {"discretisation_error": choice.gap, "bucket": choice.bucket}
        cli.print_result(f"discretisation error at most {choice.gap:.3g}")
        if evaluator is not None:
            dp_loss = math.nan if figures["dp_loss"] is None else figures["dp_loss"]
            cli.print_result(f"calibration loss {figures['loss']:.6f} (--dp: {dp_loss:.6f})")
        profile = problem.profile(picks)
        costs = problem.layer_costs(picks)
        table = zip(profile.items(), costs, problem.errors, picks, strict=True)
        write_run(
            path.with_suffix(".json"),
            invocation.command,
            invocation.arguments,
            **figures,
            fingerprint=marks,
            seconds=time.perf_counter() - started,
            layers=[
                {"name": layer, "level": level, "cost": cost, "error": error[pick]}
                for (layer, level), cost, error, pick in table
            ],
        )
        origin = origins.profile_marks(db, profile, invocation.arguments["constr"], problem.target)
        profiles.write_profile(path, profile, origin)
        kept.finish()
    cli.print_result(f"profile {path}")


def run(args: argparse.Namespace) -> None:
    check_options(args)
    method = "dp" if args.dp else "spdy"
    path = profile_file(args.prefix, args.model, args.database, args.target, method)
    if not args.score:
        files.check_writable(path)
    db = Database.open(args.database, model_tag(args.model), args.prefix)
    session = Session.of(common_options(args))
    db.check(session.model, session.weights_name)
    scores_path = profiles.score_file(args.score_path, db.model, db.kind, args.errors)
    if not scores_path.exists():
        raise UserError(
            f"{scores_path}: no such file; make it with python database.py {args.model} "
            f"{args.dataset} {args.database} {args.errors}"
        )
    if args.timings and Path(args.timings).exists():
        origins.check_marks(profiles.read_scores(args.timings), db, "; measure them again")
    costs = layer_costs(db, session.model, session.task.example, args.constr, args.timings)
    scores = profiles.read_scores(scores_path)
    origins.check_scores(scores, db)
    problem = profile_problem(db.levels, costs, scores, scores_path, args.target, args.dpbuckets)
    correction = "statcorr" if args.statcorr else "none" if args.nobatchnorm else "averages"
    if args.score:
        evaluator = Evaluator(session, db, correction)
        session.dense_figures(evaluator.batches)
        score(args.score, problem, evaluator)
    else:
        problem.solve()  # reports a target that cannot be reached before any image is read
        tables = {"scores": problem.errors, "costs": problem.costs}
        contents = {
            name: content_hash({str(i): torch.as_tensor(x) for i, x in enumerate(table)})
            for name, table in tables.items()
        }
        if not args.dp:  # only a search depends on the weights in the database
            contents["database"] = db.hash
        invocation = Invocation.of(build_parser(), args)
        marks = session.fingerprint(invocation, contents)
        figures = session.task.record()
        evaluator = None if args.dp else Evaluator(session, db, correction)
        choose(path, problem, db, invocation, marks, evaluator, args.seed, figures)
    session.world.leave()


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, repeated(build_parser, argv))


if __name__ == "__main__":
    sys.exit(main())
