"""The training loop: deliveries in, optimizer steps out, for any draft.

An optimizer step takes `accumulation` batches in a row, across the ends of epochs; only the last step of a run may take
fewer. Gradients of loss sums are added up and divided once by the weight of the whole step, so the result does not
depend on how the step was cut into batches, nor on how many ranks trained them. The position in the data moves when a
step is done and never before.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
import torch
from msgspec.structs import replace

from specd.config.settings import TrainConfig
from specd.data.batching import Place
from specd.drafts.base import Objective
from specd.errors import BatchError, PeerError, SpecdError
from specd.protocol.batch import Batch
from specd.train.checkpoint import Checkpoints, Position, RngStates, saved_tensors
from specd.train.distributed import Ranks
from specd.train.interrupt import Interrupt
from specd.train.journal import Journal, Sink, StepRecord
from specd.train.limit import TimeLimit, spent
from specd.train.measurement import measured
from specd.train.optimizer import apply_gradients, learning_rate, make_optimizer, total_steps
from specd.train.shortage import no_memory_for, out_of_memory
from specd.train.step import TOLD, Sums, Torn, UnloggedStep, Window, host_facts, told_of
from specd.train.validation import Validation, looked_at

if TYPE_CHECKING:
    from specd.metrics import Stats
    from specd.protocol.batch import Delivery

logger = logging.getLogger(__name__)


class Feed(Protocol):
    """The batches of all epochs of a run, in order."""

    @property
    def num_batches(self) -> int:
        """How many batches there are."""
        ...

    def before(self, epoch: int, index: int) -> int:
        """How many batches there are before number `index` of `epoch`."""
        ...

    def places(self, epoch: int, index: int) -> Iterator[Place]:
        """All batches from number `index` of `epoch` on, not packed; `index` may be the length of that epoch."""
        ...

    def packed(self, places: Iterable[Place]) -> Iterator[Batch]:
        """The batches of places."""
        ...


class StateSource(Protocol):
    """A source of states, such as a Subscriber."""

    def stream(self, batches: Iterable[Batch]) -> Iterator[Delivery]:
        """One delivery for each batch, in order; its tensors are valid until the next one is requested."""
        ...

    def stats(self) -> Stats:
        """Counters since the start."""
        ...


class _Run:
    """The mutable state of one call of `train`."""

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        source: StateSource,
        checkpoints: Checkpoints,
        journal: Journal | None,
        sinks: Sequence[Sink],
        optimizer: torch.optim.AdamW,
        position: Position,
        steps: int,
        ranks: Ranks,
        limit: TimeLimit,
    ) -> None:
        self.config, self.steps, self.position, self.ranks, self.limit = config, steps, position, ranks, limit
        self.module = objective.module
        self.source, self.checkpoints, self.journal, self.sinks = source, checkpoints, journal, sinks
        self.optimizer = optimizer
        self.gradients = ranks.gradients([part for group in optimizer.param_groups for part in group["params"]])
        self.rng = RngStates.capture()
        self.savable = True  # weights, moments, position and records are of the same step
        self._sound = self.position, self.rng  # of the last step that was logged
        self._num_counts: Sequence[int] = ()
        self._work_s = 0.0  # of the newest step that is logged
        self._pending: list[UnloggedStep] = []
        self.device = str(optimizer.param_groups[0]["params"][0].device)
        # 1 from the first non-finite step on: no later step changes a weight, though the host sees it only when it
        # logs.
        self._halted = torch.zeros((), dtype=torch.float32, device=self.device)
        self._stats = self._spent = source.stats()
        self._mark, self._wall_s = time.perf_counter(), 0.0

    def exchange(self, window: Window, places: Sequence[Place]) -> Sums:
        """The sums of a step and its gradients, over all ranks. No weight is changed."""
        self.ranks.finish(self.gradients.works())
        total = self.source.stats()
        step_stats, self._stats = total.difference(self._stats), total
        self._learn_counts(window)
        self._spent, now = step_stats, time.perf_counter()
        self._wall_s, self._mark = now - self._mark, now
        step, accumulation = self.position.step + 1, self.config.accumulation
        work_s = self._work_s if self._halted.is_cuda else window.watch.seconds()
        told = told_of(step_stats, work_s, self._wall_s)
        return window.sums(self.ranks, step, len(places), accumulation, self._num_counts, told)

    def step(self, window: Window, places: Sequence[Place], sums: Sums) -> None:
        """One optimizer step over the window, then log and save as configured."""
        rate = learning_rate(self.config, self.limit.stands_at(self.position.step, self.steps), self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.savable = False
        with window.watch.running():
            if sums.intact is not None:
                self._halted = torch.maximum(self._halted, (~sums.intact).float())
            norm, self._halted = apply_gradients(
                self.optimizer, sums.weight.float(), sums.losses, self.config.clip, self._halted
            )
        last = places[-1]
        self.position = Position(step=self.position.step + 1, epoch=last.epoch, index=last.index + 1)
        self.rng = RngStates.capture()
        facts = host_facts(self.position.step, places, rate, self._wall_s, self._spent)
        self._pending.append(UnloggedStep(window, sums, norm, facts, self.position, self.rng))
        self.savable = True
        step = self.position.step
        if step % self.config.log_every == 0 or step == self.steps:
            # On a GPU the newest step stays pending: the device has work while the host waits and makes the next batch.
            self._show(self._log(keep=1 if self._halted.is_cuda and step < self.steps else 0))
        if step == self.steps or (self.config.save_every and step % self.config.save_every == 0):
            self.save()

    @property
    def late(self) -> bool:
        """Whether the run ends here, before its last step, as its time is over."""
        return self.limit.over and self.position.step < self.steps

    def _learn_counts(self, window: Window) -> None:
        """What a draft counts, which a rank without a batch does not see. Rank 0 has one, the first time."""
        self._num_counts = self._num_counts or self.ranks.decide("counts", lambda: window.num_counts)

    def validate(self, objective: Objective, deliveries: Iterator[Delivery], validation: Validation) -> None:
        """Measure the held-out batches, which come next in the stream, and mark this step if it is the best.

        Nothing of the training changes. Raises as `save`.
        """
        began = time.perf_counter()
        self._show(self._log())
        window = Window(self.device)
        looked_at(window, objective, deliveries, self.ranks.deal(validation.places), self.position.step)
        self._learn_counts(window)
        places = len(validation.places)
        sums = window.sums(self.ranks, -self.position.step, places, places, self._num_counts, np.zeros(TOLD))
        if sums.intact is not None and not bool(sums.intact):
            raise self.ranks.broken()
        self.ranks.replicate([sums.losses, sums.weights])  # rank 0 decides what was best, and whether this is the end
        found = measured(self.position.step, sums, window.measured, validation.tokens)
        found = validation.decoded(found, objective, self.steps)
        found = validation.judged(replace(found, seconds=time.perf_counter() - began))
        if found.best:
            self.save()
            if self.journal is not None:
                self.checkpoints.mark_best(found.step)
        validation.keep(found, noted=self.journal is not None)
        for sink in self.sinks:
            sink.validated(found)
        self._stats, self._mark = self.source.stats(), time.perf_counter()

    def save(self) -> None:
        """Checkpoint the last optimizer step, if there is one and it is not saved yet; on rank 0 alone.

        Raises PeerError when the steps behind it turn out to have come to nothing, once it is saved.
        """
        torn: PeerError | None = None
        records: list[StepRecord] = []
        try:
            records = self._log()
        except PeerError as error:
            torn = error
        if self.position.step and self.journal is not None:
            self.journal.sync()
            path = self.checkpoints.save(self.position, self.module, self.optimizer, self.rng)
            self._show(records)
            logger.info("checkpoint of step %d: %s", self.position.step, path)
        if torn is not None:
            raise torn

    def _log(self, keep: int = 0) -> list[StepRecord]:
        """Journal all pending records but the newest `keep`: the only place that waits for the device.

        Raises PeerError for a step whose exchange was not whole; the run then stands where it did before.
        """
        records: list[StepRecord] = []
        while len(self._pending) > keep:
            try:
                records.append(self._pending[0].record())
            except Torn:
                self._pending.clear()
                self.position, self.rng = self._sound
                raise self.ranks.broken() from None
            except SpecdError:
                self.savable = False
                raise
            if self.journal is not None:
                self.journal.append(records[-1])
            self._sound = self._pending[0].position, self._pending[0].rng
            self._work_s = records[-1].draft_s
            self.limit.take(records[-1])
            del self._pending[0]
        return records

    def _show(self, records: Sequence[StepRecord]) -> None:
        for record in records:
            for sink in self.sinks:
                sink.step(record)


def train(
    config: TrainConfig,
    objective: Objective,
    feed: Feed,
    source: StateSource,
    checkpoints: Checkpoints,
    journal: Path,
    *,
    sinks: Sequence[Sink] = (),
    interrupt: Interrupt | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
    validation: Validation | None = None,
) -> Position:
    """Train to the end, from the start or from the newest checkpoint; returns the last position.

    journal: path of the step records. ranks: this process among those that train together, None for one alone; rank 0
    alone reads and writes what the run leaves, and the others begin with its weights. validation: of held-out batches,
    which `feed` packs, too; it may end the run early, as `config.max_minutes` may. On a SpecdError (running out of GPU
    memory becomes one), also of another rank (PeerError), or a KeyboardInterrupt the last optimizer step is
    checkpointed, unless the error is a non-finite loss or gradient, which no weight has seen, or came between the
    weights and the position of a step.
    """
    interrupt, ranks = interrupt or Interrupt(), ranks or Ranks()
    optimizer = make_optimizer(objective.module, config)
    position = _begin(checkpoints, objective.module, optimizer, resume, ranks)
    batches = feed.num_batches
    trained = feed.before(position.epoch, position.index)
    steps = total_steps(config, batches, position.step, trained)
    left = min(batches - trained, (steps - position.step) * config.accumulation)
    checks = validation or Validation((), 0, 0, journal)
    checks.begin(position.step, ranks)
    limit = TimeLimit(config.max_minutes, ranks.decide("spent", lambda: spent(journal, position.step)))
    planned = islice(feed.places(position.epoch, position.index), 0 if checks.ended else max(0, left))
    ahead, coming = tee(_steps(planned, config.accumulation))
    with Journal(journal, position.step) if ranks.leads else contextlib.nullcontext() as lines:
        run = _Run(config, objective, source, checkpoints, lines, sinks, optimizer, position, steps, ranks, limit)
        try:
            wanted = checks.among(ahead, position.step, steps)
            deliveries = source.stream(feed.packed(place for step in wanted for place in ranks.deal(step)))
            if checks.due(position.step, steps):
                _validate(run, objective, deliveries, checks)
            for places in coming:
                if checks.ended or run.late:
                    break
                _train_step(run, objective, deliveries, places, left, interrupt)
                left -= len(places)
                if checks.due(run.position.step, steps):
                    _validate(run, objective, deliveries, checks)
            if checks.ended or run.late:
                deliveries = _end_early(run, objective, feed, deliveries, checks)
            next(deliveries, None)  # it takes back the last one
            ranks.part()
        except (KeyboardInterrupt, SpecdError) as error:
            if run.savable:
                with interrupt.shield():
                    run.save()
                if isinstance(error, PeerError) and run.position.step and ranks.leads:
                    raise error.saying(f"the checkpoint of step {run.position.step} is saved") from None
            raise
        return run.position


def _begin(
    checkpoints: Checkpoints, module: torch.nn.Module, optimizer: torch.optim.AdamW, resume: bool, ranks: Ranks
) -> Position:
    """Where a run stands; weights and moments of every rank are then those of rank 0."""

    def restored() -> dict[str, int]:
        position = checkpoints.restore(checkpoints.latest(), module, optimizer) if resume else Position()
        if resume:
            logger.info("resuming at step %d", position.step)
        return msgspec.structs.asdict(position)

    position = Position(**ranks.decide("position", restored))
    ranks.replicate(list(saved_tensors(module, optimizer).values()))
    return position


def _steps(places: Iterator[Place], accumulation: int) -> Iterator[tuple[Place, ...]]:
    """Batches by optimizer step."""
    while step := tuple(islice(places, accumulation)):
        yield step


def _end_early(
    run: _Run, objective: Objective, feed: Feed, deliveries: Iterator[Delivery], checks: Validation
) -> Iterator[Delivery]:
    """End a run before its last step, as its held-out rows or its time say; returns the stream in use then."""
    step = run.position.step
    if checks.ended:
        logger.warning("%s", checks.why_ended(run.steps))
    else:
        logger.info("%s", run.limit.why_ended(step, run.steps))
    if isinstance(deliveries, Generator):  # what is under way is given up
        deliveries.close()
    run.steps = step
    if not checks.ended and checks.due(step, step):
        deliveries = run.source.stream(feed.packed(run.ranks.deal(checks.places)))
        _validate(run, objective, deliveries, checks)
    run.save()
    return deliveries


def _validate(run: _Run, objective: Objective, deliveries: Iterator[Delivery], checks: Validation) -> None:
    try:
        run.validate(objective, deliveries, checks)
    except torch.OutOfMemoryError as error:
        what = f"after step {run.position.step}: no memory left for the held-out batches"
        raise out_of_memory(what, error, "go on with `specd resume RUN` where more is free") from None


def _train_step(
    run: _Run,
    objective: Objective,
    deliveries: Iterator[Delivery],
    places: Sequence[Place],
    left: int,
    interrupt: Interrupt,
) -> None:
    """One optimizer step over the batches at `places`, of which this rank trains its own. left: of the run."""
    window = Window(run.device)
    mine = run.ranks.deal(places)
    delivery: Delivery | None = None
    try:
        for number, _ in enumerate(mine, 1):
            if (delivery := next(deliveries, None)) is None:
                raise BatchError(
                    f"the stream ended {left - number + 1} batches early, after step {run.position.step}: plan and "
                    f"source disagree"
                )
            with window.watch.running():
                loss = objective.loss(delivery)
                if number == len(mine):
                    run.gradients.last()
                window.add(loss)
        sums = run.exchange(window, places)
        with interrupt.shield():
            run.step(window, places, sums)
    except torch.OutOfMemoryError as error:
        what = no_memory_for(run.position.step + 1, delivery.batch if delivery else None)
        raise out_of_memory(what, error, "go on with `specd resume RUN` where more is free") from None
