"""Train rn8 on the embedded digits: how assets/rn8_digits.pth was made.

    python -m assets.train_rn8        (CPU, about a minute)

SGD with momentum 0.9 and a one-cycle schedule on augmented views of all 1,437 training images. The
last epoch's weights are saved, so no choice depends on the test images. Everything is seeded; other
machines or versions may still differ in the last digits. Prints the test accuracy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from datautils import calibration_batches, load_data, test_batches
from modelutils import CIFAR_BLOCKS, CifarResNet
from obc.inputs import files
from obc.toolkit import cli
from obc.toolkit.evaluation import evaluate

BATCH_SIZE = 64  # images
PEAK_RATE = 0.1
WEIGHT_DECAY = 1e-3


def train(epochs: int, seed: int) -> tuple[CifarResNet, float]:
    """The trained network, in eval mode, and its top-1 accuracy on the test images in percent."""
    digits = load_data("digits", nsamples=1437, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = CifarResNet(CIFAR_BLOCKS["rn8"], classes=len(digits.classes)).train()
    batches = calibration_batches(
        digits, batchsize=BATCH_SIZE, nrounds=epochs, augment=True, seed=seed
    )
    optimizer = torch.optim.SGD(
        model.parameters(), PEAK_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=len(batches))
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return model, evaluate(model, test_batches(digits), torch.device("cpu")).top1


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m assets.train_rn8", description="Train rn8 on the digits.")
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=cli.positive_int,
        default=60,
        help="passes over the training images",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=cli.nonnegative_int,
        default=0,
        help="seed of initial weights, order and augmentation",
    )
    shipped = Path(__file__).with_name("rn8_digits.pth")
    parser.add_argument("--save", metavar="FILE", default=shipped, help="where the weights go")
    return parser


def run(args: argparse.Namespace) -> None:
    files.check_writable(args.save)
    model, accuracy = train(args.epochs, args.seed)
    files.save_checkpoint(model.state_dict(), args.save)
    cli.print_result(f"top-1 {accuracy:.2f}")


def main(argv: list[str] | None = None) -> int:
    cli.setup_logging()
    return cli.guarded(run, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
