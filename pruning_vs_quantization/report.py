"""One page of whatever has been run: is pruning or quantisation better, for the user's own model?

    python -m pruning_vs_quantization.report [FOLDER] [--model rn20]

Gathers below FOLDER (plots_data) what the parts of the study have left (`report_sections.py`) and
writes report.html, a page that holds its pictures and needs no network, and report.md
(`report_page.py`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from modelutils import TORCHVISION_ALIASES
from obc.inputs import files
from obc.solver import errors
from obc.solver.errors import UserError
from obc.toolkit import cli
from pruning_vs_quantization import study_files
from pruning_vs_quantization.report_page import (
    COMMANDS,
    Section,
    answer,
    html_page,
    markdown_page,
    markdown_table,
    summary_table,
)
from pruning_vs_quantization.report_sections import gather


def page_title(sections: list[Section]) -> str:
    """The question, and of which network, if there is one only."""
    subjects = [section.subject for section in sections if section.part != "densities"]
    names = {subject.partition(" on ")[0] for subject in subjects}
    one = len({TORCHVISION_ALIASES.get(name, name) for name in names}) == 1
    return "Pruning or quantisation?" + (f" {subjects[-1]}" if one else "")


def run(args: argparse.Namespace) -> None:
    sections = gather(args.folder, args.model)
    if not sections or (args.model and all(section.part == "densities" for section in sections)):
        raise UserError(
            f"{args.folder}: nothing of the study in it"
            + (f" for {args.model}" if args.model else "")
            + f"; begin with {COMMANDS['weights']}"
        )
    title, out = page_title(sections), args.out or args.folder
    for name, page in (
        ("report.md", markdown_page(title, sections)),
        ("report.html", html_page(title, sections)),
    ):
        with files.atomic_write(out / name) as file:
            file.write(page.encode())
    cli.print_result(f"{markdown_table(summary_table(sections))}\n\n{answer(sections)}")
    errors.log.info("page: %s", out / "report.html")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="report", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=Path,
        default=study_files.PLOTS_DATA,
        help="below it a folder for each part that has been run",
    )
    add("--model", metavar="MODEL", help="only this one's results (default: all there are)")
    add(
        "--out",
        metavar="DIR",
        type=Path,
        help="where report.html and report.md go (default: FOLDER)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
