"""The registry: which transports exist, and which one `auto` takes.

Both sides of `auto` ask `preferred`: the daemon for what it serves, the trainer for the order in which it tries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from specd.errors import SpecdError, TransportError
from specd.plugins import Family
from specd.transports.base import Traits, Transport

BUILTIN: dict[str, str] = {
    "inproc": "specd.transports.inproc:Inproc",
    "cuda_ipc": "specd.transports.cuda_ipc:CudaIpc",
    "nixl": "specd.transports.nixl.transport:Nixl",
    "nccl": "specd.transports.nccl.transport:Nccl",
    "shm": "specd.transports.shm:Shm",
    "bytes": "specd.transports.bytes.server:Bytes",
}
FAMILY = Family("transport", BUILTIN, "specd.transports", TransportError)
names = FAMILY.names
WITHIN_PROCESS = "inproc"
"""What a daemon on threads of its trainer's process serves."""
_PARTS = ("available", "server", "client")


def load(name: str) -> type[Transport]:
    """Import the transport called `name`. Raises TransportError that lists the known names, or says what failed."""
    found = FAMILY.load(name)
    if not isinstance(getattr(found, "traits", None), Traits) or not all(hasattr(found, part) for part in _PARTS):
        raise TransportError(f"transport {name!r} is {found!r}: expected a class with traits, {', '.join(_PARTS)}")
    return found  # type: ignore[no-any-return]


@contextlib.contextmanager
def as_transport_error() -> Iterator[None]:
    """Whatever a transport's own code raises in this block is a TransportError: a plug-in may raise anything."""
    try:
        yield
    except SpecdError:
        raise
    except Exception as error:
        raise TransportError(f"{type(error).__name__}: {error}") from error


def known(wanted: Iterable[str]) -> dict[str, Traits]:
    """Traits of the built-in transports and of those `wanted`, by name; what cannot be imported is left out."""
    found: dict[str, Traits] = {}
    for name in dict.fromkeys([*BUILTIN, *wanted]):
        with contextlib.suppress(SpecdError):  # a probe of it says why
            found[name] = load(name).traits
    return found


def preferred(traits: Mapping[str, Traits], device: str, same_process: bool = False) -> list[str]:
    """What `auto` is for, best first: the transports with a rank that suit states on `device`, by rank.

    For host memory, between two processes, these are the ones of host memory alone: one that takes device memory as
    well is made for that, and serves a host to those who name it.
    """

    def suits(one: Traits) -> bool:
        return same_process if one.scope == "process" else device != "cpu" or one.memory == {"host"}

    ranked = {name: one.rank for name, one in traits.items() if one.rank is not None and suits(one)}
    return sorted(ranked, key=lambda name: (ranked[name], name))


class Choice(NamedTuple):
    """The outcome of `choose`: the transport taken, and why each candidate before it was not."""

    name: str
    reasons: dict[str, str]


def choose(
    asked: str,
    offered: Sequence[str],
    traits: Mapping[str, Traits],
    same_process: bool,
    device: str,
    probe: Callable[[str], str | None],
) -> Choice:
    """Pick the transport for one session.

    asked: `auto` or a name. offered: what the daemon serves. traits: of what is known here (`known`). same_process:
    whether trainer and worker share one. device: where the trainer wants the states. probe: moves verified bytes over
    one candidate and returns None, or the reason why it failed.

    `auto` tries what is `preferred`, then the rest of what is offered, by name. A name is that transport or a
    TransportError, never another one.
    """
    served = f"the daemon does not serve it (it serves {', '.join(offered) or 'none'})"
    if asked != "auto":
        reason = _attempt(probe, asked) if asked in offered else served
        if reason is not None:
            raise TransportError(f"transport {asked!r} cannot be used: {reason}")
        return Choice(asked, {})
    reasons: dict[str, str] = {}
    order = preferred(traits, device, same_process)
    far = {name for name, one in traits.items() if one.scope == "process" and not same_process}
    for name in (*order, *sorted({*offered} - {*order} - far)):
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
