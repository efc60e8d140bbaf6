"""Copies of rows that lie apart: what a kernel takes, and on a GPU that it moves these bytes and no others."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from cuda_driver import Driver
from specd.memory import rows
from specd.protocol.cut import Piece, gather

ROW = Piece(0, 0, 5, 48, 96, 64)


@pytest.fixture(autouse=True)
def not_compiled_yet() -> Iterator[None]:
    rows._kernel.cache_clear()
    yield
    rows._kernel.cache_clear()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver, cupy = Driver(), ModuleType("cupy")
    vars(cupy).update(RawKernel=driver.copy_rows)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return driver


@pytest.mark.parametrize(
    "piece",
    [
        ROW._replace(rows=1), ROW._replace(width=40), ROW._replace(pitch=100), ROW._replace(step=68),
        ROW._replace(source=4), ROW._replace(target=8),
    ],
)  # fmt: skip
def test_one_row_and_rows_that_are_no_whole_words_are_the_drivers(driver: Driver, piece: Piece) -> None:
    assert rows.queue(4096, 8192, (piece,), 0, 77) == (piece,)
    assert not driver.calls


def test_addresses_of_no_whole_words_are_the_drivers(driver: Driver) -> None:
    assert rows.queue(4096, 8200, (ROW,), 0, 77) == (ROW,)
    assert not driver.calls


def test_more_pieces_than_a_launch_takes_are_several_launches(driver: Driver) -> None:
    source, target = torch.arange(256, dtype=torch.uint8).repeat(9), torch.zeros(4096, dtype=torch.uint8)
    here, there = (tensor.data_ptr() + -tensor.data_ptr() % rows.WORD for tensor in (target, source))
    pieces = tuple(Piece(64 * index, 96 * index, 3, 16, 64, 32) for index in range(rows.PIECES_A_LAUNCH + 1))
    assert rows.queue(there, here, pieces, 0, 77) == ()
    assert [call[1:4] for call in driver.calls[1:]] == [(3, rows.PIECES_A_LAUNCH, 77), (3, 1, 77)]
    held = source[there - source.data_ptr() :].numpy().data
    expected = torch.frombuffer(gather(held, pieces, 0, 2000), dtype=torch.uint8)
    assert torch.equal(target[here - target.data_ptr() :][:2000], expected)


def test_each_device_has_its_own(driver: Driver) -> None:
    target = torch.zeros(512, dtype=torch.uint8)
    address = target.data_ptr() + -target.data_ptr() % rows.WORD
    for device in (0, 1, 0):
        assert rows.queue(address, address, (ROW._replace(step=96),), device, 77) == ()
    assert driver.names() == ["RawKernel", "copy_rows", "RawKernel", "copy_rows", "copy_rows"]


def test_without_a_compiler_the_driver_copies_and_the_log_says_so_once(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.refusals = {"RawKernel": "nvrtc\nlibnvrtc.so.13 is not here"}
    with caplog.at_level(logging.WARNING):
        assert rows.queue(4096, 8192, (ROW,), 0, 77) == (ROW,)
        assert rows.queue(4096, 8192, (ROW,), 0, 77) == (ROW,)
    (said,) = caplog.messages
    assert "libnvrtc.so.13 is not here" in said


@pytest.mark.gpu(1)
@pytest.mark.parametrize(
    "pieces",
    [
        (ROW,), (Piece(16, 48, 4097, 8192, 16384, 8192),), (Piece(0, 0, 7, 16, 32, 16),),
        tuple(Piece(16 * tap, 16 * tap, 30, 16, 512, 320) for tap in range(20)),
        (Piece(0, 0, 30, 4112, 16384, 8256), Piece(8192, 4128, 9, 4096, 16384, 8256)),
    ],
)  # fmt: skip
def test_on_a_gpu_these_bytes_and_no_others_arrive(pieces: tuple[Piece, ...]) -> None:
    size = max(piece.source + piece.rows * piece.pitch for piece in pieces)
    room = max(piece.target + piece.rows * piece.step for piece in pieces) + 64
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda:0")
    target = torch.zeros(room, dtype=torch.uint8, device="cuda:0")
    stream = torch.cuda.current_stream("cuda:0").cuda_stream
    assert rows.queue(source.data_ptr(), target.data_ptr(), pieces, 0, stream) == ()
    expected = gather(source.cpu().numpy().data, pieces, 0, room)
    assert torch.equal(target.cpu(), torch.frombuffer(expected, dtype=torch.uint8))
