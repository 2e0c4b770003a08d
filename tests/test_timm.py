"""Networks of timm's as MODEL: weights, classes, preprocessing; none is downloaded."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import main_trueobs
from datautils import ArrayImages, ImageSet, View, default_preprocessing
from modelutils import find_layers, get_model, own_preprocessing
from obc.inputs.timm_models import timm_package
from obc.inputs.vision import make_importable
from obc.solver.errors import UserError

make_importable()  # torchvision, which timm imports
timm = pytest.importorskip("timm")
QUICK = ["--nsamples", "32", "--noaug", "--device", "cpu"]


@pytest.mark.parametrize(
    "name", ["resnet18.a1_in1k", "mobilevit_xxs.cvnets_in1k", "vit_tiny_patch16_224"]
)
def test_images_are_made_as_timm_makes_them_for_validation(name):
    """resnet18.a1_in1k: 288 pixels of 288; MobileViT: not normalised; ViT: mean 0.5, crop 0.9."""
    model = timm.create_model(name)
    made = default_preprocessing("folder").changed(
        name, own_preprocessing(f"timm:{name}", True, model)
    )
    config = timm.data.resolve_data_config({}, model=model, use_test_size=True)
    assert made.image_shape == config["input_size"]
    coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    photograph = Image.fromarray(coarse).resize((640, 480))
    source = ArrayImages(np.array(photograph)[None], [0])
    expected = timm.data.create_transform(**config)(photograph)
    image, _ = ImageSet(source, View(made, True, True), [0])[0]
    assert torch.allclose(image, expected, atol=1e-6)
    assert own_preprocessing(f"timm:{name}", False, model).keys() == {"mean", "std"}


def test_weights_from_a_file_with_other_classes(tmp_path):
    torch.manual_seed(1)
    trained = timm.create_model("resnet10t", num_classes=10).eval()
    wrapped = {f"module.{name}": tensor for name, tensor in trained.state_dict().items()}
    torch.save({"state_dict": wrapped}, tmp_path / "w.pth")
    model = get_model("timm:resnet10t", "digits", tmp_path / "w.pth", classes=10)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(images), trained(images))
    with pytest.raises(UserError, match="these weights have 10 classes, but folder has 7"):
        get_model("timm:resnet10t", "folder", tmp_path / "w.pth", classes=7)


def test_attention_s_projections_are_layers():
    model = get_model("timm:vit_tiny_patch16_224", "digits", "random", classes=10)
    names = find_layers(model)
    assert len(names) == 1 + 12 * 4 + 1 and "blocks.11.attn.qkv" in names
    assert names["head"].weight.shape == (10, 192)


def test_a_run_says_what_stays_dense_and_records_the_version(tmp_path, capsys):
    save = tmp_path / "q.pth"
    line = ["timm:test_vit3", "digits", "quant", "--wbits", "4", "--weights", "random", *QUICK]
    config = timm.create_model("test_vit3").pretrained_cfg
    size = ["--image-size", str(config["input_size"][-1])]
    assert main_trueobs.main([*line, *size, "--save", str(save)]) == 0
    err = capsys.readouterr().err
    assert "left dense, in no layer to compress: " in err and "% of all parameters" in err
    record = json.loads(save.with_suffix(".json").read_text())
    assert record["fingerprint"]["timm"] == timm.__version__
    assert record["preprocessing"]["mean"] == list(config["mean"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:resnt18", "unknown model timm:resnt18; did you mean .*timm:resnet18"),
        ("timm:resnet18.best", "timm has no weights best; choose from .*a1_in1k"),
        ("timm:", "unknown model timm:; "),
        ("timm:hf-hub:timm/resnet18", "unknown model"),
    ],
)
def test_names_that_timm_does_not_have(name, words):
    with pytest.raises(UserError, match=words):
        get_model(name, "imagenet", "random")


def test_weights_that_cannot_be_downloaded_are_one_line(monkeypatch):
    def offline(*args, pretrained, **options):
        raise FileNotFoundError("cannot locate the file on the Hub\nand more lines")

    monkeypatch.setattr(timm, "create_model", offline)
    words = (
        r"its weights cannot be downloaded \(cannot locate the file on the Hub\); pass --weights"
    )
    with pytest.raises(UserError, match=words):
        get_model("timm:resnet18.a1_in1k", "imagenet")


def test_without_the_package_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install -r requirements-timm.txt"):
        timm_package()
    assert main_trueobs.main(["timm:resnet18", "digits", "dense", *QUICK]) == 2
    assert capsys.readouterr().err.count("\n") == 1
