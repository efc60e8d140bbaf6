"""Kept states are the computed ones, to the bit: all or a part, after kills under the writer, with bytes flipped."""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import zmq
from msgspec.structs import replace

from exact import daemon_config, write_model
from faults import ASKED, SEED
from members import SPECS, SYNTHETIC, digest, digest_rounded, follow, own_process, together
from samples import batch
from specd.cli.main import run
from specd.client.ask import ask_status
from specd.client.subscriber import Subscriber
from specd.config.settings import (
    CaptureConfig,
    DaemonConfig,
    ReplayConfig,
    RingConfig,
    SubscriberConfig,
    TargetConfig,
)
from specd.daemon.serve import embedded
from specd.protocol.capture import FP8, CaptureSpec
from specd.protocol.contract import ReplayInfo
from specd.replay.files import NAME, Files
from specd.replay.form import offset

COUNT = 24
KILLS = ASKED or 2
CELL_BYTES = 64 * 32 * 7 * 4
"""Of the slots of `own_process`."""


def budget(cells: int) -> str:
    """GB that exactly so many cells need."""
    return repr((offset(cells, CELL_BYTES) + 1) / 1e9)


def epochs(
    endpoints: list[str], number: int, *, seed: int = 0, meanwhile: Callable[[], None] | None = None
) -> list[str]:
    """Go through the batches so often, each time in another order; the digests, by batch, equal in all epochs.

    meanwhile: called after each delivery.
    """
    config = SubscriberConfig(endpoints=tuple(endpoints), transport="shm", depth=2, timeout_s=60, connect_s=60)
    order = [index for epoch in range(number) for index in random.Random(seed + epoch).sample(range(COUNT), COUNT)]
    found: dict[int, str] = {}
    with Subscriber(config, SPECS[1]) as source:
        for index, delivery in zip(order, source.stream(batch(index) for index in order), strict=True):
            assert found.setdefault(index, digest(delivery)) == digest(delivery), f"seed {SEED}, batch {index}"
            if meanwhile is not None:
                meanwhile()
    return [found[index] for index in range(COUNT)]


def counted(endpoint: str) -> dict[str, int]:
    """A daemon's counts of its replay tier."""
    counters = ask_status(endpoint, 30).counters
    return {name.removeprefix("replay_"): count for name, count in counters.items() if name.startswith("replay_")}


def keep(endpoint: str, cells: int, computed: list[str]) -> int:
    """Go through the batches until as many are kept as there are cells; how often: a busy disk leaves some out."""
    for number in range(1, 10):
        assert epochs([endpoint], 1, seed=number) == computed, f"seed {SEED}"
        patience = time.monotonic() + 0.5
        while time.monotonic() < patience:
            if (info := ask_status(endpoint, 30).replay) is not None and info.used == cells:
                return number
            time.sleep(0.02)  # progress of another process: nothing to wait on
    raise AssertionError(f"{counted(endpoint)} of {cells} cells")


@pytest.fixture(scope="module")
def computed() -> list[str]:
    """The digests of batches that nothing was kept of."""
    with own_process() as endpoint:
        digests = epochs([endpoint], 1)
        assert set(counted(endpoint).values()) == {0}
    assert len(set(digests)) == COUNT
    return digests


