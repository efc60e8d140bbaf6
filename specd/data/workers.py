"""Samples made by several processes at once, in the order of their rows and the same as one process makes them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import chain
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import NamedTuple, Self

from specd.data.portion import Portion
from specd.data.rows import Row
from specd.data.samples import Job, Maker
from specd.errors import DataError, SpecdError
from specd.parent import when_parent_dies

ALONE_S = 5.0
"""A process starts others when what it has to do takes longer than this: they need some seconds to begin."""
MOST = 16
"""As many are started unless more are asked for: each takes 0.4 GB, and this process has to feed them."""
AHEAD = 4
"""How many chunks a process may be ahead of the slowest one."""

Chunk = list[Row]


class _Start(NamedTuple):
    """The first message to a worker. parent: who started it. reads_text: load the tokenizer before saying so."""

    job: Job
    parent: int
    reads_text: bool


def portions(job: Job, chunks: Iterator[Chunk], processes: int) -> Generator[Portion, None, None]:
    """The samples of each chunk, in order.

    processes: how many make them; 0 for one a core up to MOST, and this one alone where that takes less than ALONE_S.
    Raises DataError when one of them dies, and what `Maker.make` raises.
    """
    maker = Maker(job)
    count = processes or min(len(os.sched_getaffinity(0)), MOST)
    if count == 1:
        yield from map(maker.make, chunks)
        return
    if not processes:
        begun = 0.0
        for chunk in chunks:
            yield maker.make(chunk)
            begun = begun or time.monotonic()  # the first chunk reads the tokenizer, which others have to do as well
            if time.monotonic() - begun > ALONE_S:
                break
        first = next(chunks, None)
        if first is None:
            return
        chunks = chain([first], chunks)
    with Workers(job, count, reads_text=maker.reads_text) as workers:
        yield from workers.make(chunks, None if processes else maker)


class Workers:
    """Processes that make samples of chunks; a context manager that ends them.

    They end with this process too, and do not get the terminal's Ctrl-C.
    """

    __slots__ = ("_idle", "_processes", "_stack")

    def __init__(self, job: Job, count: int, *, reads_text: bool = False) -> None:
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}
        self._idle: list[Connection] = []
        with ExitStack() as stack:
            for _ in range(count):
                pipe = self._start(stack)
                pipe.send(_Start(job, os.getpid(), reads_text))
            self._stack = stack.pop_all()

    def _start(self, stack: ExitStack) -> Connection:
        ours, theirs = socket.socketpair()
        pipe = stack.enter_context(Connection(ours.detach()))
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-m", "specd.data.workers", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},  # there is one for each core already
            )
        stack.callback(process.wait)
        stack.callback(process.kill)
        self._processes[pipe] = process
        return pipe

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes.values()]

    def make(self, chunks: Iterable[Chunk], here: Maker | None = None) -> Iterator[Portion]:
        """The samples of each chunk, in order. here: makes some in this process until the first of the others can."""
        source = enumerate(chunks)
        finished: dict[int, Portion] = {}
        busy: dict[Connection, int] = {}
        given, taken = 0, 0
        more = True
        while True:
            while more and self._idle and given - taken < AHEAD * len(self._processes):
                if (entry := next(source, None)) is None:
                    more = False
                    break
                pipe = self._idle.pop()
                self._send(pipe, entry[1])
                busy[pipe], given = entry[0], entry[0] + 1
            if not more and not busy and given == taken:
                return
            if more and here is not None and not busy and not self._idle:
                if (entry := next(source, None)) is None:
                    more = False
                    continue
                finished[entry[0]], given = here.make(entry[1]), entry[0] + 1
                self._take(busy, finished, 0)
            else:
                self._take(busy, finished, None)
            while taken in finished:
                yield finished.pop(taken)
                taken += 1

    def _take(self, busy: dict[Connection, int], finished: dict[int, Portion], timeout_s: float | None) -> None:
        """Put what the others have made into `finished`; they are idle then."""
        for pipe in wait(self._processes, timeout_s):
            assert isinstance(pipe, Connection)
            try:
                answer = pipe.recv()
            except (EOFError, OSError):
                raise self._dead(pipe) from None
            if isinstance(answer, SpecdError):
                raise answer
            self._idle.append(pipe)
            if pipe in busy:
                finished[busy.pop(pipe)] = answer

    def _send(self, pipe: Connection, chunk: Chunk) -> None:
        try:
            pipe.send(chunk)
        except OSError:
            raise self._dead(pipe) from None

    def _dead(self, pipe: Connection) -> DataError:
        code = self._processes[pipe].wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        why = "perhaps for want of memory" if code == -signal.SIGKILL else "what it wrote above may say why"
        return DataError(
            f"a process that prepares data {how}, {why}: give the command again, or prepare in one process with "
            f"data.processes=1"
        )


def _serve(pipe: Connection) -> None:
    """A worker: makes samples of one chunk after the other, until the pipe is closed."""
    with pipe, suppress(EOFError, ConnectionError):
        start: _Start = pipe.recv()
        if os.getppid() != start.parent:  # it was dead before this process asked to be told
            return
        maker = Maker(start.job)
        try:
            if start.reads_text:
                _ = maker.encoder
        except SpecdError as error:
            pipe.send(error)
            return
        pipe.send(None)
        while True:
            chunk: Chunk = pipe.recv()
            try:
                pipe.send(maker.make(chunk))
            except SpecdError as error:
                pipe.send(error)


if __name__ == "__main__":
    when_parent_dies(signal.SIGKILL)
    _serve(Connection(int(sys.argv[1])))
