"""Several ranks as threads of one process, which meet in a store of its own, for tests without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed

from specd.train.distributed import Ranks
from specd.train.launcher import Launch

distributed: Any = torch.distributed  # not all of it is exported for checkers
Value = TypeVar("Value")


def new_store() -> Any:
    """A launcher's store, as torchrun's agent hosts it."""
    wait = timedelta(seconds=30)
    return distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)


def connection(store: Any) -> Any:
    """Another connection to it, as another process has."""
    wait = timedelta(seconds=30)
    return distributed.TCPStore("127.0.0.1", store.port, is_master=False, timeout=wait)


def on_threads(*works: Callable[[], Value]) -> list[Value | BaseException]:
    """What each work returned, or raised, all of them at once."""
    found: dict[int, Value | BaseException] = {}

    def run(number: int) -> None:
        try:
            found[number] = works[number]()
        except BaseException as error:  # noqa: BLE001  # it is handed to the test
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[number] for number in range(len(works))]


def together(size: int, work: Callable[[Ranks], Value], *, join: bool = True) -> list[Value | BaseException]:
    """What `work` gives, or raises, on each of `size` ranks. join: they are connected for collectives, on the CPU."""
    store = new_store()

    def one(rank: int) -> Value:
        with Ranks(Launch(rank, size, rank, size), connection(store)) as ranks:
            if join:
                ranks.join("cpu", 30)
            return work(ranks)

    return on_threads(*(lambda rank=rank: one(rank) for rank in range(size)))
