"""Who comes in at a daemon that asks for keys, what the others are told, and what becomes of a key that is revoked."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from keyed import SPEC, Keyed, keyed_daemon, until, write_key
from samples import batch
from specd.client.ask import ask_status, dial
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonAuth, SubscriberConfig
from specd.curve import keys
from specd.daemon.gate import Gate
from specd.errors import ConfigError, DaemonError, RejectedError, TransportError
from specd.protocol import messages as wire
from specd.transports.bytes.server import Bytes


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    with keyed_daemon(tmp_path_factory.mktemp("keyed")) as daemon:
        yield daemon


def sessions(daemon: Keyed) -> list[str]:
    """Whose sessions there are, as STATUS tells alice."""
    return sorted(session.name for session in ask_status(daemon.endpoint, 20, daemon.identity()).sessions)


def test_a_trainer_whose_key_is_let_in_takes_its_states(daemon: Keyed) -> None:
    with daemon.subscriber() as states:
        batches = [batch(seed) for seed in range(8)]
        assert [delivery.batch.index for delivery in states.stream(batches)] == [each.index for each in batches]
        (session,) = ask_status(daemon.endpoint, 20, daemon.identity()).sessions
        assert (session.name, session.transport, session.batches) == ("alice/trainer", "bytes", 8)


def test_more_ranks_than_a_key_may_have_are_refused_at_once(daemon: Keyed) -> None:
    daemon.allow("dora", keys.draw())
    many = ask_status(daemon.endpoint, 20, daemon.identity()).max_sessions
    said = rf"of which a key may have {many - 1}, and this run has {many} ranks here: .*--trainers {many + 1}`"
    with pytest.raises(RejectedError, match=said):
        Subscriber(daemon.config(), SPEC, run=bytes(16), ranks=many)
    daemon.revoke("dora")


def test_a_stranger_is_told_that_its_key_is_refused_and_how_it_would_not_be(daemon: Keyed) -> None:
    stranger = keys.draw()
    said = rf"daemon at {daemon.endpoint} refused this key: .*specd keys allow NAME "
    with pytest.raises(RejectedError, match=said) as error:
        ask_status(daemon.endpoint, 20, daemon.identity(stranger))
    assert stranger.public in str(error.value)
    with pytest.raises(RejectedError, match=said):
        daemon.subscriber(stranger)


def test_a_trainer_without_a_key_is_told_that_it_needs_one(daemon: Keyed) -> None:
    said = rf"daemon at {daemon.endpoint} asks for keys: .*--key NAME and --server-key PUBLIC"
    with pytest.raises(RejectedError, match=said):
        ask_status(daemon.endpoint, 20)
    with pytest.raises(RejectedError, match=said):
        Subscriber(SubscriberConfig(endpoints=(daemon.endpoint,), connect_s=20), SPEC)


def test_a_trainer_does_not_talk_to_a_daemon_with_another_key(daemon: Keyed, caplog: pytest.LogCaptureFixture) -> None:
    """Not even where its own key would be let in; it cannot know whether it is a wrong key or a wrong daemon."""
    other = keys.draw().public
    with pytest.raises(DaemonError, match=r"ends every connection in the handshake, as a daemon does whose key is not"):
        ask_status(daemon.endpoint, 1, daemon.identity(server=other))
    with pytest.raises(DaemonError, match=r"no daemon for .* whose key is not") as error:
        daemon.subscriber(server=other, connect_s=1)
    assert other in str(error.value)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "specd.client.connect"]
    assert f"no session with {daemon.endpoint}: it ends every connection in the handshake" in said


def test_a_trainer_with_a_key_does_not_talk_to_a_daemon_without(daemon: Keyed) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as clear:
        clear.bind("tcp://127.0.0.1:*")
        endpoint = clear.get_string(zmq.LAST_ENDPOINT)
        identity = daemon.identity()._replace(servers={endpoint: daemon.server})
        with pytest.raises(RejectedError, match=rf"daemon at {endpoint} uses no keys, and this trainer does not talk"):
            ask_status(endpoint, 20, identity)
        assert not clear.poll(0), "not a byte was said in the clear"


def test_a_daemon_whose_key_is_not_known_is_not_dialled(daemon: Keyed) -> None:
    identity = daemon.identity()._replace(servers={})
    with pytest.raises(
        ConfigError, match=r"no key of the daemon at .* --server-key PUBLIC .* none is trusted on first"
    ):
        ask_status(daemon.endpoint, 20, identity)


def test_a_key_counts_as_soon_as_it_is_in_the_file_and_no_longer(daemon: Keyed) -> None:
    """A run whose key is revoked ends, with the reason; nobody else's is touched."""
    bob = keys.draw()
    with pytest.raises(RejectedError):
        ask_status(daemon.endpoint, 20, daemon.identity(bob))
    daemon.allow("bob", bob)
    with daemon.subscriber() as alices, daemon.subscriber(bob) as bobs:
        assert sessions(daemon) == ["alice/trainer", "bob/trainer"]
        mine, his = (source.stream(batch(seed) for seed in itertools.count()) for source in (alices, bobs))
        next(mine)
        next(his)
        daemon.revoke("bob")
        began = time.monotonic()
        with pytest.raises(RejectedError, match="refused this key"):
            for _ in his:
                pass
        assert time.monotonic() - began < 10
        for _ in range(8):
            next(mine)
        assert sessions(daemon) == ["alice/trainer"]
        assert alices.stats().reconnects == 0


