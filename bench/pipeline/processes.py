"""The processes of the pipeline benchmark: daemons as `specd start` runs them, and children that answer in JSON."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import msgspec

from specd.config.settings import DaemonConfig
from specd.errors import DaemonError

T = TypeVar("T")

START_S = 900.0
"""Longest wait for a child's answer: a large target loads for minutes."""
END_S = 20.0


class Child(NamedTuple):
    """A process that runs a module of specd. says: the pipe it answers on. log: a file with its other output."""

    process: subprocess.Popen[bytes]
    says: IO[bytes]
    log: IO[bytes]

    def tell(self, order: msgspec.Struct) -> None:
        """Write `order` as a line to its standard input; one that has ended says so when it is asked for its answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(msgspec.json.encode(order) + b"\n")
            self.process.stdin.flush()

    def answer(self, kind: type[T], wait_s: float = START_S) -> T:
        """Its next line of JSON. Raises DaemonError when it ends, or says nothing for `wait_s`."""
        return msgspec.json.decode(self.line(wait_s), type=kind)

    def line(self, wait_s: float = START_S) -> bytes:
        """Its next line. Raises as `answer` does."""
        if not select.select([self.says], [], [], wait_s)[0]:
            raise self.silent(wait_s)
        if line := self.says.readline():
            return line
        try:
            end = f"ended with exit code {self.process.wait(END_S)}"
        except subprocess.TimeoutExpired:
            end = f"answers no more, and has not ended in {END_S:g} s"
        raise DaemonError(f"{self._name} {end}; {self._last()}")

    def silent(self, waited_s: float = START_S) -> DaemonError:
        """The error when it has said nothing for so long."""
        return DaemonError(f"{self._name} has said nothing for {waited_s:g} s; {self._last()}")

    @property
    def _name(self) -> str:
        return " ".join(str(part) for part in list(self.process.args)[2:5])  # type: ignore[arg-type]

    def _last(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"its last words: {lines[-1]}" if lines else "it said nothing"


def as_answered(children: Sequence[Child], kind: type[T]) -> Iterator[tuple[int, T]]:
    """The next line of each child, with its number, in the order they come. Raises as `Child.answer` for the first."""
    waiting = {process.says: number for number, process in enumerate(children)}
    while waiting:
        ready = select.select(list(waiting), [], [], START_S)[0]
        if not ready:
            raise children[min(waiting.values())].silent()
        for says in ready:
            number = waiting.pop(says)
            yield number, children[number].answer(kind)


def end_with_input() -> None:
    """Exit this process, whatever it waits for, once its standard input ends: its parent is gone or done with it."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=watch, name="bench-input", daemon=True).start()


@contextmanager
def answers() -> Iterator[Callable[[msgspec.Struct], None]]:
    """How a child answers. All other output, an engine's included, goes to standard error meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(kept, "wb") as pipe:

        def answer(found: msgspec.Struct) -> None:
            pipe.write(msgspec.json.encode(found) + b"\n")
            pipe.flush()

        yield answer


@contextmanager
def child(module: str, job: msgspec.Struct) -> Iterator[Child]:
    """Run a module that takes `job` as a line of JSON; it has to `end_with_input`."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            bufsize=0,  # `select` does not see what a buffer holds
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            made = Child(process, process.stdout, log)
            made.tell(job)
            yield made
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            _end(process)
            process.stdout.close()


@contextmanager
def daemon(config: DaemonConfig, path: Path) -> Iterator[str]:
    """A daemon in processes of its own, which listens on the socket `path`; yields its endpoint once it serves.

    Raises DaemonError with what it said when it does not come up.
    """
    settings = path.with_suffix(".yaml")  # JSON is YAML
    settings.write_bytes(msgspec.json.encode(config))
    endpoint = f"ipc://{path}"
    reader, writer = os.pipe()
    command = [sys.executable, "-P", "-m", "specd", "start", "--config", str(settings), "--endpoint", endpoint]
    command += ["--ready-fd", str(writer)]
    with tempfile.TemporaryFile() as log, open(reader, "rb", buffering=0) as ready:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(writer,))
        finally:
            os.close(writer)
        try:
            Child(process, ready, log).line()
            yield endpoint
        finally:
            process.terminate()
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
