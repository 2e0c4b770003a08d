"""Fixtures that several test files use."""

from __future__ import annotations

import logging
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from warm import Warm, warm_server

os.environ.setdefault("MKL_CBWR", "AUTO")  # as obc/toolkit/starting.py sets it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on machines without one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights and images next to the checkout; the only thing outside of it that
    tests read. Tests that need it are skipped elsewhere."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def cifar10_images(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of CIFAR-10 as train/<class>/*.jpg and val/<class>/*.jpg."""
    return unpacked(shared_data, tmp_path_factory, "cifar10", ".jpg")


@pytest.fixture(scope="session")
def some_cifar10_images(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every hundredth image of CIFAR-10: unpacked in a second instead of twenty."""
    return unpacked(shared_data, tmp_path_factory, "some_cifar10", "00.jpg")


def unpacked(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory, name: str, ending: str
) -> Path:
    folder = tmp_path_factory.mktemp(name)
    with tarfile.open(shared_data / "cifar10.tar.gz") as archive:
        images = (entry for entry in archive if entry.name.endswith(ending))
        archive.extractall(folder, images, filter="data")
    return folder / "cifar10"


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Runs commands in processes that have already imported everything."""
    with tempfile.TemporaryDirectory(prefix="warm") as folder, warm_server(Path(folder)) as server:
        yield server


@pytest.fixture(autouse=True)
def quiet_logger() -> Iterator[None]:
    """Undo the effects of `setup_logging` in a test."""
    log = logging.getLogger("trueobs")
    handlers, level = list(log.handlers), log.level
    yield
    log.handlers[:], log.level = handlers, level
