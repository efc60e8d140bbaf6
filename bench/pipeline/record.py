"""What the phases of a run have found so far, and the result that it makes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from specd.bench.pipeline import rates
from specd.bench.pipeline.bare_target import Bare
from specd.bench.pipeline.result import PipelineResult, PipelineRow
from specd.bench.pipeline.rows import COLOCATED, settle
from specd.bench.pipeline.settings import Lengths, Settings
from specd.bench.pipeline.step import Clocked
from specd.plan.balance import Work, pipeline
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract

log = logging.getLogger(__name__)


class Timeline:
    """Shows what begins, and notes when: seconds after the start."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._begin = time.perf_counter()
        self.began_s: dict[str, float] = {}

    def __call__(self, line: str) -> None:
        self.began_s[line] = self.elapsed_s
        self._show(line)

    @property
    def elapsed_s(self) -> float:
        return round(time.perf_counter() - self._begin, 1)


class Record:
    """Rows and figures of a run, kept after each one. The phases set its fields.

    clocked: the times behind the rows of the first transport. fed: rates to a null trainer. bare: the bare target's
    times. draft_ms: of an optimizer step alone. skipped: reasons of phases that failed.
    """

    def __init__(
        self,
        settings: Settings,
        machine: dict[str, Any],
        contract: TargetContract,
        spec: CaptureSpec,
        timeline: Timeline,
        keep: Callable[[PipelineResult], None],
    ) -> None:
        self.rows: list[PipelineRow] = []
        self.clocked: dict[Lengths, list[Clocked]] = {}
        self.fed: dict[str, rates.Fed] = {}
        self.bare: Bare | None = None
        self.draft_ms: dict[Lengths, float] = {}
        self.skipped: dict[str, str] = {}
        self._settings = settings
        self._machine = machine
        self._contract = contract
        self._spec = spec
        self.timeline = timeline
        self._keep = keep

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase that is left out, with its reason in `skipped`, when it fails."""
        try:
            yield
        except Exception as error:
            log.debug("%s failed", name, exc_info=True)
            self.skipped[name] = str(error) or repr(error)
        self.keep()

    def add(self, row: PipelineRow) -> None:
        """Add a row and keep it."""
        self.rows.append(row)
        self.keep()

    def keep(self) -> None:
        """Hand on the result so far."""
        self._keep(self.result())

    def result(self) -> PipelineResult:
        """The result so far."""
        settings, contract, bare = self._settings, self._contract, self.bare
        return PipelineResult(
            machine=self._machine,
            settings=msgspec.to_builtins(settings),
            target={
                "model": contract.model,
                "layers": contract.num_layers,
                "hidden_size": contract.hidden_size,
                "vocabulary": contract.vocab_size,
                "dtype": contract.dtype,
            },
            wall_s=self.timeline.elapsed_s,
            target_ms=bare.batch_ms if bare else {},
            target_spread_ms=bare.batch_spread_ms if bare else {},
            draft_ms=self.draft_ms,
            rows=settle(self.rows, settings, bare, self.draft_ms),
            rates=tuple(rates.compare(settings, self.fed, bare)) if bare and self.fed else (),
            work=self._work(),
            skipped=self.skipped,
            began_s=self.timeline.began_s,
        )

    def _work(self) -> Work | None:
        """The rates of this run as `specd plan` takes them, of the first lengths; None while one is missing."""
        settings = self._settings
        lengths = settings.lengths[0]
        if not self.clocked.get(lengths) or not (self.bare or self.fed):
            return None
        first = self.clocked[lengths][0]
        tokens = first.tokens / len(first.seconds)
        if self.bare is not None:
            times = self.bare.batch_ms[lengths]
            alone = tokens / times[1] * 1e3
            merged = max(alone, tokens / min(times.values()) * 1e3)
        else:
            merged, alone = self.fed["long"].tokens_per_s, 0.0
        rows = [row for row in self.rows if row.lengths == lengths]
        together: dict[int, float] = {}
        for row in rows:
            if row.mode in COLOCATED:
                together[row.devices] = max(row.tokens_per_s, together.get(row.devices, 0.0))
        stats = [clocked.stats for found in self.clocked.values() for clocked in found]
        fetch_s = sum(one.fetch_s for one in stats)
        work = Work(
            target_tokens_per_s=merged,
            draft_tokens_per_s=tokens / self.draft_ms[lengths] * 1e3,
            colocated_target_tokens_per_s=alone,
            colocated_tokens_per_s=together,
            batch_tokens=tokens,
            tokens_per_sample=first.tokens / first.samples,
            bytes_per_token=self._spec.bytes_per_token(self._contract.hidden_size),
            gpus_per_daemon=settings.tp,
            wire_gb_per_s=sum(one.nbytes for one in stats) / fetch_s / 1e9 if fetch_s else 0.0,
        )
        # The daemons' row that comes closest to what a plan expects of as many; on a shared device it expects another.
        reached = [
            (
                pipeline(work, len(settings.devices), row.parallel).batch_s * 1e3 * row.parallel / row.iteration_ms,
                row.depth,
            )
            for row in rows
            if row.mode == "disaggregated" and row.transport == settings.transports[0] and not settings.shared
        ]
        efficiency, depth = max(reached, default=(1.0, work.depth))
        return msgspec.structs.replace(work, efficiency=round(efficiency, 4), depth=depth)
