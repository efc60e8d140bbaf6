"""The daemons' sides of a run: one host for all lanes of a transport on one device, started side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

from specd.bench.transport import lanes
from specd.bench.transport.served import Patterns, Served
from specd.errors import TransportError
from specd.transports.registry import load as load_transport

Key = tuple[str, str]
"""A transport, and the device of the daemon's ring."""


class Hosts:
    """Hosts by transport and device. One that did not start raises its error at each `get`."""

    def __init__(self, patterns: Patterns) -> None:
        self._patterns = patterns
        self._started: dict[Key, Future[Served]] = {}

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for future in self._started.values():
            if not future.cancel() and future.exception() is None:
                with contextlib.suppress(TransportError):  # it may be gone
                    future.result().close()

    def start(self, sizes: Mapping[Key, Sequence[int]], beside: Sequence[Callable[[], Any]] = ()) -> None:
        """Start hosts for these sizes of slots and wait for all of them: a start takes cores and memory bandwidth.

        beside: what else there is to prepare.
        """
        pool = ThreadPoolExecutor(thread_name_prefix="start-host")
        try:
            for key, each in sizes.items():
                self._started[key] = pool.submit(self._serve, key, each)
            wait([*self._started.values(), *(pool.submit(action) for action in beside)])
        finally:
            pool.shutdown(cancel_futures=True)

    def get(self, key: Key, sizes: Sequence[int]) -> Served:
        """A host, started for these sizes if it is not there. Raises TransportError as its start did."""
        if key not in self._started:
            future = self._started[key] = Future[Served]()
            try:
                future.set_result(self._serve(key, sizes))
            except TransportError as error:
                future.set_exception(error)
        return self._started[key].result()

    def _serve(self, key: Key, sizes: Sequence[int]) -> Served:
        name, device = key
        return Served(name, device, *lanes.ring(sizes, device, load_transport(name).traits), self._patterns)
