"""Names of weights, in files and in models: which tensors of a file are the model's.

Training scripts put dictionaries around a state dict (`{"model": {"state_dict": …}}`), prefixes
before its names (`module.`, `backbone.`), modules into the middle (`_orig_mod`), and other tensors
next to the weights. Nothing is removed before it is known what it must fit:

    readings(state_dicts, names) ─▶ [Reading]    ways to read a file, the preferred ones first

A `Reading` is a place in the file, which is the keys of dictionaries and a prefix of names, with
the tensors below it by the model's names, and with what is missing or unexpected there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "params")  # the usual keys
SHELLS = {  # modules around a module that have its weights and no others
    *("module", "_orig_mod"),  # of DataParallel, of torch.compile
    *("_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
}
AVERAGES = {"ema", "swa", "averaged", "average", "avg"}  # words in the keys of averaged weights
COUNTERS = {"n_averaged", "total_ops", "total_params"}  # that SWA and thop put among the weights
UNCOUNTED = "num_batches_tracked"  # missing in files from before PyTorch 0.4.1
FLAT_PLACES = {  # by number of the block: place in torchvision's MobileNet-V2 -> in flat blocks
    "": {"0.0": 0, "0.1": 1, "1.0": 3, "1.1": 4, "2": 6, "3": 7},
    "1": {"0.0": 0, "0.1": 1, "1": 3, "2": 4},  # the first block does not expand
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # of attention, whose weights torch keeps in one
MAX_PLACES = 20  # tried in one dictionary of a file


@dataclass(frozen=True)
class StateDict:
    """The tensors in one dictionary of a file."""

    tensors: Mapping[str, Tensor]
    ignored: Sequence[str] = ()  # keys of what is no tensor
    versions: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # by name of the module


@dataclass(frozen=True)
class Reading:
    """A way to read a file; see the module docstring."""

    place: str  # such as "state_dict.backbone"
    tensors: dict[str, Tensor]  # by names of the model, or by their own if these are unknown
    masks: dict[str, Tensor]  # of pruned tensors, which are not multiplied yet
    versions: dict[str, dict[str, Any]]  # of modules: their conversion of old names needs them
    missing: list[str]
    unexpected: list[str]
    left_out: list[str]  # tensors next to these, in the same dictionary
    ignored: Sequence[str]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected)

    @property
    def averaged(self) -> bool:
        return not AVERAGES.isdisjoint(re.split(r"[._]", self.place.lower()))

    @property
    def usual(self) -> bool:
        """Whether these are the usual keys, with all tensors of their dictionary."""
        parts = without_shells(self.place).split(".")
        return not self.left_out and all(part in ("", *WRAPPERS) for part in parts)

    @property
    def rank(self) -> tuple:
        """Averaged weights come first: they are meant for evaluation. Then the usual places."""
        parts = [part for part in without_shells(self.place).split(".") if part]
        order = [WRAPPERS.index(part) if part in WRAPPERS else len(WRAPPERS) for part in parts]
        return not self.averaged, not self.usual, order, len(self.left_out)

    def is_at(self, key: str) -> bool:
        """Whether the place is the key, or below it."""
        place, short = f"{self.place}.", f"{without_shells(self.place)}."
        wanted = without_shells(key)
        return place.startswith(f"{key}.") or (bool(wanted) and short.startswith(f"{wanted}."))


def as_it_is(name: str) -> str:
    return name


def without_shells(name: str) -> str:
    """A name without the modules that are only around another one, wherever they are in it.

    >>> without_shells("module.layer1._orig_mod.conv.weight")
    'layer1.conv.weight'
    """
    return ".".join(part for part in name.split(".") if part not in SHELLS)


def without_dots(name: str) -> str:
    """Before PyTorch 0.4.1 the name of a module could have dots in it (norm.1, today norm1)."""
    return name.replace(".", "")


def with_flat_blocks(name: str) -> str:
    """Names of torchvision's MobileNet-V2 as in its first weights for PyTorch, with flat blocks.

    >>> with_flat_blocks("features.5.conv.1.0.weight"), with_flat_blocks("features.1.conv.2.bias")
    ('features.5.conv.3.weight', 'features.1.conv.4.bias')
    """
    match = re.fullmatch(r"(features\.(\d+)\.conv)\.(\d(?:\.\d)?)\.(\w+)", name)
    places = FLAT_PLACES.get(match[2] if match else "", FLAT_PLACES[""])
    if match is None or match[3] not in places:
        return name
    return f"{match[1]}.{places[match[3]]}.{match[4]}"


def with_flat_blocks_and_head(name: str) -> str:
    """The same where the classifier is a linear layer without dropout before it."""
    return with_flat_blocks(name).replace("classifier.1.", "classifier.")


Spelling = Callable[[str], str]
SPELLINGS: Sequence[
    tuple[Spelling, Spelling, Spelling]
] = (  # of all names, the model's, the file's
    (as_it_is, as_it_is, as_it_is),
    (without_shells, as_it_is, as_it_is),
    (without_shells, without_dots, without_dots),
    (without_shells, with_flat_blocks, as_it_is),
    (without_shells, with_flat_blocks_and_head, as_it_is),
)


def readings(
    state_dicts: Mapping[str, StateDict],  # of a file, by the keys that lead to them
    names: Collection[str],  # of the model
    additions: Collection[str] = (),  # modules that a layer may have in the file only
) -> list[Reading]:
    """Ways to read a file, the preferred ones first.

    A prefix is tried if what follows it is a name of the model. Names are compared as they are, so
    that a model with a child `module` reads what it has written; then without shells on both sides;
    then without dots; then as the first MobileNet-V2 has them. A place is read by the first of
    these that fits.
    """
    found: dict[str, Reading] = {}
    for shorten, respell, squeeze in SPELLINGS:
        ours = {respell(shorten(name)): name for name in names}
        if len(ours) < len(names):
            continue  # two names would be one
        fitting = {without_shells(place) for place, reading in found.items() if reading.fits}
        for where, content in state_dicts.items():
            merge = not any(name.endswith("_orig") for name in names)  # the model has no masks
            tensors, masks = _pruned(content.tensors) if merge else (content.tensors, {})
            short = {shorten(key): key for key in tensors}
            for prefix in _prefixes(short, ours, squeeze) if len(short) == len(tensors) else ():
                place = ".".join(filter(None, (where, prefix)))
                if without_shells(place) in fitting:
                    continue
                below = _below(prefix, short, ours, squeeze, additions)
                reading = _reading(place, prefix, content, tensors, masks, below, names)
                if place not in found or reading.fits:
                    found[place] = reading
    return sorted(found.values(), key=lambda reading: reading.rank)


def _pruned(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors with `x_orig` and `x_mask`, as torch.nn.utils.prune saves them, under the name x."""
    masks = {
        key.removesuffix("_mask"): mask
        for key, mask in tensors.items()
        if key.endswith("_mask") and f"{key.removesuffix('_mask')}_orig" in tensors
    }
    masks = {key: mask for key, mask in masks.items() if key not in tensors}
    kept = {
        key.removesuffix("_orig") if key.removesuffix("_orig") in masks else key: tensor
        for key, tensor in tensors.items()
        if key.removesuffix("_mask") not in masks
    }
    return kept, masks


