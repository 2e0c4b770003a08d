"""vision.py: torchvision can be imported and used with this PyTorch, matching or not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)


def test_import_in_a_fresh_process_and_with_torchvision_imported_twice():
    done = run_python(
        "from obc.inputs.vision import torchvision as a; a.models; "
        "import torchvision as b; a.models.resnet18; a.datasets.CIFAR10; "
        "assert a.transforms is b.transforms"
    )
    assert done.returncode == 0, done.stderr


def test_looking_for_the_extension_does_not_import_torchvision():
    code = (
        "import sys, importlib.util, torch\n"
        "import datautils, modelutils\nfrom obc.inputs import vision\n"
        "assert isinstance(vision.extension_loads(), bool)\n"
        "assert 'torchvision' not in sys.modules"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_a_classification_model_runs():
    from obc.inputs.vision import torchvision

    model = torchvision.models.get_model("squeezenet1_1", weights=None, num_classes=3).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_a_matching_pair_is_left_alone():
    """If the extension loads, nothing is declared; if not, both operators are."""
    from obc.inputs import vision

    vision.imported()
    assert (vision.make_importable() is None) == vision.extension_loads()
    assert hasattr(torch.ops.torchvision, "nms") and hasattr(torch.ops.torchvision, "qnms")


def test_a_model_file_may_import_torchvision_itself(tmp_path):
    """Before any module of ours has used it, as when a command loads a user's model."""
    (tmp_path / "net.py").write_text(
        "import torchvision\n"
        "def small():\n"
        "    return torchvision.models.squeezenet1_1(num_classes=10)\n"
    )
    done = run_python(
        "from modelutils import get_model\n"
        f"print(type(get_model({str(tmp_path / 'net.py:small')!r}, 'digits')))"
    )
    assert done.returncode == 0 and "SqueezeNet" in done.stdout, done.stderr
