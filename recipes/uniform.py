"""The uniform baseline: every layer at the same level, the mildest one that meets a target.

    python recipes/uniform.py MODEL DATASET TARGET KIND --constr flops

Writes a profile as spdy.py does, <model>_<kind>_<100·target>x_uniform.txt, and a record next to it.
TARGET is the dense cost divided by the allowed cost. Nothing is resumed: --restart changes nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import obc.toolkit.starting  # noqa: E402, F401  # isort: skip

import argparse  # noqa: E402

from obc.inputs import files  # noqa: E402
from obc.solver import errors  # noqa: E402
from obc.toolkit import cli, records  # noqa: E402
from obc.toolkit.costs import CONSTRAINTS, layer_costs  # noqa: E402
from obc.toolkit.kinds import KINDS  # noqa: E402
from obc.toolkit.leveldb import Database, model_tag  # noqa: E402
from obc.toolkit.origins import profile_marks  # noqa: E402
from obc.toolkit.profiles import write_profile  # noqa: E402
from obc.toolkit.session import Invocation, Session, common_options  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="uniform.py", description=__doc__.splitlines()[0])
    cli.add_common_options(parser)
    cli.add_resume_options(parser)
    parser.add_argument(
        "target", metavar="TARGET", type=cli.positive_float, help="dense / allowed cost"
    )
    parser.add_argument("kind", metavar="KIND", choices=list(KINDS), help=" ".join(KINDS))
    parser.add_argument(
        "--constr", choices=CONSTRAINTS, default="flops", help="what the target is about"
    )
    parser.add_argument(
        "--prefix",
        metavar="DIR",
        default=".",
        help="folder of models_unstr/ etc., where the profile is written",
    )
    parser.add_argument("--timings", metavar="FILE", help="measured seconds, for timingsq")
    parser.add_argument("--output", metavar="FILE", help="another file for the profile")
    return parser


def run(args: argparse.Namespace) -> None:
    tag = model_tag(args.model)
    name = f"{tag}_{args.kind}_{100 * args.target:.10g}x_uniform.txt"
    path = Path(args.output or Path(args.prefix) / name)
    files.check_writable(path)
    db = Database.open(args.kind, tag, args.prefix)
    session = Session.of(common_options(args))
    db.check(session.model, session.weights_name)
    invocation = Invocation.of(build_parser(), args)
    marks = session.fingerprint(invocation, {"database": db.hash})
    costs = layer_costs(db, session.model, session.task.example, args.constr, args.timings)
    dense = sum(costs.dense.values())
    total = {level: sum(costs.levels[n][level] for n in db.layers) for level in db.levels}
    allowed = [level for level in db.levels if total[level] * args.target <= dense]
    if not allowed:
        best = dense / min(total.values())
        raise errors.UserError(f"no level reaches {args.target:g}x; the most is {best:.2f}x")
    level = max(allowed, key=total.__getitem__)
    profile = dict.fromkeys(db.layers, level)
    write_profile(path, profile, profile_marks(db, profile, args.constr, args.target))
    records.write_run(
        path.with_suffix(".json"),
        invocation.command,
        invocation.arguments,
        fingerprint=marks,
        level=level,
        reached=dense / total[level],
        layers=[
            {"name": name, "level": level, "cost": costs.levels[name][level]} for name in db.layers
        ],
    )
    for line in (f"level {level}", f"reached {dense / total[level]:.4f}", f"profile {path}"):
        cli.print_result(line)


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, records.repeated(build_parser, argv))


if __name__ == "__main__":
    sys.exit(main())
