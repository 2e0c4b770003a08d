"""The demo's tables and page, from a record (`make demo` runs it all); the picture of README.md."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from recipes import demo, picture

NETWORKS = [
    {"name": demo.DENSE, "bytes": 400_000, "seconds_per_image": 4e-5}
    | {"top1": 99.0, "kl": 0.0, "agreement": 100.0},
    {"name": "4-bit weights", "bytes": 50_000, "seconds_per_image": 1.6e-5}
    | {"top1": 98.5, "kl": 0.01234, "agreement": 97.25},
]
FOUND = {
    "results": [
        {
            "method": "uniform",
            "reached": "4.7701",
            "top1": 98.0,
            "kl": "0.0062",
            "agreement": "98.10",
        },
        {
            "method": "DP, solved anew",
            "reached": "4.01",
            "top1": 98.9,
            "kl": "0.001",
            "agreement": "99",
        },
    ],
    "profiles": {"uniform": {"a": "7903", "b": "7903"}, "DP": {"a": "0000", "b": "9900"}},
    "losses": {
        "a": {"0000": -1e-9, "7903": 0.01, "9900": 1.0},
        "b": {"0000": 0.0, "7903": 1e-6, "9900": 1e-3},
    },
}


def test_tables():
    assert demo.exported_table(NETWORKS)[1:] == [
        ["dense, float32", "400 kB", "", "40 µs", "", "99.00 %", "", ""],
        ["4-bit weights", "50 kB", "8.0×", "16 µs", "2.5×"] + ["98.50 %", "97.2 %", "0.01234"],
    ]
    assert demo.levels_table(FOUND)[1:] == [
        ["uniform", "79.0 %", "4.77×", "98.00 %", "98.10 %", "0.00620"],
        ["DP, solved anew", "0 % … 99.0 %", "4.01×", "98.90 %", "99 %", "0.00100"],
    ]


def test_heat_is_logarithmic_from_least_error_to_the_largest():
    """1e-6 to 1 are six powers of ten."""
    rows = {row["layer"]: [cell["heat"] for cell in row["cells"]] for row in demo.heat(FOUND)}
    assert rows == {"a": pytest.approx([0, 4 / 6, 1]), "b": pytest.approx([0, 0, 3 / 6])}


def test_images_apart_are_those_of_the_largest_kl():
    torch.manual_seed(0)
    dense, images = 3 * torch.randn(40, 10), torch.rand(40, 3, 4, 4)
    changed = dense.clone()
    changed[7] = -dense[7]
    changed[3] = -5 * dense[3]
    found = demo.images_apart(images, torch.arange(40), dense, changed)
    assert len(found) == demo.HARDEST and [one["label"] for one in found[:2]] == [3, 7]
    p, q = dense[3].double().softmax(0), changed[3].double().softmax(0)
    assert found[0]["kl"] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-6)
    assert found[0]["dense"]["class"] == dense[3].argmax()
    assert found[0]["dense"]["percent"] == pytest.approx(100 * float(p.max()), rel=1e-6)
    pixels = Image.open(io.BytesIO(base64.b64decode(found[0]["png"])))
    red = float(images[3, 0, 2, 1]) * 0.229 + 0.485
    assert pixels.size == (4, 4) and pixels.getpixel((1, 2))[0] == round(255 * red)


class Tags(HTMLParser):
    """Fails where tags do not match; keeps the addresses of pictures and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_other_file():
    image = {"png": "iVBO", "label": 8, "dense": {"class": 8, "percent": 99.6}}
    image |= {"compressed": {"class": 3, "percent": 51.2}}
    record = {"networks": NETWORKS, "levels": FOUND, "images": [image], "batch": 16}
    record |= {"arguments": {"model": "rn8", "dataset": "digits", "nsamples": 9}}
    record |= {
        "classes": list("0123456789"),
        "seconds": 12.3,
        "environment": {"processor": "A & B", "torch": "2"},
    }
    text = demo.page(record)
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and all(x.startswith("data:image/png;base64,") for x in tags.addresses)
    assert "A &amp; B" in text and "3, 51 %" in text and "79.0 %" in text
    assert text.count('class="chosen"') == 2 and text.count('class="uniform"') == 2
    assert not re.search(r"https?://|{{|{%", text)


# -- the picture of README.md ----------------------------------------------------------------------

RESULTS = """dense\t-\t-\t87.93
uniform\t2\t2.09\t87.6\t0.02\t97
DP\t2\t2.0\t87.8\t0.02\t97
DP, solved anew\t2\t2.0\t87.7\t0.01\t97
"""


def test_the_picture_is_drawn_light_and_dark_and_always_the_same(tmp_path):
    (tmp_path / "results.tsv").write_text(RESULTS)
    for name in ("a", "b"):
        words = [str(tmp_path / "results.tsv"), "--to", str(tmp_path / name)]
        assert picture.main(words) == 0
    light, dark = (
        [(tmp_path / f"{name}-{theme}.svg").read_bytes() for name in "ab"]
        for theme in ("light", "dark")
    )
    assert light[0] == light[1] and dark[0] == dark[1] and light[0] != dark[0]
    for text in (light[0], dark[0]):
        assert ElementTree.fromstring(text).tag.endswith("svg")
    assert b"#d55e00" in light[0] and b"#ff9a4d" in dark[0]


def test_results_that_lack_a_method_are_one_line(tmp_path, capsys):
    (tmp_path / "results.tsv").write_text(RESULTS.replace("DP, solved anew", "search"))
    assert picture.main([str(tmp_path / "results.tsv"), "--to", str(tmp_path / "a")]) == 2
    assert "error: no results of DP, solved anew" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.svg"))
