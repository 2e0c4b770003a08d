"""post_proc.py: the command, from a checkpoint or a profile to a corrected checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import main_trueobs
import post_proc
from datautils import calibration_batches, load_data
from modelutils import find_layers, get_model, load_checkpoint
from obc.inputs.files import save_checkpoint
from obc.toolkit.imagetask import CalibrationEpochs, ImageTask

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["--nsamples", "64", "--batchsize", "32", "--noaug", "--device", "cpu"]
SHORT = [
    "--bnt-batches",
    "4",
    "--gap-epochs",
    "1",
    "--lintune-epochs",
    "1",
    "--finetune-epochs",
    "1",
]
CORRECTIONS = ["--gap", "--bnt", "--statcorr", "--lintune", "--finetune"]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> Path:
    """2:4 and 4w4a."""
    folder = tmp_path_factory.mktemp("compressed")
    sparse, path = folder / "rn8_24.pth", folder / "rn8_24_4w4a.pth"
    start = ["rn8", "digits"]
    quantise = ["quant", "--wbits", "4", "--abits", "4", "--load", str(sparse)]
    assert main_trueobs.main([*start, "nmprune", *COMMON, "--save", str(sparse)]) == 0
    assert main_trueobs.main([*start, *quantise, *COMMON, "--save", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """Two levels, weights scaled so that one can tell where they come from."""
    folder = tmp_path_factory.mktemp("database")
    state = get_model("rn8", "digits").state_dict()
    (folder / "models_unstr").mkdir()
    for level, factor in (("0000", 1.0), ("5000", 0.5)):
        scaled = {
            key: tensor * factor if tensor.ndim > 1 else tensor for key, tensor in state.items()
        }
        save_checkpoint(scaled, folder / "models_unstr" / f"rn8_{level}.pth")
    return folder


def run(capsys, *words: object) -> str:
    """The top-1 that the command prints in its last line."""
    assert post_proc.main(["rn8", "digits", *map(str, words), *COMMON]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("top-1 ")
    return last


def error(capsys, *words: object) -> str:
    """The one line that the command says instead."""
    try:
        status = post_proc.main(["rn8", "digits", *map(str, words), *COMMON])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ----------------------------------------------------------------------------- checkpoints


def test_all_corrections_keep_zeros_and_grids_and_the_file_is_already_corrected(
    compressed, tmp_path, capsys
):
    saved = tmp_path / "new" / "corrected.pth"
    top1 = run(capsys, compressed, *CORRECTIONS, *SHORT, "--save", saved)
    before, after = load_checkpoint(compressed), load_checkpoint(saved)
    assert before.keys() == after.keys()
    for key, old in before.items():
        if "_quant." in key:
            assert torch.equal(after[key], old)
        elif old.ndim > 1:
            W, scale = after[key].flatten(1), after[key.replace("weight", "weight_quant.scale")]
            assert not W[old.flatten(1) == 0].any()
            assert torch.allclose(W / scale, (W / scale).round(), atol=1e-4)
    assert not torch.equal(after["bn1.weight"], before["bn1.weight"])
    assert run(capsys, saved) == top1
    record = json.loads(saved.with_suffix(".json").read_text())
    assert [step["name"] for step in record["corrections"]] == [
        option.removeprefix("--") for option in CORRECTIONS
    ]
    assert record["top1"] == pytest.approx(float(top1.split()[1]), abs=0.005)
    assert 0 < record["kl"] < 0.1 and 97 < record["agreement"] <= 100
    assert record["arguments"]["bnt_batches"] == 4


@pytest.mark.parametrize("option", CORRECTIONS)
def test_same_seed_same_model(option, compressed, tmp_path, capsys):
    files = [tmp_path / f"{number}.pth" for number in range(3)]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        run(capsys, compressed, option, *SHORT, "--save", file, "--seed", seed)
    first, again, other = (load_checkpoint(file) for file in files)
    assert equal(first, again)
    assert not equal(first, other)


def test_without_corrections_the_checkpoint_is_evaluated(compressed, tmp_path, capsys):
    run(capsys, compressed, "--save", tmp_path / "same.pth")
    assert equal(load_checkpoint(compressed), load_checkpoint(tmp_path / "same.pth"))


def test_first_and_last_layer_left_dense(compressed, tmp_path, capsys):
    saved = tmp_path / "saved.pth"
    top1 = run(capsys, compressed, "--skip-firstlast", "--save", saved)
    before, after = load_checkpoint(compressed), load_checkpoint(saved)
    dense = get_model("rn8", "digits").state_dict()
    for layer in ("conv1", "linear"):
        assert torch.equal(after[f"{layer}.weight"], dense[f"{layer}.weight"])
    missing = before.keys() - after.keys()
    assert missing == {key for key in before if "_quant" in key and key.startswith(("conv1", "li"))}
    assert torch.equal(after["layer1.0.conv1.weight"], before["layer1.0.conv1.weight"])
    assert run(capsys, saved) == top1


# -------------------------------------------------------------------------------- profiles


def test_a_profile_is_stitched(database, tmp_path, capsys):
    dense = get_model("rn8", "digits")
    layers = list(find_layers(dense))
    profile, saved = tmp_path / "profile.txt", tmp_path / "saved.pth"
    profile.write_text("".join(f"5000 {layer}\n" for layer in layers[:-2]))
    words = [profile, "--database", "unstr", "--prefix", database, "--save", saved]
    run(capsys, *words, "--bnt", "--bnt-batches", "4")
    weights = {name: load_checkpoint(saved)[f"{name}.weight"] for name in layers}
    for name, layer in find_layers(dense).items():
        factor = 0.5 if name in layers[:-2] else 1.0
        assert torch.equal(weights[name], layer.weight * factor), name
    run(capsys, *words, "--skip-firstlast")
    assert torch.equal(load_checkpoint(saved)["conv1.weight"], dense.conv1.weight)
    assert torch.equal(
        load_checkpoint(saved)["layer1.0.conv1.weight"], dense.layer1[0].conv1.weight / 2
    )


def test_what_a_profile_costs_is_told_and_what_does_not_belong_is_refused(
    database, tmp_path, capsys
):
    layers = list(find_layers(get_model("rn8", "digits")))
    profile = tmp_path / "rn8_unstr_200x_dp.txt"
    profile.write_text("# mine\n" + "".join(f"5000 {layer}\n" for layer in layers))
    words = ["--database", "unstr", "--prefix", database]
    assert post_proc.main(["rn8", "digits", str(profile), *map(str, words), *COMMON]) == 0
    told = f"{profile}: misses the target 2: reached 1.0000 (flops)"  # its levels have no zeros
    assert told in capsys.readouterr().err
    profile.write_text("# mine\n\n5000 conv1\n5500 linear\n")
    assert f"{profile}, line 4: no level 5500 of layer linear" in error(capsys, profile, *words)
    other = tmp_path / "other.pth"
    state = get_model("rn8", "digits").state_dict()
    save_checkpoint(state | {"bn1.bias": state["bn1.bias"] + 0.1}, other)
    profile.write_text("5000 conv1\n")
    told = f"rn8_0000.pth: made of other weights than {other} (bn1.bias differs)"
    assert told in error(capsys, profile, *words, "--weights", other)


def test_a_checkpoint_of_other_weights_is_refused_where_the_dense_model_matters(
    compressed, tmp_path, capsys
):
    other = tmp_path / "other.pth"
    state = get_model("rn8", "digits").state_dict()
    save_checkpoint(state | {"bn1.bias": state["bn1.bias"] + 0.1}, other)
    top1 = run(capsys, compressed)
    assert run(capsys, compressed, "--weights", other) == top1
    for option in ("--gap", "--statcorr", "--skip-firstlast"):
        told = f"{compressed}: made of other weights than {other}"
        assert told in error(capsys, compressed, "--weights", other, option)
    trained = ["--lintune", "--lintune-loss", "--lintune-epochs", "1"]  # on the labels
    run(capsys, compressed, "--weights", other, *trained)
    words = ["quant", "--wbits", "4", "--load", str(compressed.with_name("rn8_24.pth"))]
    assert main_trueobs.main(["rn8", "digits", *words, "--weights", str(other), *COMMON]) == 2
    assert "rn8_24.pth: made of other weights than" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- images


def test_every_epoch_has_all_images_in_another_order():
    data = load_data("digits", nsamples=48)

    def epochs(augment: bool = True, seed: int = 0) -> CalibrationEpochs:
        return ImageTask(data, 20, None, 5).epochs(augment, seed)

    def passes(epochs: CalibrationEpochs) -> list[Tensor]:
        return [torch.cat([images for images, _ in epochs.epoch(n)]) for n in range(2)]

    first, second = passes(epochs(augment=False))
    assert len(epochs()) == 3 and len(first) == 48
    assert not torch.equal(first, second)
    assert sorted(first.sum((1, 2, 3)).tolist()) == sorted(second.sum((1, 2, 3)).tolist())
    again, augmented, other = (
        passes(epochs(**more)) for more in ({"augment": False}, {}, {"seed": 1})
    )
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    sums = [sorted(images.sum((1, 2, 3)).tolist()) for images in (first, *augmented)]
    assert sums[0] != sums[1] and sums[1] != sums[2]
    assert not torch.equal(augmented[0], other[0])


def test_statistics_are_of_plain_images_even_if_the_others_are_augmented():
    data = load_data("digits", nsamples=48)
    images = ImageTask(data, 20, None, 0).one_batch(40)
    plain = torch.cat([images for images, _ in calibration_batches(data)])
    assert torch.equal(images, plain[:40])


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["absent.pth"], "absent.pth: no such file"),
        (
            ["FILE", "--statcorr-samples", "8"],
            "--statcorr-samples has no effect without --statcorr",
        ),
        (["FILE", "--lintune-loss"], "--lintune-loss has no effect without --lintune"),
        (["FILE", "--finetune-mse"], "--finetune-mse has no effect without --finetune"),
        (["FILE", "--prefix", "x"], "--prefix has no effect without --database"),
        (["FILE", "--statcorr", "--statcorr-samples", "65"], "more than the 64 calibration images"),
        (["FILE", "--gap", "--gap-epochs", "0"], "--gap-epochs must be a whole number from 1"),
        (["FILE", "--gap", "--gap-lr", "-1"], "--gap-lr must be a number above 0"),
        (["FILE", "--database", "other"], "--database"),
        (["FILE", "--save", "x.json"], ".json is for the record"),
        (["FILE", "--database", "unstr", "--prefix", "nowhere"], "FILE: cannot be read"),
    ],
)
def test_mistakes_are_told_in_one_line(words, told, compressed, capsys):
    words = [word.replace("FILE", str(compressed)) for word in words]
    assert told.replace("FILE", str(compressed)) in error(capsys, *words)


def test_misfits_are_told_in_one_line(database, tmp_path, capsys):
    profile = tmp_path / "profile.txt"
    words = [profile, "--database", "unstr", "--prefix", database]
    profile.write_text("5000 conv1\n5000\n")
    assert "line 2" in error(capsys, *words)
    profile.write_text("1234 conv1\n")
    assert "1234" in error(capsys, *words)
    profile.write_text("5000 convX\n")
    assert "convX" in error(capsys, *words)
    profile.write_text("5000 conv1\n")
    assert "nowhere" in error(capsys, profile, "--database", "unstr", "--prefix", "nowhere")
    other = tmp_path / "other.pth"
    save_checkpoint(get_model("rn8", "digits").state_dict() | {"more": torch.ones(1)}, other)
    assert "does not fit" in error(capsys, other)


def test_the_input_is_not_overwritten(compressed, database, tmp_path, capsys):
    source, link = tmp_path / "q.pth", tmp_path / "link.pth"
    save_checkpoint(load_checkpoint(compressed), source)
    link.symlink_to(source)
    before = source.read_bytes()
    for save in (source, link):
        assert "would overwrite the input" in error(capsys, source, "--bnt", "--save", save)
    assert "would overwrite --weights" in error(
        capsys, compressed, "--weights", source, "--save", source
    )
    profile = tmp_path / "profile.pth"
    profile.write_text("5000 conv1\n")
    words = [profile, "--database", "unstr", "--prefix", database, "--save", profile]
    assert "would overwrite the input" in error(capsys, *words)
    assert source.read_bytes() == before and profile.read_text() == "5000 conv1\n"


def test_a_failing_correction_leaves_no_file(compressed, tmp_path, capsys):
    (tmp_path / "mlp.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(768, 10))\n"
    )
    weights, saved = tmp_path / "mlp.pth", tmp_path / "saved.pth"
    save_checkpoint({"1.weight": torch.zeros(10, 768), "1.bias": torch.zeros(10)}, weights)
    words = [f"{tmp_path / 'mlp.py'}:build", "digits", weights, "--save", saved]
    for option in ("--bnt", "--statcorr"):
        assert post_proc.main([*map(str, words), *COMMON, option]) == 2
        *others, line = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and f"({option})" in line
        assert [text.split()[0] for text in others] == ["dense:", "warning:"]  # zero weights
    assert not saved.exists()


def test_the_name_in_the_recipes():
    done = subprocess.run(
        [sys.executable, ROOT / "postproc.py", "rn8", "digits", "absent.pth"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: absent.pth: no such file\n"
