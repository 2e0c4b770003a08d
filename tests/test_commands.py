"""docs/commands.md agrees with the parsers: options, defaults; and its examples parse."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex

import pytest
from scripts import ROOT, check_parses

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


def agrees(documented: str, action: argparse.Action) -> bool:
    """Whether the default in a table is the parser's, or one that its help text states."""
    default = action.default
    if default is None or isinstance(default, bool) or default == argparse.SUPPRESS:
        return not documented or f"default: {documented}" in action.help
    if isinstance(default, (int, float)):
        return float(documented) == default
    return documented == (" ".join(map(str, default)) if isinstance(default, list) else default)


@pytest.mark.parametrize("heading", PARSERS)
def test_documented_options_are_those_of_the_parser(heading: str) -> None:
    _, shared = PARSERS[heading]
    documented = documented_options(heading) | (documented_options(shared) if shared else {})
    actions = parser_of(heading)._actions
    flags = {flag for action in actions for flag in action.option_strings} - {"-h", "--help"}
    assert documented.keys() == flags


@pytest.mark.parametrize("heading", PARSERS)
def test_documented_defaults_are_those_of_the_parser(heading: str) -> None:
    documented = documented_options(heading)
    if PARSERS[heading][1] == COMMON:
        documented |= documented_options(COMMON)
    actions = {
        flag: action for action in parser_of(heading)._actions for flag in action.option_strings
    }
    wrong = [
        flag
        for flag, default in documented.items()
        if flag != "--out" and not agrees(default, actions[flag])  # --out: a folder of its own each
    ]
    assert wrong == []


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
