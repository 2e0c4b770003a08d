"""Measure the house: files, lines, long functions and names defined twice, per folder, as a table.

    python docs/measure_house.py [ROOT] [--names]

A folder is one row, the modules at the top level are another. Lines are those of `wc -l`; lines of
code leave out blank lines, comments and docstrings. A name counts as defined twice if a module of
the product (all folders but assets, benchmarks, docs, examples, recipes and tests) and another
one of the product or of benchmarks define it at their top level, as a class, a function or a
variable; names that every command has are left out.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

LONG = 50  # lines of a function
NO_PRODUCT = {"assets", "benchmarks", "docs", "examples", "recipes", "tests"}
OF_EVERY_COMMAND = {"build_parser", "main", "run", "check_options"}
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Folder ("." for the top level) and path of every Python file, hidden folders left out."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not any(part.startswith(".") for part in relative.parts):
            yield relative.parent.as_posix(), path


def code_lines(text: str, tree: ast.Module) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE and token.string:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def top_level_names(tree: ast.Module) -> set[str]:
    """Classes, functions and variables that a module defines at its top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        for target in targets:
            names |= {x.id for x in ast.walk(target) if isinstance(x, ast.Name)}
    return names - OF_EVERY_COMMAND


def measured_folders(root: Path) -> tuple[dict[str, list[int]], dict[str, list[Path]]]:
    """Folder -> files, lines, lines of code, long functions; name -> modules that define it."""
    figures: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    homes: dict[str, list[Path]] = defaultdict(list)
    for folder, path in modules(root):
        text = path.read_text()
        tree = ast.parse(text)
        functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
        long = sum(node.end_lineno - node.lineno + 1 > LONG for node in functions)
        values = (1, text.count("\n"), code_lines(text, tree), long)
        figures[folder] = [a + b for a, b in zip(figures[folder], values, strict=True)]
        if in_product(folder) or folder == "benchmarks":
            for name in top_level_names(tree):
                homes[name].append(path.relative_to(root))
    shared = {
        name: paths
        for name, paths in homes.items()
        if len(paths) > 1 and any(in_product(path.parent.as_posix()) for path in paths)
    }
    return figures, shared


def in_product(folder: str) -> bool:
    return folder.split("/")[0] not in NO_PRODUCT


def house_table(root: Path, list_names: bool) -> list[str]:
    """A row per folder; sums of the toolkit, the study and the rest; names defined twice."""
    figures, shared = measured_folders(root)
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    rows = ["| folder | files | lines | of code | functions > 50 | names also elsewhere |"]
    rows.append("|---|---|---|---|---|---|")
    for folder, values in figures.items():
        whole = "toolkit" if in_product(folder) else "outside of the product"
        whole = "study" if folder.startswith("pruning_vs_quantization") else whole
        sums[whole] = [a + b for a, b in zip(sums[whole], values, strict=True)]
        names = [any(x.parent == Path(folder) for x in paths) for paths in shared.values()]
        rows.append(f"| {folder} | {' | '.join(map(str, values))} | {sum(names)} |")
    for whole, values in sums.items():
        rows.append(f"| **{whole}** | {' | '.join(map(str, values))} | |")
    rows.append(f"| **names defined twice** | | | | | {len(shared)} |")
    if list_names:
        rows.append("")
        rows += [f"{x}: {', '.join(map(str, paths))}" for x, paths in sorted(shared.items())]
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", metavar="ROOT", nargs="?", type=Path, default=Path("."))
    parser.add_argument("--names", action="store_true", help="list the names and their modules")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    sys.stdout.write("\n".join(house_table(args.root, args.names)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
