"""usercode.py: a user's model file and the toolkit each import their own modules."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from modelutils import get_model
from obc.inputs.usercode import TOOLKIT, TOOLKIT_NAMES, files_imported, user_module
from obc.solver.errors import UserError

MODULES = ["quant", "trueobs", "modelutils", "datautils", "database", "spdy", "postproc"]
MODULES += ["main_trueobs", "post_proc", "utils"]
PACKAGES = ["engine", "networks", "recipes", "tests", "benchmarks", "assets", "obc", "solver"]
PACKAGES += ["pruning_vs_quantization", "toolkit"]

LAZY = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        import NAME
        from NAME import WHOSE
        self.layer, self.built_by = nn.Linear(4, 2), (NAME.WHOSE, WHOSE)
    def forward(self, x):
        from NAME import SCALE
        import NAME as module
        self.ran_by = module.WHOSE
        return self.layer(x) * SCALE
def net():
    return Net()
"""


def write(folder: Path, **files: str) -> Path:
    """Files by their paths without the suffix; the folder that they are in."""
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def whose(folder: Path) -> str:
    return f"WHOSE, SCALE = {folder.name!r}, 3\n"


@pytest.mark.parametrize("name", [*MODULES, *PACKAGES])
@pytest.mark.parametrize("kind", ["module", "package", "folder"])
def test_imports_in_the_builder_and_in_forward(name: str, kind: str, tmp_path: Path) -> None:
    ours = sys.modules.get(name)
    if kind == "module":
        write(tmp_path, **{name: whose(tmp_path)})
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.py").write_text(whose(tmp_path))
    if kind == "package":
        (tmp_path / name / "__init__.py").write_text("from .part import *\n")
    imported = f"{name}.part" if kind == "folder" else name
    text = LAZY.replace("import NAME\n", f"import {imported}\n").replace("NAME", imported)
    write(tmp_path, net=text)
    net = get_model(f"{tmp_path}/net.py:net", "folder")
    assert net.built_by == (tmp_path.name, tmp_path.name)
    net(torch.zeros(1, 4))
    assert net.ran_by == tmp_path.name
    assert sys.modules.get(name) is ours and str(tmp_path) not in sys.path


def test_imports_at_the_top_of_every_kind(tmp_path: Path) -> None:
    write(
        tmp_path,
        net="from __future__ import annotations\n"
        "import quant, utils, networks.blocks, obc.inputs.images as images\n"
        "from database import *\n"
        "from engine import kernels\n"
        "from networks import blocks as again, Stem\n"
        "from . import spdy\n"
        "import importlib\n"
        "from importlib import import_module\n"
        "import importlib.util\n"
        "import torch, math, time\n"
        "from torch import nn\n"
        "assert again is networks.blocks is import_module('networks.blocks')\n"
        "assert import_module('.blocks', networks.__name__) is again\n"
        "assert importlib.import_module('quant') is __import__('quant') is quant\n"
        "assert importlib.util.find_spec and time.time and math.pi\n"
        "OWN = [quant, utils, networks, again, images, kernels, spdy]\n"
        "def net():\n"
        "    return nn.Sequential(Stem(), nn.Linear(utils.WIDTH, CLASSES))\n",
        quant="import utils\nassert utils.WIDTH == 8\n",
        utils="WIDTH = 8\n",
        database="CLASSES = 5\n",
        spdy="",
        **{
            "engine/kernels": "from networks.blocks import Stem\n",
            "networks/__init__": "from .blocks import Stem\nfrom . import blocks\n",
            "networks/blocks": "from torch import nn\nfrom utils import WIDTH\n"
            "class Stem(nn.Linear):\n"
            "    def __init__(self):\n"
            "        from ..quant import utils\n"
            "        super().__init__(4, utils.WIDTH)\n",
            "obc/inputs/images": "",
        },
    )
    assert get_model(f"{tmp_path}/net.py:net", "folder")[1].out_features == 5
    with user_module(tmp_path / "net.py") as module:
        assert all(tmp_path in Path(own.__spec__.origin).parents for own in module.OWN)


