"""What being scraped ten times a second costs a daemon's control, in processor time of 1,000 batches."""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from exposed import served
from samples import batch
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.protocol.batch import Delivery
from specd.protocol.capture import CaptureSpec

PAIRS, BATCHES, SLICES, PACE_S = 90, 1000, 10, 0.002
"""A pair is 1,000 batches with a reader and 1,000 without, at 500 a second, in slices that take turns: 4 s."""
EVERY_S = 0.1
READER = """
import sys, threading, time, urllib.request
for line in sys.stdin:
    begin = time.monotonic()
    for number in range(int(line)):
        threading.Event().wait(max(0.0, begin + 0.1 * number - time.monotonic()))
        urllib.request.urlopen(sys.argv[1]).read()
"""


def spent_s(pid: int) -> float:
    """Processor time of all threads of a process, as the scheduler counts it."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


@contextlib.contextmanager
def daemon(place: Path) -> Iterator[tuple[str, int, str]]:
    """A daemon of a synthetic target: its endpoint, its control's pid and its page."""
    place.chmod(0o700)
    endpoint = f"ipc://{place}/d.sock"
    arguments = ["--model", "synthetic:hidden=16,layers=6,vocab=128", "--endpoint", endpoint, "--slots", "8"]
    command = [sys.executable, "-m", "specd", "start", *arguments, "--metrics", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield endpoint, process.pid, served(process)
        finally:
            process.terminate()


def draw(states: Iterator[Delivery], number: int) -> None:
    """Take batches at the pace, as a trainer does that computes in between."""
    begin, pause = time.monotonic(), threading.Event()
    for taken, _ in enumerate(itertools.islice(states, number)):
        pause.wait(max(0.0, begin + taken * PACE_S - time.monotonic()))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_scrapes_a_second_cost_control_less_than_a_hundredth(tmp_path: Path) -> None:
    spent: dict[bool, list[float]] = {True: [], False: []}
    with contextlib.ExitStack() as stack:
        endpoint, pid, url = stack.enter_context(daemon(tmp_path))
        reader = stack.enter_context(subprocess.Popen([sys.executable, "-c", READER, url], stdin=subprocess.PIPE))
        assert reader.stdin is not None
        link = SubscriberConfig(endpoints=(endpoint,), depth=4)
        source = stack.enter_context(Subscriber(link, CaptureSpec(taps=(1,), dtype="float32")))
        states = stack.enter_context(contextlib.closing(source.stream(map(batch, itertools.count()))))
        draw(states, BATCHES)
        for pair in range(PAIRS):
            sums = {True: 0.0, False: 0.0}
            for each in range(2 * SLICES):
                scraped = (each + pair) % 2 == 0
                begin = spent_s(pid)
                if scraped:
                    reader.stdin.write(f"{round(BATCHES / SLICES * PACE_S / EVERY_S)}\n".encode())
                    reader.stdin.flush()
                draw(states, BATCHES // SLICES)
                sums[scraped] += spent_s(pid) - begin
            for scraped, seconds in sums.items():
                spent[scraped].append(seconds)
    more = [scraped / alone - 1 for scraped, alone in zip(spent[True], spent[False], strict=True)]
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(more, k=len(more))) for _ in range(2000))
    low, high = medians[50], medians[1949]
    print(
        f"\n{PAIRS} pairs of {BATCHES} batches: {statistics.median(spent[False]):.3f} s alone, "
        f"{statistics.median(more):+.2%} when scraped (95 %: {low:+.2%} to {high:+.2%})"
    )
    assert low < 0.01
