"""Layers by name: --skip, --only, --bits, --first-last; the modes `layers` and `dense`.

Layers are independent, so a layer of a mixed model is that of a model with one width throughout.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import database
import main_trueobs
import post_proc
import spdy
from datautils import load_data, test_batches
from modelutils import get_model
from obc.solver.errors import UserError
from obc.toolkit.evaluation import evaluate
from obc.toolkit.fingerprints import difference
from obc.toolkit.selection import matching, skipped

NET = '''
import torch
from torch import nn

class Net(nn.Module):
    """`stem` comes first, `head` last; they are registered the other way round."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 10)
        self.body = nn.ModuleDict({
            "a": nn.Conv2d(8, 16, 3, 2, 1, groups=2),
            "b": nn.Conv2d(16, 16, 1),
        })
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.spare = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for layer in self.body.values():
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)) @ self.table)

def net():
    torch.manual_seed(0)
    return Net()
'''
QUICK = ["--noaug", "--nsamples", "64", "--batchsize", "32"]
CALLED = ("stem", "body.a", "body.b", "head")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("network") / "net.py"
    path.write_text(NET)
    return f"{path}:net"


def run(network: str, *words: object, main=main_trueobs.main) -> int:
    return main([network, "digits", *map(str, words), *QUICK])


def saved(network: str, path: Path, *words: object) -> dict[str, Tensor]:
    """What a run of a mode saves."""
    assert run(network, *words, "--save", path) == 0, words
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def uniform(network: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    """Models of 3 and of 5 bits throughout, with grids for inputs, too; 32: the dense one."""
    folder, states = tmp_path_factory.mktemp("uniform"), {}
    for bits in (3, 5):
        states[bits] = saved(network, folder / f"{bits}a.pth", "quant", "--abits", bits)
        states[bits] |= saved(network, folder / f"{bits}w.pth", "quant", "--wbits", bits)
    return states | {32: get_model(network, "digits").state_dict()}


# -- patterns --------------------------------------------------------------------------------------

NAMES = ["stem", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer2.0.conv1", "fc"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("fc", ["fc"]),
        ("layer1.*", NAMES[1:4]),
        ("*.conv1", [NAMES[1], *NAMES[3:5]]),
        ("layer?.0.conv[13]", [NAMES[1], NAMES[4]]),
        ("*", NAMES),
    ],
)
def test_patterns_are_globs(pattern: str, names: list[str]) -> None:
    assert matching(pattern, NAMES, "--skip") == names


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("layer1", r"layer1\.\* are the 3 layers in it"),
        ("layer1.0.", r"layer1\.0\.\* are the 2 layers in it"),
        ("layer1.0.conf1", r"did you mean layer1\.0\.conv1 or "),
        ("layre2.*", r"did you mean layer2\.\* or "),
        ("FC", "the mode layers lists them"),
        ("", "the mode layers lists them"),
    ],
)
def test_a_pattern_that_matches_nothing(pattern: str, hint: str) -> None:
    with pytest.raises(UserError, match=rf"--only x: no layer of that name; {hint}"):
        matching(pattern, NAMES, "--only x")


def test_only_chooses_and_skip_takes_away() -> None:
    reasons = skipped(NAMES, ["*conv2", "fc"], ["layer1.*", "fc"])
    assert reasons == {
        "layer1.0.conv2": "--skip *conv2",
        "fc": "--skip fc",
        "stem": "--only layer1.* fc",
        "layer2.0.conv1": "--only layer1.* fc",
    }
    assert skipped(NAMES, [], []) == {}


# -- what becomes of the layers --------------------------------------------------------------------

CHOICES = {  # options -> bits of the layers; 32: dense
    "--skip body.*": {"stem": 3, "body.a": 32, "body.b": 32, "head": 3},
    "--only stem --only *.a": {"stem": 3, "body.a": 3, "body.b": 32, "head": 32},
    "--bits *.b=5": {"stem": 3, "body.a": 3, "body.b": 5, "head": 3},
    "--bits *=5 --bits head=3 --skip stem": {"stem": 32, "body.a": 5, "body.b": 5, "head": 3},
    "--first-last 5": {"stem": 5, "body.a": 3, "body.b": 3, "head": 5},
    "--first-last 5 --bits head=3": {"stem": 5, "body.a": 3, "body.b": 3, "head": 3},
    "--first-last dense": {"stem": 32, "body.a": 3, "body.b": 3, "head": 32},
}


@pytest.mark.parametrize("words", CHOICES)
def test_each_layer_is_that_of_a_model_of_its_width(
    words: str, network: str, uniform: dict[int, dict], tmp_path: Path
) -> None:
    path = tmp_path / "saved.pth"
    state = saved(network, path, "quant", "--wbits", 3, *words.split())
    for name, bits in CHOICES[words].items():
        grid = state.get(f"{name}.weight_quant.maxq")
        assert (32 if grid is None else int(grid).bit_length()) == bits, name
        assert torch.equal(state[f"{name}.weight"], uniform[bits][f"{name}.weight"]), name
    results = {
        x["name"]: x["result"] for x in json.loads(path.with_suffix(".json").read_text())["layers"]
    }
    dense = {name for name, bits in CHOICES[words].items() if bits == 32}
    assert {name for name in CALLED if results[name].startswith("--")} == dense


def test_inputs_follow_the_width_of_their_layer(
    network: str, uniform: dict[int, dict], tmp_path: Path
) -> None:
    words = ("--wbits", 3, "--abits", 3, "--bits", "body.a=5", "--skip", "head")
    state = saved(network, tmp_path / "saved.pth", "quant", *words)
    for name, bits in {"stem": 3, "body.a": 5, "body.b": 3}.items():
        for key in ("maxq", "scale", "zero"):  # fitted on the dense network's inputs
            grid = f"{name}.act_quant.{key}"
            assert torch.equal(state[grid], uniform[bits][grid]), grid
    assert not any(key.startswith("head.act_quant") for key in state)
    only_inputs = ("quant", "--abits", 3, "--bits", "body.a=5", "--only", "body.*")
    state = saved(network, tmp_path / "inputs.pth", *only_inputs)
    widths = {key: int(x).bit_length() for key, x in state.items() if key.endswith("maxq")}
    assert widths == {"body.a.act_quant.maxq": 5, "body.b.act_quant.maxq": 3}


@pytest.mark.parametrize("mode", ["quant --wbits 3 --abits 4 --bits *.b=5", "unstr --sparsity 0.5"])
def test_sequential_leaves_them_dense_too(
    mode: str, network: str, uniform: dict[int, dict], tmp_path: Path
) -> None:
    words = (*mode.split(), "--sequential", "--skip", "stem", "--skip", "body.a", "--check")
    state = saved(network, tmp_path / "saved.pth", *words)
    for name in ("stem", "body.a"):
        assert torch.equal(state[f"{name}.weight"], uniform[32][f"{name}.weight"])
        assert not any(key.startswith(f"{name}.act") for key in state)
    assert not torch.equal(state["body.b.weight"], uniform[32]["body.b.weight"])
    if mode.startswith("quant"):
        widths = [int(state[f"body.b.{grid}.maxq"]) for grid in ("weight_quant", "act_quant")]
        assert widths == [31, 31] and int(state["head.act_quant.maxq"]) == 15


def test_plan_repeat_and_fingerprint(network: str, tmp_path: Path, capsys) -> None:
    words = ("quant", "--wbits", 3, "--skip", "body.a", "--skip", "head", "--bits", "stem=5")
    assert run(network, *words, "--plan") == 0
    lines = capsys.readouterr().out.splitlines()
    for line in ("5 bits: stem", "body.a is left dense: --skip body.a"):
        assert f"plan: {line}" in lines
    path = tmp_path / "saved.pth"
    state = saved(network, path, *words)
    again = ["--repeat", str(path.with_suffix(".json")), "--save", str(tmp_path / "again.pth")]
    assert main_trueobs.main(again) == 0
    other = torch.load(tmp_path / "again.pth", weights_only=True)
    assert state.keys() == other.keys() and all(torch.equal(x, other[k]) for k, x in state.items())
    capsys.readouterr()
    assert main_trueobs.main([*again, "--skip", "body.b"]) == 2
    message = "(--skip was body.a head, is now body.a head body.b)"
    assert message in capsys.readouterr().err


def test_a_record_that_does_not_know_an_option_never_gave_it() -> None:
    assert difference({"--order": "obs"}, {"--order": "obs", "--skip": "None"}) is None
    assert difference({}, {"--sequential": "False"}) is None
    assert difference({}, {"--skip": "fc"}) == "--skip was not set, is now fc"
    assert difference({"--skip": "None"}, {"--skip": "fc"}) == "--skip was not set, is now fc"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("quant --wbits 3 --skip stm", "--skip stm: no layer of that name; did you mean stem"),
        ("quant --wbits 3 --bits body=4", "--bits body=4: no layer of that name; body.* are"),
        ("quant --wbits 3 --only *", None),
        ("quant --wbits 3 --skip *", "every layer is left dense by --skip *"),
        ("quant --wbits 3 --bits stem=17", "--bits must be a pattern of names, =, and 1 to 16"),
        ("quant --wbits 3 --bits stem", "--bits must be a pattern of names, =, and 1 to 16"),
        ("quant --bits stem=8", "quant needs --wbits or --abits below 32; to quantise some layers"),
        ("quant --wbits 3 --first-last 32", "--first-last must be dense, or 1 to 16 bits; got 32"),
        ("nmprune --first-last 8", "--first-last 8 is for quant: pass dense, or --skip"),
        ("nmprune --bits stem=8", "--bits belongs to quant, not to nmprune"),
        ("dense --wbits 4", "--wbits has no effect on dense"),
        ("dense --skip stem", "--skip has no effect on dense"),
        ("layers --save x.pth", "--save has no effect on layers"),
        ("layers --first-last 77", "--first-last must be dense"),
    ],
)
def test_what_cannot_be_is_one_line(words: str, message: str | None, network: str, capsys) -> None:
    try:
        status = main_trueobs.main(
            [network, "digits", *words.split(), *(QUICK if message else ["--plan"])]
        )
    except SystemExit as error:
        status = error.code
    assert status == (2 if message else 0)
    if message:
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {message}")


# -- databases in which layers are dense -----------------------------------------------------------


def test_a_database_in_which_layers_are_dense(network: str, tmp_path: Path, capsys) -> None:
    """Their scores are 0, their whole cost counts, and a profile leaves them as they are."""
    grid = ("--max-sparsity", 0.8, "--delta-sparse", 0.4, "--only", "body.*")
    assert run(network, "unstr", *grid, "--sparse-dir", tmp_path / "models_unstr") == 0
    where = ("--prefix", tmp_path, "--score_path", tmp_path)
    for action in ("loss", "squared"):
        assert run(network, "unstr", action, *where, main=database.main) == 0
    scores = (tmp_path / "net_unstr_squared.txt").read_text().split("head\n")[1].splitlines()
    assert [float(line.split()[0]) for line in scores[:5]] == [0.0] * 5
    capsys.readouterr()
    words = ("unstr", "--dp", "--constr", "params", *where)
    assert run(network, 20, *words, main=spdy.main) == 2
    error = capsys.readouterr().err
    fixed = 8 * 27 + 160 + 16  # stem, head, spare
    compressed = 16 * 36 + 16 * 16
    assert f"{100 * fixed / (fixed + compressed):.2g} % are layers that cost the same" in error
    assert run(network, 1.5, *words, main=spdy.main) == 0
    profile = tmp_path / "net_unstr_150x_dp.txt"
    levels = dict(line.split()[::-1] for line in profile.read_text().splitlines() if line[0] != "#")
    assert levels["stem"] == levels["head"] == levels["spare"] == "0000"
    kept = {level: 1 - int(level) / 1e4 for level in levels.values()}
    cost = fixed + 576 * kept[levels["body.a"]] + 256 * kept[levels["body.b"]]
    assert (fixed + compressed) / cost >= 1.5 * 0.99
    path = tmp_path / "stitched.pth"
    words = (profile, "--database", "unstr", *where[:2], "--save", path, "--skip", "*.b")
    assert run(network, *words, main=post_proc.main) == 0
    assert "body.b left dense: --skip *.b" in capsys.readouterr().err
    state, dense = torch.load(path, weights_only=True), get_model(network, "digits").state_dict()
    changed = {key for key, x in state.items() if not torch.equal(x, dense[key])}
    assert changed == {"body.a.weight"}
    assert run(network, *words[:-1], "*.c", main=post_proc.main) == 2
    assert "--skip *.c: no layer of that name" in capsys.readouterr().err


def test_a_mixed_database_whose_largest_layer_is_dense(network: str, tmp_path: Path) -> None:
    """Levels are put in order by a layer that they compress."""
    folder = tmp_path / "models_quant"
    for bits in (4, 8):
        words = ("quant", "--wbits", bits, "--abits", bits, "--skip", "body.a")
        saved(network, folder / f"net_{bits}w{bits}a.pth", *words)
    db = database.Database.open("mixed", "net", tmp_path)
    assert db.levels == ["8w8a", "4w4a"]


# -- layers, dense ---------------------------------------------------------------------------------


def test_layers_lists_what_the_model_does(network: str, capsys) -> None:
    """FLOPs are those of PyTorch's own counter. No image is read: there is none."""
    words = "layers --image-size 20 --skip *.b --prunem 8 --datapath /none".split()
    assert main_trueobs.main([network, "imagenet", *words]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[:5]}
    assert list(rows) == [*CALLED, "spare"]  # in order of execution
    assert head.split() == [
        *("layer", "kind", "shape", "columns", "patches", "MFLOP", "dense", "bits"),
        *("quant", "nmprune", "unstr", "blocked", "struct"),
    ]
    assert rows["stem"][:4] == ["Conv2d", "8×3×3×3", "27", "100"]
    assert rows["body.a"][:4] == ["Conv2d", "16×4×3×3", "36", "25"]
    assert rows["head"][:4] == ["Linear", "10×16", "16", "1"]
    assert rows["stem"][5:] == ["6,912", "yes", "no", "yes", "no", "yes"]
    assert rows["body.a"][6:] == ["yes", "no", "yes", "yes", "yes"]
    assert rows["body.b"][6:] == rows["spare"][6:] == ["no"] * 5
    assert rows["head"][6:] == ["yes", "2:8", "yes", "yes", "yes"]
    model = get_model(network, "digits")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 20, 20))
    flops = {str(k): sum(x.values()) for k, x in counter.get_flop_counts().items()}
    for name in CALLED:
        assert rows[name][4] == f"{flops[f'Net.{name}'] / 1e6:.3g}", name
    reasons = lines[5:]
    assert "left dense by nmprune: stem: 3 input channels are not a multiple of M = 8" in reasons
    assert "left dense by nmprune: body.a: 4 input channels are not a multiple of M = 8" in reasons
    assert "left dense by every mode: body.b: --skip *.b" in reasons
    assert any(x.startswith("left dense by every mode: spare: the model never") for x in reasons)
    weights, total = 216 + 576 + 256 + 160 + 16, sum(p.numel() for p in model.parameters())
    share = f"{100 * weights / total:.3g} % of all parameters"
    assert any(x.startswith(f"5 layers, {weights:,} weights ({share})") for x in reasons)
    assert reasons[-1].startswith("in no layer: table (Net), 256 (")


def test_layers_shows_bits(network: str, capsys) -> None:
    words = ["layers", "--wbits", "4", "--abits", "6", "--first-last", "8", "--bits", "*.b=3"]
    assert main_trueobs.main([network, "digits", *words]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:5]]
    assert {row[0]: row[7] for row in rows} == {
        "stem": "8w8a", "body.a": "4w6a", "body.b": "3w3a", "head": "8w8a",
    }  # fmt: off


def test_dense_is_the_accuracy_of_the_dense_model(network: str, capsys) -> None:
    assert run(network, "dense") == 0
    data = load_data("digits", nsamples=8)
    top1 = evaluate(get_model(network, "digits"), test_batches(data), torch.device("cpu")).top1
    output = capsys.readouterr()
    assert output.out == f"top-1 {top1:.2f}\n" and "dense: top-1 " in output.err


def test_random_weights_follow_the_seed_and_the_classes(capsys) -> None:
    words = ["digits", "layers", "--weights", "random", "--image-size", "32"]
    assert main_trueobs.main(["resnet18", *words]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "10×512" in line]
    torch.manual_seed(3)
    model = get_model("rn8", "digits", "random", 7)
    assert isinstance(model.linear, nn.Linear) and model.linear.out_features == 7
    torch.manual_seed(3)
    other = get_model("rn8", "digits", "random", 7)
    assert all(
        torch.equal(x, y) for x, y in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_help_begins_with_the_options_that_matter(capsys) -> None:
    with pytest.raises(SystemExit):
        main_trueobs.main(["--help"])
    sections = capsys.readouterr().out.split("\n\n")
    (first,) = (x for x in sections if x.startswith("options to begin with"))
    assert first.count("\n  --") == 10
    assert all(f"--{x} " in first for x in ("weights", "datapath", "save", "wbits", "nsamples"))
    titles = [section.split(":")[0] for section in sections]
    assert titles.index("options to begin with") < titles.index("quant") < titles.index("the run")
