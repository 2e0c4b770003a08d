"""Where to compute: the device that --device names."""

from __future__ import annotations

import os
import re

import torch

from obc.solver.errors import UserError


def resolve_device(text: str) -> torch.device:
    """The device that --device names; "auto" is a GPU if there is one, else the CPU.

    Of several processes on a machine each gets a GPU of its own.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", text):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N; got {text}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "cpu" or (text == "auto" and not gpus):
        return torch.device("cpu")
    if not gpus:
        raise UserError(f"--device {text}: this PyTorch sees no GPU; use --device cpu")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if here > gpus or (":" in text and here > 1):
        raise UserError(
            f"--device {text}: {here} processes on {gpus} GPUs; each needs its own: "
            f"pass --device cuda and torchrun --nproc-per-node {gpus}"
        )
    index = int(text.partition(":")[2] or os.environ.get("LOCAL_RANK", 0))
    if index >= gpus:
        raise UserError(f"--device {text}: there are {gpus} GPUs; use cuda:0 to cuda:{gpus - 1}")
    return torch.device("cuda", index)
