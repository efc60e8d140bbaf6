"""The announcer: a thread that waits for forwards on a device, one after another, and then tells of their slots."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

import zmq

from specd.targets.base import Completion

log = logging.getLogger(__name__)

Pipe = zmq.Socket[bytes]
Announce = Callable[[Pipe, float], None]
"""Send Filled for every slot of one forward; `took`: its seconds."""


class Announcer:
    """Its thread begins with the first forward that is pending.

    outbox: makes the thread's own pipe to control. failed: called with the reason when a forward failed on the device.
    waiting: whoever waits for room at most.
    """

    def __init__(self, outbox: Callable[[], Pipe], failed: Callable[[str], None], waiting: int) -> None:
        self._outbox, self._failed, self._waiting = outbox, failed, waiting
        self._pending: queue.SimpleQueue[tuple[Completion, float, Announce] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ahead = threading.Semaphore(1)
        """Forwards launched behind a running one, at most 1: later batches then share the next."""

    def later(self, completion: Completion, begin: float, announce: Announce) -> None:
        """Announce a pending forward once it is complete, so that the next one is launched meanwhile.

        begin: when it was launched, in monotonic seconds. Blocks while another forward is in flight.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="specd-announcer", daemon=True)
            self._thread.start()
        self._pending.put((completion, begin, announce))
        self._ahead.acquire()

    def close(self) -> None:
        """Announce all that is pending, and end."""
        if self._thread is not None:
            self._pending.put(None)
            self._thread.join()

    def _run(self) -> None:
        outbox = self._outbox()
        end = 0.0
        try:
            while (item := self._pending.get()) is not None:
                completion, begin, announce = item
                completion.wait()
                # A forward launched behind another began when that one ended.
                begin, end = max(begin, end), time.monotonic()
                self._ahead.release()
                announce(outbox, end - begin)
        except BaseException:
            log.exception("a forward failed on the device")
            self._failed("a forward failed on the device")
            self._ahead.release(self._waiting)  # unblock whatever is queued
        finally:
            outbox.close(linger=1000)
