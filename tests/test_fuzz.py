"""Arbitrary bytes: cases that once failed, and thousands of new ones (tests/fuzz.py)."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from fuzz import BLIND, CORPUS, TARGETS, Target, blind, fuzz, fuzz_graphs, fuzz_modes, outcome

from obc.inputs.tracing import TracedModel

NETWORKS = 15
FRESH = 400  # cases of each target
FOUND = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "trueobs")


@pytest.mark.parametrize("name", TARGETS)
def test_good_files_are_read(name: str, tmp_path: Path) -> None:
    for data in TARGETS[name].good:
        assert outcome(TARGETS[name], data, tmp_path) == "read"


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_cases_that_once_failed(path: Path, tmp_path: Path) -> None:
    assert outcome(TARGETS[path.parent.name], path.read_bytes(), tmp_path) in ("read", "refused")


@pytest.mark.parametrize("name", TARGETS)
def test_fresh_cases(name: str) -> None:
    ends, failures = fuzz(name, FRESH, seed=1)
    assert not failures
    assert ends["refused" if name != "entry" else "read"] > FRESH / 4


def test_random_images() -> None:
    ends, failures = fuzz_modes(FRESH, seed=1)
    assert not failures
    assert ends["read"] > FRESH / 2 and ends["refused"] > FRESH / 40


def test_the_fuzzer_notices_a_white_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """All modes as Pillow converts them."""
    from obc.inputs import images

    monkeypatch.setattr(images, "more_than_8_bits", lambda image: False)
    ends, failures = fuzz_modes(FRESH, seed=1)
    assert ends["failed"] > FRESH / 10
    assert {failure.split()[2].rstrip(":") for failure in failures} >= {"I;16", "I", "F"}


def test_random_networks() -> None:
    ends, failures = fuzz_graphs(NETWORKS, seed=1)
    assert not failures
    assert ends["traced"] > 0.8 * NETWORKS


def test_the_fuzzer_notices_a_write_into_memory_that_is_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values that are handed on without a copy, and a comparison that lets everything pass."""
    from obc.inputs import tracing
    from obc.toolkit import sensitivity

    monkeypatch.setattr(tracing.TracedModel, "finish", finish_without_copies)
    for module in (tracing, sensitivity):
        monkeypatch.setattr(module, "equal_but_for_rounding", lambda outputs, plain: True)
    ends, failures = fuzz_graphs(6, seed=1)
    assert ends["failed"] and any("loss of" in failure for failure in failures)


def finish_without_copies(run: TracedModel) -> object:
    env, position = dict(run.env), run.position
    run.run_to(len(run.nodes))
    output = run.env[run.nodes[-1]]
    run.env, run.position = env, position
    return output


def test_the_fuzzer_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader with a bug, one that hangs, and those that do not say in a line what is wrong."""
    import fuzz as module

    def hangs(_path: Path) -> None:
        while time.process_time() < 1e9:
            pass

    def speechless(path: Path) -> None:
        raise module.UserError(f"{path}: ")

    def vague(_path: Path) -> None:
        raise module.UserError("broken")

    monkeypatch.setattr(module, "SECONDS", 1)
    for read, end in (
        (lambda path: path.no_such_name, "AttributeError"),
        (hangs, "slower"),
        (speechless, "refused in other"),
        (vague, "refused in other"),
    ):
        assert outcome(Target(read, "x", (b"x",), (blind,)), b"x", tmp_path).startswith(end)


def test_a_seed_makes_the_same_cases() -> None:
    import numpy as np

    first, again = (
        [blind(b"0123456789" * 9, np.random.default_rng(5)) for _ in range(9)] for _ in range(2)
    )
    assert first == again and len(BLIND) >= 7
