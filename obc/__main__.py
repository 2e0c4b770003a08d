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
    if words[:1] == ["study"] and set(words[1:2]) <= set(PARTS) and len(words) > 1:
        module, arguments = f"pruning_vs_quantization.{words[1]}", words[2:]
    elif words and words[0] in COMMANDS and words[0] != "study":
        module, arguments = COMMANDS[words[0]][0], words[1:]
    else:
        return usage(asked=words in (["-h"], ["--help"]))
    return importlib.import_module(module).main(arguments)


def usage(asked: bool) -> int:
    """Print the commands; to standard error, with status 2, unless --help was asked for."""
    lines = [f"  {word:10} {text}" for word, (_, text) in COMMANDS.items()]
    text = "\n".join(
        ["usage: trueobs COMMAND …        (trueobs COMMAND --help says more)", "", *lines]
        + ["", f"parts of the study: {', '.join(PARTS)}"]
    )
    (sys.stdout if asked else sys.stderr).write(text + "\n")
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
