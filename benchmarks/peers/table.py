"""What is compared, and the table of it, from the records of compress.py.

python -m benchmarks.peers.table [--todo] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

RECORDS = Path(__file__).parent / "records"
CELLS = {  # bits of weights and of activations, in all layers
    "4w": (4, 32),
    "3w": (3, 32),
    "2w": (2, 32),
    "4w4a": (4, 4),
    "2:4": (32, 32),
}
QUANTISED, SPARSE = ("4w", "3w", "2w", "4w4a"), ("2:4",)
ADAROUND_STEPS, LEARNED_ROUND_STEPS = 8000, 1000  # a layer
TOOLS = {  # by the name that pip knows
    "trueobs": "this",
    "nvidia-modelopt": "ModelOpt",
    "brevitas": "Brevitas",
    "aimet-torch": "AIMET",
    "model-compression-toolkit": "MCT",
}


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    package: str
    title: str
    settings: str
    cells: tuple[str, ...] = QUANTISED


BREVITAS = "ptq_evaluate.py: norms merged, 20 rounds of equalisation, MSE ranges, bias correction"
AIMET = "norms folded, tf_enhanced ranges, symmetric per channel; weights on the grid"
MCT = "symmetric per channel, batches of 32, otherwise defaults"
LEARNED = f"hard sigmoid, {LEARNED_ROUND_STEPS} steps a layer, 32 images, rate 0.01"
METHODS = {
    "ours": Method("trueobs", "plain", "--noaug", QUANTISED + SPARSE),
    "ours-wasym": Method("trueobs", "`--wasym`", "--noaug --wasym"),
    "ours-sequential": Method(
        "trueobs", "`--sequential`", "--noaug --sequential", QUANTISED + SPARSE
    ),
    "ours-sequential-wasym": Method(
        "trueobs", "`--sequential --wasym`", "--noaug --sequential --wasym"
    ),
    "ours-sequential-wasym-hscale": Method(
        "trueobs",
        "`--sequential --wasym --hscale`",
        "--noaug --sequential --wasym --hscale",
        ("3w", "2w"),
    ),
    "modelopt-sparsegpt": Method(
        "nvidia-modelopt", "SparseGPT", "defaults, all images; the mask alone", SPARSE
    ),
    "modelopt-sparsegpt-tuned": Method(
        "nvidia-modelopt",
        "SparseGPT, then norms",
        "defaults, all images; the mask, then the norms' statistics",
        SPARSE,
    ),
    "brevitas-gptq": Method("brevitas", "GPTQ", f"{BREVITAS}; act order"),
    "brevitas-gpfq": Method("brevitas", "GPFQ", f"{BREVITAS}; act order"),
    "brevitas-qronos": Method("brevitas", "Qronos", f"{BREVITAS}; act order"),
    "brevitas-gpfq-asym": Method("brevitas", "GPFQ, asymmetric", f"{BREVITAS}; act order"),
    "brevitas-qronos-asym": Method("brevitas", "Qronos, asymmetric", f"{BREVITAS}; act order"),
    "brevitas-learned-round": Method("brevitas", "learned round", f"{BREVITAS}; {LEARNED}"),
    "aimet-seqmse": Method("aimet-torch", "SeqMSE", f"{AIMET}; 20 candidates"),
    "aimet-adaround": Method("aimet-torch", "AdaRound", f"{AIMET}; {ADAROUND_STEPS} steps a layer"),
    "mct-gptq-15": Method(
        "model-compression-toolkit", "GPTQ by gradients, 15 epochs", f"{MCT}; no sample attention"
    ),
    "mct-gptq-100": Method(
        "model-compression-toolkit", "GPTQ by gradients, 100 epochs", f"{MCT}; no sample attention"
    ),
    "mct-gptq-attention-100": Method(
        "model-compression-toolkit", "GPTQ by gradients, sample attention, 100 epochs", MCT
    ),
}
Records = dict[tuple[str, str], dict]  # by method and cell


def read_records(folder: Path) -> Records:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return {(record["method"], record["cell"]): record for record in records}


def todo(records: Records) -> list[str]:
    """A line `package method cell` for each cell without a record."""
    return [
        f"{method.package} {name} {cell}"
        for name, method in METHODS.items()
        for cell in method.cells
        if (name, cell) not in records
    ]


def table(records: Records) -> str:
    """Markdown: top-1, mean KL to the dense network and CPU seconds of every cell."""
    lines = [f"| tool | method | {' | '.join(CELLS)} |", "|---" * (2 + len(CELLS)) + "|"]
    for name, method in METHODS.items():
        known = [records[name, cell] for cell in method.cells if (name, cell) in records]
        versions = sorted({record["version"] for record in known} - {"checkout"})
        cells = [
            figures(records.get((name, cell))) if cell in method.cells else "–" for cell in CELLS
        ]
        tool = " ".join([TOOLS[method.package], *versions])
        lines.append(f"| {' | '.join([tool, method.title, *cells])} |")
    return "\n".join(lines)


def figures(record: dict | None) -> str:
    """
    >>> figures({"top1": 82.34, "kl": 0.24523, "cpu_seconds": 29.5}), figures(None)
    ('82.34, 0.245, 30 s', 'not run')
    """
    if record is None:
        return "not run"
    return f"{record['top1']:.2f}, {record['kl']:.3g}, {record['cpu_seconds']:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--todo", action="store_true", help="list what has no record, instead")
    args = parser.parse_args()
    records = read_records(args.out)
    sys.stdout.write(("\n".join(todo(records)) if args.todo else table(records)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
