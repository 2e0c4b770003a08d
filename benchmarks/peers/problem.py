"""The problem that all tools solve: ResNet-20, CIFAR-10 images as tensors, the dense answers.

    python -m benchmarks.peers.problem --weights rn20.pth --datapath cifar10 --out problem.pt

writes it, in the toolkit's own environment. The scripts of the other tools only read it: they need
no data set, and see the same bits whatever their versions of PyTorch and torchvision are.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obc.inputs.cifar_resnets import CifarResNet

IMAGES_A_BATCH = 250  # of the evaluation


class Network(CifarResNet):
    """The toolkit's ResNet-20 with a call that Brevitas can trace: it fails on `mean(dim=…)`."""

    def __init__(self) -> None:
        super().__init__(3)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))


@dataclass
class Problem:
    """What a tool is given, and what its answer is compared with."""

    weights: dict[str, Tensor]  # the dense network's state dict
    calibration: Tensor  # (1024, 3, 32, 32), normalised, not augmented, in random order
    test: Tensor  # (10000, 3, 32, 32)
    labels: Tensor  # (10000,) of the test images
    dense: Tensor  # (10000, 10) the dense network's logits

    def network(self) -> Network:
        """A dense network of one's own."""
        network = Network()
        network.load_state_dict(self.weights)
        return network.eval()

    def batches(self, size: int) -> list[Tensor]:
        return list(self.calibration.split(size))

    def figures(self, network: nn.Module) -> dict[str, float]:
        """Top-1 and agreement in percent, and mean KL(dense ‖ network), on the test images."""
        scores = logits(network, self.test)
        logs, dense = (x.double().log_softmax(1) for x in (scores, self.dense))
        chosen = scores.argmax(1)
        return {
            "top1": 100 * float((chosen == self.labels).double().mean()),
            "kl": float(F.kl_div(logs, dense, log_target=True, reduction="batchmean")),
            "agreement": 100 * float((chosen == self.dense.argmax(1)).double().mean()),
        }


@torch.no_grad()
def logits(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(batch) for batch in images.split(IMAGES_A_BATCH)]).float()


def read_problem(path: Path) -> Problem:
    return Problem(**torch.load(path, weights_only=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="the dense ResNet-20")
    parser.add_argument("--datapath", type=Path, required=True, help="where CIFAR-10 is")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    args = parser.parse_args()

    from datautils import load_data  # here: the other tools' environments lack its packages
    from modelutils import get_model

    data = load_data("cifar10", datapath=args.datapath, nsamples=1024, seed=0)
    network = get_model("rn20", "cifar10", weights=args.weights)
    (calibration, _), (test, labels) = (
        zip(*part, strict=True) for part in (data.calibration, data.test)
    )
    images = torch.stack(test)
    problem = Problem(
        network.state_dict(),
        torch.stack(calibration),
        images,
        torch.tensor(labels),
        logits(network, images),
    )
    torch.save(vars(problem), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
