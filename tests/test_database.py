"""Databases: files in, levels by name, stitching, strict text files, and the command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import database
import main_trueobs
from obc.inputs.files import save_checkpoint
from obc.solver.errors import UserError
from obc.toolkit.leveldb import Database, LevelFile, write_levels
from obc.toolkit.profiles import read_profile, read_scores, write_profile, write_scores
from quant import fit_activation_grid, fit_weight_grid, set_activation_grid, set_weight_grid


def net(scale: float = 1.0, width: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Linear(5, 2))
    model[0].weight.data *= scale
    return model


def level_files(folder: Path, name: str, levels: dict[str, nn.Module]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for level, model in levels.items():
        save_checkpoint(model.state_dict(), folder / f"{name}_{level}.pth")


def test_levels_are_what_follows_the_models_name(tmp_path: Path) -> None:
    folder = tmp_path / "models_unstr"
    level_files(folder, "my_net", {"0000": net(), "5000": net(0.5)})
    level_files(folder, "my_net_2", {"9000": net(2.0)})
    level_files(folder, "my", {"9900": net(3.0)})
    assert Database.open("unstr", "my_net", tmp_path).levels == ["0000", "5000"]
    assert Database.open("unstr", "my_net_2", tmp_path).levels == ["9000"]
    db = Database.open("unstr", "my_net", tmp_path)
    assert db.layers == ["0", "2"]  # the batch norm's weight is a vector
    model = net()
    db.stitch(model, {"0": "5000"})
    assert torch.equal(model[0].weight, net(0.5)[0].weight)
    assert torch.equal(model[2].weight, net()[2].weight)


def test_mixed_levels_bring_their_grids_and_take_old_ones_away(tmp_path: Path) -> None:
    def quantised(bits: int) -> nn.Module:
        model = net()
        for layer in (model[0], model[2]):
            grid = fit_weight_grid(layer.weight.detach().flatten(1), bits)
            layer.weight.data = grid(layer.weight.detach().flatten(1)).view_as(layer.weight)
            set_weight_grid(layer, grid)
            if bits == 4:
                set_activation_grid(layer, fit_activation_grid(torch.randn(99), bits))
        return model

    level_files(tmp_path / "models_quant", "a_b", {"8w32a": quantised(8), "4w4a": quantised(4)})
    level_files(tmp_path / "models_nm_quant", "a_b", {"24_4w4a": quantised(4)})
    level_files(tmp_path / "models_quant", "a_b_c", {"4w4a": net(3.0)})
    db = Database.open("mixed", "a_b", tmp_path)
    assert db.levels[0] == "8w32a"  # the largest first
    assert sorted(db.levels) == ["24_4w4a", "4w4a", "8w32a"]
    model = net()
    db.stitch(model, {"0": "4w4a", "2": "8w32a"})
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(model[0](x), quantised(4)[0](x))
    db.stitch(model, {"0": "8w32a"})
    assert torch.equal(model[0](x), quantised(8)[0](x))
    assert "0.act_quant.scale" not in model.state_dict()


def test_files_are_mapped_not_read(tmp_path: Path) -> None:
    level_files(tmp_path / "models_unstr", "big", {"0000": nn.Sequential(nn.Linear(4000, 4000))})
    path = tmp_path / "models_unstr" / "big_0000.pth"
    db = Database.open("unstr", "big", tmp_path)
    tensor = db.states["0000"]["0.weight"]
    assert str(path) in Path("/proc/self/maps").read_text() and tensor.numel() == 16_000_000


def check_error(pattern: str, kind: str, name: str, prefix: Path, model: nn.Module) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        db = Database.open(kind, name, prefix)
        db.check(model)
    assert "\n" not in str(caught.value)


def test_misfits_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "models_unstr"
    check_error("no unstr database of net in .*models_unstr", "unstr", "net", tmp_path, net())
    level_files(folder, "net", {"0000": net(), "5000": net()})
    check_error("layer 0 is .3, 3, 3, 3. .* but .4, 3, 3, 3.", "unstr", "net", tmp_path, net(1, 4))
    check_error("layer 0 .* not in the model", "unstr", "net", tmp_path, nn.Sequential())
    level_files(folder, "net", {"9000": net(width=4)})
    check_error(r"net_9000.pth: 0.weight is \(4, 3, 3, 3\)", "unstr", "net", tmp_path, net())
    (folder / "net_9000.pth").write_bytes(b"not a checkpoint")
    check_error("net_9000.pth: cannot be read", "unstr", "net", tmp_path, net())
    (folder / "net_9000.pth").unlink()
    db = Database.open("unstr", "net", tmp_path)
    with pytest.raises(UserError, match="no level 7777"):
        db.stitch(net(), {"0": "7777"})
    with pytest.raises(UserError, match="no layer other"):
        db.stitch(net(), {"other": "5000"})


def test_levels_are_written_from_their_files(tmp_path: Path) -> None:
    dense, folder = net().state_dict(), tmp_path / "db"
    levels = torch.stack([dense["0.weight"], dense["0.weight"] * 0.5])
    (folder / ".net.partial").mkdir(parents=True)
    file = LevelFile(folder / ".net.partial" / "0.levels", levels.shape[1:], levels.dtype)
    assert file.hash() == ""
    order = torch.arange(levels.shape[1])
    for rows in (order[1:], order[:1]):
        file.write(rows, levels[:, rows])
    whole = file.hash()
    files = write_levels(folder, "net", [0.0, 0.25], dense, {"0": file})
    assert [path.name for path in files] == ["net_0000.pth", "net_2500.pth"]
    assert sorted(folder.glob("*.pth")) == sorted(folder.glob("net*")) == files
    for path, wanted in zip(files, levels, strict=True):
        state = torch.load(path, weights_only=True)
        assert torch.equal(state["0.weight"], wanted) and state.keys() == dense.keys()
    content = bytearray(file.path.read_bytes())
    content[-1] ^= 1
    file.path.write_bytes(content)
    assert whole != file.hash() != ""


NAMES = st.text("abcdefgh.0123456789_", min_size=1, max_size=12)
VALUES = st.floats(allow_nan=False)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(NAMES, st.dictionaries(NAMES, VALUES, min_size=1), min_size=1))
def test_scores_survive_the_round_trip(tmp_path_factory: pytest.TempPathFactory, scores) -> None:
    path = tmp_path_factory.mktemp("scores") / "s.txt"
    write_scores(path, scores)
    assert read_scores(path) == scores


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.dictionaries(NAMES, NAMES, min_size=1))
def test_profiles_survive_the_round_trip(tmp_path_factory: pytest.TempPathFactory, profile) -> None:
    path = tmp_path_factory.mktemp("profiles") / "p.txt"
    write_profile(path, profile)
    assert read_profile(path) == profile


@pytest.mark.parametrize(
    ("reader", "text", "message"),
    [
        (read_profile, "0000\n", "line 1: expected `<level> <layer>`"),
        (read_profile, "0000 a\n5000 a\n", "line 2: a appears twice"),
        (read_profile, "\n", "no layers"),
        (read_scores, "1.0 0000\n", "line 1: expected a layer"),
        (read_scores, "a\nx 0000\n", "line 2: expected a layer"),
        (read_scores, "a\n1.0 0000 more\n", "line 2: expected a layer"),
        (read_scores, "a\n1 0000\n2 0000\n", "line 3: level 0000 appears twice"),
        (read_scores, "a\n1 0000\na\n", "line 3: a appears twice"),
        (read_scores, "", "no scores"),
    ],
)
def test_text_files_are_read_strictly(tmp_path: Path, reader, text: str, message: str) -> None:
    path = tmp_path / "file.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        reader(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        reader(path)


# -- the command -----------------------------------------------------------------------------------

OPTIONS = ["--nsamples", "128", "--noaug"]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("databases")
    grid = ["--max-sparsity", "0.9", "--delta-sparse", "0.4"]
    directory = ["--sparse-dir", str(folder / "models_unstr")]
    assert main_trueobs.main(["rn8", "digits", "unstr", *directory, *grid, *OPTIONS]) == 0
    return folder


def command(prefix: Path, *words: str) -> int:
    scores = ["--prefix", str(prefix), "--score_path", str(prefix / "scores")]
    return database.main(["rn8", "digits", *words, *scores, *OPTIONS])


def test_loss_and_squared_write_scores(prefix: Path, capsys: pytest.CaptureFixture) -> None:
    for mode in ("loss", "squared", "spdy"):
        assert command(prefix, "unstr", mode) == 0
        scores = read_scores(prefix / "scores" / f"rn8_unstr_{mode}.txt")
        assert len(scores) == 8 and all(of["0000"] == pytest.approx(0) for of in scores.values())
        assert all(of["9000"] > of["4000"] for of in scores.values())
    assert "8 layers at 6 levels" in capsys.readouterr().out


def test_the_plan_of_losses_counts_passes(prefix: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(prefix.rglob("*"))
    assert command(prefix, "unstr", "loss", "--plan") == 0
    plan = capsys.readouterr().out  # 5 levels of 8 layers differ from the dense ones
    assert "40 distinct levels of 8 layers on 1 batches, 40 passes" in plan and "about 00:0" in plan
    assert sorted(prefix.rglob("*")) == before


def test_stitch_and_eval_tell_the_accuracy(prefix: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(prefix, "unstr", "eval") == 0
    lines = capsys.readouterr().out.splitlines()
    levels = ["0000", "4000", "6400", "7840", "8704", "9000"]
    assert [line.split()[0] for line in lines] == [*levels, "top-1"]
    assert lines[-1].split()[1] == lines[-2].split()[1]
    kls = [float(line.split()[3]) for line in lines[:-1]]
    assert kls[0] < 1e-6 < kls[1] < kls[-1] and lines[0].endswith("agreement 100.00")
    profile = prefix / "profile.txt"
    write_profile(profile, dict.fromkeys(read_layers(prefix), "0000"))
    assert command(prefix, "unstr", "stitch", "--profile", str(profile)) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["KL 0  agreement 100.00", "top-1 99.44"]


def read_layers(prefix: Path) -> list[str]:
    return Database.open("unstr", "rn8", prefix).layers


def test_mistakes_are_one_line(prefix: Path, capsys: pytest.CaptureFixture) -> None:
    bad = prefix / "bad.txt"
    bad.write_text("0000 conv1 more\n")
    for words in (
        ["unstr", "stitch"],
        ["unstr", "loss", "--profile", "x"],
        ["unstr", "squared", "--plan"],
        ["4block", "loss"],
        ["unstr", "stitch", "--profile", str(bad)],
    ):
        assert command(prefix, *words) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
