"""`main train-compressed`, its table and its recipe, as a user runs them: on rn8 and digits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT

import post_proc
import quant
from modelutils import find_layers, get_model, load_checkpoint, made_by
from obc.inputs.files import save_checkpoint
from obc.toolkit.session import load_compressed
from pruning_vs_quantization import main
from pruning_vs_quantization.fine_tuning_table import Result, no_verdict
from pruning_vs_quantization.study_files import write_result
from pruning_vs_quantization.training_options import training_options
from recipes import fine_tuning, recipe
from recipes.__main__ import main as recipes_main

QUANTISE = """train-compressed --architecture resnet18_quantized --batch-size 256 --n-bits 4
    --images-dir DIR --learning-rate 1e-2 --learning-rate-schedule cosine:1e-4 --no-act-quant
    --weight-quant-method MSE --optimizer SGD --weight-decay 1e-4 --sep-quant-optimizer
    --quant-optimizer Adam --quant-learning-rate 1e-5 --num-workers 8 --cuda --num-est-batches 1
    --max-epochs 20 --quant-weight-decay 0.0 --no-per-channel --reestimate-bn-stats""".split()
PRUNE = """train-compressed --architecture resnet18_quantized --batch-size 256 --images-dir DIR
    --learning-rate 1e-2 --learning-rate-schedule cosine:1e-4 --no-act-quant --no-weight-quant
    --optimizer SGD --weight-decay 1e-4 --no-sep-quant-optimizer --num-workers 8 --cuda
    --no-per-channel --reestimate-bn-stats --max-epochs 20 --prune-method zhu_gupta --s-f 0.75
    --s-i 0.0 --prune-epoch-start 0 --prune-last-epoch 15""".split()
SMALL = ["--dataset", "digits", "--train-samples", "256", "--batch-size", "64", "--no-cuda"]
RN8 = ["train-compressed", "--architecture", "rn8_quantized", *SMALL, "--max-epochs", "2"]
WEIGHTS_ONLY = [*RN8, "--no-act-quant"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "plots_data" / "fine_tuning"


def ours(words: list[str]) -> list[str]:
    """A published command on what is here: the shipped network and images, no GPU."""
    changed = {"resnet18_quantized": "rn8_quantized", "--cuda": "--no-cuda"}
    return [changed.get(word, word) for word in words] + [
        "--dataset",
        "digits",
        "--train-samples",
        "200",
        "--reestimate-bn-batches",
        "1",
    ]


def answer(words: list[str], capsys) -> float:
    """The accuracy that a command ends with."""
    assert main.main(words) == 0, capsys.readouterr().err
    return float(capsys.readouterr().out.splitlines()[-1].removeprefix("top-1 "))


def result(path: Path) -> dict:
    return json.loads(path.read_text())["figures"]


# -- the published commands ------------------------------------------------------------------------


@pytest.mark.parametrize("words", [QUANTISE, PRUNE], ids=["quantise", "prune"])
def test_published_commands_are_understood(words, capsys):
    options = training_options(main.build_parser().parse_args(words))
    assert (options.max_epochs, options.learning_rate, options.batch_size) == (20, 1e-2, 256)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the command would train")
    assert main.main(words) == 2
    error = capsys.readouterr().err
    assert error == "error: --cuda: this PyTorch sees no GPU; pass --no-cuda to train on the CPU\n"
    assert not os.listdir()


def test_published_quantisation(folder, capsys):
    top1 = answer(ours(QUANTISE), capsys)
    figures = result(folder / "rn8_digits_w4_seed0.json")
    assert figures["top1"] == pytest.approx(top1, abs=0.006)
    assert top1 > 95 and len(figures["epochs"]) == 20
    assert figures["epochs"][-1]["learning_rate"] < 2e-4
    state = load_checkpoint(folder / "rn8_digits_w4_seed0.pth")
    model = get_model("rn8", "digits")
    for name, layer in find_layers(model).items():
        scale, maxq = (state[f"{name}.weight_quant.{part}"] for part in ("scale", "maxq"))
        assert maxq == (255 if name in ("conv1", "linear") else 15)
        assert scale.shape == (len(layer.weight), 1) and len(scale.unique()) == 1  # per tensor
        assert f"{name}.act_quant.scale" not in state


def test_published_pruning(folder, capsys):
    top1 = answer(ours(PRUNE), capsys)
    figures = result(folder / "rn8_digits_zeros75_seed0.json")
    assert figures["top1"] == pytest.approx(top1, abs=0.006) and top1 > 90
    state = load_checkpoint(folder / "rn8_digits_zeros75_seed0.pth")
    for name, layer in find_layers(get_model("rn8", "digits")).items():
        share = 0.5 if name in ("conv1", "linear") else 0.75
        zeros = int((state[f"{name}.weight"] == 0).sum())
        assert zeros == round(share * layer.weight.numel())
    sparsities = [epoch["sparsity"] for epoch in figures["epochs"]]
    assert sparsities[14] == sparsities[-1]
    assert all(before < after for before, after in zip(sparsities, sparsities[1:15], strict=False))


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main.main(["train-compressed", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for word in QUANTISE + PRUNE:
        assert not word.startswith("--") or word in text
    for words in (
        "--tile-size T",
        "--oscillations-freeze-threshold-final F",
        "(default: 20)",
        "--deterministic, --no-deterministic",
        "(default: off)",
        "--restart",
    ):
        assert words in text


# -- what a run leaves -----------------------------------------------------------------------------


def test_networks_go_into_the_toolkits_commands(folder, capsys):
    """Weights and inputs quantised per channel; batch norms in place, and folded."""
    top1 = answer(
        [
            *RN8,
            "--n-bits",
            "3",
            "--per-channel",
            "--reestimate-bn-stats",
            "--reestimate-bn-batches",
            "4",
        ],
        capsys,
    )
    stem = folder / "rn8_digits_w3_a3_seed0"
    for ending in (".pth", "_folded.pth"):
        file = f"{stem}{ending}"
        assert post_proc.main(["rn8", "digits", file]) == 0
        assert (
            abs(float(capsys.readouterr().out.splitlines()[-1].removeprefix("top-1 ")) - top1) < 0.6
        )
        model = get_model("rn8", "digits")
        load_compressed(model, file)
        for name, layer in find_layers(model).items():
            bits = 8 if name in ("conv1", "linear") else 3
            assert layer.weight_quant.bits == layer.act_quant.bits == bits
            on_grid = quant.Grid(*layer.weight_quant.buffers())(layer.weight.flatten(1))
            torch.testing.assert_close(on_grid, layer.weight.flatten(1))
            assert len(layer.weight_quant.scale.unique()) > 1
    assert not list(folder.glob(".*"))


def test_a_run_is_done_once(folder, capsys, caplog):
    caplog.set_level("INFO", logger="trueobs")
    first = answer(WEIGHTS_ONLY, capsys)
    written = {path: path.read_bytes() for path in folder.iterdir()}
    caplog.clear()
    assert answer(WEIGHTS_ONLY, capsys) == first
    result_file = Path("plots_data", "fine_tuning", "rn8_digits_w4_seed0.json")
    assert caplog.messages == [f"{result_file}: done already"]
    assert written == {path: path.read_bytes() for path in folder.iterdir()}
    assert main.main([*WEIGHTS_ONLY, "--learning-rate", "0.02"]) == 2
    error = capsys.readouterr().err
    assert "learning_rate was 0.01, is now 0.02; pass --restart" in error
    assert written == {path: path.read_bytes() for path in folder.iterdir()}
    answer([*WEIGHTS_ONLY, "--learning-rate", "0.02", "--restart"], capsys)
    assert (
        result(folder / "rn8_digits_w4_seed0.json")["epochs"]
        != json.loads(written[folder / "rn8_digits_w4_seed0.json"])["figures"]["epochs"]
    )


# A network that draws random numbers as it trains, slowly if told to.
NETWORK = """
import os, random, time
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.dropout, self.linear = nn.Dropout(0.2), nn.Linear(8, 10)

    def forward(self, x):
        time.sleep(float(os.environ.get("SLOWLY", 0)))
        x = self.bn1(self.conv1(x)).relu()
        if self.training and random.random() < 0.5:
            x = x * 1.1
        x = self.bn2(self.conv2(x)).relu()
        return self.linear(self.dropout(x.mean((2, 3))))

