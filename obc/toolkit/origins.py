"""Whether files that are used together were made together: databases, scores and profiles.

Scores are only right for the levels that they were measured on, a profile only for the levels that
it was chosen from. Both carry marks (`profiles.py`) that say which those are:

    scores     database, dense weights, and `level <name>`, a hash of all layers at that level
    profile    database, constraint, target, dense weights; `choice`, a hash of its own lines, and
               `levels`, a hash of the layers that they choose

A level that was added to a database, or removed, does not make the scores of the others wrong. A
profile that was edited is as good as one written by hand: what it chooses is no longer compared.

Files without marks are taken for what they are if they fit. Older files tell something, too: the
record of scores has hashes, and a profile's name has the kind of database and the target.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import nn

from modelutils import Example
from obc.solver.errors import UserError, log
from obc.toolkit.costs import profile_cost
from obc.toolkit.fingerprints import bytes_hash
from obc.toolkit.kinds import KINDS
from obc.toolkit.leveldb import DENSE_WEIGHTS, Database
from obc.toolkit.profiles import Table, as_number
from obc.toolkit.records import read_record

PROFILE_NAME = re.compile(rf".*_({'|'.join(KINDS)})_([\d.e+-]+)x_(dp|spdy|uniform)")
TARGET_TOLERANCE = 1e-9  # of a target


def level_marks(db: Database) -> dict[str, str]:
    """A hash of every level."""
    return {
        f"level {level}": db.choice_hash((layer, level) for layer in db.layers)
        for level in db.levels
    }


def score_marks(db: Database) -> dict[str, str]:
    """The marks of scores that were measured on a database."""
    return {"database": db.kind, DENSE_WEIGHTS: db.dense_hash, **level_marks(db)}


def profile_marks(
    db: Database, profile: Mapping[str, str], constr: str, target: float
) -> dict[str, str]:
    """The marks of a profile that was chosen from a database."""
    return {
        "database": db.kind,
        "constraint": constr,
        "target": f"{target:.10g}",
        DENSE_WEIGHTS: db.dense_hash,
        "choice": lines_hash(profile),
        "levels": db.choice_hash(sorted(profile.items())),
    }


def lines_hash(profile: Mapping[str, str]) -> str:
    """A hash of what a profile says."""
    return bytes_hash(f"{layer} {level}".encode() for layer, level in sorted(profile.items()))


# -- checks ----------------------------------------------------------------------------------------


def check_scores(scores: Table, db: Database) -> None:
    """Raise a UserError if scores were measured on other levels than those of a checked database.

    Scores without marks are compared by the record next to them, if they have one.
    """
    again = "; measure them again with database.py"
    check_marks(scores, db, again)
    if not scores.marks:
        check_record(scores, db)
        return
    for name, mark in level_marks(db).items():
        if scores.marks.get(name, mark) != mark:
            level = name.removeprefix("level ")
            file = db.files.get(level, f"level {level}")
            raise UserError(f"{scores.path}: measured on another level than {file}{again}")


def check_record(scores: Table, db: Database) -> None:
    """Compare scores without marks with the database by the hash in their record."""
    path = Path(scores.path).with_suffix(".json")
    record = read_record(path) if path.exists() else {}
    mark = (record.get("fingerprint") or {}).get("database")
    if mark not in (None, db.hash):
        raise UserError(
            f"{scores.path}: measured on another {db.kind} database, says {path.name}; measure "
            "them again with database.py, or remove that record if these are other scores"
        )


def check_profile(profile: Table, db: Database) -> None:
    """Raise a UserError, which names the line, for a profile that is not of a checked database."""
    again = "; make it again with spdy.py, or remove its lines with #: to use it all the same"
    check_marks(profile, db, again)
    named = PROFILE_NAME.fullmatch(Path(profile.path).stem)
    if named and not profile.marks and named[1] != db.kind:
        raise UserError(
            f"{profile.path}: by its name made for a database of kind {named[1]}, not {db.kind}; "
            "make one with spdy.py, or rename it"
        )
    for layer, level in profile.items():
        place = f"{profile.place(layer)}: no"
        where = f"in the {db.kind} database of {db.model}"
        if layer not in db.layers:
            raise UserError(f"{place} layer {layer} {where}")
        if level not in db.levels:
            raise UserError(f"{place} level {level} of layer {layer} {where}")
    if profile.marks.get("choice") == lines_hash(profile):
        levels = db.choice_hash(sorted(profile.items()))
        if profile.marks.get("levels", levels) != levels:
            raise UserError(f"{profile.path}: chosen from another {db.kind} database{again}")


def check_marks(table: Table, db: Database, advice: str) -> None:
    """Raise a UserError if a file was made for another kind of database or other dense weights."""
    kind = table.marks.get("database", db.kind)
    if kind != db.kind:
        raise UserError(f"{table.path}: made for a database of kind {kind}, not {db.kind}{advice}")
    if table.marks.get(DENSE_WEIGHTS, db.dense_hash) != db.dense_hash:
        raise UserError(f"{table.path}: made for other dense weights than these{advice}")


# -- what a profile costs --------------------------------------------------------------------------


def report_cost(
    profile: Table,
    db: Database,
    model: nn.Module,  # dense
    image_shape: Example,
    left_dense: Collection[str] = (),  # layers that stay dense whatever the profile says
) -> None:
    """Log what a profile's layers cost; warn if that misses the target that it was made for."""
    named = PROFILE_NAME.fullmatch(Path(profile.path).stem)
    constr = profile.marks.get("constraint", KINDS[db.kind].constraint)
    target = as_number(profile.marks.get("target") or (named[2] if named else "nan"))
    if target and "target" not in profile.marks:
        target /= 100  # names have 100 times the target
    if constr == "timingsq":
        log.info("%s: its target is in measured seconds, which are not at hand", profile.path)
        constr, target = KINDS[db.kind].constraint, math.nan
    levels = {layer: level for layer, level in profile.items() if layer not in left_dense}
    dense, cost = profile_cost(db, levels, model, image_shape, constr)
    reached = dense / cost if cost else math.inf
    if not target or math.isnan(target):
        log.info("%s: reached %.4f (%s)", profile.path, reached, constr)
    elif cost <= dense / target * (1 + TARGET_TOLERANCE):
        log.info("%s: target %.10g, reached %.4f (%s)", profile.path, target, reached, constr)
    else:
        log.warning(
            "%s: misses the target %.10g: reached %.4f (%s)", profile.path, target, reached, constr
        )
