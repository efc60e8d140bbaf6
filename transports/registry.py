"""The registry: which transports exist, and which one `auto` takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from specd.errors import SpecdError, TransportError
from specd.transports.base import Traits, Transport

BUILTIN: dict[str, str] = {
    "inproc": "specd.transports.inproc:Inproc",
    "cuda_ipc": "specd.transports.cuda_ipc:CudaIpc",
    "nixl": "specd.transports.nixl.transport:Nixl",
    "nccl": "specd.transports.nccl.transport:Nccl",
    "shm": "specd.transports.shm:Shm",
    "bytes": "specd.transports.bytes.server:Bytes",
}
ENTRY_POINT_GROUP = "specd.transports"
HOST_ORDER = ("shm", "bytes")
"""What `auto` tries, best first, for a trainer whose states go to host memory; between two processes."""
DEVICE_ORDER = ("cuda_ipc", "nixl", "nccl", *HOST_ORDER)
"""What `auto` tries, best first, for a trainer on a GPU."""


def names() -> list[str]:
    """All transports that can be asked for by name: built-in ones first, then plug-ins."""
    plugins = {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)}
    return [*BUILTIN, *sorted(plugins - BUILTIN.keys())]


def load(name: str) -> type[Transport]:
    """Import the transport called `name`. Raises TransportError that lists the known names, or says what failed."""
    target = BUILTIN.get(name)
    try:
        if target is not None:
            module, _, attribute = target.partition(":")
            found: Any = getattr(importlib.import_module(module), attribute)
        else:
            plugins = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
            if name not in plugins:
                raise TransportError(f"unknown transport {name!r}; known here: {', '.join(names())}")
            found = plugins[name].load()
    except SpecdError:
        raise
    except Exception as error:  # a plug-in's import may raise anything
        raise TransportError(f"transport {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if (
        not isinstance(getattr(found, "traits", None), Traits)
        or not hasattr(found, "server")
        or not hasattr(found, "client")
    ):
        raise TransportError(f"transport {name!r} is {found!r}: expected a class with traits, server and client")
    return found  # type: ignore[no-any-return]


class Choice(NamedTuple):
    """The outcome of `choose`: the transport taken, and why each candidate before it was not."""

    name: str
    reasons: dict[str, str]


def choose(
    asked: str, offered: Sequence[str], same_process: bool, device: str, probe: Callable[[str], str | None]
) -> Choice:
    """Pick the transport for one session.

    asked: `auto` or a name. offered: what the daemon serves. same_process: whether trainer and worker share one.
    device: where the trainer wants the states. probe: moves verified bytes over one candidate and returns None, or the
    reason why it failed. `auto` tries the built-in ones best first, then plug-ins by name. A name is that transport or
    a TransportError, never another one.
    """
    served = f"the daemon does not serve it (it serves {', '.join(offered) or 'none'})"
    if asked != "auto":
        reason = _attempt(probe, asked) if asked in offered else served
        if reason is not None:
            raise TransportError(f"transport {asked!r} cannot be used: {reason}")
        return Choice(asked, {})
    reasons: dict[str, str] = {}
    order = HOST_ORDER if device == "cpu" else DEVICE_ORDER
    if same_process:
        order = ("inproc", *order)
    for name in (*order, *sorted(set(offered) - set(order) - {"inproc"})):
        reason = _attempt(probe, name) if name in offered else served
        if reason is None:
            return Choice(name, reasons)
        reasons[name] = reason
    raise TransportError("no transport works: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def _attempt(probe: Callable[[str], str | None], name: str) -> str | None:
    try:
        return probe(name)
    except TransportError as error:
        return str(error)
