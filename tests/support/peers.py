"""Packages of others that compute the same as specd, unpacked beside each other without what they depend on."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("SPECD_PEERS") or Path(__file__).resolve().parents[2] / ".venv/peers")
"""Where tests/oracles/install.py put them."""
MENTIONED = {
    *("triton", "tvm_ffi", "torchvision", "compressed_tensors", "einops"),
    *("aiohttp", "fastapi", "openai", "openai_harmony", "prometheus_client", "starlette", "uvloop"),
    *("cbor2", "cloudpickle", "cpuinfo", "IPython", "orjson", "pybase64", "sentencepiece"),
    *("llguidance", "partial_json_parser", "xgrammar"),
}
"""Packages that peers import and these tests never run: kernels, servers and their clients, formats, grammars."""

ASKING = ("torch._inductor.compile_fx", "torch._inductor.select_algorithm", "transformers.generation", "datasets")
"""Modules that ask on import which packages there are, and must not find one that is only mentioned."""


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

    __version__ = "0"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        return _name(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in MENTIONED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Mentioned(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """It has nothing to run."""


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Peers can be imported, also by themselves in a function. What they say on import is their own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ASKING:
            importlib.import_module(name)
        finder = _Finder()
        sys.meta_path.append(finder)
        sys.path.append(str(FOLDER))
        try:
            yield
        finally:
            sys.path.remove(str(FOLDER))
            sys.meta_path.remove(finder)
            for loaded in [known for known, module in sys.modules.items() if isinstance(module, _Mentioned)]:
                del sys.modules[loaded]


def peer(name: str) -> Any:
    """The module `name` of a peer."""
    with importable():
        return importlib.import_module(name)
