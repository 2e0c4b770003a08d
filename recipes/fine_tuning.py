"""Quantised against pruned at equal size, fine-tuned (Kuzmin et al., arXiv 2307.02973, section 5).

b-bit weights and FP16 weights of sparsity 1 − b/16, first and last layer at 8 bits or half of their
weights; and, for comparison, OBQ and ExactOBS without training, batch-norm tuned. Finished steps
are not repeated.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from obc.inputs import files
from obc.solver.errors import UserError, log
from obc.toolkit.leveldb import level_name
from obc.toolkit.records import read_record
from pruning_vs_quantization.expected_error import sparsity_of
from recipes.recipe import Recipe, run_command

STUDY = "pruning_vs_quantization.main"


def fine_tuning(recipe: Recipe) -> None:
    """Accuracy at equal size, trained and untrained (the second study, section 5)."""
    args = recipe.args
    check_options(recipe)
    widths = args.bits
    for bits in dict.fromkeys((8, *widths)):
        path = recipe.file(f"w{bits}.pth")
        if is_missing(path):
            recipe.run("main_trueobs.py", "quant", "--wbits", bits, "--save", path)
        path, sparsity = level(recipe, bits), sparsity_of(bits)
        if is_missing(path.with_name(f"{recipe.tag}.json")):
            words = ("--min-sparsity", f"{sparsity:g}", "--max-sparsity", f"{sparsity:g}")
            recipe.run("main_trueobs.py", "unstr", "--sparse-dir", path.parent, *words)
    for bits in widths:
        tuned(recipe, "OBQ", bits, recipe.file(f"w{bits}.pth"), recipe.file("w8.pth"))
        tuned(recipe, "ExactOBS", bits, level(recipe, bits), level(recipe, 8))
    for bits in widths:
        for seed in args.seeds or [args.seed]:
            common = (
                "--no-act-quant",
                "--reestimate-bn-stats",
                "--seed",
                seed,
                "--out",
                args.study,
            )
            quantise = ("--n-bits", bits, *args.train, *args.train_quantised)
            study(recipe, "train-compressed", *common, *quantise, *options_of_training(recipe))
            prune = ("--no-weight-quant", "--prune-method", "zhu_gupta")
            prune += ("--s-f", f"{sparsity_of(bits):g}", *args.train, *args.train_pruned)
            study(recipe, "train-compressed", *common, *prune, *options_of_training(recipe))
    study(recipe, "table", "--untrained", recipe.results, "--out", args.study, printed=True)


def check_options(recipe: Recipe) -> None:
    """Raise a UserError if the folder holds results of other options; note down ours."""
    options = shlex.join([recipe.model, recipe.dataset, *recipe.common])
    path = recipe.folder / "fine_tuning.options"
    if path.exists() and (old := path.read_text().strip()) != options:
        raise UserError(f"{recipe.folder}: made with {old}; name another folder by --out")
    with files.atomic_write(path) as file:
        file.write(f"{options}\n".encode())


def is_missing(path: Path) -> bool:
    if path.exists():
        log.info("%s: done already", path)
    return not path.exists()


def level(recipe: Recipe, bits: int) -> Path:
    """The file of a database with one level."""
    name = f"{recipe.tag}_{level_name(sparsity_of(bits))}.pth"
    return recipe.folder / f"models_size{bits}" / name


def tuned(recipe: Recipe, method: str, bits: int, path: Path, mild: Path) -> None:
    """First and last layer from a milder model; tune; add the result."""
    ends, result = (path.with_name(f"{path.stem}_{name}.pth") for name in ("ends", "bnt"))
    if is_missing(result.with_suffix(".json")):
        weights = ("--weights", recipe.args.weights) if recipe.args.weights else ()
        study(recipe, "first-last", path, mild, "--save", ends, *weights)
        recipe.corrected(result, ends, "--bnt")
    top1 = read_record(result.with_suffix(".json"))["top1"]
    recipe.add_line(method, bits, f"{bits} bits", top1)


def options_of_training(recipe: Recipe) -> list[object]:
    """The common options that training has, too, under its names."""
    args = recipe.args
    options = {
        "--weights": args.weights,
        "--image-size": args.image_size,
        "--images-dir": args.datapath,
        "--num-workers": args.workers,
        "--device": None if args.device == "auto" else args.device,
    }
    return [word for name, x in options.items() if x is not None for word in (name, x)]


def study(recipe: Recipe, command: str, *words: object, printed: bool = False) -> None:
    """A command of the study on the same network and images."""
    network = ("--architecture", f"{recipe.model}_quantized", "--dataset", recipe.dataset)
    run_command(STUDY, list(map(str, (command, *network, *words))), printed)
