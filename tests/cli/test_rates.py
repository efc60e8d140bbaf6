"""Rates between two looks at a daemon: of all, of each trainer and transport, and what its worker waited for."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from daemons import REPORT
from specd.cli.rates import rates, who_waits
from specd.protocol.messages import StatusReport

TRAINER = REPORT.sessions[0]


def later(report: StatusReport, seconds: float, tokens: int = 0, **changes: Any) -> StatusReport:
    """The same daemon after so many seconds, in which its trainer was sent one batch of `tokens`."""
    session = msgspec.structs.replace(
        report.sessions[0],
        age_s=report.sessions[0].age_s + seconds,
        batches=report.sessions[0].batches + 1,
        tokens=report.sessions[0].tokens + tokens,
        nbytes=report.sessions[0].nbytes + 10 * tokens,
    )
    counters = {
        "batches": 1235,
        "tokens": tokens,
        "bytes": 10 * tokens,
        "filling_us": 3_000_000,
        "no_slot_us": 1_000_000,
    }
    values: dict[str, Any] = {"uptime_s": report.uptime_s + seconds, "counters": counters, "sessions": (session,)}
    return msgspec.structs.replace(report, **(values | changes))


def test_rates_are_those_of_the_interval() -> None:
    found = rates(later(REPORT, 4.0, 1000), REPORT)
    assert found.pace == (0.25, 250.0, 2500.0)
    assert found.trainers == {TRAINER.session: (0.25, 250.0, 2500.0)}
    assert found.transports == {"shm": 2500.0, "bytes": 0.0}
    assert found.shares == {"filling": 0.75, "no slot": 0.25, "no request": 0.0, "down": 0.0}


def test_without_an_earlier_look_they_are_means_over_each_life() -> None:
    found = rates(REPORT)
    assert found.pace.batches == pytest.approx(1234 / 12.0)
    assert found.trainers[TRAINER.session].nbytes == pytest.approx((5 << 30) / 7.0)
    assert all(new == 0 for _, new in found.faults.values())


@pytest.mark.parametrize("changes", [{"pid": 1, "uptime_s": 2.0}, {"pid": 1 << 22, "uptime_s": 2.0}, {"uptime_s": 2.0}])
def test_a_daemon_that_was_started_anew_is_measured_since_then(changes: dict[str, Any]) -> None:
    anew = later(REPORT, 4.0, 1000, **changes)
    assert rates(anew, REPORT).pace.tokens == 1000 / 2.0


def test_a_trainer_that_came_in_between_is_measured_since_then() -> None:
    new = msgspec.structs.replace(TRAINER, session="cd" * 8, age_s=2.0, tokens=500)
    found = rates(later(REPORT, 4.0, sessions=(new,)), REPORT)
    assert found.trainers["cd" * 8].tokens == 250.0


def test_faults_are_counted_whole_and_anew() -> None:
    before = msgspec.structs.replace(REPORT, counters={"failed": 2})
    now = msgspec.structs.replace(later(REPORT, 1.0), counters={"failed": 5, "worker_restarts": 1})
    found = rates(now, before).faults
    assert found["failed batches"] == (5, 3)
    assert found["deaths of the worker"] == (1, 1)
    assert found["expired leases"] == (0, 0)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({"filling": 0.97, "no request": 0.03}, "trainers wait for the target: it works 97%"),
        ({"filling": 0.6, "no request": 0.4}, "the target keeps up: it works 60%"),
        ({"filling": 0.1, "no request": 0.9}, "the target waits for trainers 90%"),
        ({"no slot": 1.0}, "trainers hold them all"),
        ({"down": 1.0}, "no worker"),
    ],
)
def test_who_waits_for_whom(shares: dict[str, float], words: str) -> None:
    assert words in who_waits(shares)
