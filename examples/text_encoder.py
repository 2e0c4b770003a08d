"""A small BERT-like encoder: which module of Python's standard library is a docstring from?

    python -m examples.text_encoder encoder.pth        trains it, about a minute on 2 cores

As MODEL it is `examples/text_encoder.py:encoder`, as DATASET `examples/text_encoder.py:docstrings`.
The text comes with Python: docstrings of the modules in TOPICS, read from their sources, in pieces
of up to 32 words. Every fifth docstring is for testing. Words are numbered by their frequency in
the other ones; those beyond the first 2,000 are one unknown word.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obc.inputs.files import save_checkpoint
from obc.inputs.tasks import Task

TOPICS = """argparse asyncio collections concurrent ctypes datetime distutils email http
    importlib logging multiprocessing pathlib statistics tarfile threading tkinter turtle
    typing unittest urllib xml zipfile""".split()
WORDS = 2000  # in the vocabulary
LENGTH = 32  # words of a piece
PADDING, UNKNOWN, FIRST = range(3)  # numbers that are no words; the class is read off FIRST
MOST_PIECES = 300  # of a module, in either part
BATCH = 64


# -- the network -----------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Words and their places, two encoder layers, and a class read off the first place."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width, padding_idx=PADDING)
        self.places = nn.Parameter(torch.randn(LENGTH + 1, width) / width)
        self.norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), False)
        self.topic = nn.Linear(width, len(TOPICS))

    def forward(self, words: Tensor, padding: Tensor) -> Tensor:
        hidden = self.norm(self.words(words) + self.places)
        return self.topic(self.layers(hidden, src_key_padding_mask=padding)[:, 0])


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder()


# -- the text --------------------------------------------------------------------------------------


def docstrings_of(topic: str) -> Iterator[str]:
    """All docstrings of a module, or of a package's modules, in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted((library / topic).rglob("*.py")) or [library / f"{topic}.py"]
    for source in sources:
        if "test" in source.parts or not source.is_file():
            continue
        for node in ast.walk(ast.parse(source.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield ast.get_docstring(node) or ""


@cache
def pieces() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Words, padding and topic of all pieces: to train on, and to test on."""
    texts: dict[str, list[tuple[list[str], int]]] = {"train": [], "test": []}
    for number, topic in enumerate(TOPICS):
        counts = Counter()
        for index, text in enumerate(docstrings_of(topic)):
            words, part = re.findall(r"[a-z]+", text.lower()), "train" if index % 5 else "test"
            words = [word for word in words if word != topic]
            for start in range(0, len(words) - 7, LENGTH):
                if counts[part] < MOST_PIECES:
                    counts[part] += 1
                    texts[part].append((words[start : start + LENGTH], number))
    frequent = Counter(word for words, _ in texts["train"] for word in words)
    known = [word for word, _ in frequent.most_common(WORDS - 3)]
    numbers = {word: number for number, word in enumerate(known, 3)}

    def tensors(part: list[tuple[list[str], int]]) -> dict[str, Tensor]:
        words = torch.full((len(part), LENGTH + 1), PADDING)
        words[:, 0] = FIRST
        for row, (text, _) in enumerate(part):
            words[row, 1 : len(text) + 1] = torch.tensor([numbers.get(x, UNKNOWN) for x in text])
        topics = torch.tensor([number for _, number in part])
        return {"words": words, "padding": words == PADDING, "topic": topics}

    return tensors(texts["train"]), tensors(texts["test"])


def batches(part: Mapping[str, Tensor], order: Tensor) -> Iterator[dict[str, Tensor]]:
    for rows in order.split(BATCH):
        yield {name: tensor[rows] for name, tensor in part.items()}


# -- the task --------------------------------------------------------------------------------------


class Docstrings(Task):
    """Which module a piece of a docstring is from."""

    logits = True

    def calibration(self) -> Iterator[dict[str, Tensor]]:
        train, _ = pieces()
        generator = torch.Generator().manual_seed(0)
        return batches(train, torch.randperm(len(train["topic"]), generator=generator))

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"words": batch["words"], "padding": batch["padding"]}

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, batch["topic"])

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        _, test = pieces()
        device, right = next(model.parameters()).device, 0
        for batch in batches(test, torch.arange(len(test["topic"]))):
            scores = model(batch["words"].to(device), batch["padding"].to(device))
            right += int((scores.argmax(1).cpu() == batch["topic"]).sum())
        return {"accuracy": 100 * right / len(test["topic"])}


def docstrings() -> Task:
    return Docstrings()


# -- training --------------------------------------------------------------------------------------


def train(epochs: int) -> nn.Module:
    """The encoder, trained from a fixed seed."""
    model, (data, _), task = encoder().train(), pieces(), Docstrings()
    steps = epochs * -(-len(data["topic"]) // BATCH)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, steps)
    for epoch in range(epochs):
        for batch in batches(data, torch.randperm(len(data["topic"]))):
            loss = task.loss(model(**task.inputs(batch)), batch)
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss:.3f}", file=sys.stderr)  # noqa: T201
    return model.eval()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="text_encoder.py", description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="where to save the weights")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the text (default: 5)")
    args = parser.parse_args(argv)
    model = train(args.epochs)
    with torch.inference_mode():
        print(f"accuracy {Docstrings().evaluate(model)['accuracy']:.2f}")  # noqa: T201
    save_checkpoint(model.state_dict(), args.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
