"""What keeping states saves: the arithmetic of disks against forwards."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specd.errors import ConfigError
from specd.plan.balance import Placement, Work, balance
from specd.plan.replay import Saving, Store, saving

WORK = Work(
    target_tokens_per_s=89_100, draft_tokens_per_s=400_000, batch_tokens=3000, bytes_per_token=20_480,
    tokens_per_sample=2000, samples=50_000, epochs=6,
)  # fmt: skip
"""100 M tokens of 20 kB, 2,048 GB; the target needs 1,122 s for them, the draft 250 s."""


def with_(**changes: float) -> Work:
    return msgspec.structs.replace(WORK, **changes)


def placed(daemons: int = 1, trainers: int = 1, work: Work = WORK) -> Placement:
    found = balance(work, daemons, trainers).asked
    assert found is not None
    return found


def saved(gb: float, disk_gb_per_s: float, daemons: int = 1, work: Work = WORK) -> Saving:
    return saving(work, placed(daemons, 1, work), Store(gb=gb, disk_gb_per_s=disk_gb_per_s))


def test_a_fast_disk_that_holds_all_frees_the_target_from_the_second_epoch_on() -> None:
    found = saved(2500, 6.5)
    assert found.break_even_gb_per_s == pytest.approx(1.82, abs=0.01)
    assert (found.outcome, found.held) == ("pays", 1.0)
    assert found.saved == pytest.approx(5 / 6)
    assert found.first_s == pytest.approx(1e8 / 89_100)
    assert found.later_s == pytest.approx(2048 / 6.5)
    assert found.hours * 3600 == pytest.approx(found.first_s + 5 * found.later_s)
    assert found.hours_without * 3600 == pytest.approx(6 * found.first_s)
    slower = with_(efficiency=0.8)
    assert saved(2500, 6.5, work=slower).hours_without == pytest.approx(placed(work=slower).hours)
    assert found.why[0].startswith("later epochs take 5 min 15 s in place of 18 min 42 s, 3.56 × faster, and 83% of")
    assert "its GPUs are free" in found.why[1]
    assert saved(2500, 55).later_s == pytest.approx(250), "the draft is what is left"


def test_a_part_that_fits_saves_its_share() -> None:
    found = saved(500, 6.5)
    assert found.held == pytest.approx(0.244, abs=0.001)
    assert found.saved == pytest.approx(0.203, abs=0.001)
    assert found.later_s == pytest.approx((1 - found.held) * found.first_s)
    assert "500 GB hold 24% of the 2,048 GB" in found.why[1]
    two = saved(500, 6.5, daemons=2)
    assert two.held == pytest.approx(2 * found.held)
    assert two.write_gb_per_s == pytest.approx(found.write_gb_per_s * 2), "in half of the time"


def test_a_slow_disk_does_not_pay_unless_it_is_read_while_the_rest_is_computed() -> None:
    found = saved(2500, 0.5)
    assert found.outcome == "does not pay"
    assert "recompute is 3.6 × faster than 0.5 GB/s" in found.why[0]
    assert found.balanced_gb == pytest.approx(440.4, abs=0.1)
    assert found.later_s > found.first_s
    assert "keep at most 440 GB in each daemon" in found.why[0]
    some = saved(found.balanced_gb, 0.5)
    assert some.outcome == "pays"
    assert some.later_s == pytest.approx((1 - some.held) * some.first_s)
    assert any("it pays only as both go on at once" in reason for reason in some.why)


def test_an_epoch_that_waits_for_the_drafts_is_no_faster_and_saves_forwards() -> None:
    slow = with_(draft_tokens_per_s=10_000)
    found = saved(2500, 6.5, work=slow)
    assert (found.outcome, found.later_s) == ("saves forwards alone", found.first_s)
    assert "as the drafts are what they wait for; 83% of all forwards are not made" in found.why[0]
    wired = with_(wire_gb_per_s=0.1)
    assert "as the wires are what they wait for" in saved(2500, 6.5, work=wired).why[0]


def test_what_the_first_epoch_cannot_write_is_said() -> None:
    assert not any("to write" in reason for reason in saved(2500, 6.5).why)
    assert any("has 1.8 GB/s to write in each daemon, and a disk that takes 1.5" in r for r in saved(2500, 1.5).why)


@given(st.floats(1, 5000), st.floats(0.05, 100), st.integers(1, 4), st.integers(2, 9), st.floats(1e3, 1e6))
def test_more_of_it_never_saves_less_and_the_balanced_size_is_never_slower(
    gb: float, disk: float, daemons: int, epochs: int, draft: float
) -> None:
    work = with_(epochs=epochs, draft_tokens_per_s=draft)
    found = saved(gb, disk, daemons, work)
    assert 0 < found.saved < 1
    assert saved(2 * gb, disk, daemons, work).saved >= found.saved
    assert saved(gb, 2 * disk, daemons, work).later_s <= found.later_s
    best = saved(found.balanced_gb, disk, daemons, work)
    assert best.later_s <= found.later_s * (1 + 1e-9)
    assert best.later_s <= best.first_s
    assert (found.outcome == "does not pay") == (found.later_s > found.first_s and found.first_s / found.later_s < 0.98)


@pytest.mark.parametrize(
    ("work", "gb", "disk", "said"),
    [
        (WORK, 0.0, 1.0, r"--replay-gb 0: expected a number, more than 0"),
        (WORK, 1.0, float("nan"), r"--disk-gb-s nan: expected a number"),
        (with_(samples=0), 1.0, 1.0, r"without the size of the data.*give --samples"),
        (with_(epochs=1), 1.0, 1.0, r"--replay-gb with --epochs 1: the first epoch replays nothing, expected more"),
    ],
)
def test_what_nothing_can_be_said_of_is_refused(work: Work, gb: float, disk: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        saving(work, placed(), Store(gb=gb, disk_gb_per_s=disk))
