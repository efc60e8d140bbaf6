"""The daemon's page of metrics, in a process of its own: control says its status, whoever reads and however slow."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from specd import scrape
from specd.daemon.exposition import metrics
from specd.daemon.questions import Questions, ask
from specd.log import log_as

ANSWER_S = 5.0
END_S = 5.0


@contextmanager
def exporting(address: str, questions: Questions, answer_s: float = ANSWER_S) -> Iterator[None]:
    """Serve a daemon's metrics at `address` (see `scrape.parse`) while the block runs, from a process beside it.

    answer_s: how long a scrape waits for control's word. Raises ConfigError for an address that cannot be served.
    """
    with scrape.listen(address) as listener:
        fds = (listener.fileno(), questions.peer.fileno())
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "specd.daemon.exporter", *map(str, (*fds, os.getpid(), answer_s))],
            stdin=subprocess.DEVNULL,
            pass_fds=fds,
            start_new_session=True,  # a terminal's Ctrl-C is the daemon's
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    """Entry of the process: descriptors of the socket that listens and of the questions, the daemon's pid, answer_s."""
    listening, asking, pid, answer_s = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    log_as("metrics")
    with socket.socket(fileno=listening) as listener, socket.socket(fileno=asking) as peer:
        server = scrape.answer(listener, lambda: metrics(ask(peer, answer_s)), pid)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        gone = select.poll()
        gone.register(peer, 0)  # the other end's death alone
        gone.poll()


if __name__ == "__main__":
    main()
