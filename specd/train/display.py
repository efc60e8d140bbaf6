"""Progress of a run for people: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from specd import units
from specd.train.journal import StepRecord, bound
from specd.train.limit import TimeLimit
from specd.train.measurement import Measurement
from specd.train.summary import Epoch, Totals, held_out_line, memory_use

REFRESH_S = 0.1
BLOCKS = "▁▂▃▄▅▆▇█"
SHARES = (("target", "blue"), ("wire", "yellow"), ("trainer", "green"))


class Display:
    """Shows the steps of a run as they come; a context manager and a sink of the loop.

    title: what is trained, on what. first, steps: the step the run starts from and its last. transports: endpoint →
    transport in use, read at each refresh. every_s: seconds between two plain lines. limit: of the run's time, as it
    stands at `first`. checkpoints: their directory, if the age of the newest is to be shown. device: the trainer's,
    whose memory is shown. keeps: whether a daemon keeps states over epochs: then each epoch ends with a line of what
    was replayed. in_share: as of Totals.
    """

    def __init__(
        self,
        title: str,
        first: int,
        steps: int,
        transports: Callable[[], Mapping[str, str]],
        console: Console | None = None,
        every_s: float = 10.0,
        *,
        limit: TimeLimit | None = None,
        checkpoints: Path | None = None,
        device: str = "cpu",
        keeps: bool = False,
        in_share: bool = False,
    ) -> None:
        self.title, self.first, self.steps = title, first, steps
        self._transports = transports
        self._console = console or Console()
        self._every_s = every_s
        self._limit = limit or TimeLimit(0.0)
        self._checkpoints, self._device, self._keeps = checkpoints, device, keeps
        self._totals = Totals(in_share=in_share)
        self._recent = self._totals.recent
        self._began = time.monotonic()
        self._losses: list[float] = []
        self._live: Live | None = None
        self._said_at = -math.inf

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            # Logs go through the same console, so that they scroll above the panel instead of tearing it.
            self._live = Live(self.render(), console=self._console, auto_refresh=False, redirect_stderr=True)
            self._live.start(refresh=True)
            self._redirect(sys.__stderr__, sys.stderr)
        else:
            self._say(f"{self.title}: steps {self.first + 1} to {self.steps}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            above = sys.stderr
            with suppress(OSError):  # the terminal may be gone
                self._live.stop()
            self._live = None
            self._redirect(above, sys.__stderr__)
        with suppress(OSError):
            for line in self._totals.lines(time.monotonic() - self._began, memory_use(self._device)):
                self._say(line)

    def _redirect(self, old: TextIO | None, new: TextIO | None) -> None:
        """Move log handlers from `old` to `new`: rich's replacement of stderr scrolls lines above the panel."""
        for handler in logging.getLogger("specd").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)

    def step(self, record: StepRecord) -> None:
        """Show one more optimizer step."""
        over = self._totals.add(record)
        self._limit.take(record)
        if record.loss is not None:
            self._losses.append(record.loss)
        self._end(over)
        every_s = REFRESH_S if self._live else self._every_s
        if time.monotonic() - self._said_at < every_s and record.step != self.steps:
            return
        self._said_at = time.monotonic()
        with suppress(OSError):  # a closed terminal must not stop training
            if self._live is not None:
                self._live.update(self.render(), refresh=True)
            else:
                self._say(self.line())
        if record.step == self.steps:
            self._end(self._totals.epoch)

    def _end(self, epoch: Epoch | None) -> None:
        """Say of an epoch that is over where its batches came from."""
        if line := self._states(epoch):
            with suppress(OSError):
                self._say(line)

    def _states(self, epoch: Epoch | None) -> str:
        """Where an epoch's batches came from; empty where that is always the target."""
        return str(epoch) if epoch is not None and epoch.batches and (self._keeps or epoch.replayed) else ""

    def validated(self, found: Measurement) -> None:
        """Show what held-out rows show."""
        self._totals.held_out = found
        with suppress(OSError):
            if self._live is not None:
                self._live.update(self.render(), refresh=True)
            else:
                self._say(f"held out · {held_out_line(found)}")

    def line(self) -> str:
        """The state of the run in one line."""
        last, shares = self._recent[-1], self._shares()
        split = ", ".join(f"{name} {share:.0%}" for (name, _), share in zip(SHARES, shares, strict=True))
        return (
            f"step {last.step}/{self.steps} · epoch {last.epoch + 1} · loss {_number(last.loss, '.4f')} "
            f"(mean of {len(self._recent)}: {_number(self._totals.mean_loss(), '.4f')}) · "
            f"teacher-forced {_number(self._totals.accuracy(), '.1%')} · lr {last.lr:.2e} · "
            f"grad norm {_number(last.grad_norm, '.3g')} · "
            f"{self._tokens_per_s():,.0f} tokens/s · ring {last.busy_slots}/{last.num_slots} · "
            f"{bound(*shares)}-bound ({split}) · "
            f"{units.duration(self._elapsed())} · {self._left()}"
        )

    def render(self) -> RenderableType:
        """The panel."""
        rows = Table.grid(padding=(0, 2), expand=True)
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(ratio=1)
        done = self._recent[-1].step if self._recent else self.first
        rows.add_row("step", _bar(done, self.steps, f"{done:,} / {self.steps:,}"))
        rows.add_row("elapsed", f"{units.duration(self._elapsed())}   {self._left()}")
        if not self._recent:
            rows.add_row("", Text("waiting for the first batch", style="dim"))
            return Panel(rows, title=self.title, title_align="left", box=box.ROUNDED)
        last = self._recent[-1]
        mean = f"   mean of the last {len(self._recent)}: {_number(self._totals.mean_loss(), '.4f')}"
        rows.add_row("loss", Text.assemble((_number(last.loss, ".4f"), "bold"), mean))
        rows.add_row("", Text(sparkline(self._losses, 48), style="cyan"))
        accuracy = Text.assemble(
            (_number(self._totals.accuracy(), ".1%"), "bold"), ("   of next tokens, given true context", "dim")
        )
        rows.add_row("teacher-forced", accuracy)
        if (found := self._totals.held_out) is not None:
            rows.add_row("held out", held_out_line(found))
        rows.add_row("gradient", f"norm {_number(last.grad_norm, '.3g')}   lr {last.lr:.2e}   epoch {last.epoch + 1}")
        pace = f"{self._tokens_per_s():,.0f} tokens/s   {units.duration(self._step_s())} a step"
        rows.add_row("speed", pace)
        rows.add_row("ring", _bar(last.busy_slots, last.num_slots, f"{last.busy_slots} / {last.num_slots} slots busy"))
        rows.add_row("time", self._split())
        if line := self._states(self._totals.epoch):
            rows.add_row("states", line)
        ways = ", ".join(f"{name} ({endpoint})" for endpoint, name in self._transports().items()) or "reconnecting"
        rows.add_row("transport", Text(ways, overflow="ellipsis", no_wrap=True))
        rows.add_row("memory", memory_use(self._device))
        if self._checkpoints is not None:
            rows.add_row("checkpoint", _newest(self._checkpoints))
        return Panel(rows, title=self.title, title_align="left", box=box.ROUNDED)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _split(self) -> RenderableType:
        shares = self._shares()
        width = 30
        bar = Text()
        for (_, colour), share in zip(SHARES, shares, strict=True):
            bar.append("█" * round(share * width), style=colour)
        words = Text()
        for (name, colour), share in zip(SHARES, shares, strict=True):
            words.append(f"{name} {share:.0%}   ", style=colour)
        return Group(bar, words.append(f"{bound(*shares)}-bound", style="bold"))

    def _shares(self) -> tuple[float, float, float]:
        """Shares of target, wire and trainer in the recent wall time."""
        target, wire, train = (
            sum(getattr(record, name) for record in self._recent)
            for name in ("target_wait_s", "wire_wait_s", "train_s")
        )
        total = (target + wire + train) or 1.0
        return target / total, wire / total, train / total

    def _tokens_per_s(self) -> float:
        return sum(record.tokens for record in self._recent) / (sum(record.step_s for record in self._recent) or 1.0)

    def _step_s(self) -> float:
        return sum(record.step_s for record in self._recent) / max(1, len(self._recent))

    def _left(self) -> str:
        if not self._recent:
            return ""
        left = min(self._step_s() * (self.steps - self._recent[-1].step), self._limit.left_s)
        return f"{units.duration(left)} left" if left > 0 else "done"


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` block characters, each the mean of an equal part of `values`; the lowest is the lowest block.

    The highest block is the highest of all but the first quarter, which is cut there: a loss falls so far at first that
    nothing else would be seen.
    """
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low = min(means)
    span = (max(means[len(means) // 4 :]) - low) or 1.0
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int((mean - low) / span * len(BLOCKS)))] for mean in means)


def _bar(part: int, whole: int, text: str) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(ProgressBar(total=max(1, whole), completed=part, width=30), Text(text))
    return grid


def _newest(checkpoints: Path) -> str:
    """The newest checkpoint, and how long ago it was written."""
    found = []
    for path in checkpoints.glob("step-*"):
        with suppress(OSError, ValueError):  # it may be removed just now
            found.append((int(path.name.removeprefix("step-")), path.stat().st_mtime))
    if not found:
        return "none yet"
    step, written = max(found)
    return f"step {step:,}, {units.duration(max(0.0, time.time() - written))} old"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
