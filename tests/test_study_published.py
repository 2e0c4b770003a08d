"""The commands of the study's published README, as they stand there, and the examples of --help."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from scripts import ROOT, check_parses

from obc.solver.errors import UserError
from pruning_vs_quantization import main
from pruning_vs_quantization.training_options import TrainingOptions, training_options

FOLDER = ROOT / "pruning_vs_quantization"
COMMANDS = {  # as published; the network, the images and the size are those that are here
    "quant_pruning_weights_sqnr.py": "--models rn8 --bits 4",
    "plot_weights_sqnr.py": "",
    "post_training_quant_acts_sqnr.py": """quant-bounds-data-opt --model-name rn8 --dataset digits
        --range-search-method MSE --num-output-channels -1 --layer-name conv1 --n-bits 4
        --opt-dim 8 --num-chunks 1 --nsamples 32 --method exact --verbose-solvers""",
    "main.py": """train-compressed --architecture rn8_quantized --model-dir MODELS --dataset digits
        --train-samples 128 --batch-size 64 --max-epochs 1 --no-act-quant --no-cuda""",
}
SCRIPTS = [*(name.removesuffix(".py") for name in COMMANDS), "expected_sqnr", "report"]
SCRIPTS += ["post_training_pruning_acts_sqnr"]


def run(words: list[str], cwd, environment=os.environ) -> str:
    """What a command prints."""
    words = [sys.executable, *words]
    done = subprocess.run(words, cwd=cwd, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_run_in_the_folder_of_the_study(tmp_path):
    """By links to its files, since results go to where a command runs."""
    for script in COMMANDS:
        (tmp_path / script).symlink_to(FOLDER / script)
    (tmp_path / "models").mkdir()
    shutil.copy(ROOT / "assets" / "rn8_digits.pth", tmp_path / "models" / "rn8.pth.tar")
    printed = {}
    for script, words in COMMANDS.items():
        words = words.replace("MODELS", str(tmp_path / "models"))
        printed[script] = run([script, *shlex.split(words)], tmp_path)
    assert "| rn8 | 4 | 8 |" in printed["quant_pruning_weights_sqnr.py"]
    assert "pruning better in 0 of 8" in printed["plot_weights_sqnr.py"]
    assert "| conv1 | 4 | 16 of 16 |" in printed["post_training_quant_acts_sqnr.py"]  # channels
    assert float(printed["main.py"].splitlines()[-1].removeprefix("top-1 ")) > 90
    assert (tmp_path / "plots_data" / "weights_sqnr" / "weights_sqnr.png").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_of_the_study_shadow_nobodys(script):
    """Started as a file, a command does not search its own folder, which has a plots.py."""
    code = f"""
import runpy, sys
sys.argv, sys.path[0] = ["{script}.py"], {str(FOLDER)!r}
runpy.run_path({str(FOLDER / script)!r} + ".py")
assert sys.path[0] == {str(ROOT)!r} and {str(FOLDER)!r} not in sys.path
"""
    if script == "report":  # one is enough to run; the others have the same lines
        run(["-c", code], ROOT)
    head = re.compile(r"^if not __package__:.*\n    sys\.path\[0\] = .*\n    import pruning", re.M)
    assert len(head.findall((FOLDER / f"{script}.py").read_text())) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_ends_with_an_example_that_parses(script, capsys):
    module = importlib.import_module(f"pruning_vs_quantization.{script}")
    pages = [[]] if script != "main" else [[], ["train-compressed"], ["table"], ["first-last"]]
    for words in pages:
        with pytest.raises(SystemExit):
            module.build_parser().parse_args([*words, "--help"])
        *_, title, line = capsys.readouterr().out.splitlines()
        python, m, name, *arguments = shlex.split(line)
        assert (title, python, m, name) == ("example:", "python", "-m", module.__name__)
        assert arguments[: len(words)] == words
        module.build_parser().parse_args(arguments)


def documented_commands() -> list[list[str]]:
    """The words of every `python …` in docs/study.md, without the first."""
    text = (ROOT / "docs" / "study.md").read_text()
    lines = re.findall(r"^python .*$", text, re.M) + re.findall(r"`(python [^`]+)`", text)
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.parametrize("words", documented_commands(), ids=" ".join)
def test_documented_commands_parse(words, capsys):
    module, *words = words[1:] if words[0] == "-m" else words
    name = module.removesuffix(".py")
    script = name if "." in name else f"pruning_vs_quantization.{name}"
    script = "recipes.__main__" if name == "recipes" else script
    check_parses(script, words, capsys)


# -- --model-dir -----------------------------------------------------------------------------------


def options(*words: str) -> TrainingOptions:
    words = ["train-compressed", "--architecture", "rn8_quantized", *map(str, words)]
    return training_options(main.build_parser().parse_args(words))


def test_model_dir_is_the_file_or_its_folder(tmp_path):
    file = tmp_path / "mobilenet_v2.pth.tar"
    torch.save({}, file)
    (tmp_path / "notes.txt").touch()
    for named in (file, tmp_path):
        chosen = options("--model-dir", named)
        assert chosen.weights == str(file)
        assert chosen.settings() == options("--weights", file).settings()


def test_model_dir_that_says_nothing_or_too_much(tmp_path):
    with pytest.raises(UserError, match="contains no weights; name the file itself"):
        options("--model-dir", tmp_path)
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="contains a.pth, b.pth; name the file itself"):
        options("--model-dir", tmp_path)
    with pytest.raises(UserError, match="--model-dir and --weights say the same"):
        options("--model-dir", tmp_path / "a.pth", "--weights", "b.pth")


# -- the image -------------------------------------------------------------------------------------


def test_the_dockerfile_is_the_published_one_and_copies_what_there_is():
    """docker/check.sh builds it, which takes minutes and a network."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    assert "docker build -f docker/Dockerfile --tag pruning_vs_quantization:latest .\n" in text
    assert "docker run -ti pruning_vs_quantization:latest\n" in text
    sources = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in line.split()]
    assert sources and all((ROOT / source).exists() for source in sources)
    instructions = set(re.findall(r"^([A-Z]+) ", text, re.M))
    script = (ROOT / "docker" / "check.sh").read_text()
    assert instructions <= set(re.findall(r"\b[A-Z]+\b", script))
