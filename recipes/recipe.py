"""What the recipes share: commands that run in this process, one after another, and their records.

A recipe is a sequence of the commands that a user would type, on one network. It takes every number
from the record that a command writes next to its output, never from what it prints, and adds a line
per result to RECIPE.tsv, of which `report.py` makes the table and the pictures. Standard output
gets the table; what the commands print goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shlex
import sys
from pathlib import Path
from typing import Any

from obc.inputs import files
from obc.solver.errors import log
from obc.toolkit.evaluation import Evaluation
from obc.toolkit.leveldb import model_tag
from obc.toolkit.records import read_record
from obc.toolkit.session import Session, common_options
from recipes import report


def run_command(
    script: str,  # main_trueobs.py, or the name of a module: recipes.uniform
    words: list[str],
    printed: bool = False,  # on standard output, not on standard error
) -> None:
    """Run one of our commands in this process; raises what it raises."""
    is_module = not script.endswith(".py")
    log.info("$ python %s", shlex.join(["-m", script, *words] if is_module else [script, *words]))
    module = importlib.import_module(script.removesuffix(".py"))
    args = module.build_parser().parse_args(words)
    with contextlib.redirect_stdout(sys.stdout if printed else sys.stderr):
        module.run(args)


class Recipe:
    """A recipe at work on a network: its folder, its common options and its results so far."""

    def __init__(
        self,
        args: argparse.Namespace,  # of `recipes.__main__`
        common: list[str],  # words of the common options
    ) -> None:
        self.args, self.name = args, args.recipe
        self.model, self.dataset = args.model, args.dataset
        self.common = common
        self.tag = model_tag(args.model)
        self.folder = Path(args.out or f"results/{self.tag}-{self.dataset}")
        self.results = self.folder / f"{self.name}.tsv"
        self.lines: list[str] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        files.check_writable(self.results)

    def file(self, name: str) -> Path:
        """<model>_<name> in the folder of the results."""
        return self.folder / f"{self.tag}_{name}"

    def run(self, script: str, *words: object) -> None:
        """One of the toolkit's commands, with the common options."""
        run_command(script, [self.model, self.dataset, *map(str, words), *self.common])

    def compress(self, path: Path, *words: object) -> dict[str, Any]:
        """Make a compressed model; its record."""
        self.run("main_trueobs.py", *words, "--save", path)
        return read_record(path.with_suffix(".json"))

    def corrected(self, path: Path, *words: object) -> dict[str, Any]:
        """Correct the model that `words` begin with, into a file; the record of the result."""
        self.run("post_proc.py", *words, "--save", path)
        return read_record(path.with_suffix(".json"))

    def tuned(self, path: Path, *words: object) -> dict[str, Any]:
        """The same, by batch-norm tuning. Its images are augmented, as those that networks are
        trained on, even if the layers are compressed with --noaug; unless --tune-noaug says so.
        """
        common, more = self.common, ["--noaug"] if self.args.tune_noaug else []
        self.common = [word for word in common if word != "--noaug"]
        try:
            return self.corrected(path, *words, "--bnt", *more)
        finally:
            self.common = common

    def add(self, method: str, target: object, reached: str, figures: dict[str, Any]) -> None:
        """Add a result of a record: top-1 and, if the dense model was compared with, the rest."""
        cells = [f"{figures['top1']:.2f}"]
        if "kl" in figures:
            kl = figures["kl"]
            cells += ["nan" if kl is None else f"{kl:.3g}", f"{figures['agreement']:.2f}"]
        self.add_line(method, target, reached, *cells)

    def add_line(self, *cells: object) -> None:
        """Add a line to the results, and write all of them."""
        self.lines.append("\t".join(map(str, cells)))
        with files.atomic_write(self.results) as file:
            file.write("".join(f"{line}\n" for line in self.lines).encode())

    def add_dense(self) -> Evaluation:
        """Measure the dense model: the first line."""
        session = Session.of(common_options(self.args))
        session.dense_figures()
        evaluation = session.evaluation(session.model)
        self.add(report.DENSE, "-", "-", {"top1": evaluation.top1})
        return evaluation

    def report(self, *words: object) -> None:
        """Print the table, write the pictures next to the results."""
        words = [self.name, self.model, self.dataset, self.results, *words]
        report.run(report.build_parser().parse_args(list(map(str, words))))