def small():
    return Small()
"""


def test_a_killed_run_goes_on_bit_for_bit(folder, capsys, caplog):
    """Quantised, pruned and freezing, with two optimisers; the network draws random numbers."""
    Path("net.py").write_text(NETWORK)
    words = [
        "train-compressed",
        "--architecture",
        "net.py:small_quantized",
        *SMALL,
        "--max-epochs",
        "6",
        "--n-bits",
        "3",
        "--prune-method",
        "zhu_gupta",
        "--delta-t",
        "3",
        "--oscillations-freeze-threshold",
        "0.02",
        "--oscillations-dampen-weight",
        "1e-3",
        "--quant-learning-rate",
        "1e-3",
        "--optimizer",
        "AdamW",
    ]
    answer([*words, "--out", "whole"], capsys)
    environment = os.environ | {
        "SLOWLY": "0.05",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    running = subprocess.Popen(
        [sys.executable, "-m", "pruning_vs_quantization.main", *words],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    name = "small_digits_w3_a3_zeros75_seed0"
    state = folder / f".{name}.json.partial"
    while not list(state.glob("*.safetensors")):
        assert running.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)  # into the next epoch
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL and not (folder / f"{name}.json").exists()
    caplog.set_level("INFO", logger="trueobs")
    answer(words, capsys)
    assert "epochs are done" in caplog.text and not state.exists()
    for ending in (".pth", "_folded.pth"):
        whole, resumed = (
            load_checkpoint(place / f"{name}{ending}") for place in (Path("whole"), folder)
        )
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    epochs, others = (result(place / f"{name}.json")["epochs"] for place in (Path("whole"), folder))
    timeless = [
        {key: value for key, value in epoch.items() if "s" != key[-1:] or key == "loss"}
        for epoch in epochs + others
    ]
    assert timeless[:6] == timeless[6:] and epochs[-1]["frozen"] > 0


def test_patterns(folder, capsys, caplog):
    answer(
        [
            *WEIGHTS_ONLY,
            "--no-weight-quant",
            "--prune-method",
            "zhu_gupta",
            "--tile-size",
            "4",
            "--zeros-per-tile",
            "2",
            "--noaug",
            "--deterministic",
        ],
        capsys,
    )
    model = get_model("rn8", "digits")
    load_compressed(model, folder / "rn8_digits_zeros2of4_seed0.pth")
    for name, layer in find_layers(model).items():
        inner = (layer.weight == 0).movedim(1, -1)
        if name == "conv1":
            assert not inner.any()
        else:
            assert (inner.reshape(-1, 4).sum(1) == 2).all()


def test_photographs_are_streamed(folder, capsys):
    """A folder of images, decoded by processes, cut and mirrored."""
    numbers = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(3):
            place = Path("photos", part, f"class{label}")
            place.mkdir(parents=True)
            for number in range(5):
                pixels = numbers.integers(80 * label, 80 * label + 80, (40, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    told = "    preprocessing = {'mean': (0.25,) * 3, 'crop': 'squash'}\n"
    Path("net.py").write_text(NETWORK.replace("(nn.Module):\n", f"(nn.Module):\n{told}"))
    words = [
        "train-compressed",
        "--architecture",
        "net.py:small_quantized",
        "--dataset",
        "folder",
        "--images-dir",
        "photos",
        "--classes",
        "classes.txt",
        "--image-size",
        "24",
        "--batch-size",
        "4",
        "--no-cuda",
        "--num-workers",
        "0",
        "--max-epochs",
        "2",
        "--reestimate-bn-stats",
    ]
    Path("classes.txt").write_text("".join(f"class{label}\n" for label in range(9, -1, -1)))
    answer(words, capsys)
    (path,) = folder.glob("small_folder_w4_a4_*seed0.json")
    figures = result(path)
    assert 0 <= figures["dense_top1_calibration"] <= 100 and figures["classes"] == 10
    assert (figures["training_images"], figures["test_images"]) == (15, 15)
    assert figures["preprocessing"]["mean"] == [0.25] * 3
    assert (figures["preprocessing"]["size"], figures["preprocessing"]["crop"]) == (24, "squash")


def test_a_network_for_grey_images(folder, capsys):
    told = "    preprocessing = {'mean': (0.5,), 'std': (0.25,)}\n"
    grey = NETWORK.replace("(nn.Module):\n", f"(nn.Module):\n{told}").replace(
        "Conv2d(3,", "Conv2d(1,"
    )
    Path("net.py").write_text(grey)
    answer(
        [
            "train-compressed",
            "--architecture",
            "net.py:small_quantized",
            *SMALL,
            "--max-epochs",
            "1",
        ],
        capsys,
    )
    (path,) = folder.glob("*.json")
    assert result(path)["preprocessing"]["std"] == [0.25]


def test_tensorboard(capsys):
    pytest.importorskip("tensorboard")
    answer([*WEIGHTS_ONLY, "--no-weight-quant", "--tb-logging-dir", "log"], capsys)
    first, second = Path("log").iterdir()  # a file for each epoch
    for event in (first, second):
        assert event.name.startswith("events.out.tfevents") and b"top1" in event.read_bytes()


# -- user errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--architecture rn8", "--architecture rn8: must be a model's name and _quantized"),
        ("--architecture rn9_quantized", "unknown model rn9; did you mean"),
        ("--dataset imagenet --images-dir nowhere", "nowhere: does not exist"),
        ("--n-bits 1", "--n-bits: must be 2 to 16; got 1"),
        ("--learning-rate-schedule linear", "--learning-rate-schedule must be cosine, cosine:1e-4"),
        (
            "--learning-rate-schedule cosine:0.1",
            "the cosine ends at 0.1, above --learning-rate 0.01",
        ),
        ("--s-f 0.5", "--s-f, --tile-size and --zeros-per-tile need --prune-method zhu_gupta"),
        (
            "--prune-method zhu_gupta --s-f 75",
            "--s-f must be in [0, 1); got 75. Did you mean 0.75?",
        ),
        ("--prune-method zhu_gupta --s-i 0.8", "--s-i 0.8 is above --s-f 0.75"),
        ("--prune-method zhu_gupta --prune-last-epoch 3", "at most --max-epochs 2"),
        ("--prune-method zhu_gupta --tile-size 4", "belong together"),
        (
            "--prune-method zhu_gupta --tile-size 4 --zeros-per-tile 4",
            "must be below --tile-size 4",
        ),
        (
            "--prune-method zhu_gupta --tile-size 4 --zeros-per-tile 2 --s-f 0.7",
            "tiles of 4 are 0.5",
        ),
        ("--no-weight-quant --oscillations-dampen-weight 1", "no effect with --no-weight-quant"),
        ("--oscillations-freeze-threshold-final 0.1", "no effect without --oscillations-freeze"),
        ("--weight-quant-method best", "invalid choice: 'best'"),
        ("--device cpu", "--cuda and --no-cuda stand for --device"),
        ("--learning-rate 1e30", "the loss is not finite in epoch"),
    ],
)
def test_an_error_is_one_line(words, message, capsys):
    try:
        status = main.main([*WEIGHTS_ONLY, *words.split()])
    except SystemExit as stop:  # argparse
        status = stop.code
    lines = capsys.readouterr().err.splitlines()
    assert (
        status == 2
        and lines[-1].startswith("error: ")
        and message.replace("--n-bits:", "--n-bits") in lines[-1].replace("--n-bits:", "--n-bits")
    )
    assert not any("Traceback" in line for line in lines)
    assert not list(Path().rglob("*.json")) and not list(Path().rglob("*.pth"))


def test_no_batch_norm_to_reestimate(capsys):
    Path("net.py").write_text(NETWORK.replace("nn.BatchNorm2d(8)", "nn.Identity()"))
    words = ["train-compressed", "--architecture", "net.py:small_quantized", *SMALL]
    assert main.main([*words, "--reestimate-bn-stats"]) == 2
    assert "has no batch norm; pass --no-reestimate-bn-stats" in capsys.readouterr().err


def test_ends_of_a_network_for_other_images(capsys):
    """first-last says which images the network takes."""
    body = "nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 22 * 22, 10))"
    Path("net.py").write_text(f"from torch import nn\ndef wide():\n    return {body}\n")
    save_checkpoint(made_by("net.py:wide", torch.nn.Module).state_dict(), Path("a.pth"))
    words = ["first-last", "--architecture", "net.py:wide_quantized", "a.pth", "a.pth"]
    words += ["--dataset", "digits", "--save", "ends.pth"]
    assert main.main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "it takes 24×24 pixels: pass --image-size 24" in error
    assert main.main([*words, "--image-size", "24"]) == 0 and Path("ends.pth").exists()


# -- the table -------------------------------------------------------------------------------------


def write_run(folder: Path, name: str, top1: float, seconds: float = 60, **settings) -> None:
    common = {
        "architecture": "rn8_quantized",
        "dataset": "digits",
        "act_quant": False,
        "weight_quant": True,
        "prune_method": "none",
        "n_bits": 4,
        "s_f": None,
        "seed": 0,
        "max_epochs": 3,
        "batch_size": 64,
        "learning_rate": 0.01,
    }
    figures = {"top1": top1, "seconds": seconds, "bits_per_weight": 4.0, "training_images": 256}
    write_result(folder / f"{name}_seed0.json", common | settings, figures)


TABLE = ["table", "--architecture", "rn8_quantized", "--dataset", "digits"]


def test_table(folder, capsys, caplog):
    caplog.set_level("INFO", logger="trueobs")
    pruned = {"weight_quant": False, "prune_method": "zhu_gupta"}
    write_run(folder, "a", 90.0)
    write_run(folder, "b", 92.0, seconds=90, seed=1)
    write_run(folder, "c", 80.5, s_f=0.75, **pruned)
    write_run(folder, "d", 70.25, s_f=0.875, **pruned)
    write_run(folder, "both", 99.0, prune_method="zhu_gupta", s_f=0.75)
    write_run(folder, "inputs", 99.0, act_quant=True)
    write_run(folder, "others", 99.0, dataset="cifar10")
    Path("untrained.tsv").write_text("OBQ\t4\t4 bits\t88.8\nExactOBS\t2\t2 bits\t66.6\n")
    assert main.main([*TABLE, "--untrained", "untrained.tsv"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| bits | sparsity | quantised, trained | pruned, trained | OBQ, BN tuning | "
        "ExactOBS, BN tuning | seeds | minutes per run |",
        "|---|---|---|---|---|---|---|---|",
        "| 4 | 75 % | 91.00 (90.00 … 92.00) | 80.50 | 88.80 | – | 0 1 | 1.0 … 1.5 |",
        "| 2 | 87.5 % | – | 70.25 | – | 66.60 | 0 | 1.0 |",
        "",
        "trained for 3 epochs of 256 images in batches of 64, learning rate 0.01",
    ]
    assert sum("not a comparison at equal size" in line for line in caplog.messages) == 2
    record = json.loads((folder / "table_rn8_digits.json").read_text())
    assert len(record["results"]) == 6
    assert (folder / "table_rn8_digits.png").read_bytes().startswith(b"\x89PNG")
    write_run(folder, "e", 80.5, s_f=0.5, max_epochs=9, **pruned)
    assert main.main(TABLE) == 0
    assert "not all trained the same way: quantised and pruned for 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pruned", "why"),
    [
        ({}, ""),
        ({"weights": "../b.pth"}, "not trained alike, weights"),
        ({"weights": "./a.pth"}, ""),  # the same file in other words
        ({"max_epochs": 30}, "not trained alike, max epochs 3 and 30"),
        ({"learning_rate": 0.1}, ""),  # each method may have its own
    ],
)
def test_the_table_keeps_the_conditions_of_a_comparison(pruned, why, folder):
    figures = {"seconds": 1.0, "bits_per_weight": 4.0, "training_images": 9, "test_images": 360}
    quantised = {"act_quant": False, "weight_quant": True, "prune_method": "none", "n_bits": 4}
    common = {"architecture": "rn8_quantized", "dataset": "digits", "seed": 0, "weights": "a.pth"}
    common |= quantised | {"max_epochs": 3, "batch_size": 64, "learning_rate": 0.01}
    pruned = {"weight_quant": False, "prune_method": "zhu_gupta", "s_f": 0.75} | pruned
    write_result(folder / "a_seed0.json", common, figures | {"top1": 95.0})
    write_result(folder / "b_seed0.json", common | pruned, figures | {"top1": 80.0})
    assert main.main(TABLE) == 0
    record = json.loads((folder / "table_rn8_digits.json").read_text())
    sides = [Result(**one) for one in record["results"]]
    text = no_verdict(sides[:1], sides[1:])
    assert text.startswith(why) if why else text == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "contains no trained rn8_quantized on digits; run train-compressed first"),
        ("OBQ\t4\t4 bits\t\n", "line 1: expected method, bits, reached, top-1"),
        ("RTN\t4\t4 bits\t80\n", "line 1: RTN is neither OBQ nor ExactOBS"),
    ],
)
def test_no_table(text, message, folder, capsys):
    folder.mkdir(parents=True)
    if text:
        write_run(folder, "a", 90.0)
        Path("untrained.tsv").write_text(text)
    assert main.main([*TABLE, *(["--untrained", "untrained.tsv"] if text else [])]) == 2
    assert message in capsys.readouterr().err and not list(folder.glob("table*"))


# -- the recipe ------------------------------------------------------------------------------------

COMMON = ["--nsamples", "128", "--batchsize", "32", "--noaug", "--device", "cpu", "--seed", "3"]
TRAIN = "--max-epochs 1 --train-samples 128"


@pytest.fixture
def commands(monkeypatch) -> list[str]:
    """The commands that the recipe runs, by name, as it runs them."""
    names, run_command = [], recipe.run_command

    def note(script: str, words: list[str], printed: bool = False) -> None:
        names.append(words[0] if script == fine_tuning.STUDY else script)
        run_command(script, words, printed)

    monkeypatch.setattr(recipe, "run_command", note)
    monkeypatch.setattr(fine_tuning, "run_command", note)
    monkeypatch.setenv("OUT", "results")
    return names


def test_recipe_from_end_to_end(commands, capsys):
    """All of it, on the shipped network; done again, it repeats no finished step."""
    words = ["fine_tuning", "rn8", "digits", *COMMON, "--bits", "2", "--train", TRAIN]
    assert recipes_main(words) == 0
    made = [*["main_trueobs.py"] * 4, *["first-last", "post_proc.py"] * 2]
    assert commands == [*made, *["train-compressed"] * 2, "table"]
    lines = Path("results/fine_tuning.tsv").read_text().splitlines()
    assert [line.split("\t")[:3] for line in lines] == [
        [method, "2", "2 bits"] for method in ("OBQ", "ExactOBS")
    ]
    for line, name in zip(lines, ("rn8_w2", "models_size2/rn8_8750"), strict=True):
        record = json.loads(Path(f"results/{name}_bnt.json").read_text())
        assert float(line.split("\t")[3]) == record["top1"] > 15
    rows = [
        line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")
    ][1:]
    assert [row[:2] for row in rows] == [["| dense", "0 %"], ["| 2", "87.5 %"]]
    assert set(rows[0][2:6]) == {"99.44"} and rows[1][6] == "3"
    assert float(rows[0][2]) > 90 and float(rows[0][3]) > 15
    exact = load_checkpoint("results/rn8_w2_ends.pth")
    assert exact["conv1.weight_quant.maxq"] == exact["linear.weight_quant.maxq"] == 255
    assert exact["layer1.0.conv1.weight_quant.maxq"] == 3
    sparse = load_checkpoint("results/models_size2/rn8_8750_ends.pth")
    assert (sparse["conv1.weight"] == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    commands.clear()
    assert recipes_main(words) == 0
    assert commands == [*["train-compressed"] * 2, "table"]
    assert Path("results/fine_tuning.tsv").read_text().splitlines() == lines


def test_recipe_refuses_other_options(commands, capsys):
    Path("results").mkdir()
    Path("results/fine_tuning.options").write_text("rn8 digits \n")  # of the shell script
    assert recipes_main(["fine_tuning", "rn8", "digits", "--seed", "1"]) == 2 and not commands
    message = "error: results: made with rn8 digits; name another folder by --out\n"
    assert capsys.readouterr().err == message
