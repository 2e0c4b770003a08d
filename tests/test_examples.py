"""examples/: networks that are no image classifiers, trained a little and compressed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from scripts import ROOT

import database
import main_trueobs
import post_proc
import spdy
from examples import segmenter, text_encoder

FEW = ["--nsamples", "128"]


def last_figure(capsys: pytest.CaptureFixture[str]) -> float:
    return float(capsys.readouterr().out.splitlines()[-1].split()[-1])


def test_a_text_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ROOT / "examples/text_encoder.py"
    weights = tmp_path / "encoder.pth"
    assert text_encoder.main([str(weights), "--epochs", "1"]) == 0
    trained = last_figure(capsys)
    model = [f"{file}:encoder", f"{file}:docstrings"]
    dense = [*model, "dense", "--weights", str(weights), *FEW]
    assert main_trueobs.main(dense) == 0
    assert last_figure(capsys) == pytest.approx(trained, abs=0.01)
    assert trained > 3 * 100 / len(text_encoder.TOPICS)  # three times as good as guessing
    start = ["--weights", str(weights), *FEW]
    path = tmp_path / "pruned.pth"
    assert main_trueobs.main([*model, "nmprune", "--sequential", *start, "--save", str(path)]) == 0
    assert abs(last_figure(capsys) - trained) < 8
    state = torch.load(path, weights_only=True)
    assert text_encoder.encoder().load_state_dict(state)
    heads = state["layers.layers.0.self_attn.in_proj_weight"]
    assert ((heads.view(-1, 4) == 0).sum(1) == 2).all()
    place = ["--prefix", str(tmp_path), "--score_path", str(tmp_path / "scores")]
    grid = ["--max-sparsity", "0.8", "--delta-sparse", "0.4", "--sparse-dir"]
    folder = str(tmp_path / "models_unstr")
    assert main_trueobs.main([*model, "unstr", *start, *grid, folder]) == 0
    assert database.main([*model, "unstr", "loss", *start, *place]) == 0
    assert spdy.main([*model, "2", "unstr", "--dp", *start, *place]) == 0
    (profile,) = tmp_path.glob("*_dp.txt")
    words = [str(profile), "--database", "unstr", "--prefix", str(tmp_path), "--resolve"]
    assert post_proc.main([*model, *words, *start]) == 0
    assert abs(last_figure(capsys) - trained) < 15


def test_a_segmenter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ROOT / "examples/segmenter.py"
    weights, few = tmp_path / "segmenter.pth", tmp_path / "two.pth"
    assert segmenter.main([str(weights), "--steps", "40"]) == 0
    trained = last_figure(capsys)
    model = [f"{file}:segmenter", f"{file}:shapes"]
    start = ["--weights", str(weights), *FEW]
    assert main_trueobs.main([*model, "quant", "--wbits", "4", "--wasym", *start]) == 0
    assert abs(last_figure(capsys) - trained) < 5
    words = ["quant", "--wbits", "2", "--save", str(few)]
    assert main_trueobs.main([*model, *words, *start]) == 0
    lines = capsys.readouterr().out
    assert post_proc.main([*model, str(few), "--statcorr", *start]) == 0
    corrected = capsys.readouterr().out
    kl = [float(re.search(r"KL (\S+)", text)[1]) for text in (lines, corrected)]
    assert kl[1] < kl[0]  # closer to the dense network


def test_iou_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of 2×2 pixels, counted by hand."""
    labels = torch.tensor([[[0, 1], [2, 3]], [[0, 0], [0, 1]]])
    found = torch.tensor([[[0, 1], [2, 2]], [[0, 0], [1, 1]]])
    images = torch.zeros(2, 3, 2, 2)
    monkeypatch.setattr(segmenter, "batches", lambda seed, count: [(images, labels)])

    class Given(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.eye(4)[found].permute(0, 3, 1, 2)

    figures = segmenter.Shapes().evaluate(Given())
    assert figures["mIoU"] == pytest.approx(100 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4)
    assert figures["right pixels"] == pytest.approx(75)
