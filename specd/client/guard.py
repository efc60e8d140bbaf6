"""The guard: starts a subscriber's threads, and keeps the first error of any, which ends the run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from specd.errors import DaemonError, SpecdError

log = logging.getLogger(__name__)


class Guard:
    """Runs the bodies of threads. changed: notified of an error, by whom the training loop waits.

    error: the first one; later ones are its consequences.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self.error: SpecdError | None = None

    def start(self, name: str, run: Callable[..., None], *args: object) -> threading.Thread:
        """Run a body on a thread of its own."""
        thread = threading.Thread(target=self, args=(run, *args), name=name, daemon=True)
        thread.start()
        return thread

    def __call__(self, run: Callable[..., None], *args: object) -> None:
        """Run a body on this thread; what it raises is kept."""
        try:
            run(*args)
        except SpecdError as error:
            self.fail(error)
        except Exception as error:
            log.exception("a subscriber thread failed")
            self.fail(DaemonError(f"the subscriber failed: {error!r}"))

    def fail(self, error: SpecdError) -> None:
        """End the run."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what ended the run, if anything did."""
        if self.error is not None:
            raise self.error
