"""docs/commands.md is up to date with the parsers, and its examples parse."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex

import pytest
from scripts import ROOT, check_parses, load_script

from obc.__main__ import PARTS
from obc.toolkit import cli

make_commands = load_script("docs/make_commands.py")
DOCUMENT = (ROOT / "docs" / "commands.md").read_text()
COMMON, STUDY = "Common options", "Options of every part"
TOOLKIT = ("main_trueobs", "database", "spdy", "post_proc", "export")
PARSERS = {  # heading -> module of the parser, shared section
    **{f"`{name}.py": (name, COMMON) for name in TOOLKIT},
    "`expected_sqnr`": ("pruning_vs_quantization.expected_sqnr", STUDY),
    "`quant_pruning_weights_sqnr`": ("pruning_vs_quantization.quant_pruning_weights_sqnr", STUDY),
    "`plot_weights_sqnr": ("pruning_vs_quantization.plot_weights_sqnr", None),
    "`post_training_quant_acts_sqnr`": (
        "pruning_vs_quantization.post_training_quant_acts_sqnr",
        STUDY,
    ),
    "`post_training_pruning_acts_sqnr`": (
        "pruning_vs_quantization.post_training_pruning_acts_sqnr",
        STUDY,
    ),
    "`main train-compressed`": ("pruning_vs_quantization.main", STUDY),
    "`main table`": ("pruning_vs_quantization.main", None),
    "`main first-last": ("pruning_vs_quantization.main", None),
    "`report": ("pruning_vs_quantization.report", None),
}


def section(heading: str) -> str:
    """The one section whose heading contains these words, without its blocks of shell."""
    prose = re.sub(r"^```.*?^```", "", DOCUMENT, flags=re.M | re.S)
    sections = re.split(r"^#+ ", prose, flags=re.M)
    (text,) = (text for text in sections if heading in text.partition("\n")[0])
    return text


def documented_options(heading: str) -> dict[str, str]:
    """Flag -> default, "" where the table has none, of every row of a section's table."""
    options = {}
    for row in re.findall(r"^\| (`--.*) \|$", section(heading), re.M):
        names, *cells = re.split(r" *(?<!\\)\| *", row)
        default = cells[0] if len(cells) == 2 else ""
        for flag in re.findall(r"`(--[\w-]+)", names):
            assert flag not in options, f"{flag} appears twice in {heading}"
            options[flag] = default
    return options


def parser_of(heading: str) -> argparse.ArgumentParser:
    """The parser of a section, that of the subcommand if it has one."""
    module, _ = PARSERS[heading]
    parser = importlib.import_module(module).build_parser()
    words = heading.strip("`").split()
    if len(words) == 1:
        return parser
    (commands,) = (x for x in parser._actions if isinstance(x, argparse._SubParsersAction))
    return commands.choices[words[1]]


@pytest.mark.parametrize("heading", PARSERS)
def test_documented_options_are_those_of_the_parser(heading: str) -> None:
    _, shared = PARSERS[heading]
    documented = documented_options(heading) | (documented_options(shared) if shared else {})
    actions = parser_of(heading)._actions
    flags = {flag for action in actions for flag in action.option_strings} - {"-h", "--help"}
    assert documented.keys() == flags


def test_the_page_is_up_to_date():
    assert make_commands.regenerated(DOCUMENT) == DOCUMENT, "run python docs/make_commands.py"


def test_every_command_has_a_table():
    names = {name.partition(" ")[0] for name, _ in make_commands.TABLES.findall(DOCUMENT)}
    study = {f"pruning_vs_quantization.{part}" for part in PARTS}
    study.remove("pruning_vs_quantization.post_training_pruning_acts_sqnr")  # has the same options
    assert names == {"common", "study", *TOOLKIT, *study, "recipes.__main__"}


def test_rows_state_what_the_parser_does():
    parser = cli.Parser(prog="x.py")
    add = parser.add_argument
    add("--plain", action="store_true", help="100 %% of it")
    add("--count", metavar="N", type=int, default=3, help="as with --plain")
    add("--device", metavar="auto|cpu", help="where (default: what --plain says)")
    add("--bits", nargs="+", metavar="B", type=int, default=[4, 2], help="widths")
    add("--way", choices=["one", "other"], required=True, help="which")
    add("--on", action=argparse.BooleanOptionalAction, default=True, help="switch")
    assert [make_commands.row(action, parser) for action in parser._actions[1:]] == [
        "| `--plain` |  | 100 % of it |",
        "| `--count N` | 3 | as with `--plain` |",
        r"| `--device auto\|cpu` | what `--plain` says | where |",
        "| `--bits B …` | 4 2 | widths |",
        "| `--way {one,other}` |  | which; required |",
        "| `--on`, `--no-on` | on | switch |",
    ]


def example_commands() -> list[str]:
    """Every command in the document's blocks of shell."""
    blocks = re.findall(r"^```sh\n(.*?)^```", DOCUMENT, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("line", dict.fromkeys(example_commands()))
def test_example_parses(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    python, *words = shlex.split(line)
    assert python == "python"
    script, *words = words[1:] if words[0] == "-m" else words
    check_parses(script, words, capsys)
