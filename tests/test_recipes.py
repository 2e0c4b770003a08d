"""OBC's own recipes (docs/commands.md) and the scripts in recipes/, from end to end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ROOT, check_parses, load_script

from obc.solver.errors import UserError
from obc.toolkit.records import write_run
from recipes import recipe
from recipes.__main__ import main

QUICK = ["--nsamples", "128", "--batchsize", "32", "--noaug", "--device", "cpu"]

CONTRACT = (ROOT / "docs" / "commands.md").read_text()
OBC_RECIPES = re.search(r"^## OBC's own recipes$.*?^```sh\n(.*?)^```", CONTRACT, re.M | re.S)[1]
OBC_COMMANDS = [line for line in OBC_RECIPES.splitlines() if not line.startswith("#")]
OBC_FILES = """\
rn8_4w4a.pth rn8_24.pth rn8_24_4w4a.pth rn8_unstr_200x_dp.txt rn8_mixed_800x_dp.txt
models_unstr/rn8_0000.pth models_unstr/rn8_9900.pth models_4block/rn8_9500.pth
models_nm/rn8_24.pth models_quant/rn8_8w8a.pth models_quant/rn8_4w4a.pth
models_nm_quant/rn8_24_8w8a.pth models_nm_quant/rn8_24_4w4a.pth
scores/rn8_unstr_loss.txt scores/rn8_mixed_loss.txt""".split()


# -- OBC's own recipes -----------------------------------------------------------------------------


@pytest.mark.slow
def test_obc_recipes_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line in OBC_COMMANDS:
        line = line.replace("rn18 imagenet", "rn8 digits").replace("rn18_", "rn8_")
        _, script, *words = line.split()
        quick = QUICK if "--statcorr-samples" not in words else QUICK[2:]
        grid = ["--delta-sparse", "0.4"] if "--sparse-dir" in words else []
        assert load_script(script).main([*words, *quick, *grid]) == 0, line
        last = capsys.readouterr().out.splitlines()[-1]
        makes = {"database.py": " scores/rn8_", "spdy.py": "profile rn8_"}.get(script)
        if makes or grid:  # the last line names the file or folder that was made
            assert (makes or words[-1]) in last, line
        else:
            assert re.fullmatch(r"top-1 \d\d\.\d\d", last), line
            assert float(last.split()[1]) > 90, line
    assert [name for name in OBC_FILES if not (tmp_path / name).is_file()] == []


# -- recipes/ --------------------------------------------------------------------------------------

PROGRAMS = [path for path in (ROOT / "recipes").glob("*.py") if "def main(" in path.read_text()]
SCRIPTS = ("block8", "mixed", "nm", "quantisation", "unstructured")


def run_recipe(name: str, *words: str, python: Path, **settings: object):
    """Run a recipe with OUT=results, in the current folder."""
    environment = {**os.environ, "PYTHON": str(python), "OUT": "results", **settings}
    return subprocess.run(
        [ROOT / "recipes" / f"{name}.sh", *words], env=environment, text=True, capture_output=True
    )


def table(output: str) -> list[list[str]]:
    """Target, method, reached, top-1, KL, agreement, paper: rows of the table, the only output."""
    head, rule, *rows = output.splitlines()
    assert head == "| target | method | reached | top-1 | KL | agreement | paper |"
    assert rule == "|---|---|---|---|---|---|---|"
    return [row.removeprefix("| ").removesuffix(" |").split(" | ") for row in rows]


def compressed(output: str) -> list[list[str]]:
    """The rows of a recipe's table below the dense model's."""
    dense, *rows = table(output)
    assert [*dense[:3], *dense[4:]] == ["–", "dense", "–", "–", "–", "–"] and float(dense[3]) > 95
    assert all(float(row[4]) >= 0 and 0 <= float(row[5]) <= 100 for row in rows)
    return rows


def check_picture(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


class Notes:
    """Stands for the commands of a recipe: notes them down, leaves records, fails if told to."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []  # script and words
        self.fails = "nothing"

    def run_command(self, script: str, words: list[str], printed: bool = False) -> None:
        self.commands.append([script, *words])
        if script == self.fails:
            raise UserError("as told")
        if "--save" in words:
            path = Path(words[words.index("--save") + 1])
        elif script in ("spdy.py", "recipes.uniform"):
            ending = (
                "uniform" if script == "recipes.uniform" else "dp" if "--dp" in words else "spdy"
            )
            target = f"{100 * float(words[2]):g}x"
            path = Path("results") / f"{words[0]}_{words[3]}_{target}_{ending}.txt"
        else:
            return
        figures = {"top1": 90.0, "kl": 0.0123456, "agreement": 99.5, "reached": 2.00004}
        write_run(path.with_suffix(".json"), script, {}, **figures)


