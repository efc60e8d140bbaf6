"""The pipeline benchmark's processes: answers in the order they come, one wait for silence, errors with reasons."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from specd.bench.pipeline import processes
from specd.bench.pipeline.defaults import defaults
from specd.errors import DaemonError

TINY = "synthetic:hidden=32,layers=8,vocab=64"
SETTINGS = defaults(True, 1, TINY, {})


@contextmanager
def made(code: str, count: int) -> Iterator[tuple[list[processes.Child], list[int]]]:
    """Children that answer what is written to the descriptors beside them; their process runs `code`."""
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE))
        stack.callback(process.kill)
        log = stack.enter_context(tempfile.TemporaryFile())
        reads, writes = zip(*(os.pipe() for _ in range(count)), strict=True)
        ends = [stack.enter_context(os.fdopen(end, "rb", buffering=0)) for end in reads]
        left = [*writes]
        try:
            yield [processes.Child(process, end, log) for end in ends], left
        finally:
            for end in left:
                os.close(end)


def test_processes_answer_in_any_order() -> None:
    with made("", 2) as (children, writes):
        os.write(writes[1], b"[1]\n[2]\n")
        found = processes.as_answered(children, list[int])
        assert next(found) == (1, [1])
        os.write(writes[0], b"[0]\n")
        assert next(found) == (0, [0])
        assert list(found) == []
        os.close(writes.pop(0))
        with pytest.raises(DaemonError, match="ended with exit code 0"):
            dict(processes.as_answered(children[:1], list[int]))


def test_silence_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def select(read: Any, write: Any, error: Any, seconds: float) -> Any:
        waits.append(seconds)
        return [], [], []

    monkeypatch.setattr(processes, "select", SimpleNamespace(select=select))
    with made("", 2) as (children, _), pytest.raises(DaemonError, match="has said nothing for 900 s"):
        dict(processes.as_answered(children, list[int]))
    assert waits == [processes.START_S]


def test_one_that_answers_no_more_but_lives_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "END_S", 0.1)
    with made("import sys; sys.stdin.read()", 1) as (children, writes):
        os.close(writes.pop())
        with pytest.raises(DaemonError, match=r"answers no more, and has not ended in 0\.1 s"):
            children[0].line()


def test_a_daemon_that_does_not_come_up_is_an_error_with_its_reason(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    config = msgspec.structs.replace(SETTINGS, model="synthetic:hidden=0").daemon("cpu", 4)
    with pytest.raises(DaemonError, match="expected hidden ≥ 1"), processes.daemon(config, tmp_path / "d.sock"):
        pass
