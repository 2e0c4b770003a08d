"""All that a training run needs to go on exactly where it stopped.

    path ─▶ {"settings": JSON text, "epochs": done, "seconds", "history": a record per epoch,
             "model": state dict, "optimisers": state dicts, "random": states of the generators}

Written whole after every epoch (files.atomic_write), read with `weights_only=True`. A run that was
killed begins again at the epoch it was in, with the same bits in every tensor; order and
augmentation of its images hang on the epoch (training_images.py), learning rates and sparsities on
the number of steps done.
"""

from __future__ import annotations

import io
import json
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from obc.inputs import files
from obc.solver.errors import UserError
from pruning_vs_quantization.study_files import check_same_settings


@dataclass
class Progress:
    """How far a run has come."""

    epochs: int = 0  # done
    seconds: float = 0.0  # that they took
    history: list[dict[str, Any]] = field(default_factory=list)  # a record of each


def save_training(
    path: Path,
    settings: Mapping[str, Any],
    progress: Progress,
    model: nn.Module,
    optimisers: list[torch.optim.Optimizer],
) -> None:
    """Write the state after an epoch."""
    content = {
        "settings": json.dumps(settings, default=str),
        **vars(progress),
        "model": model.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "random": random_states(),
    }
    buffer = io.BytesIO()  # onto a full disk, torch.save would hide the OSError in C++'s own
    torch.save(content, buffer)
    with files.atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load_training(
    path: Path,
    settings: Mapping[str, Any],
    model: nn.Module,
    optimisers: list[torch.optim.Optimizer],
) -> Progress:
    """Put everything back as it was.

    Raises UserError for a file that is not whole, and for one with other settings.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with the file is said below
            content = torch.load(path, map_location="cpu", weights_only=True)
        check_same_settings(path, json.loads(content["settings"]), settings)
        model.load_state_dict(content["model"])
        for optimiser, state in zip(optimisers, content["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        set_random_states(content["random"])
        return Progress(content["epochs"], content["seconds"], content["history"])
    except (UserError, PermissionError):
        raise  # for cli.guarded
    except Exception:  # from arbitrary bytes an unpickler can raise anything
        raise UserError(
            f"{path}: not a whole state of training; delete it, or pass --restart"
        ) from None


def random_states() -> dict[str, Any]:
    """States of the generators that a model may draw from (dropout, stochastic depth)."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "gpus": gpus, "python": random.getstate()}


def set_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(states["torch"])
    if states["gpus"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["gpus"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
