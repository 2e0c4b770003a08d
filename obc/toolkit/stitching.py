"""The compressed model that a command's FILE names: a checkpoint, or a profile to stitch.

A profile gives each layer a level; the layer's tensors are those of this level in the database, and
all other tensors are the dense model's.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Collection, Mapping

from torch import nn

from modelutils import find_layers
from obc.solver.errors import log
from obc.toolkit import origins
from obc.toolkit.kinds import KINDS
from obc.toolkit.leveldb import Database
from obc.toolkit.session import Session


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """Add FILE, and the options that say which database it is a profile of."""
    add = parser.add_argument
    add("file", metavar="FILE", help="compressed checkpoint; with --database, profile to stitch")
    add("--database", choices=list(KINDS), help="kind of the database that FILE is a profile of")
    add("--prefix", metavar="DIR", help="where models_unstr/ etc. are (default: here)")


def stitched(
    session: Session,
    db: Database,
    profile: Mapping[str, str],  # layer -> level
    left_dense: Collection[str] = (),  # layers that the caller takes from the dense model
) -> nn.Module:
    """The model that a profile describes; logs what it costs, and what is not in the profile.

    Raises UserError if the database was made of other weights, or the profile of another database.
    """
    dense = session.model
    db.check(dense, session.weights_name)
    origins.check_profile(profile, db)
    origins.report_cost(profile, db, dense, session.task.example, left_dense)
    model = copy.deepcopy(dense)
    db.stitch(model, profile)
    for name in find_layers(model).keys() - profile.keys():
        log.info("%s left dense: not in the profile", name)
    return model