@pytest.mark.parametrize("spoke", [True, False])
def test_a_connection_without_a_session_is_closed_when_its_key_is_revoked(daemon: Keyed, spoke: bool) -> None:
    """At once, or, if it has said nothing yet and so is not known, when it does."""
    carol = keys.draw()
    daemon.allow("carol", carol)
    question = wire.encode(wire.Status())
    with (
        zmq.Context() as context,
        dial(context, daemon.endpoint, daemon.identity(carol)) as socket,
        socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED) as monitor,
    ):
        assert monitor.poll(10_000)
        assert recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        if spoke:
            socket.send(question)
            assert socket.poll(10_000)
            assert socket.recv()
        daemon.revoke("carol")
        if not spoke:
            until(lambda: not daemon.lets_in(carol))
            socket.send(question)
        assert monitor.poll(10_000)
        assert recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED
        assert not socket.poll(0)
        socket.disable_monitor()


def test_one_key_does_not_take_every_session(daemon: Keyed) -> None:
    bob = keys.draw()
    daemon.allow("bob", bob)
    try:
        with daemon.subscriber():
            with pytest.raises(DaemonError, match="1 sessions are alice's already, and a key may have 1"):
                daemon.subscriber(connect_s=1)
            with daemon.subscriber(bob) as states:
                assert next(states.stream([batch(0)])).batch.index == 0
    finally:
        daemon.revoke("bob")
    with daemon.subscriber(), daemon.subscriber():  # with one key alone there is nobody to keep one for
        assert sessions(daemon) == ["alice/trainer", "alice/trainer"]


def test_a_trainer_with_a_key_takes_nothing_from_afar_in_the_clear(
    daemon: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(Bytes):
        traits = msgspec.structs.replace(Bytes.traits, sealed=False)

    monkeypatch.setattr("specd.client.handshake.load", lambda name: Plain)
    daemon.subscriber(transport="bytes").close()  # within one host
    monkeypatch.setattr("specd.endpoints.is_far", lambda endpoint: True)
    with pytest.raises(
        TransportError, match=r"it does not encrypt states, and keys are used \(subscriber.insecure_data"
    ):
        daemon.subscriber(transport="bytes")
    daemon.subscriber(transport="bytes", insecure_data=True).close()


@pytest.fixture
def auth(tmp_path: Path) -> DaemonAuth:
    (tmp_path / "authorized").write_text(f"alice {keys.draw().public}\n")
    return DaemonAuth(key=str(write_key(tmp_path / "d.key", keys.draw())), authorized=str(tmp_path / "authorized"))


def test_the_file_is_looked_at_once_a_second(auth: DaemonAuth, caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    user = Path(auth.authorized).read_text().split()[1]
    with zmq.Context() as context:
        gate = Gate(auth, context, lambda: now[0])
        assert gate.lets_in(user)
        Path(auth.authorized).unlink()
        assert gate.next_deadline() == 101.0
        assert not gate.changed()
        now[0] = 101.0
        with caplog.at_level(logging.ERROR):
            assert gate.changed()
        assert "nobody is let in" in caplog.text
        assert not gate.changed()
        assert not gate.lets_in(user)
        gate.close()


@pytest.mark.parametrize("text", ["alice", "alice no-key", "bad/name " + "a" * 40])
def test_a_file_with_a_line_that_is_none_is_refused_at_the_start(auth: DaemonAuth, text: str) -> None:
    Path(auth.authorized).write_text(text)
    with zmq.Context() as context, pytest.raises(ConfigError, match="authorized: "):
        Gate(auth, context, time.monotonic)
