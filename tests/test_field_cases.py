"""The cases of ../shared/cases, inputs as people really have them, with the right answers.

Cases whose content another test has are not repeated here:

| case | what it has                            | test                                                  |
|------|----------------------------------------|-------------------------------------------------------|
| a/4  | a child called `module`, DataParallel  | test_names.py::test_whole_commands_of_such_models     |
| a/5  | a forward that fails                   | test_failures.py::test_any_exception_of_a_forward     |
| a/5  | advice about the size of images        | test_failures.py::test_advice_about_images_only_where_they_matter |
| a/9  | weights as training scripts write them | test_names.py::test_weights_as_scripts_write_them     |
| a/10 | a norm that activates                  | test_norms.py::test_a_norm_that_activates_is_corrected_as_norm_and_activation |
| a/10 | other norms                            | test_norms.py::test_moments_of_a_plain_norm_are_the_dense_ones |
| a/11 | keys that torchvision converts         | test_names.py::test_old_names_of_torchvision          |
| a/12 | dropout in eval mode                   | test_execution.py::test_commands_say_it_once          |
| b/2  | class folders without images           | test_imagefiles.py::test_a_class_without_images_keeps_its_number_and_is_named |
| b/2  | suffixes                               | test_imagefiles.py::test_suffixes_of_pillow           |
| b/5  | a database of other weights            | test_origins.py::test_a_database_of_other_weights_is_refused |
| b/6  | scores of another database             | test_origins.py::test_scores_of_other_levels_are_refused_and_those_of_more_levels_are_not |
| b/6  | one level of another network           | test_origins.py::test_one_level_of_another_network_is_named |
| b/6  | two files of one level                 | test_origins.py::test_two_files_of_one_level_are_refused |
| b/7  | a quantised checkpoint                 | test_main_trueobs.py::test_quantised_weights_are_neither_quantised_again_nor_pruned |
| b/9  | incomplete CIFAR files                 | test_datautils.py::test_damaged_cifar_files           |
| b/10 | a profile of another database          | test_origins.py::test_profiles_of_other_databases_are_refused |
| b/10 | misfits of a profile                   | test_post_proc.py::test_misfits_are_told_in_one_line  |
| b/11 | hidden files                           | test_imagefiles.py::test_hidden_files_and_folders_are_no_images |
| b/12 | --save over --weights                  | test_main_trueobs.py::test_what_a_run_starts_from_is_not_overwritten |
| b/13 | MKL_CBWR                               | test_resumed_runs.py::test_a_run_is_not_resumed_under_other_switches |
"""  # noqa: E501

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import database
import main_trueobs
import post_proc
from datautils import calibration_batches, load_data
from datautils import test_batches as batches_of_tests
from modelutils import get_model
from obc.toolkit.profiles import read_scores

CASES = Path(__file__).resolve().parents[1].parent / "shared" / "cases"
Run = Callable[..., SimpleNamespace]

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} does not exist")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in a folder of its own: its exit status, top-1, log and the rest of it."""
    monkeypatch.chdir(tmp_path)

    def command(module, *words: object, nsamples: int = 128) -> SimpleNamespace:
        common = ["--noaug", "--nsamples", str(nsamples), "--device", "cpu", "--workers", "0"]
        status = module.main([*map(str, words), *common])
        out, err = capsys.readouterr()
        top1 = re.findall(r"^top-1 (\S+)$", out, re.M)
        return SimpleNamespace(status=status, log=err, top1=float(top1[-1]) if top1 else None)

    return command


def case(number: str, function: str, weights: str = "") -> tuple[list, list]:
    """The words that name a case's model on `digits`, and those that name its weights."""
    folder = CASES / "a" / number
    words = ["--weights", folder / weights] if weights else []
    return [f"{folder}/model.py:{function}", "digits"], words


def claims(log: str) -> dict[str, tuple[float, float]]:
    """The squared errors that a layer was found to have on the images, and claimed."""
    found = re.findall(r"^(\S+) checked (\S+) \(claimed (\S+)\)", log, re.M)
    return {name: (float(checked), float(claimed)) for name, checked, claimed in found}


def plain_top1(model: nn.Module) -> float:
    """On the test images of digits, in plain PyTorch."""
    correct = total = 0
    with torch.no_grad():
        for images, labels in batches_of_tests(load_data("digits"), workers=0):
            correct += int((model.eval()(images).argmax(1) == labels).sum())
            total += len(labels)
    return round(100 * correct / total, 2)


def test_the_table_names_tests_that_exist() -> None:
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", __doc__)
    assert len(named) >= 20
    for file, test in named:
        assert f"def {test}(" in (Path(__file__).parent / file).read_text(), (file, test)


# -- a: networks -----------------------------------------------------------------------------------


