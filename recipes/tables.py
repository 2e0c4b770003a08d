"""Tables of Optimal Brain Compression (arXiv 2208.11580) and of measured time, a function each.

Next to the paper's figures, each has those of layers that make up for the ones before them: the
toolkit's own way, which needs no correction afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

from obc.solver.errors import UserError, log
from obc.toolkit.costs import DENSE
from obc.toolkit.profiles import read_scores, score_file
from obc.toolkit.records import export_record, read_record
from obc.toolkit.timings import TIMED
from recipes.recipe import Recipe


def quantisation(recipe: Recipe) -> None:
    """Weights at 4, 3 and 2 bits (table 4): asymmetric, tuned or sequential; symmetric."""
    recipe.add_dense()
    for bits in (4, 3, 2):
        quantise = ("quant", "--wbits", bits)
        plain, reached = recipe.file(f"{bits}w_asym.pth"), f"{bits} bits"
        recipe.compress(plain, *quantise, "--wasym")
        figures = recipe.tuned(recipe.file(f"{bits}w_asym_bnt.pth"), plain)
        recipe.add("asymmetric, BN-tuned", bits, reached, figures)
        path = recipe.file(f"{bits}w_asym_sequential.pth")
        figures = recipe.compress(path, *quantise, "--wasym", "--sequential")
        recipe.add("asymmetric, sequential", bits, reached, figures)
        figures = recipe.compress(recipe.file(f"{bits}w.pth"), *quantise)
        recipe.add("symmetric", bits, reached, figures)
    recipe.report()


def nm(recipe: Recipe) -> None:
    """2:4 and 4:8 (table 3): first and last layer dense, tuned; all layers, sequential."""
    recipe.add_dense()
    for n, m in ((2, 4), (4, 8)):
        prune, pattern = ("nmprune", "--prunen", n, "--prunem", m), f"{n}:{m}"
        plain = recipe.file(f"{n}{m}.pth")
        recipe.compress(plain, *prune)
        figures = recipe.tuned(recipe.file(f"{n}{m}_bnt.pth"), plain, "--skip-firstlast")
        recipe.add("first and last dense, BN-tuned", pattern, pattern, figures)
        figures = recipe.compress(recipe.file(f"{n}{m}_sequential.pth"), *prune, "--sequential")
        recipe.add("sequential", pattern, pattern, figures)
    recipe.report()


# -- a level for each layer ------------------------------------------------------------------------


def unstructured(recipe: Recipe) -> None:
    """Unstructured sparsity at 2×, 3× and 4× fewer FLOPs (figure 2, table 1)."""
    folder = recipe.folder / "models_unstr"
    recipe.run("main_trueobs.py", "unstr", "--sparse-dir", folder, *grid(recipe))
    nonuniform(recipe, "unstr", "flops", [2, 3, 4])


def mixed(recipe: Recipe) -> None:
    """Each layer at 8w8a or 4w4a, dense or 2:4, at 5× to 15× fewer BOPs (figure 2)."""
    pruned = recipe.folder / f"models_nm/{recipe.tag}_24.pth"
    recipe.compress(pruned, "nmprune")
    for bits in (8, 4):
        name, quantise = f"{bits}w{bits}a.pth", ("quant", "--wbits", bits, "--abits", bits)
        recipe.compress(recipe.folder / f"models_quant/{recipe.tag}_{name}", *quantise)
        path = recipe.folder / f"models_nm_quant/{recipe.tag}_24_{name}"
        recipe.compress(path, *quantise, "--load", pruned)
    nonuniform(recipe, "mixed", "bops", [5, 6, 8, 10, 12, 14, 15])


def block8(recipe: Recipe) -> None:
    """Sparsity in blocks of 4, with 8-bit weights and activations, at 4× and 5× (table 2).

    The paper's targets are about measured time: --timings has yours (format:
    obc/toolkit/costs.py). Without it, they are about BOPs, and the paper's numbers are left out.
    """
    folder = recipe.folder / "models_4block"
    recipe.run("main_trueobs.py", "blocked", "--sparse-dir", folder, *grid(recipe))
    for level in sorted(folder.glob(f"{recipe.tag}_[0-9][0-9][0-9][0-9].pth")):
        path = recipe.folder / "models_4block_8w8a" / level.name
        recipe.compress(path, "quant", "--wbits", 8, "--abits", 8, "--load", level)
    kind, targets = "4block_8w8a", [4, 5]
    if recipe.args.timings:
        nonuniform(recipe, kind, "timingsq", targets, budget=["--timings", recipe.args.timings])
    else:
        nonuniform(recipe, kind, "bops", targets, report=["--no-paper"])


def grid(recipe: Recipe) -> list[object]:
    """The options of the grid of sparsities that were given."""
    words: list[object] = []
    for name in ("min_sparsity", "max_sparsity", "delta_sparse"):
        if (value := getattr(recipe.args, name)) is not None:
            words += [f"--{name.replace('_', '-')}", value]
    return words


def nonuniform(
    recipe: Recipe,
    kind: str,  # of the database, which is made by now
    constraint: str,
    targets: Sequence[float],  # unless others were given
    budget: Sequence[object] = (),  # more options of what chooses
    report: Sequence[object] = (),  # and of the report
) -> None:
    """For each target, the uniform level, the dynamic programme's choice and the SPDY search's.

    Each is batch-norm tuned, as in the paper, and solved anew in order of execution instead.
    """
    scores = recipe.folder / "scores"
    recipe.run("database.py", kind, "loss", "--prefix", recipe.folder, "--score_path", scores)
    recipe.add_dense()
    budget = ["--constr", constraint, "--prefix", recipe.folder, *budget]
    ways = [
        ("uniform", "recipes.uniform", "uniform", []),
        ("DP", "spdy.py", "dp", ["--dp", "--score_path", scores]),
        ("search", "spdy.py", "spdy", ["--score_path", scores]),
    ]
    profiles = []
    for target in recipe.args.targets or targets:
        for method, script, ending, words in ways[:2] if recipe.args.no_search else ways:
            recipe.run(script, f"{target:g}", kind, *words, *budget)
            profile = recipe.file(f"{kind}_{100 * target:.10g}x_{ending}.txt")
            profiles.append(profile)
            reached = f"{read_record(profile.with_suffix('.json'))['reached']:.4f}"
            model = (profile, "--database", kind, "--prefix", recipe.folder)
            figures = recipe.tuned(profile.with_name(f"{profile.stem}_bnt.pth"), *model)
            recipe.add(method, f"{target:g}", reached, figures)
            if not recipe.args.no_resolve:
                path = profile.with_name(f"{profile.stem}_resolved.pth")
                figures = recipe.corrected(path, *model, "--resolve", "--remask")
                recipe.add(f"{method}, solved anew", f"{target:g}", reached, figures)
    scores /= f"{recipe.tag}_{kind}_loss.txt"
    recipe.report(*report, "--cost", constraint, "--scores", scores, "--profiles", *profiles)


# -- measured time ---------------------------------------------------------------------------------


def deploy(recipe: Recipe) -> None:
    """8 bits and cut channels, 1.5×, 2× and 3× faster than 8 bits alone, exported and measured.

    Levels are chosen by seconds measured on this machine (`database.py … timings`) and solved anew.
    "Exported" in the table is the ONNX file in the same runtime, at batch 1 on one thread, at the
    speed that it has there; "solved anew" the same network in PyTorch, at the speed predicted.
    """
    kind, folder, runtime = "struct_8w8a", recipe.folder, recipe.args.runtime
    sums = ["--int8-sums"] if runtime == "ort" else []  # which ONNX Runtime needs for integers
    store = ["--prefix", folder, "--score_path", folder / "scores"]
    levels = ("--sparse-dir", folder / "models_struct")
    recipe.run("main_trueobs.py", "struct", *levels, *(grid(recipe) or ["--delta-sparse", 0.15]))
    for level in sorted(levels[1].glob(f"{recipe.tag}_[0-9][0-9][0-9][0-9].pth")):
        path = folder / f"models_{kind}" / level.name  # 8 bits lose nothing to OBQ
        recipe.compress(
            path, "quant", "--wbits", 8, "--abits", 8, "--order", "nearest", "--load", level
        )
    recipe.run("database.py", kind, "squared", *store)
    recipe.run("database.py", kind, "timings", *store, "--runtime", runtime, *sums)
    timings = score_file(folder / "scores", recipe.tag, kind, "timings")
    seconds = read_scores(timings).values()
    eight_bits = sum(x[DENSE] for x in seconds) / sum(x["0000"] for x in seconds)  # times faster
    recipe.add_dense()
    budget, profiles = ["--constr", "timingsq", "--timings", timings], []
    ways = [
        ("uniform", "recipes.uniform", "uniform", ["--prefix", folder]),
        ("DP", "spdy.py", "dp", ["--dp", "--errors", "squared", *store]),
    ]
    for times in recipe.args.targets or [1.5, 2, 3]:
        target = f"{times * eight_bits:.3g}"
        for method, script, ending, words in ways:
            try:
                recipe.run(script, target, kind, *words, *budget)
            except UserError as error:
                log.warning("%s, %g× faster than 8 bits: skipped, %s", method, times, error)
                continue
            profile = recipe.file(f"{kind}_{100 * float(target):.10g}x_{ending}.txt")
            profiles.append(profile)
            predicted = f"{read_record(profile.with_suffix('.json'))['reached']:.4f}"
            path = profile.with_name(f"{profile.stem}_resolved.pth")
            model = (profile, "--database", kind, "--prefix", folder)
            figures = recipe.corrected(path, *model, "--resolve")
            recipe.add(f"{method}, solved anew", target, predicted, figures)
            file = profile.with_name(f"{profile.stem}_exported.onnx")
            recipe.run("export.py", path, "--to", file, *sums, "--measure", "--runtime", runtime)
            name, measured = TIMED[runtime], read_record(export_record(file))
            times_of = {
                x["network"]: x["seconds"]
                for x in measured["latencies"]
                if (x["runtime"], x["batch"], x["threads"]) == (name, 1, 1)
            }
            speed = times_of["float32"] / times_of["exported"]
            figures = {"top1": measured["outputs"][name]["top1"]}  # the rest is against PyTorch
            recipe.add(f"{method}, exported", target, f"{speed:.4f}", figures)
    shown = ["--profiles", *profiles] if profiles else []
    recipe.report("--no-paper", "--cost", "timingsq", *shown)
