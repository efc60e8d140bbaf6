"""Where a run's progress goes beside its journal: TensorBoard, trackers, a page for Prometheus.

A tracker has a thread of its own: training waits for no server, and ends for none that is gone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import msgspec

from specd import scrape
from specd.config.settings import LogConfig, RunConfig
from specd.errors import CheckpointError, ConfigError, first_line, missing_extra
from specd.train.directory import RunDirectory, read_facts
from specd.train.journal import Sink, StepRecord
from specd.train.measurement import Measurement
from specd.train.scalars import scalars
from specd.train.tensorboard import Scalars
from specd.train.trackers import TRACKERS, Tracked, Tracker

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"
NAMES = (TENSORBOARD, *TRACKERS)
BEHIND = 10_000
"""Steps that may wait for a tracker; with more, new ones are not sent."""
CLOSE_S = 60.0
"""How long the end of a run waits for what was not sent yet."""


def check(config: LogConfig, serves: bool = True) -> None:
    """Raise ConfigError for a logger that is unknown, or not installed, or a page that cannot be at its address.

    serves: whether this process is to serve the page.
    """
    for name in config.to:
        if name not in NAMES:
            raise ConfigError(f"log.to={name!r}: expected any of {', '.join(NAMES)}; the journal is always written")
        if importlib.util.find_spec(name) is None:
            raise missing_extra(name, name)
    if config.metrics:
        (scrape.check if serves else scrape.parse)(config.metrics)


@contextmanager
def opened(run: RunConfig, directory: RunDirectory, target: str, done: int, steps: int) -> Iterator[list[Sink]]:
    """The sinks that a run asks for, its journal aside. done: its last step until now. steps: its last one of all.

    Raises ConfigError for a page that cannot be served and a tracker that cannot be used, CheckpointError for a full
    disk.
    """
    sinks: list[Sink] = []
    with ExitStack() as stack:
        if run.log.metrics:
            from specd.train.exposition import Exposition

            page = Exposition(steps, {"method": run.method, "target": target, "output": str(directory.path)})
            stack.enter_context(scrape.serving(run.log.metrics, page.metrics))
            sinks.append(page)
        for name in dict.fromkeys(run.log.to):
            if name == TENSORBOARD:
                sinks.append(stack.enter_context(Scalars(directory.tensorboard, done)))
            else:
                sinks.append(stack.enter_context(Behind(name, _begin(name, run, directory, target))))
        yield sinks


def _begin(name: str, run: RunConfig, directory: RunDirectory, target: str) -> Tracker:
    """A tracker with the run in it. Raises ConfigError where it does not take it."""
    place = directory.path.resolve()
    try:
        started = read_facts(directory.path).started
    except CheckpointError:  # it is for people, and gone
        started = ""
    identity = hashlib.blake2b(f"{place} {started}".encode(), digest_size=8).hexdigest()
    facts: dict[str, Any] = {**msgspec.to_builtins(run), "target": target}
    tracked = Tracked(run.log.project, run.log.name or place.name, identity, place, facts)
    try:
        return TRACKERS[name](tracked)
    except Exception as error:
        raise ConfigError(
            f"log.to={name!r}: it takes no run ({type(error).__name__}: {first_line(error)}); see to that as its own "
            f"manual says, or leave it out: the journal has every step"
        ) from error


class Behind:
    """A tracker on a thread of its own, as a sink. What goes wrong there is a warning: the journal has every step."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        # Ctrl-C in a put of queue.Queue would leave its lock held.
        self._waiting: queue.SimpleQueue[StepRecord | Measurement | None] = queue.SimpleQueue()
        self._lost = 0
        self._finished = False
        self._thread = threading.Thread(target=self._run, name=f"specd-{name}", daemon=True)
        self._thread.start()

    def step(self, record: StepRecord) -> None:
        """Have one more step sent; never waits."""
        self._send(record)

    def validated(self, found: Measurement) -> None:
        """Have what held-out rows show sent; never waits."""
        self._send(found)

    def _send(self, record: StepRecord | Measurement) -> None:
        if self._waiting.qsize() < BEHIND:
            self._waiting.put(record)
        else:
            self._lose(f"{BEHIND:,} steps wait to be sent")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished = kind is None
        self._waiting.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            logger.warning("%s did not take what was left within %.0f s; the journal has it", self._name, CLOSE_S)
        elif self._lost:
            logger.warning("%s lacks %d steps; the journal has them", self._name, self._lost)

    def _run(self) -> None:
        while (record := self._waiting.get()) is not None:
            try:
                self._tracker.log(record.step, scalars(record))
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                self._lose(first_line(error))
        try:
            self._tracker.close(self._finished)
        except Exception as error:  # noqa: BLE001
            logger.warning("%s did not end its run: %s", self._name, first_line(error))

    def _lose(self, why: str) -> None:
        self._lost += 1
        if self._lost == 1:
            logger.warning("%s did not take a step (%s); training goes on, and the journal has it", self._name, why)
