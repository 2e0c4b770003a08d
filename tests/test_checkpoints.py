"""Untrusted checkpoints: an error of one line that names the file and, if there is one, the key."""

from __future__ import annotations

import io
import json
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file

import database
import main_trueobs
from modelutils import CifarResNet, get_model
from obc.inputs.checkpoints import load_checkpoint, load_state
from obc.inputs.files import save_checkpoint
from obc.solver.errors import UserError

QUICK = ["--nsamples", "8", "--noaug", "--device", "cpu"]


def state_with(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return CifarResNet(1).state_dict() | {key: tensor}


def refused(path: Path, capsys) -> str:
    """What the command says to these weights; nothing but one line."""
    assert main_trueobs.main(["rn8", "digits", "nmprune", "--weights", str(path), *QUICK]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {path}: ") and err.count("\n") == 1
    return err


def eight_bits() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch is about to give them up
        return torch.quantize_per_tensor(torch.zeros(16, 16, 3, 3), 1.0, 0, torch.qint8)


WEIGHT = "layer1.0.conv1.weight"


@pytest.mark.parametrize(
    ("key", "tensor", "words"),
    [
        (
            WEIGHT,
            torch.zeros(16, 16, 3, 3, dtype=torch.complex64),
            "is complex64, should be floating",
        ),
        (WEIGHT, torch.zeros(16, 16, 3, 3, dtype=torch.bool), "is bool, should be floating"),
        (WEIGHT, torch.zeros(16, 16, 3, 3, dtype=torch.int8), "is int8, should be floating"),
        (WEIGHT, eight_bits(), "is quantised (qint8)"),
        (WEIGHT, torch.zeros(16, 16, 3, 3).to_sparse(), "is sparse_coo"),
        (WEIGHT, torch.zeros(16, 16, 3, 3, device="meta"), "is without values"),
        (WEIGHT, torch.full((16, 16, 3, 3), float("nan")), "has NaN or infinite values"),
        (WEIGHT, torch.full((16, 16, 3, 3), -float("inf")), "has NaN or infinite values"),
        (WEIGHT, torch.zeros(16, 16, 3, 3).bfloat16() + float("nan"), "has NaN or infinite values"),
        (WEIGHT, torch.zeros(16, 16, 3), "is (16, 16, 3), should be (16, 16, 3, 3)"),
        (WEIGHT, torch.zeros(1).expand(10**6, 10**6), "claim 4,000,000,"),
        ("bn1.num_batches_tracked", torch.tensor(1 + 2j), "is complex64, should be integer"),
        ("\x1b[2Jevil\nkey", torch.zeros(1), "unexpected ?[2Jevil key"),
    ],
)
def test_odd_tensors(key, tensor, words, tmp_path, capsys):
    path = tmp_path / "x.pth"
    torch.save(state_with(key, tensor), path)
    said = refused(path, capsys)
    assert words in said and (key in said or not key.isprintable())


def test_counts_may_come_in_halves(tmp_path):
    """`{k: v.half()}` turns num_batches_tracked into a float."""
    path = tmp_path / "x.pth"
    halves = {key: value.half() for key, value in CifarResNet(1).state_dict().items()}
    torch.save(halves, path)
    model = CifarResNet(1)
    load_state(model, load_checkpoint(path), path)
    assert all(torch.equal(value, halves[key]) for key, value in model.state_dict().items())


class Mine(torch.Tensor):
    pass


def test_tensors_of_a_class_of_its_own(tmp_path):
    torch.save({"w": torch.zeros(2).as_subclass(Mine)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x.pth: contains Python objects .*Mine"):
        load_checkpoint(tmp_path / "x.pth")
    torch.save({"w": torch.nn.Parameter(torch.zeros(2))}, tmp_path / "y.pth")
    assert load_checkpoint(tmp_path / "y.pth")["w"].shape == (2,)


def rezipped(content: bytes, kind: int, **parts: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, parts.get(name.rpartition("/")[2], old.read(name)), kind)
    return made.getvalue()


def test_a_zip_bomb_is_refused_before_it_unfolds(tmp_path, capsys):
    """1 GB of zeros in 1 MB; and a part that claims more than the file has."""
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, buffer)
    bomb = rezipped(buffer.getvalue(), zipfile.ZIP_DEFLATED, **{"0": bytes(1 << 26)})
    assert len(bomb) < 1 << 20
    path = tmp_path / "bomb.pth"
    path.write_bytes(bomb)
    assert "is compressed, or claims" in refused(path, capsys)


def test_a_pickle_that_claims_a_huge_storage(tmp_path, capsys):
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(200)}, buffer)
    with zipfile.ZipFile(io.BytesIO(buffer.getvalue())) as archive:
        pickled = archive.read("archive/data.pkl")
    assert pickled.count(b"K\xc8") >= 1  # 200, as the pickle has it
    huge = pickled.replace(b"K\xc8", b"\x8a\x06" + struct.pack("<Q", 10**14)[:6])
    path = tmp_path / "x.pth"
    path.write_bytes(rezipped(buffer.getvalue(), zipfile.ZIP_STORED, **{"data.pkl": huge}))
    assert "corrupt or truncated" in refused(path, capsys) or "claim" in refused(path, capsys)


def test_an_old_file_that_claims_a_huge_storage(tmp_path, capsys):
    path = tmp_path / "x.th"
    torch.save({"w": torch.zeros(200)}, path, _use_new_zipfile_serialization=False)
    huge = path.read_bytes().replace(b"K\xc8", b"\x8a\x06" + struct.pack("<Q", 10**14)[:6])
    path.write_bytes(huge)
    assert "cannot be read" in refused(path, capsys)


def safetensors_file(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content",
    [
        safetensors_file({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),  # overlap
        safetensors_file({"a": entry([10**12], 0, 4 * 10**12)}, bytes(8)),
        safetensors_file({"a": entry([2**62, 8], 0, 8)}, bytes(8)),
        safetensors_file({"a": entry([2], 0, 8)}, bytes(8), length=2**62),
        safetensors_file(b"[" * 100_000, bytes(8)),
        safetensors_file({"a": entry([2], 0, 8, "X9")}, bytes(8)),
        safetensors_file({"a": entry([-2], 0, 8)}, bytes(8)),
        safetensors_file({"a": entry([2], 0, 8)}, bytes(100)),
        safetensors_file(b'{"a": 1', b""),
    ],
    ids=[
        "overlap",
        "huge",
        "overflow",
        "long header",
        "nested",
        "dtype",
        "negative",
        "more",
        "cut",
    ],
)
def test_wrong_safetensors(content, tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert "cannot be read as safetensors" in refused(path, capsys)


def test_dtypes_of_safetensors(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    save_file(state_with(WEIGHT, torch.zeros(16, 16, 3, 3, dtype=torch.int32)), path)
    assert f"{WEIGHT} is int32, should be floating" in refused(path, capsys)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated(name, share, tmp_path, capsys):
    path = tmp_path / name
    save_checkpoint(CifarResNet(1).state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "cannot be read" in refused(path, capsys)


class Harmful:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("option", ["--weights", "--load"])
def test_a_malicious_pickle_is_not_run(option, tmp_path, capsys):
    trace, path = tmp_path / "was here", tmp_path / "x.pth"
    torch.save({"w": torch.zeros(1), "x": Harmful(trace)}, path)
    words = ["rn8", "digits", "nmprune", option, str(path), *QUICK]
    assert main_trueobs.main(words) == 2
    assert "contains Python objects other than tensors (" in capsys.readouterr().err
    path.write_bytes(pickle.dumps(Harmful(trace)))
    assert main_trueobs.main(words) == 2
    assert not trace.exists()


def test_keys_that_are_no_names(tmp_path):
    torch.save({("a", 1): torch.zeros(1), 7: torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth: no tensors in it"):
        load_checkpoint(tmp_path / "x.pth")


def test_bytes_of_another_file(tmp_path):
    (tmp_path / "x.pth").write_bytes(safetensors_bytes({"w": torch.zeros(1)}))
    with pytest.raises(UserError, match="x.pth: cannot be read"):
        load_checkpoint(tmp_path / "x.pth")


def test_a_broken_level_of_a_database_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = get_model("rn8", "digits").state_dict()
    save_checkpoint(state, "models_unstr/rn8_0000.pth")
    save_checkpoint(
        state | {WEIGHT: torch.full((16, 16, 3, 3), float("nan"))}, "models_unstr/rn8_5000.pth"
    )
    assert database.main(["rn8", "digits", "unstr", "eval", *QUICK]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and WEIGHT in error and "5000" in error
