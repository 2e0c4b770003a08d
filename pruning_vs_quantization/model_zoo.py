"""Trained models by name: torchvision's zoo, the toolkit's own, and whether they can be had.

    name ─▶ a task of torchvision (classification, detection, segmentation, video) with
            weights from a file, or pretrained ones: IMAGENET1K_V1, or else the default
         ─▶ any other: `modelutils.get_model`

Pretrained weights are downloaded once. A server that has not answered is not asked again, so that a
whole zoo without a network fails at once instead of model by model; one that stalls raises.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from torch import nn

from modelutils import (
    CIFAR_BLOCKS,
    SHIPPED_WEIGHTS,
    TORCHVISION_ALIASES,
    get_model,
    load_checkpoint,
    load_state,
)
from obc.inputs.vision import torchvision
from obc.solver.errors import UserError

TASKS = ("detection", "segmentation", "video")  # submodules of torchvision.models, beside itself
ANSWER_SECONDS, STALL_SECONDS = 10, 60  # for a server to answer at all; for a download to go on


def zoo_names() -> dict[str, list[str]]:
    """torchvision's models by task; classification first."""
    modules = [torchvision.models, *(getattr(torchvision.models, task) for task in TASKS)]
    return {
        task: torchvision.models.list_models(module=module)
        for task, module in zip(("classification", *TASKS), modules, strict=True)
    }


def pretrained(name: str) -> Any:
    """torchvision's weights of a model: IMAGENET1K_V1, or else its default ones."""
    known = torchvision.models.get_model_weights(TORCHVISION_ALIASES.get(name, name))
    return getattr(known, "IMAGENET1K_V1", None) or known.DEFAULT


@dataclass
class Downloads:
    """Which servers have not answered, so that nobody waits for them again."""

    silent: dict[str, str] = field(default_factory=dict)  # host → why

    def check(self, url: str) -> None:
        """Raise a UserError unless `url` has been downloaded before, or its server answers."""
        name, host = Path(urlsplit(url).path).name, urlsplit(url).hostname
        if (Path(torch.hub.get_dir()) / "checkpoints" / name).exists():
            return
        if host in self.silent:
            raise UserError(f"{host} has not answered before ({self.silent[host]})")
        try:
            request = Request(url, method="HEAD")
            urlopen(request, timeout=ANSWER_SECONDS).close()  # nosec B310  # torchvision's own https
        except HTTPError as error:
            raise UserError(f"{url}: {error.code} {error.reason}") from None
        except OSError as error:
            self.silent[host] = str(getattr(error, "reason", error))
            raise UserError(f"{host} does not answer ({self.silent[host]})") from None


@contextmanager
def stalled_downloads_end() -> Iterator[None]:
    """Let a connection that says nothing for STALL_SECONDS raise TimeoutError."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def load_model(name: str, weights: str | None, downloads: Downloads) -> nn.Module:
    """The model with its weights, on the CPU. Raises UserError where they cannot be had."""
    full = TORCHVISION_ALIASES.get(name, name)
    names = zoo_names() if ".py:" not in name and name not in CIFAR_BLOCKS else {}
    task = next((task for task, of in names.items() if full in of), None)
    if weights is not None and task in ("detection", "segmentation"):
        model = torchvision.models.get_model(full, weights=None, weights_backbone=None)
    elif weights is not None and task == "video":
        model = torchvision.models.get_model(full, weights=None)
    elif task is None or weights is not None:
        shipped_for = next((data for of, data in SHIPPED_WEIGHTS if of == name), "imagenet")
        return get_model(name, shipped_for, weights)
    else:
        chosen = pretrained(name)
        downloads.check(chosen.url)
        try:
            with stalled_downloads_end():
                return torchvision.models.get_model(full, weights=chosen)
        except (OSError, RuntimeError) as error:
            raise UserError(f"its weights cannot be downloaded ({error})") from None
    load_state(model, load_checkpoint(weights), weights)
    return model


def weights_identity(name: str, weights: str | None) -> str:
    """What tells one set of weights from another, found without loading or downloading it."""
    shipped = next((path for (of, _), path in SHIPPED_WEIGHTS.items() if of == name), None)
    path = Path(weights) if weights is not None else shipped
    if path is None and (".py:" in name or name in CIFAR_BLOCKS):
        return "its own"
    if path is None:
        return str(pretrained(name))
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return f"{path.name}, SHA-256 {digest.hexdigest()[:16]}"