def test_later_epochs_are_read_as_far_as_they_fit_and_the_next_daemon_goes_on(
    computed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = 13
    flags = ("--replay", str(tmp_path / "store"), "--replay-gb", budget(cells))
    with own_process(*flags) as endpoint:
        went = keep(endpoint, cells, computed)
        before = counted(endpoint)
        assert before["hit"] + before["miss"] == went * COUNT
        assert (before["wrote"], before["damaged"]) == (cells, 0)
        assert epochs([endpoint], 2, seed=70) == computed
        assert counted(endpoint)["hit"] - before["hit"] >= 0.98 * 2 * cells
        assert run(["replay", str(tmp_path / "store"), "--check"]) == 2, "a daemon uses it"
        assert "stop that first" in capsys.readouterr().err
    assert (tmp_path / "store" / NAME).stat().st_size == offset(cells, CELL_BYTES)
    with own_process(*flags) as endpoint:
        assert epochs([endpoint], 1, seed=90) == computed
        assert counted(endpoint)["hit"] >= 0.98 * cells
    assert run(["replay", str(tmp_path / "store"), "--check"]) == 0


def test_a_worker_that_is_killed_while_it_writes_leaves_nothing_wrong(computed: list[str], tmp_path: Path) -> None:
    rng = random.Random(SEED)
    with own_process("--replay", str(tmp_path / "s"), "--replay-gb", budget(COUNT)) as endpoint:
        killed, wait = {0}, rng.randrange(5)  # 0 while there is none

        def kill() -> None:
            nonlocal wait
            wait -= 1
            if wait < 0 and len(killed) <= KILLS and (pid := ask_status(endpoint, 30).worker_pid) not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
                wait = rng.randrange(10)

        lives = 0
        while len(killed) <= KILLS:
            assert epochs([endpoint], 2, seed=lives, meanwhile=kill) == computed, f"seed {SEED}"
            lives += 1
        keep(endpoint, COUNT, computed)
        before = counted(endpoint)
        assert epochs([endpoint], 1, seed=99) == computed
        assert counted(endpoint)["hit"] - before["hit"] >= 0.98 * COUNT
        assert ask_status(endpoint, 30).counters["worker_restarts"] == KILLS


def test_of_400_flipped_bytes_each_is_found_and_none_is_served(computed: list[str], tmp_path: Path) -> None:
    rng, flags = random.Random(SEED), ("--replay", str(tmp_path / "s"), "--replay-gb", budget(COUNT))
    with own_process(*flags) as endpoint:
        keep(endpoint, COUNT, computed)
    store, _ = Files.view(tmp_path / "s")
    lengths = [found.header.nbytes for found in store.scan() if found.header is not None]
    store.close()
    hurt = set()
    with (tmp_path / "s" / NAME).open("r+b") as file:
        for _ in range(400):
            cell = rng.randrange(2 * COUNT // 3)
            hurt.add(cell)
            at = offset(cell, CELL_BYTES) + rng.randrange(4096 + lengths[cell])
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ rng.randrange(1, 256)]))
    assert run(["replay", str(tmp_path / "s"), "--check"]) == 1
    with own_process(*flags) as endpoint:
        keep(endpoint, COUNT, computed)
        counts = counted(endpoint)
        assert counts["damaged"] == len(hurt), f"seed {SEED}"
        assert counts["wrote"] == len(hurt)
        assert epochs([endpoint], 1, seed=5) == computed
        assert counted(endpoint)["hit"] - counts["hit"] >= 0.98 * COUNT
    assert run(["replay", str(tmp_path / "s"), "--check"]) == 0


def test_one_of_two_daemons_dies_and_its_store_is_no_others(computed: list[str], tmp_path: Path) -> None:
    def flags(name: str) -> tuple[str, ...]:
        return "--replay", str(tmp_path / name), "--replay-gb", budget(COUNT)

    with own_process(*flags("a")) as stays, own_process(*flags("b")) as dies:
        pid, left = ask_status(dies, 10).pid, COUNT + 5

        def kill() -> None:
            nonlocal left
            left -= 1
            if not left:
                os.kill(pid, signal.SIGKILL)

        assert epochs([stays, dies], 3, meanwhile=kill) == computed
        assert counted(stays)["damaged"] == 0


