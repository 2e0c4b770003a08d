"""Layers seen from outside: hooks on their calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

Call = Callable[[str, nn.Module, tuple, dict[str, Any], Any], Any]


@contextmanager
def forward_hooks(modules: Mapping[str, nn.Module], see: Call) -> Iterator[None]:
    """Inside, `see(name, module, args, kwargs, output)` follows every call of these modules.

    What `see` returns, unless it is None, takes the place of the output.
    """

    def hook_of(name: str) -> Callable:
        return lambda module, args, kwargs, output: see(name, module, args, kwargs, output)

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(hook_of(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield
