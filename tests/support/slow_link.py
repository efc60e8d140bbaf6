"""A user-space link: TCP connections of this machine with the delay, rate, loss and cuts of a bad network.

What it models, and what it does not: bytes are late by half a round trip, and those of a new connection by a whole one
more, for the SYNs, which the kernel answers at once. All connections share the rate of each direction. A lost segment
of 1,448 bytes holds up what is behind it for a retransmission timeout, twice as long if it is lost again; real TCP
repairs most losses sooner, and sends less after each. A cut loses nothing: what was on its way goes on when the link
is restored, at once, where TCP would wait out its back-off.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

SEGMENT = 1448
READ = 10 * SEGMENT
IN_FLIGHT = 256
"""Reads of one direction of a connection that may be under way: 3.7 MB, as the window of a TCP connection."""


class SlowLink:
    """Leads to any number of addresses, each from a port of its own.

    rtt_s: of a round trip. mbit_s: 10⁶ bits/s each way, 0 for no limit. loss: share of segments that are lost.
    accepted: connections that were made through it.
    """

    def __init__(self, *, rtt_s: float = 0.0, mbit_s: float = 0.0, loss: float = 0.0, seed: int = 0) -> None:
        self.rtt_s, self.mbit_s, self.loss = rtt_s, mbit_s, loss
        self.accepted = 0
        self._rng = random.Random(seed)
        self._sent_at = [0.0, 0.0]
        self._ports: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._up = asyncio.Event()
        self._up.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="slow-link")
        self._thread.start()

    def through(self, endpoint: str) -> str:
        """An endpoint that leads to tcp://ADDRESS:PORT over this link."""
        if endpoint not in self._ports:
            self._ports[endpoint] = self._do(self._listen(endpoint))
        return f"tcp://127.0.0.1:{self._ports[endpoint]}"

    def cut(self) -> None:
        """Nothing gets through any more, and nobody is told."""
        self._loop.call_soon_threadsafe(self._up.clear)

    def restore(self) -> None:
        self._loop.call_soon_threadsafe(self._up.set)

    def close(self) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    # On the thread of the loop

    async def _listen(self, endpoint: str) -> int:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.accepted += 1
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            with contextlib.suppress(OSError, asyncio.CancelledError), contextlib.closing(writer):
                await asyncio.sleep(self.rtt_s)
                await self._up.wait()
                there, back = await asyncio.open_connection(host, int(port))
                with contextlib.closing(back):
                    ways = [self._carry(0, reader, back), self._carry(1, there, writer)]
                    for way in asyncio.as_completed(ways):  # the first end of either ends both
                        await way
                        break
            self._tasks.discard(task)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self._tasks.add(asyncio.create_task(server.serve_forever()))
        return int(server.sockets[0].getsockname()[1])

    async def _carry(self, way: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(IN_FLIGHT)
        delivering = asyncio.create_task(self._deliver(under_way, sink))
        arrival, data = 0.0, b"-"
        try:
            while data and not delivering.done():
                data = await source.read(READ)
                now = self._loop.time()
                sent = max(now, self._sent_at[way]) + (len(data) * 8 / self.mbit_s / 1e6 if self.mbit_s else 0.0)
                self._sent_at[way] = sent
                arrival = max(arrival, sent + self.rtt_s / 2) + self._stall(len(data))
                await under_way.put((arrival, data))
                await asyncio.sleep(max(0.0, sent - now))
            await delivering
        except OSError:
            pass
        finally:
            delivering.cancel()

    async def _deliver(self, under_way: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        while True:
            arrival, data = await under_way.get()
            await asyncio.sleep(max(0.0, arrival - self._loop.time()))
            await self._up.wait()
            if not data:
                return
            sink.write(data)
            await sink.drain()

    def _stall(self, nbytes: int) -> float:
        """Seconds that losses among so many bytes hold them up."""
        stall = 0.0
        for _ in range(-(-nbytes // SEGMENT)):
            timeout = self.rtt_s + 0.2
            while self._rng.random() < self.loss:
                stall += timeout
                timeout *= 2
        return stall

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
