"""The ring's memory, where the target computes, and the serving side of each transport."""

from __future__ import annotations

import contextlib
import logging
from typing import NamedTuple

from specd.config.settings import DaemonConfig
from specd.endpoints import is_loopback
from specd.errors import SpecdError, TransportError
from specd.memory.arena import HostArena
from specd.memory.device_arena import DeviceArena
from specd.memory.segment import NoRoomError
from specd.transports import registry
from specd.transports.base import Server, ServerContext, Transport

log = logging.getLogger(__name__)


class Serving(NamedTuple):
    """arena: the ring's slots. servers: by transport. on_host: those that read a ring on a device from its mirror."""

    arena: HostArena | DeviceArena
    servers: dict[str, Server]
    on_host: frozenset[str]


def open_ring(config: DaemonConfig, slot_bytes: int, device: str, epoch: bytes, serving: ServerContext) -> Serving:
    """Make the ring on `device`, `config.ring.slots` slots of `slot_bytes`, and serve it.

    A transport that was named must work; one that only `auto` brings is left out if it does not. The caller closes the
    servers, then the arena. Raises TransportError when the memory cannot be had or nothing can serve it.
    """
    found: dict[str, type[Transport]] = {}
    sealed = serving.curve and not is_loopback(serving.host) and not config.insecure_data
    automatic = candidates(device) if "auto" in config.transports else ()
    for name in dict.fromkeys([*automatic, *(name for name in config.transports if name != "auto")]):
        try:
            found[name] = _usable(name, device, sealed)
        except TransportError as error:
            _leave_out(config, name, error)
    arena, on_host = _make(config, slot_bytes, device, epoch.hex(), found)
    servers: dict[str, Server] = {}
    with contextlib.ExitStack() as undo:
        undo.callback(arena.close)
        for name, transport in found.items():
            here = arena.ledger if name in on_host else arena
            try:
                with registry.as_transport_error():
                    servers[name] = transport.server(here, serving)
            except TransportError as error:
                _leave_out(config, name, error)
            else:
                undo.callback(servers[name].close)
        if not servers:
            raise TransportError(f"no transport can serve a ring on {device}; the log says why, at level INFO")
        undo.pop_all()
    return Serving(arena, servers, on_host)


def candidates(device: str) -> list[str]:
    """What `auto` serves of a ring on `device`, best first; the log says what is left out."""
    here: dict[str, type[Transport]] = {}
    for name in registry.names():
        try:
            here[name] = registry.load(name)
        except SpecdError as error:
            log.info("%s is not served: %s", name, error)
    found: list[str] = []
    for name in registry.preferred({name: one.traits for name, one in here.items()}, device):
        try:
            with registry.as_transport_error():
                reason = here[name].available(device)
        except TransportError as error:
            reason = str(error)
        if reason:
            log.info("%s is not served: %s", name, reason)
        else:
            found.append(name)
    return found


def _make(
    config: DaemonConfig, slot_bytes: int, device: str, epoch: str, found: dict[str, type[Transport]]
) -> tuple[HostArena | DeviceArena, frozenset[str]]:
    """The ring's memory, and the transports that read its mirror.

    Where shared memory has no room for the slots, the transports that need them there are dropped from `found`: of a
    ring on the CPU those of scope `host`, as the others read a private ring; of one on a device all that read a mirror.
    """
    slots = config.ring.slots
    while True:
        local = frozenset(name for name, one in found.items() if one.traits.scope == "host")
        mirrored = frozenset(name for name, one in found.items() if "device" not in one.traits.memory)
        needy = local if device == "cpu" else mirrored
        shared = epoch if local else None
        try:
            if device == "cpu":
                return HostArena.create(slots, slot_bytes, shared), frozenset()
            return DeviceArena.create(slots, slot_bytes, device, shared, mirrored=bool(mirrored)), mirrored
        except NoRoomError as error:
            if not needy or len(needy) == len(found):
                raise
            for name in sorted(needy):
                _leave_out(config, name, error, logging.WARNING)
                del found[name]


def _usable(name: str, device: str, sealed: bool) -> type[Transport]:
    """The transport called `name`, if it can take a ring on `device`. Raises TransportError.

    sealed: whether what leaves this host has to be encrypted.
    """
    transport = registry.load(name)
    if device == "cpu" and "host" not in transport.traits.memory:
        raise TransportError("it moves device memory, and the ring lies where the target computes, on the CPU")
    if sealed and transport.traits.scope == "anywhere" and not transport.traits.sealed:
        raise TransportError(
            "it does not encrypt states, and this daemon asks for keys: --insecure-data serves it nevertheless, on a "
            "network in which you trust everybody"
        )
    return transport


def _leave_out(config: DaemonConfig, name: str, error: TransportError, level: int = logging.INFO) -> None:
    """Go on without a transport that only `auto` asked for; raise the error of one that was named."""
    if name in config.transports:
        raise TransportError(f"transport {name!r} cannot be served: {error}") from error
    log.log(level, "%s is not served: %s", name, error)