def test_members_of_a_share_and_a_real_target_in_memory(tmp_path: Path) -> None:
    """Exact forwards of a transformer, kept in memory: by what a slot holds, so alone and shared are not mixed up."""
    layers = 3
    specs = [CaptureSpec(taps=(0,), dtype="float32"), CaptureSpec(taps=(0, layers - 1), final=True, dtype="float32")]
    plain = replace(daemon_config(write_model(tmp_path)), capture=CaptureConfig(num_taps=6, final=True))
    keeping = replace(plain, replay=ReplayConfig(ram_gb=0.1))
    with zmq.Context() as context:
        with embedded(plain, context) as here:
            expected = [follow(here.endpoint, "inproc", spec, 10, context=context).digests for spec in specs]
        with embedded(keeping, context) as here:
            stream = partial(follow, here.endpoint, "inproc", context=context)
            alone = [stream(spec, 10) for spec in specs]
            for _ in range(2):
                meet = threading.Barrier(2)
                shared = together([partial(stream, spec, 10, share="s", meet=meet) for spec in specs])
                assert [one.digests for one in shared] == expected
            again = [stream(spec, 10) for spec in specs]
    assert [one.digests for one in alone] == [one.digests for one in again] == expected
    assert all(now.stats.forward_s < before.stats.forward_s / 2 for now, before in zip(again, alone, strict=True))


def test_of_a_disk_that_fails_the_daemon_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring, target = RingConfig(slots=4, max_sessions=2, slot_tokens=64), TargetConfig(model=SYNTHETIC)
    config = DaemonConfig(target=target, ring=ring, replay=ReplayConfig(dir=str(tmp_path / "s"), gb=0.01))

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with embedded(config) as here:
        link = SubscriberConfig(endpoints=(here.endpoint,), depth=2, timeout_s=60)

        def said() -> ReplayInfo:
            with Subscriber(link, SPECS[0], context=here.context) as source:
                assert source.replay is not None
                return source.replay

        stream = partial(follow, here.endpoint, "inproc", SPECS[0], 10, context=here.context)
        digests = stream().digests
        while said().used < 6:
            assert not said().failed
        monkeypatch.setattr(os, "preadv", broken)
        assert stream().digests == digests
        assert (said().failed, said().cells, said().used) == ("3 errors in a row: Input/output error", 0, 0)


@pytest.mark.parametrize("where", ["disk", "ram"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_as_float8_is_computed_states_first_and_what_their_codes_say_ever_after(
    where: str,
    dtype: Literal["float32", "bfloat16"],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "specd.client.inflight")
    specs = [replace(spec, dtype=dtype) for spec in SPECS[:2]]
    plain = DaemonConfig(
        target=TargetConfig(model="synthetic:hidden=256,layers=8,vocab=128", dtype=dtype),
        ring=RingConfig(slots=12, slot_tokens=64),
        capture=CaptureConfig(num_taps=6, final=True),
    )
    kept = ReplayConfig(dir=str(tmp_path / "s"), gb=0.02) if where == "disk" else ReplayConfig(ram_gb=0.02)
    with zmq.Context() as context:
        with embedded(plain, context) as here:
            ways = [[partial(follow, here.endpoint, "inproc", spec, COUNT, context=context, of=of)().digests
                     for of in (digest, digest_rounded)] for spec in specs]  # fmt: skip
        with embedded(replace(plain, replay=replace(kept, encoding=FP8)), context) as here:
            stream = partial(follow, here.endpoint, "inproc", count=COUNT, context=context)
            for spec, (computed, coded) in zip(specs, ways, strict=True):
                assert stream(spec=spec).digests == computed
                for _ in range(9):
                    seen = stream(spec=spec)
                    assert all(found in each for found, *each in zip(seen.digests, computed, coded, strict=True))
                    if seen.stats.replayed == COUNT:
                        assert seen.digests == coded
                        break
                assert stream(spec=spec).digests == coded
            for _ in range(9):
                meet = threading.Barrier(2)
                shared = together([partial(stream, spec=spec, share="s", meet=meet) for spec in specs])
                for one, (computed, coded) in zip(shared, ways, strict=True):
                    assert all(found in each for found, *each in zip(one.digests, computed, coded, strict=True))
                if all(one.digests == coded for one, (_, coded) in zip(shared, ways, strict=True)):
                    break
            else:
                raise AssertionError("a share never read all of it")
    assert not any(set(computed) & set(coded) for computed, coded in ways)
    assert " keeps states as float8_e4m3fn: those that it reads are rounded" in caplog.text
    if where == "disk":
        assert run(["replay", str(tmp_path / "s"), "--check"]) == 0
        assert ", kept as float8_e4m3fn\n" in capsys.readouterr().out
