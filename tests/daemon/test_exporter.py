"""The page of metrics beside a daemon: it ends with the daemon, and being read costs control nothing that shows."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import select
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from daemons import REPORT
from exposed import samples, served
from samples import batch
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonConfig, RingConfig, TargetConfig
from specd.daemon.exporter import exporting
from specd.daemon.questions import Questions
from specd.daemon.serve import embedded
from specd.protocol.capture import CaptureSpec

TARGET = TargetConfig(model="synthetic:hidden=16,layers=6,vocab=128", device="cpu")


class Timed(zmq.Poller):
    """A poller that notes how long control's thread computed between two polls."""

    turns: list[tuple[float, float]] = []  # noqa: RUF012
    _begin = 0.0

    def poll(self, timeout: int | None = None) -> list[tuple[object, int]]:
        if threading.current_thread().name == "specd-control":  # other threads of this process poll as well
            self.turns.append((time.monotonic(), time.thread_time() - self._begin))
        events = super().poll(timeout)
        self._begin = time.thread_time()
        return events


def address(caplog: pytest.LogCaptureFixture) -> str:
    (url,) = [each.getMessage().removeprefix("metrics at ") for each in caplog.records if each.name == "specd.scrape"]
    return url


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        text: str = answer.read().decode()
    return text


def test_it_ends_with_the_daemon_also_one_that_is_killed(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/d.sock"
    tmp_path.chmod(0o700)
    arguments = ["start", "--model", TARGET.model, "--endpoint", endpoint, "--slots", "4", "--metrics", "0"]
    command = [sys.executable, "-m", "specd", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as daemon:
        try:
            url = served(daemon)
            assert samples(read(url))['specd_daemon_state{state="serving"}'] == 1
            assert samples(read(url))["process_start_time_seconds"] > 1e9
            (page,) = [pid for pid in children(daemon.pid) if "specd.daemon.exporter" in command_of(pid)]
            pidfd = os.pidfd_open(page)
        finally:
            daemon.send_signal(signal.SIGKILL)
    try:
        assert select.select([pidfd], [], [], 20)[0], "the page outlives its daemon"
    finally:
        os.close(pidfd)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def test_a_loop_that_does_not_answer_is_a_503_and_the_next_scrape_is_answered(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECD_LOG", "DEBUG")
    monkeypatch.setenv("SPECD_LOG_FORMAT", "json")
    questions = Questions()
    try:
        with caplog.at_level(logging.INFO, "specd.scrape"), exporting("0", questions, answer_s=1.0):
            url = address(caplog)
            with pytest.raises(urllib.error.HTTPError, match="503") as refused:
                read(url)
            refused.value.close()
            asked = threading.Thread(target=lambda: answer_next(questions))
            asked.start()
            assert samples(read(url))["specd_batches_total"] == 1234
            asked.join()
    finally:
        questions.close()
    said = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"specd.scrape"' in line]
    assert {line["process"] for line in said} == {"metrics"}, "it logs in the form of all processes"


def answer_next(questions: Questions) -> None:
    """Forget the question that was given up, and answer the next one."""
    questions.answer([questions.fd], lambda: REPORT)
    assert select.select([questions.fd], [], [], 20)[0]
    questions.answer([questions.fd], lambda: REPORT)


@pytest.mark.slow
def test_being_scraped_ten_times_a_second_leaves_controls_longest_turn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Medians over windows of the longest turn, in turn with and without a reader, while a trainer draws batches."""
    monkeypatch.setattr("specd.daemon.control.zmq.Poller", Timed)
    monkeypatch.setattr(Timed, "turns", [])
    settings = DaemonConfig(target=TARGET, ring=RingConfig(slots=4, max_sessions=2, slot_tokens=64), metrics="0")
    longest: dict[bool, list[float]] = {True: [], False: []}
    with caplog.at_level(logging.INFO, "specd.scrape"), embedded(settings) as host, drawing(host):
        url = address(caplog)
        for scraped in itertools.islice(itertools.cycle((False, True)), 16):
            begin = time.monotonic()
            pause = threading.Event()
            while time.monotonic() < begin + 1.5:
                if scraped:
                    read(url)
                pause.wait(0.1)
            longest[scraped].append(max(spent for at, spent in list(Timed.turns) if at >= begin))
    alone, read_too = (statistics.median(longest[scraped]) for scraped in (False, True))
    print(f"\nlongest turn of control: {alone * 1e3:.2f} ms alone, {read_too * 1e3:.2f} ms when scraped")
    assert read_too < 1.5 * alone + 5e-4, longest


@contextlib.contextmanager
def drawing(host: object) -> Iterator[None]:
    """A trainer that draws batches all the time."""
    end, begun = threading.Event(), threading.Event()

    def draw() -> None:
        spec = CaptureSpec(taps=(1,), dtype="float32")
        with Subscriber(host.subscriber_config(), spec, context=host.context) as states:  # type: ignore[attr-defined]
            source = itertools.takewhile(lambda _: not end.is_set(), map(batch, itertools.count()))
            for _ in states.stream(source):
                begun.set()

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        assert begun.wait(60)
        yield
    finally:
        end.set()
        thread.join()