def test_a1_layers_that_do_more_than_their_type_says(run: Run) -> None:
    results = []
    for name in ("same2", "same2x"):  # one function in two spellings
        model, weights = case("1", name, f"{name}.pth")
        results.append(run(main_trueobs, *model, "nmprune", "--prunen", 3, "--check", *weights))
    assert results[0].top1 == results[1].top1 > 93
    figures = [list(claims(result.log).values()) for result in results]
    assert len(figures[0]) == 3 and figures[0] == figures[1]
    assert all(checked == claimed for checked, claimed in figures[0])
    model, weights = case("1", "std", "std.pth")
    standardised = run(main_trueobs, *model, "nmprune", "--save", "std.pth", *weights)
    assert standardised.log.count("left dense: StdConv2d does not just convolve") == 3
    assert (torch.load("std.pth")["3.weight"] != 0).all()
    assert run(main_trueobs, *case("1", "same5")[0], "quant", "--wbits", 4).status == 0


def test_a2_a_layer_that_is_called_twice_has_one_grid_over_all_calls(run: Run) -> None:
    model, weights = case("2", "reused", "reused3.pth")
    words = ("--wbits", 32, "--abits", 8, *weights, "--save", "a8.pth")
    assert run(main_trueobs, *model, "quant", *words, nsamples=1024).top1 == 90.0
    grid = {
        key: torch.load("a8.pth")[f"shared.act_quant.{key}"] for key in ("scale", "zero", "maxq")
    }
    assert float(grid["scale"] * (grid["maxq"] - grid["zero"])) > 100  # the first call reaches 117


def test_a3_figures_are_those_of_the_checkpoint_in_plain_pytorch(run: Run) -> None:
    model, weights = case("3", "alias", "alias2.pth")
    shown = run(main_trueobs, *model, "quant", "--wbits", 8, *weights, "--save", "q8.pth")
    plain = get_model(model[0], "digits", weights[1])
    dense = {key: x.clone() for key, x in plain.state_dict().items()}
    plain.load_state_dict({k: x for k, x in torch.load("q8.pth").items() if "_quant." not in k})
    assert shown.top1 == plain_top1(plain) > 88
    levels = ("--max-sparsity", 0.5, "--delta-sparse", 0.5)
    run(main_trueobs, *model, "unstr", "--sparse-dir", "models_unstr", *levels, *weights)
    assert run(database, *model, "unstr", "loss", *weights).status == 0
    scores = read_scores("scores/alias_unstr_loss.txt")
    pruned = torch.load("models_unstr/alias_5000.pth")
    images, labels = next(
        iter(calibration_batches(load_data("digits", nsamples=128), batchsize=128, workers=0))
    )

    def loss(state: dict) -> float:
        plain.load_state_dict(state)
        with torch.no_grad():
            return F.cross_entropy(plain.eval()(images), labels).item()

    for layer in ("d", "k"):
        stitched = dense | {f"{layer}.weight": pruned[f"{layer}.weight"]}
        assert scores[layer]["5000"] == pytest.approx(loss(stitched) - loss(dense), abs=1e-5)


@pytest.mark.parametrize("function", ["kw", "moe", "unb"])
def test_a6_calls_by_keyword_with_no_image_and_image_by_image(function: str, run: Run) -> None:
    result = run(main_trueobs, *case("6", function)[0], "quant", "--wbits", 4, "--abits", 8)
    assert result.status == 0 and result.top1 is not None


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # of the case's own model
@pytest.mark.parametrize("name", ["tinys", "win"])
def test_a7_images_are_counted_wherever_they_are_in_a_batch(name: str, run: Run) -> None:
    model, weights = case("7", name, f"{name}.pth")
    result = run(main_trueobs, *model, "quant", "--wbits", 4, "--check", *weights)
    figures = claims(result.log)
    assert len(figures) >= 3
    for checked, claimed in figures.values():
        assert checked == pytest.approx(claimed, rel=2e-3)
    assert "Use --check" not in result.log and "solver" not in result.log


def test_a8_first_and_last_are_those_that_run_first_and_last(run: Run) -> None:
    model, weights = case("8", "order", "order2.pth")
    pruned = run(main_trueobs, *model, "nmprune", "--prunen", 3, *weights, "--save", "p.pth")
    stem = torch.load("p.pth")["stem.weight"]
    assert "3 input channels are not a multiple of M = 4" in pruned.log and (stem != 0).all()
    kept = run(post_proc, *model, "p.pth", "--skip-firstlast", *weights, "--save", "s.pth")
    assert "fc left dense" in kept.log and "aux left dense" not in kept.log
    assert kept.top1 > pruned.top1
    dense, saved = torch.load(weights[1]), torch.load("s.pth")
    assert all(torch.equal(saved[f"{x}.weight"], dense[f"{x}.weight"]) for x in ("stem", "fc"))


# -- b: images and labels --------------------------------------------------------------------------


@pytest.fixture
def rn20(shared_data: Path) -> Path:
    return shared_data / "rn20_cifar10.pth"


@pytest.fixture
def quantised(run: Run, rn20: Path) -> Run:
    """ResNet-20, rounded to 8 bits, on a folder of CIFAR-10's images."""

    def command(folder: Path, *more: object, model: object = "rn20") -> SimpleNamespace:
        weights = ["--weights", rn20] if model == "rn20" else []
        words = ("quant", "--wbits", 8, "--order", "nearest", *weights, "--datapath", folder, *more)
        return run(main_trueobs, model, "cifar10", *words, nsamples=60)

    return command


