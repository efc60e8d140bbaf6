"""A daemon's status as Prometheus metrics: names after its conventions, seconds and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from specd.daemon.account import DOWN, FILLING, NO_REQUEST, NO_SLOT
from specd.protocol.messages import StatusReport

STATES = ("starting", "serving", "draining")
WAITS = {"filling": FILLING, "no_slot": NO_SLOT, "no_request": NO_REQUEST, "down": DOWN}


class Count(NamedTuple):
    """A counter of the daemon's as a metric. name: of the metric. per: how many of it make one of the metric's unit."""

    name: str
    help: str
    per: float = 1


COUNTS = {
    "batches": Count("specd_batches", "Batches announced as ready, once for each trainer."),
    "tokens": Count("specd_tokens", "Tokens of the batches announced."),
    "bytes": Count("specd_served_bytes", "Bytes of the states announced."),
    "failed": Count("specd_failed_batches", "Requests answered with a failure."),
    "refused_messages": Count("specd_refused_messages", "Messages that the protocol forbids."),
    "revoked_sessions": Count("specd_revoked_sessions", "Sessions that the daemon ended: expired, or its worker died."),
    "idle_connections": Count("specd_idle_connections_closed", "Connections closed that had no session."),
    "worker_restarts": Count("specd_worker_restarts", "Deaths of the worker."),
    "forward_us": Count("specd_forward_seconds", "Time of the target's forwards.", 1e6),
    "submitted": Count("specd_requests", "Batches and probes asked for."),
    "fills": Count("specd_ring_fills", "Slots given to a request to be filled."),
    "joins": Count("specd_ring_joins", "Requests served by a slot that has the same content."),
    "kept_hits": Count("specd_ring_kept_hits", "Those of them whose slot was kept for their share."),
    "kept_evicted": Count("specd_ring_kept_evictions", "Kept slots that were filled anew before all had read them."),
    "lag_hits": Count("specd_ring_lag_hits", "Slots filled from the lag window, without a forward."),
    "lag_saves": Count("specd_ring_lag_saves", "Kept slots copied to the lag window."),
    "unlike": Count("specd_ring_unlike_batches", "Batches that two runs of a share had different at one place."),
    "held_ms": Count("specd_ring_held_seconds", "Time that trainers were held for others of their share.", 1e3),
    "replay_hit": Count("specd_replay_hits", "Batches read from what was kept, instead of computed."),
    "replay_miss": Count("specd_replay_misses", "Batches computed that may be kept."),
    "replay_wrote": Count("specd_replay_writes", "Batches that were kept."),
    "replay_skipped": Count("specd_replay_skips", "Batches that were not kept, though there was room."),
    "replay_damaged": Count("specd_replay_damaged_cells", "Cells found that were not as written."),
    "released": Count("specd_ring_releases", "Leases given back."),
    "expired": Count("specd_ring_expired_holders", "Sessions whose lease ran out."),
}


def metrics(report: StatusReport) -> Iterator[Metric]:
    """All metrics of a daemon at one moment."""
    yield _labelled("specd_build_info", "The version of specd.", version=report.version)
    state = GaugeMetricFamily("specd_daemon_state", "1 for what the daemon is doing.", labels=["state"])
    for name in STATES:
        state.add_metric([name], float(report.state == name))
    yield state
    yield GaugeMetricFamily("specd_uptime_seconds", "Age of the daemon's control.", value=report.uptime_s)
    if (contract := report.contract) is not None:
        yield _labelled(
            "specd_target_info",
            "The target.",
            model=contract.model,
            model_type=contract.model_type,
            dtype=contract.dtype,
            fingerprint=contract.fingerprint,
        )
    yield from _ring(report)
    for key, count in COUNTS.items():
        yield CounterMetricFamily(count.name, count.help, value=report.counters.get(key, 0) / count.per)
    worker = CounterMetricFamily(
        "specd_worker_seconds",
        "Time of the worker, by what it waited for: filling (nothing), no_slot (all are held by trainers, or kept for "
        "some), no_request, down.",
        labels=["state"],
    )
    for name, key in WAITS.items():
        worker.add_metric([name], report.counters.get(key, 0) / 1e6)
    yield worker
    yield from _sessions(report)


def _ring(report: StatusReport) -> Iterator[Metric]:
    slots = GaugeMetricFamily("specd_ring_slots", "Slots of the ring in each state.", labels=["state"])
    for state, number in ({"kept": 0} | report.slots).items():  # the report leaves it out where none is
        slots.add_metric([state], number)
    yield slots
    if (ring := report.ring) is not None:
        yield GaugeMetricFamily("specd_ring_slot_bytes", "Size of a slot.", value=ring.slot_bytes)
        yield GaugeMetricFamily("specd_ring_slot_tokens", "Longest batch that fits a slot.", value=ring.slot_tokens)
    if report.lag_cells:
        yield GaugeMetricFamily("specd_lag_cells", "Batches that the lag window has room for.", value=report.lag_cells)
        yield GaugeMetricFamily("specd_lag_used_cells", "Batches in the lag window now.", value=report.lag_used)
    if (replay := report.replay) is not None:
        yield GaugeMetricFamily("specd_replay_cells", "Batches that can be kept over epochs.", value=replay.cells)
        yield GaugeMetricFamily("specd_replay_used_cells", "Batches that are kept now.", value=replay.used)
        yield GaugeMetricFamily("specd_replay_cell_bytes", "Largest batch that can be kept.", value=replay.cell_bytes)
        failed = "1 if the disk that batches are kept on is switched off."
        yield GaugeMetricFamily("specd_replay_disk_failed", failed, value=bool(replay.failed))
    yield GaugeMetricFamily("specd_queued_requests", "Requests that wait for a slot.", value=report.queued)


def _sessions(report: StatusReport) -> Iterator[Metric]:
    """One series for each trainer that is there. Two may have one name, so the session is a label too."""
    yield GaugeMetricFamily("specd_sessions", "Trainers that are connected.", value=len(report.sessions))
    labels = ["trainer", "session", "transport"]
    gauges = {
        "specd_session_credits": ("Batches that a trainer may have outstanding.", "credits"),
        "specd_session_outstanding_requests": ("Requests of a trainer that are not over.", "outstanding"),
        "specd_session_leases": ("Slots that a trainer holds, filled or not.", "leases"),
        "specd_session_age_seconds": ("Time since a trainer came.", "age_s"),
        "specd_session_behind": ("1 for a trainer so far behind its share that nobody waits for it.", "behind"),
    }
    counters = {
        "specd_session_batches": ("Batches announced to a trainer.", "batches"),
        "specd_session_tokens": ("Tokens of the batches announced to a trainer.", "tokens"),
        "specd_session_served_bytes": ("Bytes of the states announced to a trainer.", "nbytes"),
    }
    for kind, families in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
        for name, (text, field) in families.items():
            family = kind(name, text, labels=labels)
            for session in report.sessions:
                family.add_metric([session.name, session.session, session.transport], getattr(session, field))
            yield family


def _labelled(name: str, text: str, **labels: str) -> Metric:
    """A metric whose value is always 1 and whose labels are what it tells."""
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), 1.0)
    return family