def test_the_toolkits_modules_stay_the_toolkits(tmp_path: Path) -> None:
    """Also those that it imports after the user's code has run, in a process that is new."""
    names = [*MODULES, *PACKAGES]
    write(tmp_path, net=LAZY.replace("NAME", "quant"), **{name: whose(tmp_path) for name in names})
    code = (
        "import sys, torch; from pathlib import Path; from modelutils import get_model\n"
        f"net = get_model('{tmp_path}/net.py:net', 'folder')\n"
        "import importlib, quant, trueobs, datautils, main_trueobs, database, spdy, post_proc\n"
        "import obc.solver.levels, obc.toolkit.sensitivity, benchmarks.timing, recipes.uniform\n"
        "import pruning_vs_quantization.main\n"
        "net(torch.zeros(1, 4)); assert net.ran_by != 'toolkit'\n"
        "for name, module in list(sys.modules.items()):\n"
        f"    if name.partition('.')[0] in {[*MODULES, *PACKAGES]} and module.__spec__.origin:\n"
        f"        assert Path('{TOOLKIT}') in Path(module.__spec__.origin).parents, name\n"
        f"assert '{tmp_path}' not in sys.path\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TOOLKIT, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_whole_command_with_every_name_taken(tmp_path: Path) -> None:
    names = {name: "WHOSE = 'user'\n" for name in [*MODULES, *PACKAGES]}
    imports = "\n".join(f"from {name} import WHOSE; assert WHOSE == 'user'" for name in names)
    write(
        tmp_path,
        net=f"{imports}\nfrom torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        from trueobs import WHOSE\n"
        "        import threading, utils\n"
        "        assert WHOSE == utils.WHOSE == 'user'\n"
        "        return super().forward(x)\n"
        "def net():\n"
        "    return Net(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),"
        " nn.Flatten(), nn.Linear(8, 10))\n",
        **names,
    )
    words = [f"{tmp_path}/net.py:net", "digits", "quant", "--nsamples", "64", "--batchsize", "16"]
    words += ["--workers", "2", "--abits", "8", "--check"]
    done = subprocess.run(
        [sys.executable, str(TOOLKIT / "main_trueobs.py"), *words],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0 and "top-1" in done.stdout, done.stderr


def test_two_folders_do_not_mix(tmp_path: Path) -> None:
    nets = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        write(folder, net=LAZY.replace("NAME", "utils"), utils=whose(folder))
        nets.append(get_model(f"{folder}/net.py:net", "folder"))
    for net, name in zip(nets, ("first", "second"), strict=True):
        net(torch.zeros(1, 4))
        assert net.built_by == (name, name) and net.ran_by == name
    write(tmp_path / "second", other="import only_in_first\ndef net(): pass\n")
    write(tmp_path / "first", only_in_first="")
    with pytest.raises(UserError, match="No module named 'only_in_first'"):
        get_model(f"{tmp_path}/second/other.py:net", "folder")


def test_threads_copies_and_pickles_of_a_users_model(tmp_path: Path) -> None:
    write(tmp_path, net=LAZY.replace("NAME", "quant"), quant=whose(tmp_path))
    net = get_model(f"{tmp_path}/net.py:net", "folder")
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    threads = [threading.Thread(target=net, args=(torch.zeros(1, 4),)) for net in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(type(net) is type(copied) for copied in copies)
    assert [copied.ran_by for copied in copies] == [tmp_path.name] * 2


def test_dataclasses_pickled_models_and_files_with_odd_names(tmp_path: Path) -> None:
    write(
        tmp_path,
        utils="from __future__ import annotations\n"
        "from dataclasses import dataclass, field\n"
        "from typing import ClassVar, get_type_hints\n"
        "@dataclass\nclass Widths:\n    kind: ClassVar[str] = 'mlp'\n    inner: int = 4\n"
        "hints = get_type_hints(Widths)\n",
        parts="from torch import nn\nclass Part(nn.Linear):\n    pass\n",
        **{"net/inside": "WIDTH = 4\n"},
    )
    text = (
        "import torch\nfrom utils import Widths, hints\nassert hints['inner'] is int\n"
        "from net.inside import WIDTH\n"
        "def net():\n    return torch.load(HERE, weights_only=False)\n"
    )
    sys.path.append(str(tmp_path))
    try:
        parts = importlib.import_module("parts")
        torch.save(parts.Part(4, 4), tmp_path / "whole.pt")
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["parts"]
    for name in ("my-net.v2.py", "net.py"):
        (tmp_path / name).write_text(text.replace("HERE", repr(str(tmp_path / "whole.pt"))))
        assert get_model(f"{tmp_path}/{name}:net", "folder").out_features == 4
    sys.modules.pop("parts", None)


def test_folders_that_the_user_adds_to_the_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    write(tmp_path, networks_of_mine="from quant import WHOSE\n", quant="WHOSE = 'user'\n")
    write(
        tmp_path / "tools",
        net="import os, sys\n"
        "sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))\n"
        "from networks_of_mine import WHOSE\nfrom torch import nn\n"
        "def net():\n    import quant\n    assert quant.WHOSE == WHOSE\n"
        "    return nn.Linear(2, 2)\n",
    )
    assert isinstance(get_model(f"{tmp_path}/tools/net.py:net", "folder"), nn.Linear)


def test_what_is_installed_and_what_is_ours_are_imported_as_usual(tmp_path: Path) -> None:
    """A folder of data named like a module is no module; a link to the file is like the file."""
    for data in ("torch", "time", "numpy"):
        (tmp_path / data).mkdir()
    write(
        tmp_path,
        net="import torch, time, numpy\nimport modelutils\nfrom torch import nn\n"
        "from obc.inputs.cifar_resnets import CifarResNet\n"
        "assert torch.tensor and time.time and numpy.array\n"
        "def net():\n    return CifarResNet(1)\n",
    )
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "net.py").symlink_to(tmp_path / "net.py")
    for path in (tmp_path / "net.py", tmp_path / "links" / "net.py"):
        model = get_model(f"{path}:net", "folder")
        assert type(model) is type(get_model("rn8", "digits"))
    assert {"quant", "obc", "main_trueobs", "tests"} <= TOOLKIT_NAMES


def test_a_model_file_in_the_toolkits_own_folder(tmp_path: Path) -> None:
    """It sees the toolkit's modules, not copies of them."""
    link = tmp_path / "toolkit"
    link.mkdir()
    for name in ("obc", "quant.py", "trueobs.py", "modelutils.py", "datautils.py", "assets"):
        (link / name).symlink_to(TOOLKIT / name)
    write(link, net="import quant\nfrom torch import nn\ndef net():\n    return nn.Linear(2, 2)\n")
    code = (
        "import sys; import obc.inputs.usercode as usercode; from pathlib import Path\n"
        f"usercode.TOOLKIT = Path('{link}')\n"
        "from modelutils import get_model; import quant\n"
        f"get_model('{link}/net.py:net', 'folder')\n"
        "assert [name for name in sys.modules if name.endswith('quant')].count('quant') == 1\n"
        "assert not [name for name in sys.modules if name.startswith('user_code_1.q')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=link, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_files_that_a_users_file_imports(tmp_path: Path) -> None:
    """Those of its folder and of folders below, also if they are imported late; no others."""
    write(
        tmp_path,
        net="import blocks\nimport torch, json\ndef late():\n    import quant",
        blocks="import parts.part",
        quant="x = 1",
        unused="",
    )
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/part.py").write_text("")
    with user_module(tmp_path / "net.py") as module:
        before = [tmp_path / name for name in ("blocks.py", "parts/part.py")]
        assert files_imported(tmp_path / "net.py") == before
        module.late()
    assert files_imported(tmp_path / "net.py") == [*before, tmp_path / "quant.py"]


def test_a_change_in_an_imported_file_is_another_model(tmp_path: Path) -> None:
    """In a process of its own each time, as commands are: modules are loaded once."""
    write(
        tmp_path,
        net="from torch import nn\nimport blocks\ndef net(): return nn.Sequential(nn.Flatten(), "
        "nn.Linear(192, 10))",
        blocks="scale = 1",
    )
    script = (
        "import main_trueobs as m; from obc.toolkit.session import Session, common_options\n"
        f"words = ['{tmp_path}/net.py:net', *'digits quant --image-size 8 --device cpu'.split()]\n"
        "session = Session.of(common_options(m.build_parser().parse_args(words)))\n"
        "print(session.fingerprint(None, {})['code of the model'])"
    )

    def code() -> str:
        words = [sys.executable, "-c", script]
        return subprocess.run(words, cwd=TOOLKIT, capture_output=True, text=True, check=True).stdout

    first = code()
    (tmp_path / "unused.py").write_text("")
    assert code() == first
    (tmp_path / "blocks.py").write_text("scale = 2")
    assert code() != first
