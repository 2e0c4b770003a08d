"""`trueobs WORD …`, or `python -m obc WORD …`: all commands under one name."""

from __future__ import annotations

import obc.toolkit.starting  # noqa: F401  # isort: skip

import importlib
import sys

COMMANDS = {  # word -> module, what it does
    "compress": ("main_trueobs", "compress a model, or make a database of its layers"),
    "database": ("database", "measure the levels of a database"),
    "spdy": ("spdy", "choose a level for each layer"),
    "post": ("post_proc", "correct a compressed model"),
    "export": ("export", "write it as ONNX, a program or packed codes, and measure it"),
    "study": ("pruning_vs_quantization", "the second study: `trueobs study PART …`"),
}
PARTS = (  # of the study
    "expected_sqnr",
    "quant_pruning_weights_sqnr",
    "plot_weights_sqnr",
    "post_training_quant_acts_sqnr",
    "post_training_pruning_acts_sqnr",
    "main",
    "report",
)


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["-h"], ["--help"]):
        sys.stdout.write(usage())
        return 0
    study = words[:1] == ["study"]
    names, word = (PARTS, words[1:2]) if study else (COMMANDS, words[:1])
    if not word or word[0] not in names:
        given = f"{word[0]}: no such command" if word else "name a command"
        first = "trueobs study" if study else "trueobs"
        sys.stderr.write(f"error: {given}; {first} {' | '.join(names)}\n")
        return 2
    module = f"pruning_vs_quantization.{word[0]}" if study else COMMANDS[word[0]][0]
    return importlib.import_module(module).main(words[2 if study else 1 :])


def usage() -> str:
    """What --help shows."""
    lines = [f"  {word:10} {text}" for word, (_, text) in COMMANDS.items()]
    head = "usage: trueobs COMMAND …        (trueobs COMMAND --help says more)"
    return "\n".join([head, "", *lines, "", f"parts of the study: {', '.join(PARTS)}", ""])


if __name__ == "__main__":
    sys.exit(main())
