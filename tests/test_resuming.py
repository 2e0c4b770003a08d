"""States return exactly what was saved, or nothing; those of another run are refused."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import main_trueobs
from obc.solver.errors import UserError
from obc.toolkit import fingerprints, resume
from obc.toolkit.fingerprints import content_hash, difference
from obc.toolkit.resume import Notes, RunState, SharedCache, open_state
from obc.toolkit.session import Invocation, Session, common_options

MARKS = {"MODEL": "rn8", "--wbits": "4", "--noaug": "True", "code": "0" * 32}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(2, 3, generator=generator),
        "scale": torch.tensor(0.5, dtype=torch.float64),
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


# -- fingerprints ----------------------------------------------------------------------------------


def test_a_hash_depends_on_the_contents_and_nothing_else():
    original = content_hash(tensors())
    assert content_hash(dict(reversed(tensors().items()))) == original
    transposed = tensors() | {"weight": tensors()["weight"].T.contiguous().T}
    assert content_hash(transposed) == original  # the layout in memory does not matter
    others = [{"name": tensors()["weight"]}]
    for key, tensor in tensors().items():
        others += [{key: tensor.unsqueeze(0)}, {key: tensor.double().long()}]
        if tensor.numel():
            bits = tensor.clone().flatten()
            bits.view(torch.uint8)[0] ^= 1
            others.append({key: bits.view(tensor.shape)})
    hashes = {content_hash(tensors() | other) for other in others}
    assert len(hashes) == len(others) and original not in hashes
    assert content_hash(tensors(), "x") != original


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Callable[..., str]:
    """Write files into a tree of code; the hash that the results of its module `one` have."""
    monkeypatch.setattr(fingerprints, "CODE_ROOT", tmp_path)
    monkeypatch.setattr(fingerprints, "OUR_NAMES", {"one", "two", "sub", "other", "obc"})

    def write(**texts: str) -> str:
        for name, text in texts.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        fingerprints.parsed.cache_clear()
        return fingerprints.result_code("one")

    return write


def test_the_code_of_a_result_is_what_its_command_imports_and_the_whole_solver(tree):
    before = tree(
        one="import os\nfrom two import x\nfrom obc.toolkit import cli\n",
        two="def f():\n    from sub import three\n",
        sub__three="",
        other="",
        obc__solver__kernels="",
        obc__toolkit__cli="",
    )
    assert tree(other="x = 1", obc__toolkit__cli="import other") == before
    for name in ("obc__solver__kernels", "sub__three", "two", "one"):
        assert tree(**{name: "x = 1"}) != before
        before = tree()


def test_comments_docstrings_and_formatting_do_not_count(tree):
    code = '"""Module."""\nclass A:\n    """Class."""\n    def f(x):\n        """Function."""\n'
    before = tree(one=code + '        return (x, "value")\n')
    assert tree(one="class A:\n  def f( x ):  # says it\n\n    return x, 'value'") == before
    assert tree(one=code + '        return (x, "other")\n') != before


def test_a_fingerprint_names_the_surroundings(monkeypatch):
    for name in fingerprints.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    marks = fingerprints.surroundings(torch.device("cpu"), "a hash")
    assert marks["torch"] == torch.__version__ and marks["threads"] == str(torch.get_num_threads())
    assert marks["code"] == "a hash" and marks["NVIDIA_TF32_OVERRIDE"] == "0"
    assert marks.keys() <= set(fingerprints.SURROUNDINGS) and "MKL_CBWR" not in marks
    assert "threads" not in fingerprints.surroundings(torch.device("cpu"), "a hash", False)


def test_memory_is_in_the_fingerprint_of_a_gpu_only(monkeypatch):
    """It decides how many rows are in one product there, and so the last bits."""
    parser = main_trueobs.build_parser()

    def memory(device: str, *more: str) -> str | None:
        args = parser.parse_args(["rn8", "digits", "quant", "--device", "cpu", *more])
        session = replace(Session.of(common_options(args)), device=torch.device(device))
        assert "--memory" not in session.fingerprint(None, {})  # Hessians are the same
        return session.fingerprint(Invocation.of(parser, args), {}).get("--memory")

    assert memory("cpu", "--memory", "2") is None
    assert memory("cuda", "--memory", "2") == "2"
    said = set()
    for free in (80e9, 70e9):  # what other programs use does not count
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (int(free), 0))
        said.add(memory("cuda"))
    assert said == {"34.3597"} and memory("cuda", "--memory", "34.3597") in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--wbits": "3"}, "--wbits was 4, is now 3"),
        ({"--noaug": "False"}, "--noaug was on, is now off"),
        ({"code": "1" * 32}, "code changed"),
        ({"--new": "x"}, "--new was not set, is now x"),
        ({}, None),
    ],
)
def test_the_first_difference_is_reported_in_words(change, said, tmp_path):
    assert difference(MARKS, MARKS | change) == said
    with open_state(tmp_path / "state", MARKS) as state:
        state.save("conv1", {}, {})
    if said is None:
        open_state(tmp_path / "state", MARKS | change).__exit__()
        return
    with pytest.raises(UserError) as refusal:
        open_state(tmp_path / "state", MARKS | change)
    assert f"holds an interrupted run that differs from this one ({said})" in str(refusal.value)
    assert "--restart" in str(refusal.value) and "\n" not in str(refusal.value)


# -- states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["layer1.0.conv1", "a/b", "..", "ü %", "notes 0"])
def test_what_is_saved_comes_back(key, tmp_path):
    figures = {"name": key, "loss": 0.1 + 0.2, "worst": math.inf, "none": None, "shape": [1, 2]}
    with open_state(tmp_path / "deep" / "state", MARKS) as state:
        assert state.load(key) is None
        state.save(key, {}, {})
        state.save(key, tensors(), figures)
    with open_state(tmp_path / "deep" / "state", MARKS) as state:
        entry = state.load(key)
        assert same(entry.tensors, tensors()) and entry.figures == figures
        assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {state.folder}
        state.finish()
    assert not state.folder.exists()


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path):
    with open_state(tmp_path / "state", MARKS):
        pass
    assert not list(tmp_path.iterdir())
    open_state(tmp_path / "state", MARKS)  # as a kill leaves it: with a fingerprint, held by nobody
    with open_state(tmp_path / "state", {"MODEL": "other"}) as state:
        assert state.load("conv1") is None


def test_restart_and_a_state_without_a_fingerprint_begin_anew(tmp_path):
    for spoil, restart in (
        (lambda: None, True),
        (lambda: (tmp_path / "fingerprint.json").unlink(), False),
    ):
        with open_state(tmp_path, MARKS, restart=True) as state:
            state.save("conv1", tensors(), {})
            (tmp_path / "levels").mkdir()
        spoil()
        with open_state(tmp_path, {"MODEL": "other"} if restart else MARKS, restart) as state:
            assert state.load("conv1") is None
            assert {path.name for path in tmp_path.iterdir()} == {"fingerprint.json", "lock"}


def test_no_damaged_byte_passes(tmp_path, caplog):
    """Whichever byte of an entry is changed, it is loaded as it was saved or not at all."""
    figures = {"squared_error": 2.74, "name": "conv1"}
    with open_state(tmp_path, MARKS) as state:
        state.save("conv1", tensors(), figures)
        path = state.path("conv1")
        whole, refused = path.read_bytes(), 0
        for position in range(len(whole)):
            for flip in (1, 128):
                damaged = bytearray(whole)
                damaged[position] ^= flip
                path.write_bytes(damaged)
                entry = state.load("conv1")
                refused += entry is None
                assert entry is None or same(entry.tensors, tensors()) and entry.figures == figures
        assert refused > 1.5 * len(whole)
        for length in (0, 7, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert state.load("conv1") is None
    assert caplog.records[-1].getMessage() == f"{path}: damaged; it is computed again"


def test_no_damaged_byte_of_a_fingerprint_passes(tmp_path):
    with open_state(tmp_path, MARKS) as state:
        state.save("conv1", {}, {})
    path = tmp_path / "fingerprint.json"
    whole, refused = path.read_bytes(), 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 2]) + whole[position + 1 :])
        try:
            open_state(tmp_path, MARKS).__exit__()
        except UserError as error:
            refused += 1
            assert str(error) == f"{path}: damaged; pass --restart to start over"
    assert refused > 0.8 * len(whole)  # what passes is white space
    assert len(whole) < 400


def test_two_runs_at_once_are_refused(tmp_path):
    with open_state(tmp_path, MARKS) as state:
        child = os.fork()
        if child == 0:
            try:
                open_state(tmp_path, MARKS)
            except UserError as error:
                os._exit(7 if "in use by another run" in str(error) else 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        state.save("conv1", {}, {})
    open_state(tmp_path, MARKS).__exit__()


def test_a_folder_that_vanishes_is_reported(tmp_path):
    state = open_state(tmp_path / "state", MARKS)
    state.finish()
    with pytest.raises(UserError, match="was removed during the run"):
        state.save("conv1", tensors(), {})
    assert not state.folder.exists()
    state.__exit__()


def test_a_cache_is_for_one_fingerprint_and_for_several_runs(tmp_path):
    first, second, other = (
        SharedCache(tmp_path, marks) for marks in (MARKS, MARKS, MARKS | {"x": "y"})
    )
    first.save("conv1", tensors(), {"nsamples": 3})
    assert same(second.load("conv1").tensors, tensors()) and other.load("conv1") is None
    first.finish()
    assert second.load("conv1").figures == {"nsamples": 3}
    assert json.loads((first.folder / "fingerprint.json").read_text()) == MARKS


# -- notes -----------------------------------------------------------------------------------------


def test_notes_come_back_and_damaged_ones_are_lost_alone(tmp_path, monkeypatch):
    with open_state(tmp_path, MARKS) as state:
        notes = Notes(state)
        notes.add("quick", {"a": 1 / 3})
        assert not list(tmp_path.glob("notes*"))  # not yet a second
        monkeypatch.setattr(resume, "SECONDS_BETWEEN_NOTES", 0.0)
        notes.add("slow", 2.0)
        notes.add("third", None)
    pages = sorted(path.name for path in tmp_path.glob("notes*"))
    assert pages == ["notes 0.safetensors", "notes 1.safetensors"]
    with open_state(tmp_path, MARKS) as state:
        assert Notes(state).known == {"quick": {"a": 1 / 3}, "slow": 2.0, "third": None}
        content = bytearray((tmp_path / pages[0]).read_bytes())
        content[-3] ^= 1
        (tmp_path / pages[0]).write_bytes(content)
        notes = Notes(state)
        assert notes.known == {"third": None}
        notes.add("again", 1)
        assert Notes(state).known == {"third": None, "again": 1}


def test_an_interrupt_loses_no_note(tmp_path):
    with open_state(tmp_path, MARKS) as state:
        notes = Notes(state)
        with pytest.raises(KeyboardInterrupt), notes:
            notes.add("quick", 1)
            raise KeyboardInterrupt
        assert Notes(state).known == {"quick": 1}


def test_without_a_folder_nothing_is_saved():
    with RunState() as state:
        state.save("conv1", tensors(), {})
        assert state.load("conv1") is None and Notes(state).known == {}
        state.finish()
    assert not Path("conv1.safetensors").exists()
