"""How ranks find each other, and do not take what others left in the store for their own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from groups import connection, new_store, on_threads
from specd.errors import ConfigError
from specd.train.launcher import Launch
from specd.train.meeting import meet


def met(store: Any, rank: int, size: int, restarts: int = 0) -> tuple[Any, bytes, list[Any]]:
    return meet(connection(store), Launch(rank, size, rank, size, restarts), limit_s=20)


def test_ranks_that_are_started_again_in_one_store_find_each_other_and_nothing_of_before() -> None:
    store = new_store()
    names = set()
    for start in range(3):
        found: list[Any] = on_threads(*(partial(met, store, rank, 3, start * (rank == 2)) for rank in range(3)))
        runs = {run for _, run, _ in found}
        assert len(runs) == 1
        assert all(members == found[0][2] for _, _, members in found)
        assert [member.rank for member in found[0][2]] == [0, 1, 2]
        assert found[0][2][2].restarts == start
        assert not any(ours.check(["left"]) for ours, _, _ in found)
        found[0][0].set("left", "behind")
        names |= runs
    assert len(names) == 3


def test_a_rank_that_comes_late_is_taken_by_its_newest_process() -> None:
    """Rank 1 dies after it said that it is here; its next process meets the others."""
    store = new_store()
    (gone,) = on_threads(lambda: meet(connection(store), Launch(1, 2, 1, 2), limit_s=0.2))
    assert isinstance(gone, ConfigError)
    one, two = on_threads(partial(met, store, 0, 2), partial(met, store, 1, 2))
    assert not isinstance(one, BaseException)
    assert not isinstance(two, BaseException)
    assert one[1:] == two[1:]


def test_one_that_never_comes_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"rank 0 of 2 has not met all ranks for 0\.1 s"):
        meet(new_store(), Launch(0, 2, 0, 2), limit_s=0.1)
