"""Copies of rows that lie apart: what a kernel takes, and on a GPU that it moves these bytes and no others."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from specd.memory import rows
from specd.protocol.cut import Piece, gather

ROW = Piece(0, 0, 5, 48, 96, 64)


@pytest.fixture(autouse=True)
def not_compiled_yet() -> Iterator[None]:
    rows._kernel.cache_clear()
    yield
    rows._kernel.cache_clear()


class Launches:
    """cupy's kernels and a stream of its. made: blocks, threads and pieces of each launch on that stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: str = "") -> None:
        self.made: list[tuple[Any, ...]] = []
        self.refuses = refuses
        self.kernel = self.launch
        cupy = ModuleType("cupy")
        vars(cupy).update(RawKernel=self.compiled)
        monkeypatch.setitem(sys.modules, "cupy", cupy)

    def compiled(self, source: str, name: str, options: tuple[str, ...]) -> Any:
        assert name in source
        return self

    def compile(self) -> None:
        if self.refuses:
            raise RuntimeError(self.refuses)

    def launch(
        self, blocks: tuple[int, ...], threads: tuple[int, ...], arguments: tuple[Any], shared: int, stream: object
    ) -> None:
        assert (shared, stream) == (0, self)
        (table,) = arguments
        assert table.size == 1, "what cupy passes by value"
        self.made.append((blocks, threads, np.frombuffer(table, np.int64).reshape(rows.MOST, 6).tolist()))


def test_rows_of_whole_words_are_launched_and_others_are_left_to_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    odd = [ROW._replace(rows=1), ROW._replace(width=40), ROW._replace(pitch=100), ROW._replace(source=4)]
    wide = Piece(48, 16, 8, 8192, 16384, 8192)
    assert rows.queue(4096, 8192, [odd[0], ROW, *odd[1:], wide], launches) == odd
    ((blocks, threads, table),) = launches.made
    assert (blocks, threads) == ((2, 2), (rows.THREADS,))
    assert table[:3] == [[4096, 8192, 5, 3, 6, 4], [4144, 8208, 8, 512, 1024, 512], [0] * 6]
    assert rows.queue(4100, 8192, [ROW], launches) == [ROW]
    assert rows.queue(4096, 8200, [ROW], launches) == [ROW]
    assert len(launches.made) == 1


def test_more_pieces_than_a_launch_takes_are_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    assert rows.queue(0, 0, [ROW] * (rows.MOST + 1), launches) == []
    assert [(made[0], made[1]) for made in launches.made] == [((2, rows.MOST), (32,)), ((2, 1), (32,))]


def test_without_a_compiler_the_driver_copies_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launches = Launches(monkeypatch, refuses="nvrtc\nlibnvrtc.so.13 is not here")
    with caplog.at_level(logging.WARNING):
        assert rows.queue(4096, 8192, [ROW], launches) == [ROW]
        assert rows.queue(4096, 8192, [ROW], launches) == [ROW]
    (said,) = caplog.messages
    assert "libnvrtc.so.13 is not here" in said
    assert not launches.made


@pytest.mark.gpu(1)
@pytest.mark.parametrize(
    "pieces",
    [
        [ROW], [Piece(16, 48, 4097, 8192, 16384, 8192)], [Piece(0, 0, 7, 16, 32, 16)],
        [Piece(16 * tap, 16 * tap, 30, 16, 512, 320) for tap in range(20)],
        [Piece(0, 0, 30, 4112, 16384, 8256), Piece(8192, 4128, 30, 4096, 16384, 8256)],
    ],
)  # fmt: skip
def test_on_a_gpu_these_bytes_and_no_others_arrive(pieces: list[Piece]) -> None:
    size = max(piece.source + piece.rows * piece.pitch for piece in pieces)
    room = max(piece.target + piece.rows * piece.step for piece in pieces) + 64
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda:0")
    target = torch.zeros(room, dtype=torch.uint8, device="cuda:0")
    assert not rows.queue(source.data_ptr(), target.data_ptr(), pieces, pytest.importorskip("cupy").cuda.Stream.null)
    expected = gather(source.cpu().numpy().data, pieces, 0, room)
    assert torch.equal(target.cpu(), torch.frombuffer(expected, dtype=torch.uint8))
