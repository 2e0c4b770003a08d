"""profiles.py: files survive a round trip; errors name the file and the line."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from obc.solver.errors import UserError
from obc.toolkit.profiles import read_profile, read_scores, write_profile, write_scores

SCORES = {"conv1": {"0000": 0.0, "1900": -1.5e-7}, "fc": {"0000": math.inf, "8w8a": 1 / 3}}
PROFILE = {"conv1": "0000", "layer1.0.conv1": "24_4w4a"}


def test_files_survive_a_round_trip(tmp_path):
    write_scores(tmp_path / "s.txt", SCORES)
    write_profile(tmp_path / "p.txt", PROFILE)
    assert read_scores(tmp_path / "s.txt") == SCORES
    assert read_profile(tmp_path / "p.txt") == PROFILE
    (tmp_path / "s.txt").write_bytes((tmp_path / "s.txt").read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert read_scores(tmp_path / "s.txt") == SCORES


def refused(read: Callable, path: Path, text: str) -> str:
    """The error message for a file with this text, which names the file."""
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("conv1\n\n0.5 0000\nabc 1900\n", "line 4: expected a layer, or `<value> <level>`"),
        ("conv1\n1_0 0000\n", "line 2: expected"),
        ("conv1\n١ 0000\n", "line 2: expected"),
        ("conv1\n1e999 0000\n", "line 2: expected"),
        ("conv1\n0x1p3 0000\n", "line 2: expected"),
        ("conv1\n0.5 0000 more\n", "line 2: expected"),
        ("0.5 0000\n", "line 1: expected"),
        ("conv1\n0.5 0000\n0.6 0000\n", "line 3: level 0000 appears twice"),
        ("conv1\n0.5 0000\nconv1\n", "line 3: conv1 appears twice"),
        ("conv1\n0.5 00\x1b[2J00\n", "line 2: contains a control character"),
        ("conv1\n0.5 0000\n\x00\n", "line 3: contains a control character"),
        ("\n\n", "contains no scores"),
    ],
)
def test_scores_are_read_strictly(text, words, tmp_path):
    assert words in refused(read_scores, tmp_path / "s.txt", text)


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "-inf"])
def test_seconds_are_positive(value, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(f"conv1\n0.5 dense\n{value} 0000\n")
    with pytest.raises(UserError, match=f"t.txt, line 3: must be 0 or more, .* got {value}"):
        read_scores(path, positive=True)
    assert len(read_scores(path)["conv1"]) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0000 conv1\n0000\n", "line 2: expected `<level> <layer>`"),
        ("0000 conv1\n\n1900 conv1\n", "line 3: conv1 appears twice"),
        ("", "contains no layers"),
    ],
)
def test_profiles_are_read_strictly(text, words, tmp_path):
    assert words in refused(read_profile, tmp_path / "p.txt", text)


def test_binary_files_are_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    for read in (read_scores, read_profile):
        with pytest.raises(UserError, match=r"x: cannot be read \(not a text file\)"):
            read(tmp_path / "x")
        with pytest.raises(UserError, match=r"none: cannot be read \(No such file"):
            read(tmp_path / "none")
