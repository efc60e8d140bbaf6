"""Artifacts in chunks: complete, in place, and never mixed with what came late for another one."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from specd.client.artifacts import ArtifactReader
from specd.client.handshake import Session
from specd.errors import DaemonError, ProtocolError
from specd.protocol.limits import ARTIFACT_CHUNK_BYTES
from specd.protocol.messages import Artifact, Fetch, Message

SIZE = 3 * ARTIFACT_CHUNK_BYTES + 17


class Wire:
    """Answers FETCH at once, and then comes with whatever `late` messages it is given.

    more: how many bytes more than were asked for it sends of the last chunk, or fewer.
    """

    def __init__(self, contents: dict[str, bytes], late: list[Artifact] | None = None, more: int = 0) -> None:
        self.contents = contents
        self.more = more
        self.late = late or []
        self.asked: list[Fetch] = []
        self.reader = ArtifactReader(threading.Condition(), 0.2, self.ask)

    def ask(self, messages: Callable[[bytes], list[Message]], asked: Session | None) -> Session | None:
        if asked is None and self.contents:
            for fetch in messages(b"e" * 16):
                assert isinstance(fetch, Fetch)
                self.asked.append(fetch)
                content, end = self.contents[fetch.name], fetch.offset + fetch.length
                data = content[fetch.offset : end + self.more if end == SIZE else end]
                self._come(Artifact(epoch=b"e" * 16, name=fetch.name, offset=fetch.offset, data=data))
            for late in self.late:
                self._come(late)
        return asked

    def _come(self, message: Artifact) -> None:
        self.reader.arrived(message, "ipc://here")


def test_all_bytes_arrive_in_place() -> None:
    content = bytes(range(256)) * (SIZE // 256 + 1)
    assert Wire({"a": content[:SIZE]}).reader.read("a", SIZE) == content[:SIZE]


def test_a_chunk_that_comes_late_for_another_artifact_changes_nothing() -> None:
    late = [Artifact(epoch=b"e" * 16, name="embedding", offset=0, data=b"x" * 64)]
    assert Wire({"lm_head": b"y" * 64}, late).reader.read("lm_head", 64) == b"y" * 64


def test_nothing_in_time_is_an_error_that_names_it() -> None:
    with pytest.raises(DaemonError, match="artifact 'gone' did not come within"):
        Wire({}).reader.read("gone", 10)


@pytest.mark.parametrize("more", [-17, -1, 1])
def test_a_chunk_of_another_length_than_was_asked_for_is_refused(more: int) -> None:
    wire = Wire({"embedding": bytes(SIZE + 1)}, more=more)
    last = SIZE - 17
    with pytest.raises(
        ProtocolError, match=rf"ipc://here sent {17 + more} bytes of artifact 'embedding' at {last}, 17 were asked for"
    ):
        wire.reader.read("embedding", SIZE)


def test_a_late_chunk_of_another_length_is_only_judged_if_it_is_wanted() -> None:
    late = [Artifact(epoch=b"e" * 16, name="lm_head", offset=ARTIFACT_CHUNK_BYTES, data=b"x" * 5)]
    assert Wire({"lm_head": b"y" * 64}, late).reader.read("lm_head", 64) == b"y" * 64
