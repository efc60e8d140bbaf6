"""`specd status`: what a daemon hosts, how full its ring is, and who trains from it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from specd import units

if TYPE_CHECKING:
    from specd.protocol import StatusReport

EXAMPLES = "Examples: `specd status` · `specd status --endpoint tcp://127.0.0.1:7070 --json`"


def status(
    endpoint: Annotated[str, typer.Option("--endpoint", "-e", help="The daemon's endpoint.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 5.0,
) -> None:
    """Show a daemon's target, ring, sessions and counters."""
    from specd.session import ask_status

    report = ask_status(endpoint, timeout)
    if as_json:
        typer.echo(json.dumps(as_data(report), indent=2))
    else:
        _show(report)


def as_data(report: StatusReport) -> dict[str, object]:
    """The report as plain data: as the message, with the epoch in hex."""
    data: dict[str, object] = msgspec.to_builtins(report)
    return {**data, "epoch": report.epoch.hex()}


def _show(report: StatusReport) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("daemon", f"specd {report.version}, {report.state}, up {report.uptime_s:.0f} s")
    facts.add_row(
        "", f"control pid {report.pid}, worker pid {report.worker_pid or '–'}, epoch {report.epoch.hex() or '–'}"
    )
    facts.add_row("endpoints", ", ".join(report.endpoints))
    facts.add_row("transports", ", ".join(report.transports) or "–")
    if (contract := report.contract) is not None:
        shape = f"{contract.num_layers} layers, hidden {contract.hidden_size}, vocabulary {contract.vocab_size:,}"
        facts.add_row("target", f"{contract.model} ({contract.model_type}), {shape}, {contract.dtype}")
        facts.add_row("", f"fingerprint {contract.fingerprint}")
    if (ring := report.ring) is not None:
        size = units.size(ring.num_slots * ring.slot_bytes)
        facts.add_row("ring", f"{ring.num_slots} slots × {ring.slot_tokens:,} tokens, {size}")
    facts.add_row("slots", ", ".join(f"{count} {state}" for state, count in report.slots.items()) or "–")
    facts.add_row("queued", str(report.queued))
    facts.add_row("counters", ", ".join(f"{name} {count:,}" for name, count in report.counters.items()) or "–")
    console.print(facts)
    if not report.sessions:
        console.print("no trainers")
        return
    sessions = Table(
        "trainer", "GPU", "transport", "credits", "outstanding", "leases", "batches", "bytes served", "age"
    )
    for session in report.sessions:
        sessions.add_row(
            f"{session.name} {session.session[:8]}",
            ", ".join(gpu[:12] for gpu in session.gpus) or "–",
            session.transport or "–",
            str(session.credits),
            str(session.outstanding),
            str(session.leases),
            f"{session.batches:,}",
            units.size(session.nbytes),
            f"{session.age_s:.0f} s",
        )
    console.print(sessions)
