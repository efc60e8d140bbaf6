"""`specd top`: daemons and their trainers at work, in one view that renews itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from specd import units
from specd.cli.rates import Rates, rates, saved, who_waits
from specd.cli.replay import kept, replayed
from specd.cli.settings import Key, servers_of
from specd.cli.trainers import gb, trainers
from specd.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from specd.client.watch import Reading
    from specd.protocol.messages import StatusReport

EXAMPLES = "Examples: `specd top` · `specd top -e tcp://gpu1:7070 -e tcp://gpu2:7070` · `specd top --once`"
COLOURS = {"filling": "green", "no slot": "yellow", "no request": "blue", "down": "red"}
BAR = 30
WINDOW_S = 10.0
"""Rates that renew themselves are over so long: batches may take seconds."""


def top(
    endpoint: Annotated[
        list[str] | None, typer.Option("--endpoint", "-e", help="A daemon; give it again for more.")
    ] = None,
    every: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two readings.")] = 2.0,
    timeout: Annotated[float, typer.Option(min=0, max=3600, help="Seconds to wait for an answer.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Show one interval, and end.")] = False,
    key: Key = "",
    server_key: Annotated[
        list[str] | None,
        typer.Option(
            "--server-key", metavar="PUBLIC", help="Over TCP: daemons' public keys; one for all, or one each."
        ),
    ] = None,
) -> None:
    """Watch daemons: ring, trainers, tokens a second, who waits for whom, faults. Ctrl-C ends it.

    In a pipe, each reading is a page of its own.
    """
    from specd.client.line import identity
    from specd.client.watch import Watch
    from specd.config.settings import TrainerAuth

    where = endpoint or ["auto"]
    if server_key and not key:
        raise ConfigError("--server-key is given without --key: expected both, or neither")
    auth = TrainerAuth(key=key, servers=servers_of(where, server_key or [])) if key else None
    with Watch(where, identity(auth, where)) as watch:
        try:
            answered = _show(lambda: watch.read(timeout), every, once)
        except KeyboardInterrupt:
            return
    raise typer.Exit(0 if answered else 1)


def _show(read: Callable[[], list[Reading]], every_s: float, once: bool) -> bool:
    """Show reading after reading, or the first interval; whether every daemon answered then."""
    from rich.console import Console
    from rich.live import Live

    console = Console(markup=False, emoji=False, highlight=False)
    before = read()
    if console.is_terminal and not once:
        earlier = deque([before], maxlen=max(1, round(WINDOW_S / every_s)))
        with Live(_pages(before, before), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(every_s)
                now = read()
                live.update(_pages(earlier[0], now), refresh=True)
                earlier.append(now)
    while True:
        time.sleep(every_s)
        now = read()
        console.print(_pages(before, now))
        if once:
            return all(reading.report for reading in now)
        before = now


def _pages(before: list[Reading], now: list[Reading]) -> RenderableType:
    from rich.console import Group

    return Group(*(page(reading, earlier.report) for earlier, reading in zip(before, now, strict=True)))


def page(reading: Reading, before: StatusReport | None) -> RenderableType:
    """One daemon, and its trainers. before: what it said the last time; without it, or if it is the same, means."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    report = reading.report
    facts.add_row("daemon", Text(units.printable(reading.endpoint), style="bold"))
    if report is None:
        facts.add_row("", Text(units.printable(reading.problem), style="bold red"))
        return Group(facts, Text())
    found = rates(report, None if report is before else before)
    for name, value in _facts(report, found):
        facts.add_row(name, value)
    return Group(facts, *([trainers(report, found)] if report.sessions else []), Text())


def _facts(report: StatusReport, found: Rates) -> Iterator[tuple[str, RenderableType]]:
    from rich.text import Text

    target = f"{report.contract.model}, " if report.contract else ""
    yield "target", units.printable(f"{target}{report.state}, up {units.duration(report.uptime_s)}")
    slots = sum(report.slots.values())
    busy = slots - report.slots.get("free", 0) - report.slots.get("kept", 0)
    parts = ", ".join(f"{count} {state}" for state, count in report.slots.items() if count)
    bar = Text("█" * round(BAR * busy / max(1, slots)), style="cyan")
    bar.append("░" * (BAR - len(bar)), style="dim")
    yield "ring", Text.assemble(bar, f"  {busy}/{slots} busy")
    yield "", units.printable(f"{parts or 'no slots'}; {report.queued} waiting for one")
    ways = ", ".join(f"{name} {gb(nbytes)}" for name, nbytes in found.transports.items() if nbytes)
    yield "speed", f"{found.pace.tokens:,.0f} tokens/s   {found.pace.batches:,.1f} batches/s"
    yield "states", units.printable(f"{gb(found.pace.nbytes)} GB/s{f'   by {ways}' if ways else ''}")
    if shared := saved(found.counts):
        yield "shared", shared
    if report.replay is not None:
        yield "replay", f"{kept(report.replay)}; {replayed(found.counts)}"
    yield "time", _split(found.shares)
    yield "", "   ".join(f"{word} {share:.0%}" for word, share in found.shares.items() if share >= 0.005)
    yield "", f"{who_waits(found.shares)}; forwards {found.forward:.0%}"
    faults = [f"{count} {word}{f' (+{new})' if new else ''}" for word, (count, new) in found.faults.items() if count]
    fresh = any(new for _, new in found.faults.values())
    yield "faults", Text(", ".join(faults) or "none", style="bold red" if fresh else "")


def _split(shares: dict[str, float]) -> RenderableType:
    from rich.text import Text

    bar = Text()
    for word, share in shares.items():
        bar.append("█" * round(BAR * share), style=COLOURS[word])
    return bar