def own_models(rn20: Path) -> Path:
    """ResNet-20 trained with another normalisation, and as it is, as functions of a file."""
    path = Path("own.py")
    path.write_text(
        "import torch\nfrom torch import nn\nfrom obc.inputs.cifar_resnets import CifarResNet\n"
        "I = [torch.tensor(v).view(1, 3, 1, 1)\n"
        "     for v in ((.485, .456, .406), (.229, .224, .225))]\n"
        "class Other(nn.Module):\n"
        "    def __init__(self, mean, std):\n"
        "        super().__init__()\n"
        "        self.net, self.mean, self.std = mine(), mean, std\n"
        "    def forward(self, x): return self.net((x * self.std + self.mean - I[0]) / I[1])\n"
        "def mine():\n"
        "    model = CifarResNet(3, classes=10)\n"
        f"    model.load_state_dict(torch.load({str(rn20)!r}))\n"
        "    return model\n"
        "def half(): return Other(.5, .5)\n"
        "def raw(): return Other(0., 1.)\n"
    )
    return path.resolve()


def dense_top1(result: SimpleNamespace) -> float:
    (figure,) = re.findall(r"^dense: top-1 (\S+) on \d+ calibration images, ", result.log, re.M)
    return float(figure)


def test_b1_images_of_16_bits_and_floating_point(quantised: Run) -> None:
    kinds = {
        "eight.png": lambda grey: grey,
        "sixteen.png": lambda grey: grey.astype(np.uint16) * 257,
        "float.tif": lambda grey: grey.astype(np.float32) / 255,
        "unknown.tif": lambda grey: grey.astype(np.float32) * 16.5,
    }
    for path in (CASES / "b" / "images").rglob("*.jpg"):
        grey = np.array(Image.open(path).convert("L"))
        for kind, values in kinds.items():
            folder, suffix = kind.split(".")
            file = Path(folder, *path.parts[-3:]).with_suffix(f".{suffix}")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values(grey)).save(file)
    results = {name.split(".")[0]: quantised(name.split(".")[0]) for name in kinds}
    assert results["eight"].top1 == results["sixteen"].top1 == results["float"].top1 > 80
    assert [results[name].log.count("images have") for name in results] == [0, 1, 1, 0]
    assert (
        results["unknown"].status == 2 and "black and white are not known" in results["unknown"].log
    )


def linked(folder: Path, names: dict[str, str]) -> Path:
    """The case's images in class folders of other names, or some of them only: name → class."""
    for part in ("train", "val"):
        (folder / part).mkdir(parents=True)
        for name, kind in names.items():
            (folder / part / name).symlink_to(CASES / "b" / "images" / part / kind)
    return folder


def test_b3_classes_that_are_sorted_as_text(quantised: Run, tmp_path: Path) -> None:
    classes = sorted(path.name for path in (CASES / "b" / "images" / "train").iterdir())
    folder = linked(tmp_path / "num", {str(i + 1): name for i, name in enumerate(classes)})
    result = quantised(folder)
    assert result.top1 < 20 and dense_top1(result) < 20
    assert "sorted as text: 1, 10, 2, 3" in result.log and "near chance" in result.log
    (tmp_path / "classes.txt").write_text("".join(f"{i + 1}\n" for i in range(10)))
    named = quantised(folder, "--classes", tmp_path / "classes.txt", "--save", "q.pth")
    assert named.top1 > 85 and "near chance" not in named.log and "as text" not in named.log
    assert json.loads(Path("q.json").read_text())["dense_top1_calibration"] == pytest.approx(
        dense_top1(named), abs=0.01
    )


def test_b4_more_outputs_than_class_folders(quantised: Run, rn20: Path, tmp_path: Path) -> None:
    classes = sorted(path.name for path in (CASES / "b" / "images" / "train").iterdir())
    some = {name: name for name in ("bird", "cat", "deer", "dog", "frog")}
    folder, models = linked(tmp_path / "sub", some), ("rn20", f"{own_models(rn20)}:mine")
    for model in models:
        refused = quantised(folder, model=model)
        assert (
            refused.status == 2 and "10 classes, but cifar10 has 5; pass --classes" in refused.log
        )
    (tmp_path / "classes.txt").write_text("\n".join(classes))
    right = [quantised(folder, "--classes", "classes.txt", model=model).top1 for model in models]
    assert right[0] == right[1] > 80


def test_b8_the_dense_models_top1_shows_another_normalisation(quantised: Run, rn20: Path) -> None:
    images, path = CASES / "b" / "images", own_models(rn20)
    figures = {}
    for name in ("mine", "half", "raw"):
        result = quantised(images, model=f"{path}:{name}")
        figures[name] = dense_top1(result)
        assert abs(result.top1 - figures[name]) < 15
    assert figures["mine"] > 90 > figures["half"] + 5 and figures["raw"] < 40
