"""attention.py: the same outputs as torch's module, by layers that can be compressed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import database
import export
import main_trueobs
import post_proc
import spdy
from modelutils import find_layers
from obc.inputs.attention import SplitAttention, split_attention
from obc.inputs.tracing import TracedModel, resumable
from obc.solver.errors import UserError


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(**options: object) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **options).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)  # torch's biases are zero
    return module


# -------------------------------------------------------------------------------- the same outputs

CALLS = {  # options of the module; shapes of query, key, value; options of the call
    "of itself": ({"batch_first": True}, [(3, 5, 8)], {}),
    "length first": ({}, [(5, 3, 8)], {}),
    "without weights": ({"batch_first": True}, [(3, 5, 8)], {"need_weights": False}),
    "weights of each head": ({}, [(5, 3, 8)], {"average_attn_weights": False}),
    "no bias": ({"bias": False}, [(5, 3, 8)], {}),
    "not batched": ({}, [(5, 8)], {"key_padding_mask": torch.tensor([0, 0, 0, 1, 1]).bool()}),
    "of another": ({"batch_first": True}, [(3, 5, 8), (3, 7, 8), (3, 7, 8)], {}),
    "other sizes": (
        {"batch_first": True, "kdim": 6, "vdim": 4},
        [(3, 5, 8), (3, 7, 6), (3, 7, 4)],
        {"need_weights": False},
    ),
    "one more key": ({"add_bias_kv": True}, [(5, 3, 8)], {}),
    "one more of zeros": ({"add_zero_attn": True}, [(5, 3, 8)], {"need_weights": False}),
    "all at once": (
        {"add_bias_kv": True, "add_zero_attn": True, "kdim": 3, "batch_first": True},
        [(2, 4, 8), (2, 6, 3), (2, 6, 8)],
        {
            "attn_mask": random(4, 6),
            "key_padding_mask": torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]]).float(),
            "average_attn_weights": False,
        },
    ),
    "causal": (
        {"batch_first": True},
        [(3, 5, 8)],
        {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True, "need_weights": False},
    ),
    "a mask for each head": ({}, [(5, 3, 8)], {"attn_mask": random(6, 5, 5)}),
    "boolean masks": (
        {"batch_first": True},
        [(2, 4, 8)],
        {
            "attn_mask": torch.eye(4).bool(),
            "key_padding_mask": torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0]]).bool(),
        },
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_outputs_are_those_of_the_packed_module(name: str) -> None:
    options, shapes, call = CALLS[name]
    packed = attention(**options)
    inputs = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    inputs = inputs if len(inputs) == 3 else inputs * 3
    split, theirs = SplitAttention(packed), packed(*inputs, **call)
    ours = split(*inputs, **call)
    torch.testing.assert_close(ours[0], theirs[0])
    assert (ours[1] is None) == (theirs[1] is None)
    if ours[1] is not None:
        torch.testing.assert_close(ours[1], theirs[1])
    assert len(find_layers(split)) == 4
    state = split.state_dict()
    assert state.keys() == packed.state_dict().keys()
    assert all(torch.equal(tensor, packed.state_dict()[key]) for key, tensor in state.items())
    other = attention(**options)
    for parameter in other.parameters():
        parameter.data.mul_(-2)
    split.load_state_dict(other.state_dict())
    torch.testing.assert_close(split(*inputs, **call)[0], other(*inputs, **call)[0])


# ------------------------------------------------------------------------------------ in a network


class Odd(nn.MultiheadAttention):
    pass


class Reader(nn.Module):
    """Attention that is called in several ways, or not, or looked into."""

    def __init__(self, peeks: bool = False) -> None:
        super().__init__()
        self.peeks = peeks
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=True
        )
        self.decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        self.odd, self.unused = Odd(8, 2), nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = True
        x = self.encoder(x, src_key_padding_mask=padding)
        x = x.masked_fill(padding[:, :, None], 0)  # as torch's fast path for nested tensors does
        x = self.decoder(x, x[:, :2])
        if self.peeks:
            x = x @ self.encoder.layers[0].self_attn.in_proj_weight[:8]
        return x + self.odd(x, x, x)[0]


def run(model: nn.Module, x: Tensor) -> Tensor:
    try:
        with torch.inference_mode():
            return model(x)
    except TypeError as error:
        raise UserError("it fails") from error


def test_every_attention_of_a_network_is_divided(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Reader().eval()
    x, plain = random(3, 5, 8), copy.deepcopy(model)
    before = run(model, x)
    with caplog.at_level("INFO", "trueobs"):
        split_attention(model, lambda: run(model, x))
    split = [name for name, x in model.named_modules() if isinstance(x, SplitAttention)]
    assert split == [
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
        "decoder.self_attn",
        "decoder.multihead_attn",
    ]
    assert [record.message for record in caplog.records] == [
        "odd.in_proj_weight left dense: its class is not torch's own",
        "unused.in_proj_weight left dense: the network does not call it",
    ]
    torch.testing.assert_close(run(model, x), before)
    called = set()
    for name, layer in find_layers(model).items():
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
    run(model, x)
    assert find_layers(model).keys() - called == {"odd.out_proj", "unused.out_proj"}
    plain.load_state_dict(model.state_dict())  # all of torch's names, and no other
    torch.testing.assert_close(run(plain, x), before)


def test_attention_that_the_network_looks_into_stays_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = Reader(peeks=True).eval(), random(3, 5, 8)
    before = run(model, x)
    with caplog.at_level("INFO", "trueobs"):
        split_attention(model, lambda: run(model, x))
    assert not any(isinstance(x, SplitAttention) for x in model.modules())
    assert "the network needs it whole (it fails)" in caplog.text
    torch.testing.assert_close(run(model, x), before)


# ------------------------------------------------------------------------------------- the commands

NET = '''
import torch
from torch import nn

class Patches(nn.Module):
    """A small vision transformer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.places = nn.Parameter(torch.randn(16, 16) / 4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.last = nn.Linear(16, 10)

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2) + self.places
        x = x + self.attention(self.norm(x), self.norm(x), self.norm(x), need_weights=False)[0]
        return self.last(self.block(x).mean(1))

