"""A table of a daemon's trainers, with every figure whole at any width: only names are folded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specd import units
from specd.cli.rates import Rates

if TYPE_CHECKING:
    from rich.table import Table

    from specd.protocol.messages import SessionStatus, StatusReport

FIGURES = ("tokens/s", "GB/s", "batches", "served", "in flight", "leases", "since")


def trainers(report: StatusReport, found: Rates) -> Table:
    """One row a trainer; what it uses stands under its name."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("trainer", overflow="fold")
    for name in FIGURES:
        table.add_column(name, justify="right", no_wrap=True)
    for session in report.sessions:
        pace = found.trainers[session.session]
        table.add_row(
            _name(session),
            f"{pace.tokens:,.0f}",
            gb(pace.nbytes),
            f"{session.batches:,}",
            units.size(session.nbytes),
            f"{session.outstanding}/{session.credits}",
            str(session.leases),
            units.duration(session.age_s),
        )
    return table


def gb(nbytes: float) -> str:
    """Bytes as GB, 10⁹ bytes: two decimals, more where these would show nothing."""
    value = nbytes / 1e9
    return f"{value:.2f}" if value >= 0.095 or not value else f"{value:.1g}" if value >= 1e-4 else "0.00"


def _name(session: SessionStatus) -> str:
    uses = ", ".join((session.transport or "–", *(gpu[:12] for gpu in session.gpus)))
    run = f", run {session.run}" if session.run else ""
    share = f", share {session.share}{' (behind)' * session.behind}" if session.share else ""
    return f"{units.printable(f'{session.name} {session.session[:8]}{run}{share}')}\n{units.printable(uses)}"
