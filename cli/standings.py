"""Several runs as they stand, read from their directories: a table of 80 columns, every figure whole."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from specd import units
from specd.errors import CheckpointError
from specd.evaluate.results import EVALS, EvalFacts, load_facts
from specd.train.journal import StepRecord
from specd.train.measurement import Measurement
from specd.train.summary import Totals

if TYPE_CHECKING:
    from rich.table import Table

NONE = "–"
FIGURES = ("steps", "loss", "held out", "acceptance", "tokens/s", "shared")


class Standing:
    """One run: the sums over its steps, and the newest held-out loss. Nothing raises: a run may change at any moment.

    about: what stands under its name. state: what it does, in a word or two. directory: of the run.
    """

    def __init__(self, name: str, about: str, directory: Path) -> None:
        self.name, self.about, self.directory = name, about, directory
        self.state = ""
        self.held_out: float | None = None
        self.acceptance = ""
        """Of an evaluation, with its 95 % interval; else of the last held-out rows that were decoded."""
        self._measured = 0
        self._decoded = 0
        self._forget()

    def __repr__(self) -> str:
        return f"Standing({self.name!r}, {self.state!r}, {self.totals.steps} steps)"

    def _forget(self) -> None:
        self.totals = Totals()
        self._end = 0

    def look(self) -> bool:
        """Take the steps that came since the last look, all of them again where the run was cut back to a checkpoint.

        Whether held-out rows were measured since.
        """
        from specd.train.directory import JOURNAL, VALIDATION

        if not self._follow(self.directory / JOURNAL):
            self._forget()
            self._follow(self.directory / JOURNAL)
        before = self._measured
        for line in _lines(self.directory / VALIDATION, 0)[-1:]:
            with suppress(msgspec.MsgspecError):
                found = msgspec.json.decode(line, type=Measurement)
                self._measured, self.held_out = found.step, found.loss
                if found.acceptance_length is not None and not self._decoded:
                    self.acceptance = f"{found.acceptance_length:.2f}"
        self._see_evaluation(self.directory / EVALS["trained"])
        return self._measured != before and self.held_out is not None

    def _follow(self, journal: Path) -> bool:
        """Whether what is new goes on where the last look ended."""
        if journal.exists() and journal.stat().st_size < self._end:
            return False
        for line in _lines(journal, self._end):
            try:
                record = msgspec.json.decode(line, type=StepRecord)
            except msgspec.MsgspecError:
                return False
            if record.step != self.totals.steps + 1:
                return False
            self.totals.add(record)
            self._end += len(line)
        return True

    def _see_evaluation(self, path: Path) -> None:
        """Take the acceptance length of its draft, with the 95 % interval, where it was decoded anew."""
        from specd.evaluate import intervals

        with suppress(OSError, CheckpointError):
            if (written := path.stat().st_mtime_ns) == self._decoded:
                return
            facts, self._decoded = load_facts(path, EvalFacts), written
            sure = intervals.acceptance_length(facts.result.prompts)
            self.acceptance = f"{facts.acceptance_length:.2f}" + (f"\n{sure[0]:.2f}–{sure[1]:.2f}" if sure else "")


def _lines(path: Path, start: int) -> list[bytes]:
    """The whole lines behind byte `start`."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            found = file.read().splitlines(keepends=True)
    except OSError:
        return []
    return found if not found or found[-1].endswith(b"\n") else found[:-1]


def table(standings: Sequence[Standing]) -> Table:
    """One row a run; what it is and does stands under its name."""
    from rich.table import Table
    from rich.text import Text

    decoded = any(each.acceptance for each in standings)
    shown = [figure for figure in FIGURES if decoded or figure != "acceptance"]
    rows = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    rows.add_column("run", overflow="fold")
    for figure in shown:
        rows.add_column(figure, justify="right", no_wrap=True)
    for each in standings:
        figures = _figures(each)
        name = Text(units.printable(each.name)).append(f"\n{each.about}, {each.state}", style="dim")
        rows.add_row(name, *(figures[figure] for figure in shown))
    return rows


def _figures(run: Standing) -> dict[str, str]:
    totals, loss = run.totals, run.totals.mean_loss()
    return {
        "steps": f"{totals.steps:,}",
        "loss": NONE if loss is None else f"{loss:.4f}",
        "held out": NONE if run.held_out is None else f"{run.held_out:.4f}",
        "acceptance": run.acceptance or NONE,
        "tokens/s": f"{totals.tokens / totals.step_s:,.0f}" if totals.step_s else NONE,
        "shared": f"{totals.shared / totals.batches:.0%}" if totals.batches else NONE,
    }


def saved(standings: Sequence[Standing]) -> str:
    """What sharing saved, in a line."""
    batches = sum(each.totals.batches for each in standings)
    shared = sum(each.totals.shared for each in standings)
    if not batches:
        return "no batch was trained"
    return (
        f"{batches:,} batches were trained from {batches - shared:,} forwards of the target: {shared:,} "
        f"({shared / batches:.0%}) were shared"
    )
