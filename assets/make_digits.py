"""Make assets/digits.npz from scikit-learn's copy of the UCI optical digits. Was run once.

    python -m assets.make_digits

Stored: images (1797, 8, 8) uint8 in 0 … 16 as published, labels (1797,) uint8, and test (1797,)
bool, a stratified random fifth. See assets/README.md for provenance. Needs scikit-learn, which
nothing else in the toolkit does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from obc.inputs.files import atomic_write

TEST_IMAGES = 360


def main() -> int:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    labels = digits.target.astype(np.uint8)
    _, chosen = train_test_split(
        np.arange(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=0
    )
    test = np.zeros(len(labels), dtype=bool)
    test[chosen] = True
    with atomic_write(Path(__file__).with_name("digits.npz")) as file:
        np.savez_compressed(file, images=digits.images.astype(np.uint8), labels=labels, test=test)
    return 0


if __name__ == "__main__":
    sys.exit(main())
