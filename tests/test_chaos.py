"""A few runs of tests/chaos.py; other tests send signals to every command."""

from __future__ import annotations

import pytest
from chaos import Broken, chaos, check_files, check_said


@pytest.mark.slow
def test_faults_change_nothing():
    good, broken = chaos(3, seed=1)
    assert not broken
    assert good["troubles"] >= 3 and {"SIGKILL", "full", "damaged"} < good.keys()


@pytest.mark.parametrize(
    ("text", "status"),
    [("Traceback (most recent call last):\n", 1), ("", 2), ("error: a\nerror: b\n", 2)],
)
def test_a_broken_result_is_noticed(text, status):
    with pytest.raises(Broken):
        check_said(text, status)
    check_said("error: interrupted\n", 130)


@pytest.mark.parametrize("name", ["x.pth", "x.json", "scores/x.txt", "x_dp.txt"])
def test_half_a_file_is_noticed(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half")
    with pytest.raises(Broken, match="x"):
        check_files(tmp_path)
