"""Artifacts in chunks: complete, in place, and never mixed with what came late for another one."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from specd.artifacts import Artifacts
from specd.errors import DaemonError
from specd.protocol import ARTIFACT_CHUNK_BYTES, Artifact, Fetch, Message
from specd.session import Session

SIZE = 3 * ARTIFACT_CHUNK_BYTES + 17


class Wire:
    """Answers FETCH at once, and then comes with whatever `late` messages it is given."""

    def __init__(self, contents: dict[str, bytes], late: list[Artifact] | None = None) -> None:
        self.contents = contents
        self.late = late or []
        self.asked: list[Fetch] = []
        self.reader = Artifacts(threading.Condition(), 0.2, self.ask)

    def ask(self, messages: Callable[[bytes], list[Message]], asked: Session | None) -> Session | None:
        if asked is None and self.contents:
            for fetch in messages(b"e" * 16):
                assert isinstance(fetch, Fetch)
                self.asked.append(fetch)
                data = self.contents[fetch.name][fetch.offset : fetch.offset + fetch.length]
                self.reader.arrived(Artifact(epoch=b"e" * 16, name=fetch.name, offset=fetch.offset, data=data))
            for late in self.late:
                self.reader.arrived(late)
        return asked


def test_all_bytes_arrive_in_place() -> None:
    content = bytes(range(256)) * (SIZE // 256 + 1)
    assert Wire({"a": content[:SIZE]}).reader.read("a", SIZE) == content[:SIZE]


def test_a_chunk_that_comes_late_for_another_artifact_changes_nothing() -> None:
    late = [Artifact(epoch=b"e" * 16, name="embedding", offset=0, data=b"x" * 64)]
    assert Wire({"lm_head": b"y" * 64}, late).reader.read("lm_head", 64) == b"y" * 64


def test_nothing_in_time_is_an_error_that_names_it() -> None:
    with pytest.raises(DaemonError, match="artifact 'gone' did not come within"):
        Wire({}).reader.read("gone", 10)
