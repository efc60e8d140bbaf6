"""Replay in a worker: what of its batches is kept, under which key and whose states, and what control is told of it."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import msgspec
import zmq

from specd.config.settings import ReplayConfig, TargetConfig
from specd.memory.arena import HostArena
from specd.memory.device_arena import DeviceArena
from specd.protocol.capture import FP8, StateDtype
from specd.protocol.contract import ReplayInfo
from specd.protocol.limits import MAX_REASON_CHARS
from specd.replay.coding import Coded, Coder
from specd.replay.files import GB, Files, StoreDirectory
from specd.replay.form import Identity
from specd.replay.lanes import Lanes, Task
from specd.replay.pinned import Pinned, cells_in
from specd.targets.base import Target
from specd.version import __version__
from specd.worker import messages as channel

SCAN_S = 1.0
"""A start waits so long for what lies on the disk: a small store then misses nothing."""


class Replay:
    """The replay tier of one worker; made before the target is loaded, which takes long.

    config: one that is `on`. owner: the process that a person knows.
    Raises ConfigError for a directory that cannot be used.
    """

    def __init__(self, config: ReplayConfig, owner: int) -> None:
        self._config = config
        self._place = (
            StoreDirectory(Path(os.path.expanduser(config.dir)), round(config.gb * GB), owner) if config.dir else None
        )
        self._lanes: Lanes | None = None
        self._pipe: zmq.Socket[bytes] | None = None
        self._lock = threading.Lock()  # of the pipe, which all lanes use
        self._told: dict[str, int] = {}

    def open(
        self,
        arena: HostArena | DeviceArena,
        identity: Identity,
        hidden_size: int,
        dtype: StateDtype,
        pipe: zmq.Socket[bytes],
        missed: Callable[[channel.FillSlot], None],
        crashed: Callable[[str], None],
    ) -> ReplayInfo:
        """Begin to keep the slots of `arena`, which are sized for `dtype`. pipe: to control, used and closed here.

        missed: called for a batch of `take` that has to be computed after all. crashed: as of Lanes.
        Raises ConfigError for a store of other states, and without enough room.
        """
        self._pipe = pipe
        coder = Coder(arena, hidden_size, dtype) if identity.encoding == FP8 else None
        cell_bytes = coder.cell_bytes if coder is not None else arena.stride
        cells: list[Files | Pinned] = []
        try:
            if budget := round(self._config.ram_gb * GB):
                cells.append(Pinned(cells_in(budget, cell_bytes), arena, coder))
            if self._place is not None:
                cells.append(Files.open(self._place, cell_bytes, identity))
            self._lanes = Lanes(
                arena,
                cells,
                coder,
                filled=self._filled,
                missed=lambda task: missed(task.note),
                counted=self._tell,
                crashed=crashed,
            )
        except BaseException:
            for each in cells:
                each.close()
            raise
        self._lanes.start()
        self._lanes.scanned.wait(SCAN_S)
        return ReplayInfo(
            cells=self._lanes.cells,
            used=self._lanes.used,
            cell_bytes=cell_bytes,
            failed=self._failed,
            encoding=self._config.encoding,
        )

    def take(self, fill: channel.FillSlot) -> bool:
        """Whether a batch is kept: it is then read into its slot, and announced."""
        assert self._lanes is not None
        return self._lanes.take(self._task(fill))

    def offer(self, fill: channel.FillSlot) -> None:
        """Keep a batch that was computed and announced."""
        assert self._lanes is not None
        self._lanes.offer(self._task(fill))

    def lasts(self, lookups: int) -> None:
        """See Lanes."""
        assert self._lanes is not None
        self._lanes.lasts(lookups)

    def close(self) -> None:
        """End its threads, before the arena is closed, and let others use the directory."""
        if self._lanes is not None:
            self._lanes.close()
        if self._pipe is not None:
            self._pipe.close(linger=1000)
        if self._place is not None:
            self._place.close()

    def _task(self, fill: channel.FillSlot) -> Task:
        held = hashlib.blake2b(msgspec.json.encode(fill.spec), digest_size=16).digest()
        coded = Coded.of(fill.spec, fill.layout) if self._config.encoding == FP8 else None
        return Task(
            key=fill.content + held,
            slot=fill.slot,
            generation=fill.generation,
            nbytes=(coded.codes if coded is not None else fill.layout).nbytes,
            tokens=len(fill.tokens) // 4,
            keep=fill.keep,
            coded=coded,
            note=fill,
        )

    def _filled(self, task: Task) -> None:
        with self._lock:
            self._send(channel.Filled(slot=task.slot, generation=task.generation, target_us=0, replayed=True))

    def _tell(self) -> None:
        assert self._lanes is not None
        with self._lock:
            now = self._lanes.counters.values()
            counts = {name: count - self._told.get(name, 0) for name, count in now.items()}
            self._told = now
            self._send(
                channel.ReplayCounts(cells=self._lanes.cells, used=self._lanes.used, counts=counts, failed=self._failed)
            )

    @property
    def _failed(self) -> str:
        return self._lanes.failed[:MAX_REASON_CHARS] if self._lanes is not None else ""

    def _send(self, note: channel.ToControl) -> None:
        """Under the lock: a later count of cells must not come before an earlier one."""
        assert self._pipe is not None
        self._pipe.send(channel.encode(note))


def identity_of(config: TargetConfig, target: Target, encoding: str = "raw") -> Identity:
    """Whose states a target's are, and how they are kept."""
    device = target.device
    if device.startswith("cuda"):
        import torch

        device = torch.cuda.get_device_name(device)
    return Identity(
        model=target.contract.model,
        fingerprint=target.contract.fingerprint,
        backend=_software(type(target)),
        torch=metadata.version("torch"),
        device=device,
        exact=config.exact,
        tp=config.tp,
        attention=config.attention_backend,
        graphs=str(config.prefill_graphs),
        encoding=encoding,
    )


def _software(target: type) -> str:
    """What runs a target, with its version: of the package that a backend is named after, or comes from."""
    parts = target.__module__.split(".")
    name = parts[2] if parts[:2] == ["specd", "targets"] else parts[0]
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"{name} of specd {__version__}"
