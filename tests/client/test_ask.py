"""Questions without a session: answered, or an error that says by whom not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq

from specd.client.ask import ask_status, dial, waitable
from specd.errors import ConfigError, DaemonError, ProtocolError
from specd.protocol import messages as wire


def test_nobody_who_answers_is_named(tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match=rf"no daemon answers at ipc://{tmp_path}/none\.sock within 0\.01 s: start"):
        ask_status(f"ipc://{tmp_path}/none.sock", 0.01)


def test_an_answer_to_another_question_is_refused(tmp_path: Path, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    endpoint = f"ipc://{tmp_path}/rude.sock"
    with context.socket(zmq.ROUTER) as daemon, ThreadPoolExecutor(1) as pool:
        daemon.bind(endpoint)
        answer = pool.submit(ask_status, endpoint, 20)
        key, frame = daemon.recv_multipart()
        assert isinstance(wire.decode_request(frame), wire.Status)
        daemon.send_multipart([key, wire.encode(wire.Error(epoch=bytes(16), reason="what?"))])
        with pytest.raises(ProtocolError, match="the daemon answered with Error, expected StatusReport"):
            answer.result(20)


def test_every_socket_has_a_routing_id_of_its_own(tmp_path: Path, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    sockets = [dial(context, f"ipc://{tmp_path}/d.sock") for _ in range(2)]
    ids = [socket.get(zmq.ROUTING_ID) for socket in sockets]
    assert [(len(each), each[:1]) for each in map(bytes, ids)] == [(16, b"\1")] * 2
    assert ids[0] != ids[1]
    for socket in sockets:
        socket.close()


@pytest.mark.parametrize("endpoint", ["ftp://host", "tcp://nowhere"])
def test_an_endpoint_that_is_none_leaves_no_socket_behind(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str
) -> None:
    with pytest.raises(ConfigError, match="expected"):
        dial(context, endpoint)


@pytest.mark.parametrize("timeout_s", [0, 0.5, 86_400])
def test_a_timeout_that_can_be_waited_is_taken_as_it_is(timeout_s: float) -> None:
    assert waitable(timeout_s) == timeout_s


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]"])
def test_a_daemon_is_dialled_at_either_kind_of_address(
    address: str, context: zmq.Context[zmq.Socket[bytes]], request: pytest.FixtureRequest
) -> None:
    if ":" in address:
        request.getfixturevalue("ipv6")
    with context.socket(zmq.ROUTER) as daemon:
        daemon.set(zmq.LINGER, 0)
        daemon.set(zmq.IPV6, int(":" in address))
        daemon.set(zmq.RCVTIMEO, 5000)
        daemon.bind(f"tcp://{address}:*")
        with dial(context, daemon.get_string(zmq.LAST_ENDPOINT)) as trainer:
            trainer.send(b"hello")
            assert daemon.recv_multipart()[1] == b"hello"
