"""Trainers as processes side by side: begun together, followed until each has ended, ended in order together."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from specd.cli.children import Children
from specd.cli.standings import Standing
from specd.log import error_in

REFRESH_S = 1.0
SAVE_S = 120.0
"""Timeout of the orderly end of trainers: each writes a checkpoint."""


class Command(NamedTuple):
    """A command for a run. log: file that its output goes to, added at the end."""

    run: Standing
    arguments: Sequence[str]
    log: Path


class Running(NamedTuple):
    """A command under way. begin: where its part of the log begins, in bytes."""

    command: Command
    child: subprocess.Popen[bytes]
    begin: int


class Fleet:
    """Commands for several runs. say: takes a line for each thing that happens. refresh: called as time goes on."""

    def __init__(self, children: Children, say: Callable[[str], None], refresh: Callable[[], None]) -> None:
        self._children, self._say, self._refresh = children, say, refresh
        self.failed: list[Standing] = []

    def run(self, commands: Sequence[Command], doing: str) -> None:
        """Run all at once until the last has ended. The end of one, however it comes, leaves the others alone.

        doing: what a run does meanwhile, as a state. When this is interrupted, all end in order, and keep what they
        have.
        """
        with ExitStack() as stack, selectors.DefaultSelector() as ends:
            running: dict[int, Running] = {}
            try:
                for command in commands:
                    log = stack.enter_context(open(command.log, "ab"))
                    begin = log.tell()
                    command.run.look()  # what was there is no news
                    child = self._children.start(command.arguments, signal.SIGTERM, stdout=log, stderr=log)
                    command.run.state = doing
                    pidfd = os.pidfd_open(child.pid)
                    stack.callback(os.close, pidfd)
                    running[pidfd] = Running(command, child, begin)
                    ends.register(pidfd, selectors.EVENT_READ)
                    self._say(
                        f"{command.run.name}: {command.run.about}, {doing}, process {child.pid}; log {command.log}"
                    )
                while running:
                    for key, _ in ends.select(REFRESH_S):
                        ends.unregister(key.fd)
                        one = running.pop(key.fd)
                        self._ended(one, bool(running))
                    self._look(each.command.run for each in running.values())
            except KeyboardInterrupt:
                for each in running.values():
                    each.command.run.state = "interrupted"
                self._say(f"interrupted: {len(running)} runs end in order, each keeps what it has")
                self._children.end([each.child for each in running.values()], SAVE_S)
                self._look(command.run for command in commands)
                raise

    def _look(self, runs: Iterable[Standing]) -> None:
        for run in runs:
            if run.look():
                self._say(f"{run.name}: step {run.totals.steps:,}, held-out loss {run.held_out:.4f}")
        self._refresh()

    def _ended(self, one: Running, others: bool) -> None:
        run, code = one.command.run, one.child.wait()
        self._children.end([one.child])  # what is left of its group
        run.look()
        if code == 0:
            run.state = "finished"
            self._say(f"{run.name}: finished, {run.totals.steps:,} steps")
            return
        run.state = f"killed by {signal.Signals(-code).name}" if code < 0 else "failed"
        self.failed.append(run)
        reason = "" if code < 0 else f": {_reason(one.command.log, one.begin)}"
        self._say(f"{run.name}: {run.state} after step {run.totals.steps:,}{reason}{'; the others go on' * others}")


def _reason(log: Path, begin: int) -> str:
    """The last error in a log behind byte `begin`, or its last line."""
    lines = [line for line in log.read_bytes()[begin:].decode(errors="replace").splitlines() if line.strip()]
    said = [error for line in lines if (error := error_in(line))]
    return (said or lines or ["it said nothing"])[-1]
