"""Disaggregated rows: which ones there are, that all daemons take part, and how a trainer is linked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, cast

import msgspec
import pytest

from specd.bench.pipeline import apart
from specd.bench.pipeline.apart import draft_alone, train
from specd.bench.pipeline.defaults import defaults
from specd.bench.pipeline.settings import Lengths, Settings, batches
from specd.config.settings import SubscriberConfig
from specd.errors import DaemonError
from specd.metrics import Stats
from specd.protocol.batch import Batch, Delivery
from specd.protocol.capture import CaptureSpec
from specd.train.distributed import Ranks

SETTINGS = msgspec.structs.replace(
    defaults(True, 1, "synthetic:hidden=32,layers=8,vocab=64", {}), lengths=("fixed", "log-normal"),
    depths=(4, 0, 2), transports=("shm", "bytes"), steps=3, warmup=1,
)  # fmt: skip


class Linked:
    """A subscriber that delivers at once and is linked with one more daemon each time it is asked."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._reached = 0
        self.delivered = 0

    def __enter__(self) -> Linked:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None: ...

    def stats(self) -> Stats:
        self._reached = min(self._most, self._reached + 1)
        return Stats(transports={str(number): "shm" for number in range(self._reached)}, batches=self.delivered)

    def stream(self, drawn: Sequence[Batch]) -> Iterator[Delivery]:
        assert self._reached == self._most, "all daemons were reached before anything is timed"
        for batch in drawn:
            self.delivered += 1
            yield Delivery(batch)


class Counted:
    """A step that counts."""

    def __init__(self) -> None:
        self.parameters: list[Any] = []
        self.waited: list[bool] = []

    def join(self, ranks: Ranks) -> None: ...

    def __call__(self, delivery: Delivery, wait: bool) -> None:
        self.waited.append(wait)


def draw(lengths: Lengths) -> list[Batch]:
    return batches(SETTINGS, lengths, 64, 4, 1)


@pytest.mark.parametrize(
    ("transport", "rows"),
    [
        ("shm", [(lengths, depth) for lengths in ("fixed", "log-normal") for depth in (4, 0, 2)]),
        ("bytes", [("fixed", 0), ("fixed", 4)]),
    ],
)
def test_the_first_transport_has_all_rows(
    transport: str, rows: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def subscribed(settings: Settings, *link: Any) -> Linked:
        asked.append(link)
        return Linked(2)

    monkeypatch.setattr(apart, "subscribed", subscribed)
    step, shown = Counted(), list[str]()
    found = list(train(SETTINGS, ["a", "b"], transport, step, draw, shown.append))
    assert [(lengths, depth) for lengths, depth, _ in found] == rows
    assert asked == [(["a", "b"], transport, depth) for _, depth in rows]
    assert [len(clocked.seconds) for _, _, clocked in found] == [3] * len(rows)
    assert [clocked.stats.batches for _, _, clocked in found] == [3] * len(rows)
    assert step.waited == [depth == 0 for _, depth in rows for _ in range(4)], "at depth 0 nothing overlaps"
    assert shown == [f"{transport}, {lengths} lengths, depth {depth}" for lengths, depth in rows]


def test_a_daemon_that_is_not_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "CONNECT_S", 0.0)
    monkeypatch.setattr(apart, "subscribed", lambda *_: Linked(1))
    with pytest.raises(DaemonError, match="only 1 of 3 daemons were reached"):
        next(train(SETTINGS, ["a", "b", "c"], "shm", Counted(), draw, lambda line: None))


def test_a_trainer_is_linked_as_the_row_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def subscriber(link: SubscriberConfig, capture: Any, device: str, name: str, **run: Any) -> Any:
        assert capture == SETTINGS.capture
        return link, device, run

    monkeypatch.setattr(apart, "Subscriber", subscriber)
    link, device, run = cast(Any, apart.subscribed(SETTINGS, ["ipc:///a", "ipc:///b"], "bytes", 4))
    assert (run["run"], run["ranks"]) == (b"", 1)
    assert (link.endpoints, link.transport, link.depth) == (("ipc:///a", "ipc:///b"), "bytes", 4)
    assert (link.connect_s, link.timeout_s, device) == (apart.CONNECT_S, apart.CONNECT_S, "cpu")


def test_the_draft_alone_trains_on_states_that_are_there() -> None:
    step = Counted()
    found = draft_alone(SETTINGS, CaptureSpec(taps=(1,), dtype="float32"), 32, step, draw, lambda line: None)
    assert found.keys() == {"fixed", "log-normal"}
    assert len(step.waited) == 8
    assert not any(step.waited)
