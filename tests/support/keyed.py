"""A daemon that asks for keys, and honest trainers of it: keys, files and endpoint in a directory of the test's own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zmq

from specd.client.line import Identity
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonAuth, DaemonConfig, RingConfig, SubscriberConfig, TargetConfig, TrainerAuth
from specd.curve import authorized, keys
from specd.daemon.control import Control
from specd.daemon.supervisor import Supervisor, ThreadHandle
from specd.protocol.capture import CaptureSpec
from specd.transports.base import ServerContext

MODEL = "synthetic:hidden=16,layers=6,vocab=128"
SPEC = CaptureSpec(taps=(1,), dtype="float32")


def write_key(path: Path, pair: keys.Pair) -> Path:
    """A key file as `specd keys new` writes it."""
    path.touch(mode=0o600)
    path.write_text(f"# a test's\n{pair.secret}\n")
    return path


class Keyed:
    """A daemon on threads of this process, at a loopback TCP endpoint. `allow` and `revoke` as `specd keys` does.

    endpoint, server: where it listens, and its public key. alice: a pair that is let in.
    """

    def __init__(self, directory: Path, context: zmq.Context[zmq.Socket[bytes]], **ring: Any) -> None:
        self.directory = directory
        own, self.alice = keys.draw(), keys.draw()
        self.server = own.public
        self.authorized = directory / "authorized"
        self.allow("alice", self.alice)
        self.settings = DaemonConfig(
            target=TargetConfig(model=MODEL, device="cpu"),
            ring=RingConfig(**{"slots": 4, "max_sessions": 2, "slot_tokens": 64} | ring),
            transports=("bytes",),
            auth=DaemonAuth(key=str(write_key(directory / "daemon.key", own)), authorized=str(self.authorized)),
        )
        serving = ServerContext(host="127.0.0.1", curve=True)  # no directory: batches come over TCP, too
        supervisor = Supervisor(
            self.settings, lambda worker: ThreadHandle(worker, context), f"inproc://{own.public}", serving, context
        )
        self._up = threading.Event()
        self.control = Control(
            self.settings, ("tcp://127.0.0.1:*",), supervisor, context, lambda report: self._up.set()
        )
        (self.endpoint,) = self.control.endpoints

    @contextlib.contextmanager
    def running(self) -> Iterator[Keyed]:
        loop = threading.Thread(target=self.control.run)
        loop.start()
        try:
            assert self._up.wait(60)
            yield self
        finally:
            self.control.ending.stop()
            loop.join()
            self.control.close()

    def allow(self, name: str, pair: keys.Pair) -> None:
        authorized.allow(self.authorized, name, pair.public)

    def revoke(self, name: str) -> None:
        authorized.revoke(self.authorized, name)

    def lets_in(self, pair: keys.Pair) -> bool:
        """Whether the daemon knows a key, as it has read its file by now."""
        gate = self.control._front.gate
        assert gate is not None
        return gate.lets_in(pair.public)

    def identity(self, pair: keys.Pair | None = None, server: str = "") -> Identity:
        """Who a trainer with a key of its own is, and whom it trusts at the endpoint; alice, and the daemon."""
        return Identity(pair or self.alice, {self.endpoint: server or self.server})

    def config(self, pair: keys.Pair | None = None, server: str = "", **settings: Any) -> SubscriberConfig:
        """Settings of a trainer: alice's, with the daemon's key, unless others are given."""
        pair = pair or self.alice
        path = self.directory / f"trainer-{pair.public.encode().hex()[:16]}.key"
        auth = TrainerAuth(key=str(write_key(path, pair)), servers={self.endpoint: server or self.server})
        given: dict[str, Any] = {"timeout_s": 20, "connect_s": 20, "auth": auth} | settings
        return SubscriberConfig(endpoints=(self.endpoint,), **given)

    def subscriber(self, pair: keys.Pair | None = None, server: str = "", **settings: Any) -> Subscriber:
        """A trainer's subscriber that takes what `SPEC` captures."""
        return Subscriber(self.config(pair, server, **settings), SPEC)


@contextlib.contextmanager
def keyed_daemon(directory: Path, **ring: Any) -> Iterator[Keyed]:
    """A daemon that serves `MODEL` over bytes to whose keys it knows, at first alice's."""
    directory.mkdir(mode=0o700, exist_ok=True)
    with zmq.Context() as context, Keyed(directory, context, **ring).running() as daemon:
        yield daemon


def until(happened: Callable[[], bool], within_s: float = 20.0) -> None:
    """Wait for something that nobody announces."""
    limit = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.01)
