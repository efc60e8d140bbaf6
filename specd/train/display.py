"""Progress of a run for people: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import itertools
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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

RECENT = 20
"""Steps that the shown rates and shares are averaged over."""
REFRESH_S = 0.1
BLOCKS = "▁▂▃▄▅▆▇█"
SHARES = (("target", "blue"), ("wire", "yellow"), ("trainer", "green"))


class Display:
    """Shows the steps of a run as they come; a context manager and a sink of the loop.

    title: what is trained, on what. first, steps: the step the run starts from and its last. transports: endpoint →
    transport in use, read at each refresh. every_s: seconds between two plain lines.
    """

    def __init__(
        self,
        title: str,
        first: int,
        steps: int,
        transports: Callable[[], Mapping[str, str]],
        console: Console | None = None,
        every_s: float = 10.0,
    ) -> None:
        self.title, self.first, self.steps = title, first, steps
        self._transports = transports
        self._console = console or Console()
        self._every_s = every_s
        self._recent: deque[StepRecord] = deque(maxlen=RECENT)
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

    def _redirect(self, old: TextIO | None, new: TextIO | None) -> None:
        """Move log handlers from `old` to `new`: rich's replacement of stderr scrolls lines above the panel."""
        for handler in logging.getLogger("specd").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)

    def step(self, record: StepRecord) -> None:
        """Show one more optimizer step."""
        self._recent.append(record)
        if record.loss is not None:
            self._losses.append(record.loss)
        every_s = REFRESH_S if self._live else self._every_s
        if time.monotonic() - self._said_at < every_s and record.step != self.steps:
            return
        self._said_at = time.monotonic()
        with suppress(OSError):  # a closed terminal must not stop training
            if self._live is not None:
                self._live.update(self.render(), refresh=True)
            else:
                self._say(self.line())

    def line(self) -> str:
        """The state of the run in one line."""
        last, shares = self._recent[-1], self._shares()
        split = ", ".join(f"{name} {share:.0%}" for (name, _), share in zip(SHARES, shares, strict=True))
        return (
            f"step {last.step}/{self.steps} · epoch {last.epoch + 1} · loss {_number(last.loss, '.4f')} · "
            f"teacher-forced {_number(self._accuracy(), '.1%')} · lr {last.lr:.2e} · "
            f"{self._tokens_per_s():,.0f} tokens/s · ring {last.busy_slots}/{last.num_slots} · "
            f"{bound(*shares)}-bound ({split}) · {self._left()}"
        )

    def render(self) -> RenderableType:
        """The panel."""
        rows = Table.grid(padding=(0, 2), expand=True)
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(ratio=1)
        done = self._recent[-1].step if self._recent else self.first
        rows.add_row("step", _bar(done, self.steps, f"{done:,} / {self.steps:,}   {self._left()}"))
        if not self._recent:
            rows.add_row("", Text("waiting for the first batch", style="dim"))
            return Panel(rows, title=self.title, title_align="left", box=box.ROUNDED)
        last = self._recent[-1]
        rows.add_row(
            "loss", Text.assemble((_number(last.loss, ".4f"), "bold"), "   ", (sparkline(self._losses, 48), "cyan"))
        )
        accuracy = Text.assemble(
            (_number(self._accuracy(), ".1%"), "bold"), ("   of next tokens, given true context", "dim")
        )
        rows.add_row("teacher-forced", accuracy)
        pace = f"{self._tokens_per_s():,.0f} tokens/s   {units.duration(self._step_s())} a step"
        rows.add_row("speed", f"{pace}   lr {last.lr:.2e}   epoch {last.epoch + 1}")
        rows.add_row("ring", _bar(last.busy_slots, last.num_slots, f"{last.busy_slots} / {last.num_slots} slots busy"))
        rows.add_row("time", self._split())
        ways = ", ".join(f"{name} ({endpoint})" for endpoint, name in self._transports().items()) or "reconnecting"
        rows.add_row("transport", Text(ways, overflow="ellipsis", no_wrap=True))
        return Panel(rows, title=self.title, title_align="left", box=box.ROUNDED)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _split(self) -> RenderableType:
        shares = self._shares()
        width = 30
        bar = Text()
        for (_, colour), share in zip(SHARES, shares, strict=True):
            bar.append("█" * round(share * width), style=colour)
        for (name, colour), share in zip(SHARES, shares, strict=True):
            bar.append(f"  {name} {share:.0%}", style=colour)
        return Group(bar, Text(f"{bound(*shares)}-bound", style="bold"))

    def _shares(self) -> tuple[float, float, float]:
        """Shares of target, wire and trainer in the recent wall time."""
        target, wire, train = (
            sum(getattr(record, name) for record in self._recent)
            for name in ("target_wait_s", "wire_wait_s", "train_s")
        )
        total = (target + wire + train) or 1.0
        return target / total, wire / total, train / total

    def _accuracy(self) -> float | None:
        known = [
            record.teacher_forced_accuracy for record in self._recent if record.teacher_forced_accuracy is not None
        ]
        return sum(known) / len(known) if known else None

    def _tokens_per_s(self) -> float:
        return sum(record.tokens for record in self._recent) / (sum(record.step_s for record in self._recent) or 1.0)

    def _step_s(self) -> float:
        return sum(record.step_s for record in self._recent) / max(1, len(self._recent))

    def _left(self) -> str:
        if not self._recent:
            return ""
        left = self.steps - self._recent[-1].step
        return f"{units.duration(self._step_s() * left)} left" if left else "done"


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` block characters, each the mean of an equal part of `values`; the lowest is the lowest block."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int((mean - low) / span * len(BLOCKS)))] for mean in means)


def _bar(part: int, whole: int, text: str) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(ProgressBar(total=max(1, whole), completed=part, width=30), Text(text))
    return grid


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