@pytest.fixture
def notes(tmp_path, monkeypatch) -> Notes:
    """A recipe's commands are noted down, and not run; results/ is its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUT", "results")
    notes = Notes()
    monkeypatch.setattr(recipe, "run_command", notes.run_command)
    monkeypatch.setattr(recipe.Recipe, "add_dense", lambda self: None)
    monkeypatch.setattr(
        recipe.Recipe,
        "report",
        lambda self, *words: notes.commands.append(
            ["recipes/report.py", self.name, self.model, self.dataset, str(self.results)]
            + list(map(str, words))
        ),
    )
    return notes


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_of_a_recipe_parses(name, notes, capsys):
    """Without any common option."""
    assert main([name, "rn18", "imagenet"]) == 0
    for script, *words in notes.commands:
        check_parses(script, words, capsys)
    assert len(notes.commands) >= 5 and notes.commands[-1][0] == "recipes/report.py"


def test_results_are_those_of_the_records(notes):
    assert main(["unstructured", "rn18", "imagenet", "--targets", "2", "--no-search"]) == 0
    assert Path("results/unstructured.tsv").read_text().splitlines() == [
        f"{method}\t2\t2.0000\t90.00\t0.0123\t99.50"
        for method in ("uniform", "uniform, solved anew", "DP", "DP, solved anew")
    ]


def test_norms_are_tuned_on_augmented_images_unless_told_otherwise(notes):
    options = ("--noaug", "--seed", "1")
    for more, noaug in (([], [False, True]), (["--tune-noaug"], [True, True])):
        notes.commands.clear()
        assert main(["mixed", "rn18", "imagenet", *options, *more]) == 0
        corrected = [words for script, *words in notes.commands if script == "post_proc.py"]
        tuned = ["--bnt" in words for words in corrected]
        assert tuned == ["--resolve" not in words for words in corrected] and any(tuned)
        for words, is_tuned in zip(corrected, tuned, strict=True):
            assert ("--noaug" in words) == noaug[not is_tuned] and words[-2:] == ["--seed", "1"]
    notes.commands.clear()
    assert main(["mixed", "rn18", "imagenet", "--no-resolve"]) == 0
    assert not any("--resolve" in words for words in notes.commands)


def test_the_environment_sets_what_options_set(notes, monkeypatch):
    """As it did when the recipes were shell scripts; the command line counts more."""
    for name, value in {"TARGETS": "7 9.5", "SEARCH": "0", "RESOLVE": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GRID", "--min-sparsity 0.25 --delta-sparse 0.5")
    monkeypatch.setenv("BITS", "3")  # of another recipe
    assert main(["unstructured", "rn18", "imagenet", "--nsamples", "9"]) == 0
    grid = notes.commands[0][notes.commands[0].index("--min-sparsity") :]
    assert grid == ["--min-sparsity", "0.25", "--delta-sparse", "0.5", "--nsamples", "9"]
    targets = [words[3] for words in notes.commands if words[0] == "spdy.py"]
    assert targets == ["7", "9.5"]
    assert not any("--resolve" in words for words in notes.commands)
    notes.commands.clear()
    assert main(["unstructured", "rn18", "imagenet", "--targets", "4"]) == 0
    assert [words[3] for words in notes.commands if words[0] == "spdy.py"] == ["4"]


def test_a_bad_word_in_the_environment_is_one_line(notes, monkeypatch, capsys):
    monkeypatch.setenv("TARGETS", "two")
    with pytest.raises(SystemExit) as stop:
        main(["mixed", "rn18", "imagenet"])
    assert stop.value.code == 2 and not notes.commands
    assert capsys.readouterr().err == "error: --targets must be a number above 0; got two\n"


@pytest.mark.parametrize(
    ("name", "script"),
    [
        *((name, "post_proc.py") for name in SCRIPTS),
        *((name, "main_trueobs.py") for name in SCRIPTS),
        *(
            (name, script)
            for name in ("block8", "mixed", "unstructured")
            for script in ("recipes.uniform", "spdy.py", "database.py")
        ),
    ],
)
def test_a_failing_command_stops_a_recipe(name, script, notes, capsys):
    notes.fails = script
    assert main([name, "rn18", "imagenet"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: as told"
    assert notes.commands[-1][0] == script  # no command follows it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "quantisation",
            [
                (bits, method, f"{bits} bits")
                for bits in "432"
                for method in ("asymmetric, BN-tuned", "asymmetric, sequential", "symmetric")
            ],
        ),
        (
            "nm",
            [
                (pattern, method, pattern)
                for pattern in ("2:4", "4:8")
                for method in ("first and last dense, BN-tuned", "sequential")
            ],
        ),
    ],
)
def test_uniform_tables(name, expected, warm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_recipe(name, "rn8", "digits", *QUICK, python=warm.python)
    assert done.returncode == 0, done.stderr
    rows = compressed(done.stdout)
    assert [(target, method, reached) for target, method, reached, *_ in rows] == expected
    for target, _, _, top1, _, _, paper in rows:
        assert float(top1) > (30 if target == "2" else 95) and paper == "–"
    check_picture(tmp_path / "results" / f"{name}_accuracy.png")


def check_nonuniform(name: str, methods: list[str], targets: list[str], output: str) -> None:
    """Two rows per target and method, each of which meets its target; the pictures."""
    rows = compressed(output)
    methods = [f"{method}{way}" for method in methods for way in ("", ", solved anew")]
    assert [row[:2] for row in rows] == [[f"{t}×", m] for t in targets for m in methods]
    for target, _, reached, top1, _, _, paper in rows:
        times, wanted = float(reached.removesuffix("×")), float(target.removesuffix("×"))
        assert wanted <= times + 0.005 and times < 3 * wanted
        assert float(top1) > 90 and paper == "–"
    for picture in ("accuracy", "errors", "profiles"):
        check_picture(Path("results") / f"{name}_{picture}.png")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "targets", "settings"),
    [
        ("unstructured", ["2", "3.5"], {"GRID": "--delta-sparse 0.4", "SEARCH": "1"}),
        ("mixed", ["10"], {}),
        ("block8", ["9"], {"GRID": "--min-sparsity 0.5 --max-sparsity 0.75 --delta-sparse 0.5"}),
    ],
)
def test_nonuniform_tables(name, targets, settings, warm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"SEARCH": "0", "TARGETS": " ".join(targets), **settings}
    done = run_recipe(name, "rn8", "digits", *QUICK, python=warm.python, **settings)
    assert done.returncode == 0, done.stderr
    methods = ["uniform", "DP", "search"] if settings["SEARCH"] == "1" else ["uniform", "DP"]
    check_nonuniform(name, methods, targets, done.stdout)
    dp = [float(row[3]) for row in table(done.stdout) if row[1] == "DP"]
    assert dp[0] >= dp[-1] - 1  # a harder target is no better


@pytest.mark.slow
def test_block8_at_measured_time(warm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers = [f"layer{n}.0.conv{m}" for n in (1, 2, 3) for m in (1, 2)]
    seconds = "".join(
        f"{name}\n8.0 dense\n2.5 5000\n1.0 7500\n" for name in ("conv1", *layers, "linear")
    )
    Path("seconds.txt").write_text(seconds)
    grid = "--min-sparsity 0.5 --max-sparsity 0.75 --delta-sparse 0.5"
    done = run_recipe(
        "block8",
        "rn8",
        "digits",
        *QUICK,
        python=warm.python,
        GRID=grid,
        SEARCH="0",
        TARGETS="4",
        TIMINGS="seconds.txt",
    )
    assert done.returncode == 0, done.stderr
    check_nonuniform("block8", ["uniform", "DP"], ["4"], done.stdout)
    reached = [row[2] for row in compressed(done.stdout)]
    assert reached == ["8.00×"] * 2 + ["4.13×"] * 2  # 8 · 8 / (5 · 2.5 + 3)


@pytest.mark.slow
def test_deploy_exports_and_measures_what_it_chooses(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    grid = ("--max-sparsity", "0.6", "--delta-sparse", "0.4")
    words = ("deploy", "rn8", "digits", *QUICK, "--out", "results", "--targets", "0.5", "1000")
    assert main([*words, *grid]) == 0
    out, err = capsys.readouterr()
    dense, *rows = table(out)
    ways = ("uniform, solved anew", "uniform, exported", "DP, solved anew", "DP, exported")
    assert [row[1] for row in rows] == list(ways)
    anew, exported = ([float(row[3]) for row in rows[first::2]] for first in (0, 1))
    assert all(top1 > 95 for top1 in anew) and exported == pytest.approx(anew, abs=1)
    assert err.count("1000× faster than 8 bits: skipped") == 2  # for uniform levels and for the DP
    assert len(list(Path("results").glob("rn8_struct_8w8a_*x_dp_exported.onnx"))) == 1


def test_a_recipe_without_arguments_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["nm", "rn8"])
    assert stop.value.code == 2 and not os.listdir()
    message = "error: the following arguments are required: DATASET\n"
    assert capsys.readouterr().err == message


@pytest.mark.slow
def test_a_target_out_of_reach(warm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_recipe(
        "unstructured",
        "rn8",
        "digits",
        *QUICK,
        python=warm.python,
        TARGETS="3",
        GRID="--min-sparsity 0.5 --max-sparsity 0.5",
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "error: no level reaches 3x; the most is 2.00x"
    assert "Traceback" not in done.stderr


# -- recipes/report.py -----------------------------------------------------------------------------


@pytest.fixture
def report(tmp_path, capsys):
    """Runs report.py on lines of results; status, standard output and error."""
    report_main = load_script("recipes/report.py").main

    def run(text: str, recipe: str, model: str, dataset: str) -> tuple[int, str, str]:
        results = tmp_path / f"{recipe}.tsv"
        results.write_text(text)
        return (report_main([recipe, model, dataset, str(results)]), *capsys.readouterr())

    return run


UNSTRUCTURED = """dense\t-\t-\t76.1
uniform\t2\t2.01\t75.1
DP\t2\t2.0004\t75.5
search\t4\t4.0004\t74.123\t0.0123\t90.50
"""


@pytest.mark.parametrize(
    ("recipe", "model", "dataset", "papers"),
    [
        ("unstructured", "rn50", "imagenet", ["76.13", "–", "75.64", "74.05"]),
        ("unstructured", "rn50", "cifar10", ["–", "–", "–", "–"]),
        ("unstructured", "rn101", "imagenet", ["–", "–", "–", "–"]),
        ("mixed", "rn18", "imagenet", ["69.76", "–", "–", "–"]),  # no such targets
    ],
)
def test_numbers_of_the_paper(recipe, model, dataset, papers, report, tmp_path):
    status, out, _ = report(UNSTRUCTURED, recipe, model, dataset)
    assert status == 0 and [row[-1] for row in table(out)] == papers
    assert table(out)[3][:6] == ["4×", "search", "4.00×", "74.12", "0.0123", "90.50"]
    assert table(out)[2][4:6] == ["–", "–"]  # written before there were any
    check_picture(tmp_path / f"{recipe}_accuracy.png")


def test_numbers_of_the_paper_of_quantisation(report):
    lines = "asymmetric, BN-tuned\t3\t3 bits\t75\nsymmetric\t3\t3 bits\t73\n"
    status, out, _ = report(lines, "quantisation", "rn50", "imagenet")
    assert status == 0 and [row[-1] for row in table(out)] == ["75.24", "73.61"]
    assert [row[:3:2] for row in table(out)] == [["3", "3 bits"]] * 2


def test_names_of_profiles_in_pictures():
    label = load_script("recipes/report.py").profile_label
    assert label(Path("a/rn18_unstr_230x_dp.txt")) == "2.3× dp"
    assert label(Path("mine.txt")) == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DP\t2\t2.0\t75.5\nDP\t3\t3.0\t\n", "line 2: expected method, target, reached, top-1"),
        ("DP 2 2.0 75.5\n", "line 1: expected method"),
        ("", "no results in it"),
    ],
)
def test_broken_results_are_one_line(text, message, report, tmp_path):
    status, out, err = report(text, "unstructured", "rn50", "imagenet")
    assert (status, out) == (2, "") and not list(tmp_path.glob("*.png"))
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("script", sorted(PROGRAMS), ids=lambda x: x.stem)
def test_a_script_of_recipes_runs_from_any_folder(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr
