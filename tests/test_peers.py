"""benchmarks/peers: records, versions and the table agree. No other tool is imported."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.peers import table

FOLDER = Path(table.__file__).parent
RECORDS = sorted((FOLDER / "records").glob("*.json"))


def test_the_readme_shows_the_table_of_the_records() -> None:
    assert table.table(table.read_records(FOLDER / "records")) in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_of_a_known_cell_with_the_pinned_version(path: Path) -> None:
    record = json.loads(path.read_text())
    method = table.METHODS[record["method"]]
    assert record["cell"] in method.cells and record["package"] == method.package
    assert path.stem == f"{record['method']}_{record['cell'].replace(':', '')}"
    assert (record["images"], record["threads"]) == (1024, 1)
    assert record["settings"] == method.settings
    assert 0 < record["top1"] <= 100 and record["kl"] > 0 and record["cpu_seconds"] > 0
    if method.package != "trueobs":
        pins = (FOLDER / f"{method.package}.txt").read_text().split()
        assert f"{method.package}=={record['version']}" in pins
        assert f"torch=={record['torch'].partition('+')[0]}" in pins


def test_a_cell_is_measured_missing_or_impossible(tmp_path: Path) -> None:
    record = {"method": "brevitas-gptq", "cell": "2w", "version": "9.8.7"}
    record |= {"top1": 81.5, "kl": 0.123456, "cpu_seconds": 7.8}
    (tmp_path / "one.json").write_text(json.dumps(record))
    records = table.read_records(tmp_path)
    assert (
        "| Brevitas 9.8.7 | GPTQ | not run | not run | 81.50, 0.123, 8 s | not run | – |"
        in table.table(records).splitlines()
    )
    missing = table.todo(records)
    assert "brevitas brevitas-gptq 3w" in missing and "brevitas brevitas-gptq 2w" not in missing
    assert len(missing) == sum(len(method.cells) for method in table.METHODS.values()) - 1


def test_the_script_knows_every_tool_and_parses() -> None:
    tree = ast.parse((FOLDER / "compress.py").read_text())
    tools = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MAKERS"
    )
    packages = {method.package for method in table.METHODS.values()}
    assert {ast.literal_eval(key) for key in tools.keys} == packages == table.TOOLS.keys()
    pinned = {path.stem for path in FOLDER.glob("*.txt")}
    assert pinned == packages - {"trueobs"}
    assert subprocess.run(["bash", "-n", FOLDER / "run.sh"]).returncode == 0
    for path in FOLDER.glob("*.txt"):
        assert re.search(rf"^{path.stem}==[\d.]+$", path.read_text(), re.MULTILINE)
