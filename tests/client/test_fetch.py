"""The fetcher looks ahead: what a Receiver is told of while another transfer is waited for, and into which buffers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specd.client.fetch import Fetcher
from specd.client.guard import Guard
from specd.errors import TransportError
from specd.memory.streams import allocate
from specd.transports.base import SlotRef

WAIT_S = 20.0


class Client:
    """A Receiver that notes what it is told: `e0` for slot 0 expected, `f0` for it fetched.

    gone: its daemon is, so that a fetch waits. waits: set while one does.
    """

    def __init__(self, log: list[str], gone: bool = False) -> None:
        self.log = log
        self.gone = gone
        self.waits = threading.Event()
        self.cancelled = threading.Event()
        self.expected: deque[tuple[int, torch.Tensor]] = deque()
        self.intos: list[torch.Tensor] = []
        self.lost = False

    def hello(self) -> bytes:
        return b""

    def attach(self, offer: bytes, deadline_s: float) -> None:
        raise AssertionError

    def expect(self, ref: SlotRef, into: torch.Tensor) -> None:
        assert all(into.data_ptr() != other.data_ptr() for _, other in self.expected), "one buffer for two transfers"
        self.expected.append((ref.slot, into))
        self.intos.append(into)
        self.log.append(f"e{ref.slot}")

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        slot, expected = self.expected.popleft()
        assert (slot, expected.data_ptr()) == (ref.slot, into.data_ptr())
        self.log.append(f"f{slot}")
        if self.gone:
            self.waits.set()
            self.lost = self.cancelled.wait(deadline_s)
        if self.lost:
            raise TransportError("the communicator is gone", lost=True)

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        self.log.append("close")


class Bench:
    """A fetcher with three buffers. Its thread looks at what is asked for only at `go`.

    gone: slots that their session has nothing to send for. keep: whether buffers that came stay in use.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.client = Client(self.log)
        self.gone: set[int] = set()
        self.keep = False
        self.ended: list[tuple[int, torch.Tensor | TransportError]] = []
        self._go = threading.Event()
        self._held = False
        self._count = 0
        self._session: Any = SimpleNamespace(client=self.client)
        self.guard = Guard(threading.Condition())
        self.fetcher = Fetcher("cpu", 3, self._begin, self._end, self.guard)

    def ask(self, count: int, nbytes: int = 4096, session: Any = None) -> None:
        if not self._held:
            self._held = True
            self.fetcher._work.put(self._wait)
        for _ in range(count):
            layout = SimpleNamespace(nbytes=nbytes)
            pending: Any = SimpleNamespace(index=self._count, layout=layout, borrowed=False)
            self.fetcher.fetch(pending, session or self._session)
            self._count += 1

    def retire(self) -> None:
        self.fetcher.retire(self._session)

    def start(self) -> None:
        """Let the thread work."""
        self._go.set()

    def go(self) -> None:
        """Let the thread work until it has done what was asked for."""
        self.start()
        done = threading.Event()
        self.fetcher._work.put(done.set)
        assert done.wait(WAIT_S)
        self._go.clear()
        self._held = False

    def _wait(self) -> None:
        assert self._go.wait(WAIT_S)

    def _begin(self, pending: Any, session: object) -> SlotRef | None:
        return None if pending.index in self.gone else SlotRef(pending.index, 1, pending.layout.nbytes)

    def _end(self, pending: Any, got: torch.Tensor | TransportError, took_s: float) -> None:
        assert 0 <= took_s < WAIT_S
        self.ended.append((pending.index, got))
        if isinstance(got, torch.Tensor) and not self.keep:
            self.fetcher.recycle(got)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    bench = Bench()

    def allocated(nbytes: int, device: str) -> torch.Tensor:
        assert not bench.client.expected, "this may wait for a transfer whose deadline nobody looks at then"
        return allocate(nbytes, device)

    monkeypatch.setattr("specd.client.staging.allocate", allocated)
    yield bench
    bench._go.set()
    bench.fetcher.close()
    bench.guard.check()


