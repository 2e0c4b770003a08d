"""A user's model file imports the user's modules, whatever names the toolkit's own have.

    with user_module("project/net.py") as net: …      `import quant` in it means project/quant.py

The folder becomes a package under a private name: net.py is loaded as `user_code_1.net`, quant.py
next to it as `user_code_1.quant`. Python looks `__import__` up among the builtins of the importing
module, so the user's modules are given builtins of their own, whose `__import__` reads
`import quant` as `import user_code_1.quant`. This works whenever the import runs (at the top of a
file, in the function that builds the model, in `forward`, in any thread), keeps apart two folders
that both have a utils.py, and does not touch the toolkit's modules and imports.

A module is the user's if it lies in that folder, or in one that the user's code added to sys.path,
or elsewhere on sys.path under a name that the toolkit has, too. All others are imported as usual.
"""

from __future__ import annotations

import builtins
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

TOOLKIT = Path(__file__).resolve().parents[2]
TOOLKIT_NAMES = {path.stem for path in TOOLKIT.iterdir()}
numbers = count(1)


class UserLoader(SourceFileLoader):
    """Runs a source file with another `__import__`."""

    import_name: Callable[..., ModuleType]

    def exec_module(self, module: ModuleType) -> None:
        module.__builtins__ = vars(builtins) | {"__import__": self.import_name}
        super().exec_module(module)


@cache  # a folder's modules are loaded once
class UserPackage:
    """A user's folder as a package under a private name; it finds the modules of this package."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, f"user_code_{next(numbers)}"
        self.installed = {Path(entry).resolve() for entry in sys.path} - {folder}
        self.owned: dict[tuple[str, ...], bool] = {}
        sys.modules[self.name] = package = ModuleType(self.name)
        package.__path__ = [str(folder)]
        sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """For Python's import system: where a module with a private name is."""
        package, _, rest = name.partition(".")
        if package != self.name:
            return None
        spec = PathFinder.find_spec(name, path) if "." in rest else self.locate(name)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = self.loader(name, spec.origin)
        return spec

    def loader(self, name: str, path: str) -> UserLoader:
        loader = UserLoader(name, path)
        loader.import_name = self.import_name
        return loader

    def locate(self, name: str) -> ModuleSpec | None:
        """Where a top-level module is, with the user's folder in the place of the toolkit's."""
        entries = [str(self.folder), *sys.path]
        return PathFinder.find_spec(name, [x for x in entries if Path(x).resolve() != TOOLKIT])

    def owns(self, name: str) -> bool:
        """Whether a top-level module is the user's."""
        key = (name, *sys.path)
        if key not in self.owned:  # else it takes 1 ms, and `forward` may import at each call
            spec = None if name in sys.builtin_module_names else self.locate(name)
            paths = spec and (spec.submodule_search_locations or [spec.origin])
            installed = paths and self.installed & {Path(x).parent.resolve() for x in paths}
            self.owned[key] = bool(spec and (not installed or name in TOOLKIT_NAMES))
        return self.owned[key]

    def private(self, name: str) -> str:
        """The name that a module is loaded under."""
        return f"{self.name}.{name}" if self.owns(name.partition(".")[0]) else name

    def import_name(
        self,
        name: str,
        globals: dict[str, Any] | None = None,
        locals: dict[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """`__import__` for the user's modules."""
        full = name if level else self.private(name)
        module = __import__(full, globals, locals, fromlist, level)
        if full != name and not fromlist:  # `import a.b` binds a
            return sys.modules[f"{self.name}.{name.partition('.')[0]}"]
        if module is importlib:
            module = ModuleType("importlib")
            module.__dict__.update(vars(importlib), import_module=self.import_module)
        return module

    def import_module(self, name: str, package: str | None = None) -> ModuleType:
        """`importlib.import_module` for the user's modules."""
        return importlib.import_module(name if name[:1] == "." else self.private(name), package)


def files_imported(path: Path) -> list[Path]:
    """The files of a user's folder, and of its like, that a file in it has imported so far."""
    path = path.resolve()
    start = f"{UserPackage(path.parent).name}."
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(start)]
    files = {Path(x).resolve() for x in (vars(m).get("__file__") for m in modules) if x}
    return sorted(files - {path})


@contextmanager
def user_module(path: Path) -> Iterator[ModuleType]:
    """The module in a user's file, run anew (what it imports is not, if it was loaded before).

    Inside, the folder is also on sys.path, for pickles and whatever else has names of modules.
    """
    path = path.resolve()
    package = UserPackage(path.parent)
    name = f"{package.name}.{path.stem}"
    spec = package.find_spec(name)
    if spec is None or spec.origin != str(path):  # my.net.py; net.py next to a folder net/
        name = f"{package.name}.__main__"
        loader = package.loader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    added = [str(path.parent)] if str(path.parent) not in sys.path else []
    sys.path += added
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for entry in added:
            sys.path.remove(entry)
