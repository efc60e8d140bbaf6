"""The bare NCCL loop over a stand-in: both ranks carry bytes, and a peer that is gone ends the wait."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch

import fake_cuda
import fake_nccl
from specd.bench.transport import raw_nccl
from specd.bench.transport.raw_nccl import RawRank
from specd.errors import TransportError


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with fake_nccl.reset():
        yield


def rank(number: int, unique_id: bytes, lives: bool = True) -> RawRank:
    return RawRank(fake_nccl.LIBRARY, "cpu", number, unique_id, 5000, 2, lambda: lives)


@pytest.mark.usefixtures("stand_in")
def test_what_one_rank_sends_the_other_receives() -> None:
    unique_id = fake_nccl.NCCL.get_unique_id()
    ended: list[bool] = []

    def send() -> None:
        sender = rank(raw_nccl.SENDER, unique_id)
        sender._buffers[0].fill_(7)
        sender._buffers[1].fill_(9)
        sender.send(3000, 3)
        sender.abort()
        ended.append(True)

    thread = threading.Thread(target=send)
    thread.start()
    receiver = rank(raw_nccl.RECEIVER, unique_id)
    receiver.receive(3000, 3)
    thread.join(10)
    receiver.abort()
    assert ended == [True]
    assert [int(buffer[:3000].sum()) for buffer in receiver._buffers] == [7 * 3000, 9 * 3000]
    assert int(receiver._buffers[0][3000:].sum()) == 0


@pytest.mark.usefixtures("stand_in")
def test_a_peer_that_ended_is_not_waited_for() -> None:
    with pytest.raises(TransportError, match="the other process of the raw NCCL loop ended"):
        rank(raw_nccl.RECEIVER, fake_nccl.NCCL.get_unique_id(), lives=False)


@pytest.mark.gpu(2)
def test_a_loop_between_two_gpus() -> None:
    size = 64 << 20
    with contextlib.closing(raw_nccl.NcclLoop("cuda:0", "cuda:1", size, 2)) as loop:
        loop.one(size)
        assert 4 * size / loop.stream(size, 4) > 1e9
        loop._process.kill()
        loop._process.join()
        with pytest.raises(TransportError):
            loop.one(size)
