"""The first and the last layer, which are compressed less than the others.

Kuzmin et al. (arXiv 2307.02973) keep them at 8 bits. A network compressed without training has all
layers at the same level; since its layers were compressed independently of each other, taking the
first and the last from a milder one is as good as having compressed them so.
"""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from modelutils import find_layers
from obc.inputs.files import save_checkpoint
from obc.toolkit.session import load_compressed
from quant import put_layer


def first_and_last(model: nn.Module) -> tuple[str, ...]:
    """Their names, in order of registration; one, if there is but one layer."""
    names = list(find_layers(model))
    return tuple(dict.fromkeys((names[0], names[-1])))


def replace_first_and_last(dense: nn.Module, strong: Path, mild: Path, save: Path) -> None:
    """Save the model in the checkpoint `strong` with these layers as they are in `mild`.

    Raises UserError for a file that does not fit the model.
    """
    model, milder = copy.deepcopy(dense), copy.deepcopy(dense)
    load_compressed(model, strong)
    load_compressed(milder, mild)
    for name in first_and_last(dense):
        put_layer(model.get_submodule(name), milder.get_submodule(name).state_dict())
    save_checkpoint(model.state_dict(), save)
