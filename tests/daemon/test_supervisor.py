"""Restarts of the worker: a daemon over targets that fail in an order a test chooses."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq

from samples import batch
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.daemon import supervisor
from specd.daemon.control import Control
from specd.daemon.serve import Embedded, embedded
from specd.daemon.supervisor import Supervisor, ThreadHandle
from specd.errors import BatchError, DaemonError, TargetError
from specd.protocol.capture import CaptureSpec
from specd.targets.base import CaptureJob, Target
from specd.targets.registry import load_target
from specd.transports.base import ServerContext
from specd.worker import worker
from specd.worker.worker import WorkerConfig

SPEC = CaptureSpec(taps=(1, 3), dtype="float32")
SETTINGS = DaemonConfig(
    target=TargetConfig(model="synthetic:hidden=16,layers=6,vocab=128"),
    ring=RingConfig(slots=4, slot_tokens=64, max_sessions=1),
)


class Broken:
    """A target whose every forward ends its worker."""

    def __init__(self, inner: Target) -> None:
        self._inner = inner
        self.contract, self.device = inner.contract, inner.device

    def run(self, fills: Sequence[CaptureJob]) -> None:
        raise RuntimeError("the forward broke")

    def artifact(self, name: str) -> Any:
        return self._inner.artifact(name)

    def close(self) -> None:
        self._inner.close()


Lives = Callable[..., None]


@pytest.fixture
def lives(monkeypatch: pytest.MonkeyPatch) -> Lives:
    """Chooses what the nth worker loads: a function of its config; the last one serves all that follow."""
    monkeypatch.setattr(supervisor, "BACKOFF_S", (0.0, 0.01, 0.02, 0.04, 0.08))

    def choose(*loads: Callable[[TargetConfig], Any]) -> None:
        left = list(loads)
        monkeypatch.setattr(worker, "load_target", lambda config: (left.pop(0) if left[1:] else left[0])(config))

    return choose


def broken(config: TargetConfig) -> Broken:
    return Broken(load_target(config))


def refuses(config: TargetConfig) -> Target:
    raise TargetError("out of memory for a moment")


def served(host: Embedded, **facts: Any) -> Iterator[int]:
    config = SubscriberConfig(endpoints=(host.endpoint,), timeout_s=20, connect_s=20, **facts)
    with Subscriber(config, SPEC, context=host.context) as source:
        for item in source.stream(batch(i) for i in range(5)):
            yield item.batch.index


def test_a_failed_restart_is_retried(lives: Lives) -> None:
    lives(broken, refuses, load_target)
    with embedded(SETTINGS) as host:
        assert list(served(host)) == list(range(5))


def test_a_build_that_raises_is_tried_once(lives: Lives, caplog: pytest.LogCaptureFixture) -> None:
    loads = []

    def raises(config: TargetConfig) -> Target:
        loads.append(config)
        raise AttributeError("no layers")

    lives(raises)
    with pytest.raises(DaemonError, match="the target failed to start: AttributeError: no layers"), embedded(SETTINGS):
        pass
    assert len(loads) == 1
    assert any(record.exc_info for record in caplog.records if "worker start failed" in record.msg)


def test_the_back_off_grows_until_the_batch_that_ends_every_worker_is_found(
    lives: Lives, caplog: pytest.LogCaptureFixture
) -> None:
    """A trainer proves its transport in each life: that is no forward."""
    lives(broken)
    with embedded(SETTINGS) as host, pytest.raises(BatchError, match=r"batch \d of .* died 2 times .* alone"):
        list(served(host, depth=2))
    pauses = [record.args[1] for record in caplog.records if "the next one starts" in record.msg]  # type: ignore[index]
    assert len(pauses) in (3, 4, 5), "the first death may leave several suspects, and each dies alone twice"
    assert pauses == list(supervisor.BACKOFF_S[: len(pauses)])


def control_over(launch: Callable[[WorkerConfig], ThreadHandle], context: zmq.Context[zmq.Socket[bytes]]) -> Control:
    endpoint = f"inproc://{secrets.token_hex(4)}"
    return Control(SETTINGS, (endpoint,), Supervisor(SETTINGS, launch, endpoint, ServerContext(), context), context)


def test_a_failed_launch_is_retried_and_named_when_it_never_works(lives: Lives) -> None:
    with zmq.Context() as context:
        attempts = []

        def launch(config: WorkerConfig) -> ThreadHandle:
            attempts.append(config)
            raise OSError(12, "Cannot allocate memory")

        control = control_over(launch, context)
        with pytest.raises(DaemonError, match=r"3 times before it served: .*Cannot allocate memory"):
            control.run()
        control.close()
        assert len(attempts) == supervisor.MAX_EARLY_DEATHS


def test_a_thread_that_outlives_its_daemon_writes_to_no_other_file(
    lives: Lives, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(supervisor, "STOP_S", 0.05)
    loading, go_on = threading.Event(), threading.Event()
    handles: list[ThreadHandle] = []

    def loads(config: TargetConfig) -> Target:
        loading.set()
        assert go_on.wait(30)
        return load_target(config)

    lives(loads)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def launch(config: WorkerConfig) -> ThreadHandle:
        handles.append(ThreadHandle(config, context))
        return handles[0]

    control = control_over(launch, context)
    thread = threading.Thread(target=control.run)
    thread.start()
    assert loading.wait(30)
    control.ending.stop()
    thread.join(30)
    control.close()
    with contextlib.ExitStack() as stack:
        for number in range(20):
            stack.enter_context((tmp_path / str(number)).open("wb"))
        go_on.set()
        context.term()
        assert handles[0].wait(30)
    handles[0].close()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b""] * 20
