"""Trainers that share forwards get, to the bit, what they get alone, for less forwards, whatever one of them does."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import zmq
from msgspec.structs import replace

import members
from exact import daemon_config, write_model
from members import FORWARD_S, SPECS, SYNTHETIC, follow, own_process, together
from specd.client.ask import ask_status
from specd.client.subscriber import Subscriber
from specd.config.settings import AlwaysConfig, CaptureConfig, DaemonConfig, SubscriberConfig, TargetConfig
from specd.daemon.serve import embedded
from specd.errors import RejectedError, SpecdError
from specd.protocol.capture import CaptureSpec
from specd.protocol.messages import StatusReport

COUNT = 20
NIXL = any(importlib.util.find_spec(name) for name in ("nixl_cu13", "nixl_cu12"))
nixl = pytest.mark.skipif(not NIXL, reason="needs NIXL: pip install --no-deps nixl-cu13")


@pytest.fixture(scope="module")
def daemon() -> Iterator[str]:
    with own_process("--transports", "auto,nixl" if NIXL else "auto") as endpoint:
        yield endpoint


def fills(endpoint: str) -> int:
    return ask_status(endpoint, 10).counters["fills"]


def wait_until(endpoint: str, there: Callable[[StatusReport], bool]) -> None:
    limit = time.monotonic() + 30
    while not there(status := ask_status(endpoint, 10)):
        assert time.monotonic() < limit, status
        time.sleep(0.02)  # progress of another process: nothing to wait on


@contextmanager
def other_process(endpoint: str, share: str, count: int, step_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """A member in a process of its own, which wants the final states, once it has had some batches."""
    command = [sys.executable, members.__file__, endpoint, "shm", share, str(count), str(step_s)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        try:
            wait_until(
                endpoint, lambda status: any(each.share == share and each.batches > 3 for each in status.sessions)
            )
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def alone(daemon: str) -> list[list[str]]:
    """The digests of separate runs."""
    return [follow(daemon, "shm", spec, COUNT).digests for spec in SPECS]


@pytest.mark.parametrize("transport", ["shm", "bytes", pytest.param("nixl", marks=nixl)])
def test_three_specs_get_the_bytes_of_separate_runs(transport: str, daemon: str, alone: list[list[str]]) -> None:
    before, meet = fills(daemon), threading.Barrier(len(SPECS))
    found = together([partial(follow, daemon, transport, spec, COUNT, share=transport, meet=meet) for spec in SPECS])
    saved, probes = sum(one.stats.shared for one in found), 8 * len(SPECS)
    assert [one.digests for one in found] == alone
    assert all(len(set(digests)) == COUNT for digests in alone)
    assert saved >= 1.5 * COUNT, "all were in before the first forward"
    assert 3 * COUNT - saved <= fills(daemon) - before <= 3 * COUNT - saved + probes


@pytest.mark.parametrize("steps_s", [(0.02, 0.03), (0.02,) * 4])
def test_forwards_are_shared_at_unequal_speeds(steps_s: tuple[float, ...], daemon: str) -> None:
    count, meet = 60, threading.Barrier(len(steps_s))
    found = together([
        partial(follow, daemon, "shm", SPECS[place % 3], count, share="speeds", step_s=step_s, meet=meet)
        for place, step_s in enumerate(steps_s)
    ])  # fmt: skip
    deliveries = count * len(steps_s)
    assert deliveries - sum(one.stats.shared for one in found) <= (0.55 if len(steps_s) == 2 else 0.30) * deliveries


def test_a_slow_member_holds_a_fast_one_no_longer_than_its_pace(daemon: str) -> None:
    meet = threading.Barrier(2)
    fast, slow = together([
        partial(follow, daemon, "shm", SPECS[0], 60, share="slow", meet=meet),
        partial(follow, daemon, "shm", SPECS[1], 20, share="slow", step_s=0.3, meet=meet),
    ])  # fmt: skip
    pace_s = 2 * FORWARD_S * 2  # a forward takes longer than it sleeps where the machine is busy
    assert fast.took_s < 60 * (FORWARD_S + pace_s) + max(1.0, 16 * pace_s)
    assert fast.took_s < slow.took_s


def test_a_member_that_is_killed_costs_the_others_nothing(daemon: str, alone: list[list[str]]) -> None:
    with other_process(daemon, "killed", 10_000, 0.05) as member, ThreadPoolExecutor(1) as pool:
        rest = pool.submit(follow, daemon, "shm", SPECS[0], COUNT, share="killed", step_s=0.02)
        wait_until(daemon, lambda status: sum(each.share == "killed" for each in status.sessions) == 2)
        member.kill()
        assert rest.result().digests == alone[0]
    wait_until(daemon, lambda status: status.slots["free"] == 12)


def test_one_that_comes_late_and_one_that_was_stopped_get_their_own_states(daemon: str, alone: list[list[str]]) -> None:
    with other_process(daemon, "stopped", COUNT, 0.05) as member:
        member.send_signal(signal.SIGSTOP)
        went_on = follow(daemon, "shm", SPECS[0], COUNT + 40, share="stopped")
        assert went_on.digests[:COUNT] == alone[0]
        assert went_on.sharing == 1
        member.send_signal(signal.SIGCONT)
        assert json.loads(member.communicate(timeout=60)[0]) == alone[2]
        assert member.returncode == 0


def test_one_that_was_stopped_for_3_s_reads_what_the_other_passed() -> None:
    """At equal speeds they do not meet again: with a lag window no forward is made twice, and nobody waits."""
    count, step_s = 150, 0.02
    with own_process("--lag-gb", "0.02") as daemon, other_process(daemon, "lag", count, step_s) as member:
        wakes = threading.Timer(3.5, member.send_signal, [signal.SIGCONT])
        threading.Timer(0.5, member.send_signal, [signal.SIGSTOP]).start()
        wakes.start()
        went_on = follow(daemon, "shm", SPECS[2], count, share="lag", step_s=step_s)
        wakes.join()
        assert json.loads(member.communicate(timeout=60)[0]) == went_on.digests
        counters = ask_status(daemon, 10).counters
    assert counters["lag_hits"] >= 30, "they were together all the time"
    assert counters["fills"] <= 0.6 * 2 * count


def test_one_that_comes_when_the_others_are_over_reads_what_is_always_captured(alone: list[list[str]]) -> None:
    always = ("--set", "capture.always.taps=[5,1,3]", "--set", "capture.always.final=true")
    with own_process("--replay-ram-gb", "0.01", *always) as daemon:
        assert follow(daemon, "shm", SPECS[2], COUNT, share="late").digests == alone[2]
        before = ask_status(daemon, 10).counters
        assert follow(daemon, "shm", SPECS[0], COUNT, share="late").digests == alone[0]
        after = ask_status(daemon, 10).counters
    assert after["replay_hit"] - before["replay_hit"] >= 0.9 * COUNT


def test_what_is_always_captured_must_be_layers_of_the_target() -> None:
    always = AlwaysConfig(taps=(1, 7))
    config = DaemonConfig(target=TargetConfig(model=SYNTHETIC), capture=CaptureConfig(always=always))
    with pytest.raises(SpecdError, match=r"capture.always: taps \[1, 7\] leave the legal range 0…6"), embedded(config):
        pass


def test_a_real_target_within_one_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Exact forwards of a transformer, over inproc; a trainer without a share takes what covers its own."""
    settings = replace(daemon_config(write_model(tmp_path)), capture=CaptureConfig(num_taps=6, final=True))
    with zmq.Context() as context, embedded(settings, context) as here:
        layers = 3
        specs = [
            CaptureSpec(taps=(0,), dtype="float32"),
            CaptureSpec(taps=(0, layers - 1), final=True, dtype="float32"),
        ]
        stream = partial(follow, here.endpoint, "inproc", context=context)
        expected = [stream(spec, 10) for spec in specs]
        meet = threading.Barrier(2)
        with caplog.at_level(logging.INFO, "specd.client.inflight"):
            found = together([partial(stream, spec, 10, share="s", meet=meet) for spec in specs])
    said = [record.getMessage().partition(": ")[2] for record in caplog.records if "captures" in record.getMessage()]
    assert said == ["share s captures 2 taps + final, this run reads 1 tap"], "once, by the one that reads less"
    assert [one.digests for one in found] == [one.digests for one in expected]
    assert sum(one.stats.shared for one in found) == 10


def test_what_a_share_cannot_do_is_refused_in_one_sentence(daemon: str) -> None:
    wide = CaptureSpec(taps=tuple(range(7)), final=True, dtype="float32")
    with pytest.raises(RejectedError, match=r"share s would capture 7 taps \+ final .* --set capture.num_taps=7"):
        follow(daemon, "shm", wide, 1, share="s")
    member = SubscriberConfig(endpoints=(daemon,), transport="shm", share="s")
    with (
        Subscriber(member, SPECS[0]),
        pytest.raises(RejectedError, match="share s captures float32, this trainer wants bfloat16"),
    ):
        follow(daemon, "shm", CaptureSpec(taps=(1,), dtype="bfloat16"), 1, share="s")