def patches():
    torch.manual_seed(0)
    return Patches()
'''
PARTS = [f"{which}.{part}_proj" for which in ("attention", "block.self_attn") for part in "qkv"]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("network") / "net.py"
    path.write_text(NET)
    return f"{path}:patches"


def plain_network(network: str) -> nn.Module:
    scope: dict = {}
    exec(Path(network.rpartition(":")[0]).read_text(), scope)
    return scope["patches"]().eval()


@pytest.fixture(scope="module")
def folder(network: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised and a pruned checkpoint, and databases of two kinds."""
    folder = tmp_path_factory.mktemp("compressed")
    for words in (
        f"quant --wbits 4 --save {folder}/four.pth",
        f"quant --wbits 8 --abits 8 --save {folder}/models_quant/patches_8w8a.pth",
        f"quant --wbits 4 --abits 4 --save {folder}/models_quant/patches_4w4a.pth",
        f"nmprune --sequential --save {folder}/nm.pth",
        f"unstr --max-sparsity 0.6 --delta-sparse 0.3 --sparse-dir {folder}/models_unstr",
    ):
        line = [network, "digits", *words.split(), "--noaug", "--nsamples", "64"]
        assert main_trueobs.main(line) == 0, words
    return folder


def test_projections_are_compressed_and_files_have_torchs_names(network: str, folder: Path) -> None:
    model = plain_network(network)
    names = set(model.state_dict())
    for path in [folder / "four.pth", folder / "nm.pth", *folder.glob("models_unstr/*.pth")]:
        state = torch.load(path, weights_only=True)
        assert {key for key in state if ".weight_quant." not in key} == names, path
        mismatch = model.load_state_dict(state, strict=False)
        assert not mismatch.missing_keys
    state = torch.load(folder / "nm.pth", weights_only=True)
    for key in ("attention.in_proj_weight", "block.self_attn.in_proj_weight"):
        assert ((state[key].view(-1, 4) == 0).sum(1) == 2).all()
    state = torch.load(folder / "four.pth", weights_only=True)
    for part, weight in zip("qkv", state["attention.in_proj_weight"].chunk(3), strict=True):
        grid = {x: state[f"attention.{part}_proj.weight_quant.{x}"] for x in ("scale", "zero")}
        codes = weight / grid["scale"] + grid["zero"]
        torch.testing.assert_close(codes, codes.round().clamp(0, 15))
    reports = json.loads((folder / "four.json").read_text())["layers"]
    assert {x["name"] for x in reports if not x["dense"]} >= {*PARTS, "block.linear1"}


def test_corrections_and_later_steps_start_from_these_files(network: str, folder: Path) -> None:
    start = torch.load(folder / "nm.pth", weights_only=True)
    words = [network, "digits", str(folder / "nm.pth"), "--statcorr", "--nsamples", "64"]
    assert post_proc.main([*words, "--save", str(folder / "corrected.pth")]) == 0
    corrected = torch.load(folder / "corrected.pth", weights_only=True)
    assert {k for k in start if not torch.equal(start[k], corrected[k])} >= {"block.norm1.weight"}
    assert torch.equal(start["attention.in_proj_weight"], corrected["attention.in_proj_weight"])
    line = [network, "digits", "quant", "--wbits", "8", "--load", str(folder / "nm.pth")]
    line += ["--nsamples", "64", "--noaug", "--save", str(folder / "both.pth")]
    assert main_trueobs.main(line) == 0
    both = torch.load(folder / "both.pth", weights_only=True)["attention.in_proj_weight"]
    assert (both[start["attention.in_proj_weight"] == 0] == 0).all()


@pytest.mark.parametrize("kind", ["unstr", "mixed"])
def test_scores_a_profile_and_a_stitched_model(kind: str, network: str, folder: Path) -> None:
    scores = f"--prefix {folder} --score_path {folder / 'scores'}".split()
    few = ["--nsamples", "64"]
    for errors in ("squared", "loss"):
        assert database.main([network, "digits", kind, errors, *scores, *few]) == 0
    words = [network, "digits", "1.6" if kind == "unstr" else "6", kind, "--dp", *scores]
    assert spdy.main(words) == 0
    (profile,) = folder.glob(f"patches_{kind}_*_dp.txt")
    levels = {name: level for level, name in map(str.split, filtered(profile))}
    assert levels.keys() >= {*PARTS}
    path = folder / f"{kind}.pth"
    words = [network, "digits", str(profile), "--database", kind, "--prefix", str(folder)]
    assert (
        post_proc.main(
            [*words, *few, "--resolve", "--gap", "--gap-epochs", "1", "--save", str(path)]
        )
        == 0
    )
    mismatch = plain_network(network).load_state_dict(torch.load(path), strict=False)
    assert not mismatch.missing_keys


def filtered(profile: Path) -> list[str]:
    return [x for x in profile.read_text().splitlines() if x and not x.startswith("#")]


def test_a_divided_network_is_traced(network: str) -> None:
    model = plain_network(network)
    images = random(2, 3, 16, 16)
    split_attention(model, lambda: run(model, images))
    with torch.inference_mode():
        traced = resumable(model, images)
    assert isinstance(traced, TracedModel)
    assert len(traced.calls("attention.q_proj")) == 1


def test_codes_are_exported_by_layer(network: str, folder: Path) -> None:
    path = folder / "four.safetensors"
    assert export.main([network, "digits", str(folder / "four.pth"), "--to", str(path)]) == 0
    state = load_file(path)
    whole = torch.load(folder / "four.pth", weights_only=True)["attention.in_proj_weight"]
    for part, weight in zip("qkv", whole.chunk(3), strict=True):
        codes = state[f"attention.{part}_proj.weight_codes"]
        codes = torch.stack([codes & 15, codes >> 4], 1).view(weight.shape)
        grid = [state[f"attention.{part}_proj.weight_quant.{x}"] for x in ("scale", "zero")]
        torch.testing.assert_close((codes - grid[1]) * grid[0], weight)
