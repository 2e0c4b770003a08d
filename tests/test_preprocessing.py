"""How images become a network's input: as the network says, or as the options do."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import main_trueobs
from datautils import (
    ArrayImages,
    ImageSet,
    View,
    calibration_batches,
    default_preprocessing,
    load_data,
)
from modelutils import own_preprocessing
from obc.inputs.preprocessing import Preprocessing
from obc.inputs.vision import torchvision
from obc.solver.errors import UserError
from obc.toolkit import cli
from obc.toolkit.imagetask import images_hash
from obc.toolkit.session import model_without_images

QUICK = ["--nsamples", "32", "--noaug", "--device", "cpu"]
GREY = """
import torch
from torch import nn
from modelutils import get_model

class Grey(nn.Module):  # rn8, with what it expects made from one channel in [-1, 1]
    def __init__(self):
        super().__init__()
        self.rn8 = get_model("rn8", "digits")
        self.preprocessing = {"mean": [0.5], "std": (0.5,)}
    def forward(self, x):
        assert x.shape[1] == 1
        mean, std = (torch.tensor(v).view(3, 1, 1)
                     for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return self.rn8((x * 0.5 + 0.5 - mean) / std)

def grey(): return Grey()
def silent(): net = Grey(); del net.preprocessing; return net
def odd(): net = Grey(); net.preprocessing["size"] = "large"; return net
def other(): net = Grey(); net.preprocessing["colour"] = 1; return net
def words(): net = Grey(); net.preprocessing = "none"; return net
"""


@pytest.fixture
def photograph() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("name", "size"),
    [("rn18", 224), ("efficientnet_b1", 240), ("swin_t", 224), ("efficientnet_v2_l", 480)],
)
def test_torchvision_networks_see_what_the_transforms_of_their_weights_make(name, size, photograph):
    """With sizes, interpolations and means that are not all the same; to the bit."""
    told = own_preprocessing(name, True, torch.nn.Identity())
    made = default_preprocessing("folder").changed(name, told)
    assert made.size == size
    known = torchvision.models.get_model_weights({"rn18": "resnet18"}.get(name, name))
    expected = known.IMAGENET1K_V1.transforms()(photograph)
    source = ArrayImages(np.array(photograph)[None], [0])
    assert torch.equal(ImageSet(source, View(made, True, True), [0])[0][0], expected)


def test_torchvision_weights_leave_the_size_of_small_images_alone():
    told = own_preprocessing("efficientnet_v2_l", False, torch.nn.Identity())
    made = default_preprocessing("cifar10").changed("it", told)
    assert made == Preprocessing(32, 32, "squash", "bilinear", (0.5,) * 3, (0.5,) * 3)


def test_random_crops_have_the_interpolation_and_the_mean(photograph):
    made = Preprocessing(64, 72, interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    source = ArrayImages(np.array(photograph)[None], [7])
    images = ImageSet(source, View(made, photographs=True, flips=False), [0])
    data = replace(load_data("digits"), calibration=images)
    ((batch, labels),) = calibration_batches(data, augment=True, seed=5)
    transforms = torchvision.transforms
    bicubic = transforms.InterpolationMode.BICUBIC
    state = np.random.SeedSequence((5, 0, 0)).generate_state(1, np.uint64)
    with torch.random.fork_rng():
        torch.manual_seed(int(state[0]))
        view = transforms.RandomResizedCrop(64, interpolation=bicubic)(photograph)
    expected = transforms.Normalize(made.mean, made.std)(transforms.ToTensor()(view))
    assert labels.tolist() == [7] and torch.allclose(batch[0], expected, atol=1e-6)


def test_squashed_images_are_resized_as_a_whole(photograph):
    made = Preprocessing(20, 20, "squash", "lanczos", (0.0,), (1.0,))
    source = ArrayImages(np.array(photograph)[None], [0])
    image, _ = ImageSet(source, View(made, True, True), [0])[0]
    expected = photograph.convert("L").resize((20, 20), Image.Resampling.LANCZOS)
    assert np.array_equal(image[0].mul(255).round().numpy(), np.array(expected))


def test_a_grey_network_gets_grey_images_and_its_record_says_so(tmp_path, capsys):
    """It computes what rn8 does on images of three channels, so it has the same accuracy."""
    path = tmp_path / "net.py"
    path.write_text(GREY)
    assert main_trueobs.main(["rn8", "digits", "dense", *QUICK]) == 0
    expected = capsys.readouterr().out
    assert main_trueobs.main([f"{path}:grey", "digits", "dense", *QUICK]) == 0
    done = capsys.readouterr()
    assert done.out == expected
    assert "calibration images, 16×16 pixels, squashed, bilinear; mean 0.5, std 0.5" in done.err
    save = tmp_path / "q.pth"
    line = ["quant", "--wbits", "8", *QUICK, "--save", str(save)]
    assert main_trueobs.main([f"{path}:grey", "digits", *line]) == 0
    record = json.loads(save.with_suffix(".json").read_text())
    assert record["preprocessing"]["mean"] == [0.5] and record["preprocessing"]["size"] == 16
    assert "mean 0.5" in record["fingerprint"]["preprocessing"]
    capsys.readouterr()
    again = ["--repeat", str(save.with_suffix(".json"))]
    assert main_trueobs.main([*again, "--mean", "0.4", "--save", str(tmp_path / "r.pth")]) == 2
    assert "would not repeat the run (preprocessing was" in capsys.readouterr().err
    told = ["--mean", "1/2", "--std", "0.5"]  # what the network said, as options
    assert main_trueobs.main([f"{path}:silent", "digits", "dense", *QUICK, *told]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("odd", [], "size must be pixels, from 1; got 'large'"),
        ("other", [], "preprocessing has size, resize, crop, interpolation, mean, std, not colour"),
        ("words", [], "its attribute preprocessing must be a dict; got 'none'"),
        ("silent", [], "it takes 1 channel, images have 3: pass --mean and --std with one value"),
        ("grey", ["--mean", "0.5,0.5,0.5"], "mean has 3 value(s), std has 1; give both"),
        ("grey", ["--std", "0"], "std must be a number above 0 for each of 3 channels"),
        ("grey", ["--crop", "center", "--resize", "8"], "resize 8 is less than the image size 16"),
    ],
)
def test_what_cannot_be_is_one_line(function, options, words, tmp_path, capsys):
    path = tmp_path / "net.py"
    path.write_text(GREY)
    assert main_trueobs.main([f"{path}:{function}", "digits", "dense", *QUICK, *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err


@pytest.mark.parametrize("text", ["0.5,0.5", "a,b,c", "1/0", "", "nan"])
def test_values_by_channel_that_are_none(text, capsys):
    parser = cli.Parser()
    cli.add_common_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["rn8", "digits", f"--mean={text}"])
    assert "error: --mean must be a number for each of 3 channels" in capsys.readouterr().err


def test_another_size_is_resized_in_proportion_unless_told():
    """Twice the size of ImageNet's 224 from 256 is 448 from 512."""
    made = default_preprocessing("imagenet")
    assert (made.size, made.resize) == (224, 256)
    assert made.changed("options", {"size": 448}).resize == 512
    assert made.changed("options", {"size": 64}).resize == 73  # 73.14
    assert made.changed("options", {"size": 64, "resize": 64}).resize == 64
    assert made.changed("options", {"resize": 300, "mean": None}) == replace(made, resize=300)
    with pytest.raises(UserError, match="crop must be one of center, squash; got 'border'"):
        made.changed("timm", {"crop": "border"})


def test_fingerprints_of_what_was_right_are_as_they_were():
    """The hash was computed before a network had a say in its images."""
    data = load_data("digits", nsamples=5)
    assert images_hash(data.calibration) == "243549eb238a9a3c89991050a937fe36"


def test_layers_are_listed_for_images_of_the_network_s_own_size():
    parser = cli.Parser()
    cli.add_common_options(parser)
    args: Namespace = parser.parse_args(["efficientnet_b1", "imagenet", "--device", "cpu"])
    from obc.toolkit.session import common_options

    assert model_without_images(common_options(args))[1] == (3, 240, 240)
