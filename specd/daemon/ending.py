"""How a daemon is asked to end: at once, or drained; safe from any thread and from a signal handler."""

from __future__ import annotations

import contextlib
import os


class Ending:
    """Whether the control loop is to end, and a pipe that wakes it to see. stopping: now. draining: once it is idle.

    fd: readable when asked. wake_fd: a byte written to it wakes the loop, as signals must.
    """

    def __init__(self) -> None:
        self.stopping = self.draining = False
        self.fd, self.wake_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def stop(self) -> None:
        """End the loop soon."""
        self.stopping = True
        self._wake()

    def drain(self) -> None:
        """Finish outstanding requests, refuse new ones, then end; a second call ends at once."""
        if self.draining:
            self.stopping = True
        self.draining = True
        self._wake()

    def seen(self) -> None:
        """Empty the pipe."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)

    def close(self) -> None:
        """Close the pipe. Nothing may be asked after it."""
        os.close(self.fd)
        os.close(self.wake_fd)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe: the loop wakes anyway
            os.write(self.wake_fd, b"\0")
