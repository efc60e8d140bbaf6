"""How the ranks of a launcher find each other in its store, and which of what lies there is theirs.

A launcher that starts its ranks again may keep its store, with all that those before them left there. So every process
has a nonce, rank 0 makes up a name for what follows, and a rank takes it only beside its own nonce.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
import torch.distributed

from specd.endpoints import host_id
from specd.errors import ConfigError
from specd.train.launcher import Launch
from specd.train.peers import Member

distributed: Any = torch.distributed  # not all of it is exported for checkers

POLL_S: Final = 0.02
MEET_S: Final = 600.0
"""How long the ranks of a launcher may take from the first to the last."""


def meet(store: Any, launch: Launch, limit_s: float = MEET_S) -> tuple[Any, bytes, list[Member]]:
    """A part of the store that these ranks alone use, 16 bytes that name them, and who they are.

    Raises ConfigError when they do not come.
    """
    me = Member(
        rank=launch.rank,
        host=socket.gethostname(),
        host_id=host_id(),
        pid=os.getpid(),
        restarts=launch.restarts,
        nonce=secrets.token_hex(8),
    )
    waiting = _Waiting(f"rank {launch.rank} of {launch.size}", limit_s)
    put(store, f"here/{launch.rank}", me)
    if launch.rank == 0:
        run = secrets.token_hex(16)
        waiting.until("all ranks", lambda: _all_took(store, run, launch.size))
        members = _read_all(store, "here", launch.size)
    else:
        run = waiting.until("rank 0", lambda: _named_beside(store, me))
        put(store, f"took/{launch.rank}", run)
        members = None
    ours = distributed.PrefixStore(run, store)
    ours.set(f"beat/{launch.rank}", "0")
    if members is not None:
        put(ours, "members", members)
    keys = ["members", *(f"beat/{rank}" for rank in range(launch.size))]
    waiting.until("all ranks", lambda: ours.check(keys))
    return ours, bytes.fromhex(run), msgspec.convert(read(ours, "members"), list[Member])


def put(store: Any, key: str, value: object) -> None:
    """Put plain data, as JSON: nothing that is unpickled."""
    store.set(key, msgspec.json.encode(value).decode())


def read(store: Any, key: str) -> Any:
    """What was put."""
    return msgspec.json.decode(store.get(key))


class _Waiting:
    """Waits before ranks can be watched."""

    def __init__(self, who: str, limit_s: float) -> None:
        self._who, self._limit_s, self._until = who, limit_s, time.monotonic() + limit_s

    def until(self, whom: str, found: Callable[[], Any]) -> Any:
        while not (result := found()):
            if time.monotonic() > self._until:
                raise ConfigError(
                    f"{self._who} has not met {whom} for {self._limit_s:g} s: see what keeps them from starting, and "
                    f"that all have the same number of ranks"
                )
            time.sleep(POLL_S)
        return result


def _all_took(store: Any, run: str, size: int) -> bool:
    """Whether every rank has taken the name `run`, which is offered to those that are here."""
    others = range(1, size)
    if not store.check([f"here/{rank}" for rank in range(size)]):
        return False
    put(store, "name", {"run": run, "nonces": [member["nonce"] for member in _read_all(store, "here", size)]})
    took = [f"took/{rank}" for rank in others]
    return bool(store.check(took)) and all(read(store, key) == run for key in took)


def _named_beside(store: Any, me: Member) -> str:
    """The name that rank 0 offers this very process; empty until then."""
    named: dict[str, Any] = read(store, "name") if store.check(["name"]) else {"run": "", "nonces": []}
    run: str = named["run"] if named["nonces"][me.rank : me.rank + 1] == [me.nonce] else ""
    return run


def _read_all(store: Any, name: str, size: int) -> list[Any]:
    return [read(store, f"{name}/{rank}") for rank in range(size)]
