"""Links: which sessions are up, and why the others are not."""

from __future__ import annotations

import time

import pytest
import zmq

from scripted import Daemon
from specd.client.links import Links
from specd.protocol import messages as wire


def test_a_link_is_up_from_open_to_hang_up(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Daemon(context) as daemon:
        session = daemon.session(monkeypatch)
        links = Links(["ipc://none", daemon.endpoint])
        other, link = links
        assert (len(links), links.index(link), links.num_up, links.session) == (2, 1, 0, None)
        assert links.problems() == f"ipc://none: not reached yet; {daemon.endpoint}: not reached yet"
        link.broken = "of the last session"
        link.open(session)
        assert link.renew_at == link.heard > 0
        assert (link.broken, links.session, links.num_up, links.of(session)) == ("", session, 1, link)
        other.problem = "it is loading"
        assert links.problems() == f"ipc://none: it is loading; {daemon.endpoint}: up"
        assert not links.loading
        other.loading_until = time.monotonic() + 600
        assert links.loading
        assert "longer" not in links.problems()
        other.loading_until = time.monotonic() - 1
        assert not links.loading
        assert links.problems() == f"ipc://none: it is loading (longer than it may load); {daemon.endpoint}: up"
        other.loading_until = 0.0
        links.down_since = 0.0
        assert links.hang_up(link, "it died") is session
        assert links.down_since > 0
        assert (links.of(session), links.session) == (None, None)
        assert links.problems() == f"ipc://none: it is loading; {daemon.endpoint}: it died"
        daemon.expect(wire.Bye)
        assert session.socket.closed
        session.client.close()


def test_a_run_is_down_only_without_any_session(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Daemon(context) as one, Daemon(context) as two:
        links = Links([one.endpoint, two.endpoint])
        for link, daemon in zip(links, (one, two), strict=True):
            link.open(daemon.session(monkeypatch))
        links.down_since = 0.0
        for count, link in enumerate(links):
            assert (links.down_since == 0.0) == (count < 2)
            links.hang_up(link, "it died").client.close()
        assert links.down_since > 0
