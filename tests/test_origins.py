"""Files that do not belong together: levels of other weights, scores of other levels."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from obc.inputs.checkpoints import checkpoint_marks
from obc.inputs.files import save_checkpoint
from obc.solver.errors import UserError
from obc.toolkit.fingerprints import weights_hash
from obc.toolkit.leveldb import Database
from obc.toolkit.origins import check_profile, check_scores, profile_marks, report_cost, score_marks
from obc.toolkit.profiles import read_profile, read_scores, write_profile, write_scores
from obc.toolkit.resume import open_state
from quant import fit_weight_grid, set_weight_grid

LEVELS = {"0000": 0.0, "5000": 0.5, "9000": 0.9}
WEIGHTS = "other.pth"  # what the user calls the weights in use


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))
    model[1].running_mean.normal_()
    return model.eval()


def pruned(model: nn.Sequential, sparsity: float, layers: tuple[int, ...] = (0, 3)) -> nn.Module:
    for index in layers:
        weight = model[index].weight.data
        weight[weight.abs() < weight.abs().quantile(sparsity)] = 0
    return model


def write_level(prefix: Path, level: str, model: nn.Module, made_of: nn.Module | None) -> Path:
    path = prefix / "models_unstr" / f"net_{level}.pth"
    marks = {"dense weights": weights_hash(made_of.state_dict())} if made_of else None
    save_checkpoint(model.state_dict(), path, marks)
    return path


def write_database(prefix: Path, seed: int = 0, marked: bool = True) -> Database:
    for level, sparsity in LEVELS.items():
        write_level(prefix, level, pruned(net(seed), sparsity), net(seed) if marked else None)
    return opened(prefix, seed)


def opened(prefix: Path, seed: int = 0) -> Database:
    db = Database.open("unstr", "net", prefix)
    db.check(net(seed), WEIGHTS)
    return db


def check_refused(call: Callable[[], object], *words: object) -> None:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_marked_checkpoint_is_still_a_plain_state_dict(tmp_path: Path, suffix: str) -> None:
    path, model, marks = tmp_path / f"x{suffix}", net(), {"dense weights": "0123"}
    save_checkpoint(model.state_dict(), path, marks)
    load = load_file if suffix == ".safetensors" else torch.load
    state = load(path) if suffix == ".safetensors" else load(path, weights_only=True)
    assert isinstance(state, dict) and state.keys() == model.state_dict().keys()
    other = net(1)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other[0].weight, model[0].weight)
    assert checkpoint_marks(path) == marks
    save_checkpoint(state, path)
    assert checkpoint_marks(path) == {}


def test_attributes_of_other_programs_are_no_marks(tmp_path: Path) -> None:
    path, state = tmp_path / "x.pth", OrderedDict(a=torch.ones(2))
    for value in (1, ["dense weights"], {"dense weights": 3}, {4: "x"}):
        state.obc_marks = value
        torch.save(state, path)
        assert checkpoint_marks(path) == {}
    torch.save(torch.ones(3), path)
    assert checkpoint_marks(path) == {}
    torch.save(net().state_dict(), path, _use_new_zipfile_serialization=False)
    assert checkpoint_marks(path) == {}
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", {"format": "pt"})
    assert "dense weights" not in checkpoint_marks(tmp_path / "x.safetensors")


# -- databases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [True, False])
def test_a_database_of_other_weights_is_refused(tmp_path: Path, marked: bool) -> None:
    write_database(tmp_path, 0, marked)
    check_refused(lambda: opened(tmp_path, 1), "net_0000.pth: made of other weights than other.pth")


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("level", LEVELS)
def test_one_level_of_another_network_is_named(tmp_path: Path, level: str, marked: bool) -> None:
    write_database(tmp_path, 0, marked)
    path = write_level(tmp_path, level, pruned(net(1), LEVELS[level]), net(1) if marked else None)
    check_refused(lambda: opened(tmp_path), path, WEIGHTS)


@pytest.mark.parametrize(
    ("key", "seen"),
    [
        ("0.bias", True),
        ("1.weight", True),
        ("1.bias", True),
        ("1.running_mean", True),
        ("1.running_var", True),
        ("3.bias", True),
        ("1.num_batches_tracked", False),  # not part of what the network computes in eval mode
        ("3.weight", False),  # that is what compression changes
    ],
)
def test_files_without_marks_are_compared_tensor_by_tensor(
    tmp_path: Path, key: str, seen: bool
) -> None:
    write_database(tmp_path, 0, marked=False)
    model = pruned(net(), 0.5)
    with torch.no_grad():
        model.state_dict()[key].add_(1)
    write_level(tmp_path, "5000", model, None)
    if seen:
        check_refused(
            lambda: opened(tmp_path), "net_5000.pth: made of other weights", f"({key} differs)"
        )
    else:
        assert opened(tmp_path).layers


def test_layers_without_zeros_count_as_dense_at_level_0_and_if_all_levels_are_equal(
    tmp_path: Path,
) -> None:
    def bare(seed: int) -> nn.Module:  # no biases, no norms
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Linear(6, 5, bias=False))

    for level, sparsity in LEVELS.items():
        write_level(tmp_path, level, pruned(bare(0), sparsity, (1,)), None)
    db = Database.open("unstr", "net", tmp_path)
    db.check(bare(0))
    check_refused(lambda: db.check(bare(1)), "net_0000.pth", "(0.weight differs)")
    (tmp_path / "models_unstr/net_0000.pth").unlink()
    db = Database.open("unstr", "net", tmp_path)
    db.check(bare(0))
    check_refused(lambda: db.check(bare(1)), "net_5000.pth", "(0.weight differs)")


def test_what_people_do_to_files_without_marks_is_accepted(tmp_path: Path) -> None:
    db = write_database(tmp_path, 0, marked=False)
    assert db.levels == list(LEVELS)
    half = {k: x.half() if x.is_floating_point() else x for k, x in db.states["5000"].items()}
    save_checkpoint(half, tmp_path / "models_unstr/net_5000.pth")
    few = {k: x for k, x in db.states["9000"].items() if k.endswith("weight") and x.ndim > 1}
    save_checkpoint(few, tmp_path / "models_unstr/net_9000.pth")
    rounded = net()
    for layer in (rounded[0], rounded[3]):
        grid = fit_weight_grid(layer.weight.detach().flatten(1), 3)
        layer.weight.data = grid(layer.weight.detach().flatten(1)).view_as(layer.weight)
        set_weight_grid(layer, grid)
    write_level(tmp_path, "0000", rounded, None)
    assert opened(tmp_path).levels == list(LEVELS)


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [
        ("unstr", "models_unstr/net_5000.pth", "models_unstr/net_5000.safetensors"),
        ("mixed", "models_quant/net_8w8a.pth", "models_nm_quant/net_8w8a.pth"),
        ("mixed", "models_nm_quant/net_24_4w4a.pth", "models_nm_quant/net_24_4w4a.safetensors"),
    ],
)
def test_two_files_of_one_level_are_refused(
    tmp_path: Path, kind: str, one: str, other: str
) -> None:
    for path in (one, other):
        save_checkpoint(net().state_dict(), tmp_path / path)
    check_refused(lambda: Database.open(kind, "net", tmp_path), tmp_path / one, tmp_path / other)
    (tmp_path / other).unlink()
    assert len(Database.open(kind, "net", tmp_path).levels) == 1


# -- scores ----------------------------------------------------------------------------------------


def scores_of(db: Database, path: Path, marked: bool = True) -> Path:
    values = {layer: {level: 0.5 for level in db.levels} for layer in db.layers}
    write_scores(path, values, score_marks(db) if marked else None)
    return path


def test_scores_of_other_levels_are_refused_and_those_of_more_levels_are_not(
    tmp_path: Path,
) -> None:
    path = scores_of(write_database(tmp_path), tmp_path / "s.txt")
    check_scores(read_scores(path), opened(tmp_path))
    level = tmp_path / "models_unstr/net_5000.pth"
    content = level.read_bytes()
    level.unlink()
    check_scores(read_scores(path), opened(tmp_path))  # the scores of the others are right
    level.write_bytes(content)
    write_level(tmp_path, "5000", pruned(net(), 0.45), net())
    check_refused(lambda: check_scores(read_scores(path), opened(tmp_path)), path, level)
    level.write_bytes(content)
    check_scores(read_scores(path), opened(tmp_path))


def test_scores_of_other_weights_and_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = scores_of(write_database(tmp_path / "a"), tmp_path / "s.txt")
    db = write_database(tmp_path / "b", 1)
    check_refused(lambda: check_scores(read_scores(path), db), path, "other dense weights")
    db.kind = "4block"
    check_refused(lambda: check_scores(read_scores(path), db), path, "kind unstr, not 4block")


def test_scores_without_marks_are_compared_by_their_record(tmp_path: Path) -> None:
    db = write_database(tmp_path)
    path = scores_of(db, tmp_path / "s.txt", marked=False)
    check_scores(read_scores(path), db)  # written by hand
    record = {"command": "database.py", "arguments": {}, "environment": {}}
    for mark, right in ((db.hash, True), (None, True), ("0" * 32, False)):
        marks = {"fingerprint": {"database": mark} if mark else None}
        path.with_suffix(".json").write_text(json.dumps(record | marks))
        if right:
            check_scores(read_scores(path), db)
        else:
            check_refused(lambda: check_scores(read_scores(path), db), path, "s.json")


# -- profiles --------------------------------------------------------------------------------------


PROFILE = {"0": "5000", "3": "9000"}


def profile_of(db: Database, path: Path, target: float = 2.0) -> Path:
    write_profile(path, PROFILE, profile_marks(db, PROFILE, "params", target))
    return path


def test_profiles_of_other_databases_are_refused(tmp_path: Path) -> None:
    path = profile_of(write_database(tmp_path), tmp_path / "p.txt")
    check_profile(read_profile(path), opened(tmp_path))
    write_level(tmp_path, "0000", pruned(net(), 0.05), net())  # the profile does not use it
    check_profile(read_profile(path), opened(tmp_path))
    write_level(tmp_path, "9000", pruned(net(), 0.8), net())
    check_refused(
        lambda: check_profile(read_profile(path), opened(tmp_path)), path, "another unstr"
    )
    db = write_database(tmp_path / "other", 1)
    check_refused(lambda: check_profile(read_profile(path), db), path, "other dense weights")
    db.kind = "4block"
    check_refused(lambda: check_profile(read_profile(path), db), path, "kind unstr, not 4block")
    plain = [line for line in path.read_text().splitlines() if not line.startswith("#:")]
    path.write_text("\n".join(plain))
    check_profile(read_profile(path), db)


def test_an_edited_profile_is_accepted_if_it_fits(tmp_path: Path) -> None:
    db = write_database(tmp_path)
    path = profile_of(db, tmp_path / "p.txt")
    text = path.read_text()
    path.write_text("# mine\n\n" + text.replace("9000", "5000") + "  # the end\n")
    assert dict(read_profile(path)) == {"0": "5000", "3": "5000"}
    check_profile(read_profile(path), db)
    lines = text.splitlines()
    for old, new, words in (
        ("9000 3", "9500 3", "no level 9500 of layer 3 in the unstr database of net"),
        ("9000 3", "9000 fc", "no layer fc in the unstr database of net"),
    ):
        path.write_text("# mine\n" + text.replace(old, new))
        number = lines.index("9000 3") + 2
        check_refused(
            lambda: check_profile(read_profile(path), db), f"{path}, line {number}: {words}"
        )


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("net_unstr_200x_dp.txt", False),
        ("my_4block_net_unstr_200x_spdy.txt", False),
        ("net_4block_200x_dp.txt", True),
        ("net_4block_8w8a_1.5e+03x_spdy.txt", True),
        ("net_mixed_250.5x_uniform.txt", True),
        ("4block_notes.txt", False),
    ],
)
def test_old_profiles_tell_their_kind_by_their_names(
    tmp_path: Path, name: str, other: bool
) -> None:
    db = write_database(tmp_path)
    write_profile(tmp_path / name, PROFILE)
    if other:
        check_refused(lambda: check_profile(read_profile(tmp_path / name), db), name, "not unstr")
    else:
        check_profile(read_profile(tmp_path / name), db)


# The convolution has 108 weights, of which 54 are left, and 16 outputs a channel; the linear layer
# has 320, of which 32 are left. In FLOPs: 2 · (16 · 108 + 320) against 2 · (16 · 54 + 32), 2.2857.
REACHED = 428 / 86


@pytest.mark.parametrize(
    ("name", "marked", "dense", "words"),
    [
        ("p.txt", 4.0, (), "target 4, reached 4.9767 (params)"),
        ("p.txt", REACHED, (), f"target {REACHED:.10g}, reached 4.9767 (params)"),
        ("p.txt", 5.0, (), "misses the target 5: reached 4.9767 (params)"),
        ("p.txt", 4.0, ("3",), f"misses the target 4: reached {428 / 374:.4f} (params)"),
        ("net_unstr_120x_dp.txt", None, (), "target 1.2, reached 2.2857 (flops)"),
        ("net_unstr_350.5x_dp.txt", None, (), "misses the target 3.505: reached 2.2857 (flops)"),
        ("p.txt", None, (), "p.txt: reached 2.2857 (flops)"),
    ],
)
def test_what_a_profile_costs_is_logged(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    marked: float | None,
    dense: tuple[str, ...],
    words: str,
) -> None:
    caplog.set_level("INFO")
    db = write_database(tmp_path)
    profile = tmp_path / name
    write_profile(profile, PROFILE)
    if marked:
        profile_of(db, profile, marked)
    report_cost(read_profile(profile), db, net(), (3, 6, 6), dense)
    assert words in caplog.text
    assert ("misses" in caplog.text) == ("misses" in words)
    assert any(r.levelname == "WARNING" for r in caplog.records) == ("misses" in words)


# -- several processes -----------------------------------------------------------------------------


class Process:
    """A stand-in for one of two processes: the second hears what the first one has shared."""

    size = 2

    def __init__(self, rank: int, shared: list[object]) -> None:
        self.rank, self.shared, self.calls = rank, shared, 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, value: object) -> object:
        if self.first:
            self.shared.append(value)
        self.calls += 1
        return self.shared[self.calls - 1]

    def meet(self) -> None:
        self.share(None)


def test_all_processes_learn_that_a_folder_cannot_be_written(tmp_path: Path) -> None:
    folder, shared = tmp_path / ".eval.partial", []
    folder.write_text("a file in its place")
    calls = []
    for rank in range(2):
        process = Process(rank, shared)
        with pytest.raises(OSError):
            open_state(folder, {"MODEL": "net"}, world=process)
        calls.append(process.calls)
    assert calls[0] == calls[1]
    folder.unlink()
    for rank in range(2):
        with open_state(folder, {"MODEL": "net"}, world=Process(rank, [None])) as state:
            assert state.folder == folder
