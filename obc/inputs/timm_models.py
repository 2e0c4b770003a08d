"""timm's networks as MODEL: timm:NAME or timm:NAME.TAG, as in timm:resnet18.a1_in1k.

The package is imported when such a name is asked for; requirements-timm.txt has its version.
"""

from __future__ import annotations

import difflib
import logging
import math
from types import ModuleType
from typing import Any

from torch import nn

from obc.inputs.vision import make_importable
from obc.solver.errors import UserError

TIMM = "timm:"


def timm_package() -> ModuleType:
    """timm; a UserError if it is missing."""
    make_importable()  # torchvision, which timm imports
    try:
        import timm
    except ModuleNotFoundError:
        raise UserError(
            f"models {TIMM}NAME need timm: pip install -r requirements-timm.txt"
        ) from None
    return timm


def timm_model(
    name: str,  # with the prefix
    pretrained: bool = False,  # with the weights of its tag, which may have to be downloaded
    classes: int | None = None,  # None: as many as its weights have
) -> nn.Module:
    """A network of timm's, in eval mode. Raises UserError for an unknown name, and for a download
    that fails.
    """
    timm, short = timm_package(), name.removeprefix(TIMM)
    bare, _, tag = short.partition(".")
    if not timm.is_model(bare):
        close = difflib.get_close_matches(bare, timm.list_models(), n=3)
        hint = f"did you mean {TIMM}{f' or {TIMM}'.join(close)}?" if close else "see timm's list"
        raise UserError(f"unknown model {name}; {hint}")
    tags = [other.partition(".")[2] for other in timm.list_pretrained(f"{bare}.*")]
    if tag and tag not in tags:
        raise UserError(f"{name}: timm has no weights {tag}; choose from {', '.join(tags)}")
    if pretrained and not tags:
        raise UserError(f"{name}: timm has no weights of it; pass --weights FILE")
    hub = logging.getLogger("huggingface_hub")  # logs every attempt; the last error is reported
    level = hub.level
    hub.setLevel(logging.CRITICAL)
    try:
        options = {} if classes is None else {"num_classes": classes}
        return timm.create_model(short, pretrained=pretrained, **options).eval()
    except (OSError, RuntimeError, ValueError) as error:  # no network, no such page, other weights
        reason = str(error).partition("\n")[0]
        what = "its weights cannot be downloaded" if pretrained else "timm cannot make it"
        raise UserError(
            f"{name}: {what} ({reason}){'; pass --weights FILE' if pretrained else ''}"
        ) from None
    finally:
        hub.setLevel(level)


def timm_preprocessing(model: nn.Module) -> dict[str, Any]:
    """How images are made for a network of timm's, by field of `Preprocessing`.

    As timm validates it: sizes and crops for testing, where they are not those of the training.
    """
    made = timm_package().data.resolve_data_config({}, model=model, use_test_size=True)
    size = made["input_size"][-1]
    return {
        "size": size,
        "resize": math.floor(size / made["crop_pct"]),
        "crop": made["crop_mode"],
        "interpolation": made["interpolation"],
        "mean": made["mean"],
        "std": made["std"],
    }
