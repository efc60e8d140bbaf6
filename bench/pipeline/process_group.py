"""Process groups of torch.distributed for one benchmark alone: an engine in the process may have the default one."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from specd.bench.pipeline.step import synchronize
from specd.errors import TransportError

DEADLINE: Final = datetime.timedelta(seconds=120)
HANDSHAKE_S: Final = 30.0


@contextmanager
def joined(backend: str, store: str, rank: int, world: int, timeout: datetime.timedelta = DEADLINE) -> Iterator[Any]:
    """Rank `rank` of a group of `world` processes that meet at `store`, the path of a new file.

    backend: gloo, over the loopback interface unless GLOO_SOCKET_IFNAME says otherwise, or nccl. Raises TransportError
    when the group does not form.
    """
    import torch.distributed as dist

    name = "GLOO_SOCKET_IFNAME"
    given = os.environ.get(name)
    os.environ.setdefault(name, "lo")
    distributed: Any = dist  # its classes are not all typed
    group: Any
    try:
        meeting = distributed.PrefixStore("specd", distributed.FileStore(store, world))
        meeting.set_timeout(timeout)
        if backend == "nccl":
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = timeout
            group = distributed.ProcessGroupNCCL(meeting, rank, world, options)
        else:
            group = distributed.ProcessGroupGloo(meeting, rank, world, timeout)
    except RuntimeError as error:
        raise TransportError(f"torch.distributed does not form a {backend} group: {error}") from None
    finally:
        if given is None:
            del os.environ[name]
    try:
        yield group
    finally:
        if backend == "nccl":
            group.abort()


def shake_hands(group: Any, rank: int, device: str) -> None:
    """Send a word from rank 0 to rank 1: the first transfer makes a communicator, and is where it would hang.

    Raises TransportError when it does not arrive in time; the group cannot be used then.
    """
    word = torch.zeros(1, device=device)
    try:
        work = group.send([word], 1, 0) if rank == 0 else group.recv([word], 0, 0)
        limit = time.monotonic() + HANDSHAKE_S
        while device != "cpu" and not work.is_completed():  # its wait is the device's, which nothing could end
            if time.monotonic() > limit:
                raise TransportError(f"nothing was transferred in {HANDSHAKE_S:g} s")
            time.sleep(0.001)
        work.wait()
    except RuntimeError as error:
        raise TransportError(f"torch.distributed transfers nothing: {error}") from None
    synchronize(device)
