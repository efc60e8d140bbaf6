"""`specd status`: what a daemon hosts, how full its ring is, and who trains from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from specd import units
from specd.cli.rates import Rates, rates, saved
from specd.cli.replay import kept, replayed
from specd.cli.settings import Key, ServerKey, asker
from specd.cli.trainers import gb, trainers

if TYPE_CHECKING:
    from specd.protocol.messages import SessionStatus, StatusReport

EXAMPLES = "Examples: `specd status` · `specd status --endpoint tcp://127.0.0.1:7070 --json`"


def status(
    endpoint: Annotated[str, typer.Option("--endpoint", "-e", help="The daemon's endpoint.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for an answer.")] = 5.0,
    key: Key = "",
    server_key: ServerKey = "",
) -> None:
    """Show a daemon's target, ring, sessions and counters."""
    from specd.client.ask import ask_status

    report = ask_status(endpoint, timeout, asker(endpoint, key, server_key))
    if as_json:
        typer.echo(json.dumps(as_data(report), indent=2))
    else:
        _show(report)


def as_data(report: StatusReport) -> dict[str, object]:
    """The report as plain data, with the epoch in hex."""
    data: dict[str, object] = msgspec.to_builtins(report)
    return {**data, "epoch": report.epoch.hex()}


def _show(report: StatusReport) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    found = rates(report)
    for name, value in (*_facts(report), *_rates(found)):
        facts.add_row(name, units.printable(value))
    console.print(facts)
    if not report.sessions:
        console.print("no trainers")
        return
    console.print(trainers(report, found))
    console.print("rates are means since a trainer, or the daemon, came; `specd top` shows them now", style="dim")


def _runs(report: StatusReport) -> Iterator[str]:
    """Each run of several ranks: how many of them are here, and what they were served."""
    runs: dict[str, list[SessionStatus]] = {}
    for session in report.sessions:
        if session.run:
            runs.setdefault(session.run, []).append(session)
    for run, ranks in runs.items():
        come = max(rank.ranks for rank in ranks)
        yield f"run {run}: {len(ranks)} of {come} ranks, {sum(rank.batches for rank in ranks):,} batches"


def _facts(report: StatusReport) -> Iterator[tuple[str, str]]:
    """Facts of the daemon itself, line by line: a name and its value."""
    yield "daemon", f"specd {report.version}, {report.state}, up {report.uptime_s:.0f} s"
    yield "", f"control pid {report.pid}, worker pid {report.worker_pid or '–'}, epoch {report.epoch.hex() or '–'}"
    yield "endpoints", ", ".join(report.endpoints)
    yield "transports", ", ".join(report.transports) or "–"
    if (contract := report.contract) is not None:
        shape = f"{contract.num_layers} layers, hidden {contract.hidden_size}, vocabulary {contract.vocab_size:,}"
        yield "target", f"{contract.model} ({contract.model_type}), {shape}, {contract.dtype}"
        yield "", f"fingerprint {contract.fingerprint}"
    if (ring := report.ring) is not None:
        size = units.size(ring.num_slots * ring.slot_bytes)
        yield "ring", f"{ring.num_slots} slots × {ring.slot_tokens:,} tokens, {size}"
    yield "slots", ", ".join(f"{count} {state}" for state, count in report.slots.items()) or "–"
    yield "queued", str(report.queued)
    yield "sessions", f"{len(report.sessions)} of {report.max_sessions}" + "".join(f"; {run}" for run in _runs(report))
    yield from _shared(report)
    if report.lag_cells:
        yield "lag window", f"{report.lag_used:,} of {report.lag_cells:,} batches"
    if report.replay is not None:
        yield "replay", f"{kept(report.replay)}; {replayed(report.counters)}"
    absent = ("replay_",) * (report.replay is None) + ("lag_",) * (not report.lag_cells)
    counts = {name: count for name, count in report.counters.items() if not name.endswith("_us")}
    told = [f"{name} {count:,}" for name, count in counts.items() if count or not name.startswith(absent)]
    yield "counters", ", ".join(told) or "–"


def _shared(report: StatusReport) -> Iterator[tuple[str, str]]:
    """What was saved, and for whom."""
    shares = Counter(session.share for session in report.sessions if session.share)
    if shares or saved(report.counters):
        here = "".join(f"; {share}: {count} trainer{'s' * (count > 1)}" for share, count in sorted(shares.items()))
        yield "shared", f"{saved(report.counters) or 'no request was spared a forward'}{here}"
        if unlike := report.counters.get("unlike", 0):
            yield "", f"{unlike:,} batches differ between runs of a share: other data, data.batch_tokens or train.seed"


def _rates(found: Rates) -> Iterator[tuple[str, str]]:
    """How fast the daemon was until now, and where its worker's time went."""
    pace = found.pace
    yield "speed", f"{pace.tokens:,.0f} tokens/s, {pace.batches:,.1f} batches/s, {gb(pace.nbytes)} GB/s"
    spent = ", ".join(f"{word} {share:.0%}" for word, share in found.shares.items())
    yield "worker", f"{spent}; forwards {found.forward:.0%} of the time"
