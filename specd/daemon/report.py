"""What a daemon says of itself: STATUS_REPORT to whoever asks, WELCOME to a trainer that is let in."""

from __future__ import annotations

import os

from specd.daemon.account import Account
from specd.daemon.ending import Ending
from specd.daemon.ring import Ring
from specd.daemon.sessions import Sessions, TrainerSession
from specd.daemon.supervisor import Supervisor
from specd.protocol.messages import StatusReport, Welcome
from specd.version import __version__
from specd.worker.messages import Started


def status_report(
    account: Account,
    ring: Ring,
    sessions: Sessions,
    supervisor: Supervisor,
    ending: Ending,
    endpoints: tuple[str, ...],
    started: Started | None,
    loading_ms: int,
) -> StatusReport:
    """The state of all parts of a daemon, now. started: its worker's, None without one."""
    now = account.settle()
    return StatusReport(
        epoch=supervisor.epoch,
        state="draining" if ending.draining else "starting" if started is None else "serving",
        version=__version__,
        pid=os.getpid(),
        worker_pid=supervisor.worker_pid,
        uptime_s=now - account.began,
        contract=started.contract if started else None,
        ring=started.ring if started else None,
        slots=ring.counts(),
        queued=ring.queued(),
        sessions=tuple(session.status(ring, now) for session in sessions),
        counters={**account.counters.values(), **ring.counters},
        endpoints=endpoints,
        transports=started.transports if started else (),
        loading_ms=loading_ms,
        max_sessions=ring.max_holders,
        replay=started.replay if started else None,
        lag_cells=ring.contents.lag.cells,
        lag_used=ring.contents.lag.used,
    )


def welcome(session: TrainerSession, ring: Ring, supervisor: Supervisor, started: Started, ttl_s: float) -> Welcome:
    """The answer to a trainer that is let in. ttl_s: of a lease."""
    return Welcome(
        epoch=supervisor.epoch,
        contract=started.contract,
        ring=started.ring,
        credits=session.credits,
        slots=1 + ring.pool,
        lease_ttl_ms=round(ttl_s * 1000),
        transports=started.transports,
        sharing=ring.sharing(session.key),
        replay=started.replay,
    )
