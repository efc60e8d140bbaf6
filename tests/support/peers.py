"""Packages of others that compute the same as specd, unpacked beside each other without what they depend on."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("SPECD_PEERS") or Path(__file__).resolve().parents[2] / ".venv/peers")
"""Where tests/oracles/install.py put them."""
MENTIONED = {"openai", "triton"}
"""Packages that peers import and these tests never run: clients of servers, GPU kernels."""


class _Name(type):
    """Of a name in a module that is only mentioned: a class, and a decorator that changes nothing, whatever it is."""

    def __new__(cls, name: str, bases: tuple[type, ...], content: dict[str, Any], **_: Any) -> _Name:
        return super().__new__(cls, name, bases, content)

    def __getattr__(cls, name: str) -> Any:
        return _name(name)

    def __call__(cls, *given: Any, **named: Any) -> Any:
        return given[0] if given and callable(given[0]) else super().__call__()


def _name(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    content = {
        "__call__": lambda self, *given: given[0] if given else self,
        "__get_pydantic_core_schema__": lambda *_: {"type": "any"},
    }
    return _Name(name, (), content)


class _Mentioned(types.ModuleType):
    """A module that is there, and has every name."""

    __path__: Sequence[str] = ()
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        return _name(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in MENTIONED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Mentioned(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """It has nothing to run."""


def peer(name: str) -> Any:
    """The module `name` of a peer. What it says on import is its own affair."""
    # These ask which packages there are, and must not find one that is only mentioned.
    for first in ("torch._dynamo", "transformers.generation", "datasets"):
        importlib.import_module(first)
    finder = _Finder()
    sys.meta_path.append(finder)
    sys.path.append(str(FOLDER))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
        sys.meta_path.remove(finder)
        for loaded in [known for known, module in sys.modules.items() if isinstance(module, _Mentioned)]:
            del sys.modules[loaded]