def test_what_has_a_buffer_is_expected_before_the_first_is_waited_for(bench: Bench) -> None:
    bench.ask(5)
    bench.go()
    assert bench.log == ["e0", "e1", "e2", "f0", "e3", "f1", "e4", "f2", "f3", "f4"]
    assert [index for index, _ in bench.ended] == [0, 1, 2, 3, 4]


def test_no_buffer_is_made_to_look_ahead(bench: Bench) -> None:
    bench.keep = True
    bench.ask(5)
    bench.go()
    assert bench.log == ["e0", "e1", "e2", "f0", "f1", "f2", "e3", "f3", "e4", "f4"]
    assert len({got.data_ptr() for _, got in bench.ended if isinstance(got, torch.Tensor)}) == 5


def test_buffers_are_enlarged_only_while_nothing_is_expected(bench: Bench) -> None:
    bench.ask(3)
    bench.go()
    bench.ask(2)
    bench.ask(3, nbytes=8192)
    bench.go()
    assert bench.log[6:] == ["e3", "e4", "e5", "f3", "f4", "f5", "e6", "e7", "f6", "f7"]


def test_what_is_no_longer_its_sessions_gives_its_buffer_to_the_next(bench: Bench) -> None:
    bench.gone = {0, 2}
    bench.keep = True
    bench.ask(5)
    bench.go()
    assert bench.log == ["e1", "e3", "e4", "f1", "f3", "f4"]


def test_a_loss_is_told_of_each_and_their_buffers_are_left_alone(bench: Bench) -> None:
    bench.client.lost = True
    bench.ask(3)
    bench.go()
    told = [(index, isinstance(got, TransportError) and got.lost) for index, got in bench.ended]
    assert told == [(0, True), (1, True), (2, True)]
    lost = {into.data_ptr() for into in bench.client.intos}
    bench.client.lost = False
    bench.keep = True
    bench.ask(3)
    bench.go()
    fresh = {got.data_ptr() for _, got in bench.ended if isinstance(got, torch.Tensor)}
    assert (len(lost), len(fresh), lost & fresh) == (3, 3, set())


def test_a_session_is_closed_behind_what_it_expects(bench: Bench) -> None:
    bench.ask(2)
    bench.retire()
    bench.go()
    assert bench.log == ["e0", "e1", "f0", "f1", "close"]


def test_a_session_that_is_lost_is_not_waited_for(bench: Bench) -> None:
    """Nothing else would tell the transfer, and every other daemon's batches come behind it."""
    gone = Client([], gone=True)
    lost: Any = SimpleNamespace(client=gone)
    bench.ask(2, session=lost)
    bench.ask(1)
    bench.start()
    assert gone.waits.wait(WAIT_S)
    bench.fetcher.retire(lost)
    bench.go()
    told = [(index, isinstance(got, TransportError) and got.lost) for index, got in bench.ended]
    assert told == [(0, True), (1, True), (2, False)]
    assert gone.log == ["e0", "e1", "f0", "f1", "close"]
    assert bench.log == ["e2", "f2"], "its own session goes on"


def test_what_is_under_way_may_end_when_it_stops_but_not_for_long(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specd.client.fetch.GRACE_S", 0.05)
    gone = Client([], gone=True)
    bench.ask(1)
    bench.ask(1, session=SimpleNamespace(client=gone))
    bench.start()
    assert gone.waits.wait(WAIT_S)
    bench.fetcher.stop()
    assert gone.cancelled.is_set()
    assert [index for index, _ in bench.ended] == [0], "the session is not lost, it is closed"


def test_what_was_asked_for_while_it_stops_is_done_by_close(bench: Bench) -> None:
    bench.ask(2)
    stopping = threading.Thread(target=bench.fetcher.stop)
    stopping.start()
    while bench.fetcher._work.qsize() < 3:  # both, and the end
        threading.Event().wait(0.001)
    bench.retire()
    bench._go.set()
    stopping.join(WAIT_S)
    assert bench.log == ["e0", "e1", "f0", "f1"]
    bench.fetcher.close()
    assert bench.log[-1] == "close"
