"""The trainer's side of bytes against a worker that does as it is told: what is progress, and what is skipped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zmq

from specd.errors import TransportError
from specd.transports.base import SlotRef
from specd.transports.bytes.client import BytesClient
from specd.transports.bytes.frames import Header, Kind, checksum, unpack
from specd.transports.bytes.server import Bytes
from specd.transports.bytes.socket import BytesOffer, new_token
from specd.transports.checks import wrap

CHUNK = 1000
PATIENCE_S = 0.6
STEP_S = 0.2


class Worker:
    """A worker's end that sends what a test says, on a thread of its own. heard: what the trainer sent."""

    def __init__(self, directory: Path) -> None:
        self.offer = BytesOffer(
            token=new_token(), endpoints=(f"ipc://{directory}/bulk.sock",), num_slots=4, slot_bytes=100 * CHUNK
        )
        self.heard: list[Header] = []
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.offer.endpoints[0])
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def chunk(self, slot: int, number: int, index: int, count: int) -> None:
        """Send chunk `index` of `count` of a transfer."""
        payload = bytes([index]) * CHUNK
        digest = checksum(memoryview(payload))
        header = Header(Kind.CHUNK, slot, CHUNK, number, 1, index * CHUNK, count * CHUNK, digest)
        self._socket.send_multipart([self.offer.token, header.pack(), payload])

    def pause(self) -> bool:
        """Wait as long as a slow link would, and hear what came; whether to go on."""
        while self._socket.poll(0):
            header = unpack(self._socket.recv_multipart()[1])
            assert header is not None
            self.heard.append(header)
        return not self._over.wait(STEP_S)

    def runs(self, script: Callable[[], None]) -> BytesClient:
        """A trainer that is attached, to which `script` sends from now on."""

        def run() -> None:
            self._socket.recv_multipart()
            self._socket.send_multipart([self.offer.token, Header(Kind.WELCOME).pack()])
            script()

        self._thread = threading.Thread(target=run)
        self._thread.start()
        client = Bytes.client("cpu")
        client.attach(wrap(self.offer), 10.0)
        return client

    def close(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._socket.close(linger=0)
        self._context.term()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(tmp_path)
    yield worker
    worker.close()


def test_a_transfer_that_gets_on_is_waited_for(worker: Worker) -> None:
    def slowly() -> None:
        for index in range(6):
            worker.chunk(0, 1, index, 6)
            worker.pause()

    client = worker.runs(slowly)
    into = torch.zeros(6 * CHUNK, dtype=torch.uint8)
    begin = time.monotonic()
    client.fetch(SlotRef(0, 1, 6 * CHUNK), into, PATIENCE_S)
    assert time.monotonic() - begin > PATIENCE_S, "it was too fast to show anything"
    assert into.view(6, CHUNK).float().mean(1).tolist() == [0, 1, 2, 3, 4, 5]
    client.close()


def test_what_a_peer_trickles_beside_the_transfer_is_no_progress(worker: Worker) -> None:
    def trickle() -> None:
        number = 0
        worker.chunk(0, 1, 0, 6)
        while worker.pause():
            number += 1
            worker.chunk(1, 1, 0, 6)  # of another slot
            worker.chunk(0, 1, 3, 6)  # not the next one
            worker.chunk(0, 1 + number, 0, 6)  # over and over again
            worker._socket.send_multipart([worker.offer.token, b"noise"])

    client = worker.runs(trickle)
    begin = time.monotonic()
    with pytest.raises(TransportError, match="came to 1000 of 6000 bytes when its time was up") as late:
        client.fetch(SlotRef(0, 1, 6 * CHUNK), torch.zeros(6 * CHUNK, dtype=torch.uint8), PATIENCE_S)
    assert not late.value.lost
    assert time.monotonic() - begin < 3 * PATIENCE_S
    client.close()


def test_what_is_left_of_a_fetch_that_was_given_up_is_cancelled_and_not_charged_to_the_next(worker: Worker) -> None:
    """On a slow link the chunks that are under way may take longer than the next fetch may stand still."""
    given_up = threading.Event()

    def late() -> None:
        given_up.wait(10)
        for index in range(4):
            worker.pause()
            worker.chunk(0, 1, index, 9)
        for index in range(2):
            worker.pause()
            worker.chunk(1, 2, index, 2)
        worker.pause()

    client = worker.runs(late)
    with pytest.raises(TransportError, match="came to 0 of 9000 bytes"):
        client.fetch(SlotRef(0, 1, 9 * CHUNK), torch.zeros(9 * CHUNK, dtype=torch.uint8), 0.01)
    given_up.set()
    client.fetch(SlotRef(1, 1, 2 * CHUNK), torch.zeros(2 * CHUNK, dtype=torch.uint8), PATIENCE_S)
    assert client.ignored == 4
    client.close()
    worker.close()
    assert [header.transfer for header in worker.heard if header.kind is Kind.CANCEL] == [1]
