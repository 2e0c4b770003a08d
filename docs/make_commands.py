"""The tables of options in docs/commands.md, from the parsers: `python docs/make_commands.py`.

Rewrites what is between `<!-- options of NAME -->` and `<!-- end -->`, and nothing else: the text
around the tables is written by hand. NAME is a module with a parser, and a subcommand if it has
some; or `common`, what every command of the toolkit takes, or `study`, what every part of the study
takes. `--check` writes nothing, and fails if something would change.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "commands.md"
TABLES = re.compile(r"<!-- options of ([\w. -]+) -->\n(.*?)<!-- end -->\n", re.DOTALL)
HELP = {"-h", "--help"}
SHARED = {  # name → a command of which these are the options, the flags
    "common": (
        "main_trueobs",
        "--weights --datapath --nsamples --weights-key --classes --labels --image-size --resize "
        "--crop --interpolation --mean --std --noaug --nrounds --batchsize --skip-bad-images "
        "--seed --device --memory --workers --restart --repeat",
    ),
    "study": ("pruning_vs_quantization.expected_sqnr", "--out --seed --restart"),
}
WITHOUT_SHARED = {  # parts of the study that have --out only, with another meaning each
    f"pruning_vs_quantization.{x}"
    for x in ("plot_weights_sqnr", "main table", "main first-last", "report")
}


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a module, or of its subcommand: "pruning_vs_quantization.main table"."""
    module, _, command = name.partition(" ")
    parser = importlib.import_module(module).build_parser()
    if not command:
        return parser
    (commands,) = (x for x in parser._actions if isinstance(x, argparse._SubParsersAction))
    return commands.choices[command]


def shared_flags(name: str) -> set[str]:
    """The flags that another table has."""
    study = name.startswith("pruning_vs_quantization.")
    if name in WITHOUT_SHARED:
        return set()
    return set(SHARED["study" if study else "common"][1].split())


def option_table(name: str) -> str:
    """The options of a parser as Markdown: a table for each group, in the order of --help."""
    source, only = SHARED.get(name, (name, ""))
    parser, tables = parser_of(source), []
    shared = set() if only else shared_flags(name)
    for group in parser._action_groups:
        rows = [
            row(action, parser)
            for action in group._group_actions
            if (flags := set(action.option_strings) - HELP)
            and (flags <= set(only.split()) if only else not flags & shared)
        ]
        if rows:
            title = "" if group.title in ("options", "optional arguments") else f"*{group.title}*"
            tables.append(
                "\n".join([f"| option | default | {title or 'meaning'} |", "|---|---|---|", *rows])
            )
    return "\n\n".join(tables)


def row(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """An option: how it is written, what it is without it, what it means."""
    value = action.metavar
    if value is None and action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if action.nargs in ("+", "*"):
        value = f"{value} …"
    takes_value = action.nargs != 0
    names = [f"{flag} {value}" if takes_value else flag for flag in action.option_strings]
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    text, _, stated = text.partition(" (default: ")
    default = action.default
    if stated and stated != f"{default})":  # as Python 3.10 itself states it of --x, --no-x
        default = stated.removesuffix(")")
    elif default is None or default is False or default == argparse.SUPPRESS or default == []:
        default = ""
    elif default is True:
        default = "on" if len(names) > 1 else ""
    elif isinstance(default, list):
        default = " ".join(map(str, default))
    text += "; required" * (action.required and bool(action.option_strings))
    cells = [", ".join(f"`{name}`" for name in names), str(default), text]
    cells[1:] = [re.sub(r"(?<![\w`-])(--[a-z][\w-]*)", r"`\1`", cell) for cell in cells[1:]]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def regenerated(page: str) -> str:
    """The page with all tables as the parsers have them now."""
    return TABLES.sub(
        lambda found: (
            f"<!-- options of {found[1]} -->\n\n{option_table(found[1])}\n\n<!-- end -->\n"
        ),
        page,
    )


def main() -> int:
    page = PAGE.read_text()
    new = regenerated(page)
    if "--check" in sys.argv[1:]:
        if new != page:
            sys.stderr.write(
                "error: docs/commands.md is not up to date: python docs/make_commands.py\n"
            )
        return int(new != page)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