def _prefixes(
    keys: Collection[str], ours: Collection[str], squeeze: Callable[[str], str]
) -> list[str]:
    """What precedes names of the model in these keys, most frequent first; none is one of them."""
    count = Counter({"": 0})
    for key in keys:
        parts = key.split(".")
        for number in range(len(parts)):
            if squeeze(".".join(parts[number:])) in ours:
                count[".".join(parts[:number])] += 1
    return list(dict.fromkeys([prefix for prefix, _ in count.most_common(MAX_PLACES)] + [""]))


def _below(
    prefix: str,
    keys: Mapping[str, str],  # shortened -> in the file
    ours: Mapping[str, str],  # spelled like the file's -> the model's name
    squeeze: Callable[[str], str],
    additions: Collection[str],
) -> dict[str, tuple[str, str | None]]:  # key in the file -> its own name, and the model's
    """The tensors below a prefix."""
    start, below = f"{prefix}." if prefix else "", {}
    for short, key in keys.items():
        if short.startswith(start):
            own = short.removeprefix(start)
            name = ours.get(squeeze(own))
            owner, _, rest = own.rpartition(".")
            owner, _, addition = owner.rpartition(".")
            if name is None and addition in additions:
                weight = ours.get(squeeze(f"{owner}.weight" if owner else "weight"))
                name = weight and f"{weight.removesuffix('weight')}{addition}.{rest}"
                if name is None:
                    name = _of_attention(owner, ours, squeeze, f"{addition}.{rest}")
            if name is not None or rest not in COUNTERS:
                below[key] = own, name
    return below


def _of_attention(
    owner: str, ours: Mapping[str, str], squeeze: Callable[[str], str], rest: str
) -> str | None:
    """The name of an addition to a projection, whose weight torch keeps in its attention."""
    attention, _, projection = owner.rpartition(".")
    start = f"{attention}." if attention else ""
    for weight in (f"{projection}_weight", "in_proj_weight"):
        if projection in PROJECTIONS and (name := ours.get(squeeze(f"{start}{weight}"))):
            return f"{name.removesuffix(weight)}{projection}.{rest}"
    return None


def _reading(
    place: str,
    prefix: str,
    content: StateDict,
    tensors: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    below: Mapping[str, tuple[str, str | None]],
    names: Collection[str],
) -> Reading:
    named = {key: name or own for key, (own, name) in below.items()}
    start = f"{prefix}." if prefix else ""
    left_out = [
        key for key in tensors if key not in below and key.rpartition(".")[2] not in COUNTERS
    ]
    versions = {
        f"{module}.".removeprefix(start).rstrip("."): version
        for module, version in content.versions.items()
        if f"{module}.".startswith(start)
    }
    known = {name for _, name in below.values()}
    return Reading(
        place,
        {name: tensors[key] for key, name in named.items()},
        {named[key]: mask for key, mask in masks.items() if key in named},
        versions,
        [name for name in names if name not in known and not name.endswith(UNCOUNTED)],
        [key for key, (_, name) in below.items() if name is None],
        left_out,
        content.ignored,
    )


def named_like(
    tensors: Mapping[str, Tensor],
    names: Collection[str],  # of the model
    additions: Collection[str] = (),
) -> Mapping[str, Tensor]:
    """The tensors of a state dict by the model's names; as they are if they do not fit them."""
    if all(name in tensors for name in names):
        return tensors
    found = (x for x in readings({"": StateDict(tensors)}, names, additions) if x.fits)
    reading = next((x for x in found if not (x.left_out or x.masks)), None)
    return tensors if reading is None else reading.tensors
