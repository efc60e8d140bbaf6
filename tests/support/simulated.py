"""Daemons of any pace around a window, in simulated time: who gets which batch, and when it is here."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Sequence

from msgspec import structs

from specd.client import effects
from specd.client.peers import Keeping
from specd.client.pending import State
from specd.client.window import Window
from specd.protocol.messages import Source
from windows import SLOT, Clock, Effects, Item, Token, item, make, ready

TICK_S = 0.25


class Simulated:
    """One daemon: it captures batches one after the other, in `seconds` each, give or take `jitter`.

    stopped: from when until when it does nothing. replay: seconds of a batch that it has kept; 0 if it keeps none.
    asked: for how many batches it was. kept: which ones it keeps. hits: how many it had kept.
    """

    def __init__(
        self,
        seconds: float,
        *,
        jitter: float = 0.0,
        stopped: tuple[float, float] = (0.0, 0.0),
        first: float = 0.0,
        replay: float = 0.0,
    ) -> None:
        self.seconds, self.replay = seconds, replay
        self.kept: set[int] = set()
        self.hits = 0
        self.stopped = stopped
        self.asked = 0
        self._first = first
        self._jitter = jitter
        self._free_at = 0.0
        self._random = random.Random(7)

    def has(self, index: int) -> bool:
        return index in self.kept

    def capture(self, now: float, index: int = 0, *, keep: bool = False) -> float:
        """When a batch is there that it is asked for now."""
        begins = max(now, self._free_at)
        takes_s = self.seconds if self.asked else self._first or self.seconds
        if self.has(index):
            self.hits += 1
            takes_s = self.replay
        elif keep and self.replay:
            self.kept.add(index)
        self._free_at = begins + takes_s
        self._free_at += self._jitter * self._random.uniform(-1, 1)
        self.asked += 1
        begin, end = self.stopped
        if self._free_at > begin and begins < end:
            self._free_at += end - max(begin, begins)
        return self._free_at


class Run:
    """Takes 64 batches over and over, as fast as they come or a step takes. times: when each was taken, in seconds."""

    def __init__(
        self,
        daemons: Sequence[Simulated],
        depth: int,
        credits: int | None = None,
        *,
        keeping: Keeping = "anywhere",
        step_s: float = 0.0,
    ) -> None:
        self.clock = Clock()
        self.clock.now = 0.0
        self.daemons = list(daemons)
        self.times: list[float] = []
        self._depth, self._step_s = depth, step_s
        self._window: Window[Token, Token] = make(len(daemons), self.clock, keeping)
        self._places: dict[Token, int] = {}
        self._coming: list[tuple[float, int, Token, Item, Source]] = []
        self._numbers = itertools.count()
        self._credits = depth + 1 if credits is None else credits
        for place in range(len(daemons)):
            self.open(place)

    def open(self, place: int) -> None:
        session = Token(f"session of {place}")
        self._places[session] = place
        keeps = self.daemons[place].replay > 0
        self._do(self._window.opened(place, session, self._credits, SLOT, keeps=keeps))

    def lose(self, place: int) -> None:
        """The session with a daemon ends."""
        (session,) = (token for token, at in self._places.items() if at == place)
        del self._places[session]
        self._coming = [one for one in self._coming if one[2] is not session]
        heapq.heapify(self._coming)
        self._do(self._window.lost(session, "it died"))

    def take(self, count: int) -> float:
        """Take so many batches; how many came a second."""
        began, end = self.clock.now, len(self.times) + count
        while len(self.times) < end:
            if (lack := self._depth + 1 - len(self._window)) > 0:
                first = len(self.times) + len(self._window)
                self._do(self._window.add([item((first + index) % 64) for index in range(lack)]))
            while not self._window.here():
                self._wait()
            pending = self._window.first
            assert pending.batch.index == len(self.times) % 64, "out of order"
            self._do(self._window.take())
            self._do(self._window.give_back(pending))
            self.times.append(self.clock.now)
            self._train()
        return count / max(self.clock.now - began, 1e-9)

    def _train(self) -> None:
        """Spend a step on the batch that was taken, while others come."""
        until = self.clock.now + self._step_s
        while self._step_s and self._coming and self._coming[0][0] <= until:
            self._wait()
        self.clock.now = max(self.clock.now, until)

    def _wait(self) -> None:
        if self._coming and self._coming[0][0] <= self.clock.now + TICK_S:
            self.clock.now, number, session, pending, source = heapq.heappop(self._coming)
            self._do(self._window.ready(session, structs.replace(ready(pending, number), source=source)))
        else:
            self.clock.now += TICK_S
            self._do(self._window.tick())

    def _do(self, todo: Effects) -> None:
        for effect in todo:
            match effect:
                case effects.SendSubmit(session, pending, _, keep):
                    daemon = self.daemons[self._places[session]]
                    source: Source = "replay" if daemon.has(pending.batch.index) else "forward"
                    there = daemon.capture(self.clock.now, pending.batch.index, keep=keep)
                    heapq.heappush(self._coming, (there, next(self._numbers), session, pending, source))
                case effects.FetchSlot(session, pending):
                    assert self._window.begin(pending, session) is not None
                    self._do(self._window.fetched(pending, Token("buffer"), 0.0))
                    assert pending.state is State.FETCHED
                case _:
                    pass
