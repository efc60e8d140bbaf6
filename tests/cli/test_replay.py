"""`specd replay`: what it shows of a store, and what it finds damaged."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import msgspec
import pytest

from specd.cli.main import run
from specd.cli.replay import kept, replayed
from specd.protocol.capture import FP8
from specd.protocol.contract import ReplayInfo
from specd.replay.files import NAME, Files, StoreDirectory
from specd.replay.form import PAGE, Identity, offset

IDENTITY = Identity(model="tiny", fingerprint="llama:64", backend="sglang 0.5", torch="2.9", device="cpu", exact=True)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three batches in five cells."""
    place = StoreDirectory(tmp_path, offset(5, 2 * PAGE), 1)
    cells = Files.open(place, 2 * PAGE, IDENTITY)
    for cell in (0, 1, 3):
        image = memoryview(mmap.mmap(-1, 2 * PAGE))
        image[:9] = b"some data"
        cells.write(cell, bytes([cell]) * 32, image, 2 * PAGE - 10, 100)
    cells.close()
    place.close()
    return tmp_path


def flip(store: Path, at: int) -> None:
    with (store / NAME).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_store_is_shown(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", str(store)]) == 0
    shown = capsys.readouterr().out
    for part in (
        f"{store}: 5 cells, 8 KiB each",
        "tiny on sglang 0.5, exact, cpu, torch 2.9",
        "fingerprint llama:64",
        "3 batches, 300 tokens, 24,546 bytes (24 KiB)",
    ):
        assert part in shown
    assert "damaged" not in shown


def test_what_is_damaged_is_found_by_its_header_or_by_every_byte(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["replay", str(store), "--check"]) == 0
    assert "every batch at" in capsys.readouterr().out
    flip(store, offset(1, 2 * PAGE) + PAGE + 5000)
    flip(store, offset(4, 2 * PAGE) + 70)
    assert run(["replay", str(store), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert (data["batches"], data["damaged"], data["identity"]["exact"]) == (3, [4], True)
    assert run(["replay", str(store), "--check"]) == 1
    assert "2 cells (1, 4): a daemon computes them again" in capsys.readouterr().out


def test_what_is_no_store_or_is_used_is_one_clear_line(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", str(store / "nowhere")]) == 2
    assert "expected the DIR of specd start --replay DIR" in capsys.readouterr().err
    place = StoreDirectory(store, 1, 4242)
    assert run(["replay", str(store)]) == 0
    assert run(["replay", str(store), "--check"]) == 2
    assert "another daemon (pid 4242) uses" in capsys.readouterr().err
    place.close()
    with (store / NAME).open("r+b") as file:
        file.truncate(offset(1, 2 * PAGE))
    assert run(["replay", str(store)]) == 1
    assert "look at that disk" in capsys.readouterr().err


def test_what_became_of_batches_in_words() -> None:
    info = ReplayInfo(cells=7936, used=36, cell_bytes=63 << 20)
    assert kept(info) == "36 of 7,936 cells hold a batch, 63 MiB each"
    off = msgspec.structs.replace(info, cells=0, used=0, failed="3 errors in a row: Input/output error")
    assert kept(off).startswith("its disk is switched off (3 errors in a row: Input/output error); 0 of 0 cells hold")
    assert " cells hold a batch as float8_e4m3fn, 63 MiB" in kept(msgspec.structs.replace(info, encoding=FP8))
    assert replayed({}) == "0 of 0 batches replayed, 0 written"
    counts = {"replay_hit": 96, "replay_miss": 4, "replay_wrote": 3, "replay_skipped": 1, "replay_damaged": 2}
    assert replayed(counts) == "96 of 100 batches replayed (96%), 3 written, 1 skipped, 2 damaged"
