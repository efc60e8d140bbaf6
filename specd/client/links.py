"""Links: each endpoint of a subscriber, and its session while one is up. The subscriber's lock guards them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import zmq

from specd.client.handshake import Session
from specd.client.seats import Role

STANDBY_S = 2.0
"""How long none of a rank's own daemons is up before it turns to those that stand by."""


class Link:
    """One endpoint.

    role: its part in a run of several ranks. dialled: whether a session is up, or looked for. monitor: tells of the
    end of the session's connection. problem: why there is no session. broken: why the session has to be opened anew, as
    a thread found that may not touch its socket; else empty. heard: when the daemon last answered, renew_at: when its
    leases are renewed next, loading_until: until when a daemon without a worker may take to load one, 0 if it does not,
    in monotonic seconds.
    """

    __slots__ = (
        "broken", "dialled", "endpoint", "heard", "loading_until", "monitor", "problem", "renew_at", "role", "session",
    )  # fmt: skip

    def __init__(self, endpoint: str, role: Role) -> None:
        self.endpoint = endpoint
        self.role = role
        self.dialled = False
        self.session: Session | None = None
        self.monitor: zmq.Socket[bytes] | None = None
        self.problem = "it stands by" if role.standby else "not reached yet"
        self.broken = ""
        self.renew_at = self.heard = self.loading_until = 0.0

    def open(self, session: Session) -> None:
        """The session is up."""
        self.monitor = session.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.heard = self.renew_at = time.monotonic()
        self.broken = ""
        self.loading_until = 0.0
        self.session = session

    def hang_up(self, reason: str) -> Session:
        """End the session; returns it, for its transport to be closed by whoever may still use it."""
        session, self.session, self.problem = self.session, None, reason
        assert session is not None
        assert self.monitor is not None
        session.socket.disable_monitor()
        self.monitor.close(linger=0)
        session.hang_up()
        return session


class Links:
    """All endpoints of one subscriber, in the order they were given in.

    roles: one an endpoint; none for daemons that are all its own. down_since: when the last session ended.
    away_since: when the last one ended of those that do not stand by.
    """

    def __init__(self, endpoints: Sequence[str], roles: Sequence[Role] = ()) -> None:
        self._links = [Link(*each) for each in zip(endpoints, roles or [Role()] * len(endpoints), strict=True)]
        self.down_since = self.away_since = time.monotonic()

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links)

    def index(self, link: Link) -> int:
        """Its place among the endpoints."""
        return self._links.index(link)

    @property
    def session(self) -> Session | None:
        """The first session that is up."""
        return next((link.session for link in self._links if link.session is not None), None)

    @property
    def near(self) -> bool:
        """Whether a session is up with a daemon that does not stand by."""
        return any(link.session is not None and not link.role.standby for link in self._links)

    def to_dial(self) -> list[Link]:
        """Those that a session is to be looked for with, which nobody does yet."""
        away = not self.near and time.monotonic() - self.away_since > STANDBY_S
        return [link for link in self._links if not link.dialled and (away or not link.role.standby)]

    @property
    def num_up(self) -> int:
        """How many sessions are up."""
        return sum(link.session is not None for link in self._links)

    @property
    def loading(self) -> bool:
        """Whether a daemon is loading its worker, and may: it is no daemon that is gone."""
        return any(link.loading_until > time.monotonic() for link in self._links)

    def of(self, session: Session) -> Link | None:
        """The link of a session that is up."""
        return next((link for link in self._links if link.session is session), None)

    def hang_up(self, link: Link, reason: str) -> Session:
        """End a link's session, as `Link.hang_up` does."""
        session = link.hang_up(reason)
        if self.session is None:
            self.down_since = time.monotonic()
        if not (link.role.standby or self.near):
            self.away_since = time.monotonic()
        return session

    def problems(self) -> str:
        """Each endpoint, and why it has no session."""
        now = time.monotonic()
        return "; ".join(
            f"{link.endpoint}: {'up' if link.session else link.problem}"
            + " (longer than it may load)" * (0 < link.loading_until <= now)
            for link in self._links
        )
