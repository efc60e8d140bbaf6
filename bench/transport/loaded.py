"""A host that also reports the CPU seconds of its process, and runs matmuls on its device."""

from __future__ import annotations

import contextlib
import time
from typing import ClassVar

from specd.bench.transport.matmuls import MatmulLoad
from specd.errors import TransportError
from specd.transports.testing.hosts import LocalHost
from specd.transports.testing.spawned import SpawnedHost


class _Loadable(LocalHost):
    """The child's side: its load shares the process with the transport, as a target does."""

    _load: MatmulLoad | None = None

    def ask(self, what: str) -> float:
        match what:
            case "cpu_s":
                return time.process_time()
            case "start_load":
                self._start_load()
                return 0.0
            case "stop_load":
                return self._stop_load()
        return super().ask(what)

    def close(self) -> None:
        if self._load is not None:
            with contextlib.suppress(TransportError):
                self._stop_load()
        super().close()

    def _start_load(self) -> None:
        if self._arena.device == "cpu":
            raise TransportError("a load needs a host on a CUDA device, this one's arena lies in host memory")
        if self._load is None:
            self._load = MatmulLoad(self._arena.device)

    def _stop_load(self) -> float:
        running, self._load = self._load, None
        if running is None:
            raise TransportError("no load is running: start it first")
        return running.stop()


class LoadedHost(SpawnedHost):
    """A host in a process of its own, with a load on its device that starts and stops."""

    kind: ClassVar[type[LocalHost]] = _Loadable

    def cpu_s(self) -> float:
        """CPU seconds of the child so far."""
        return self.ask("cpu_s")

    def start_load(self) -> None:
        """Keep the arena's device busy with matmuls, as a target would. Raises TransportError for a host arena."""
        self.ask("start_load")

    def stop_load(self) -> float:
        """End that; returns what the device reached meanwhile, in TFLOP/s."""
        return self.ask("stop_load")
