"""Two network namespaces and a link between them whose packets are late, lost, few, or none: for root on Linux.

TCP is the kernel's own, so its retransmissions, back-off and windows are real. A process of the far side does not see
the directory that is hidden from it, so that it takes the addresses a trainer on another machine would.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

NEAR, FAR = "10.77.0.1", "10.77.0.2"
QUEUE_S = 0.5
"""What waits longer than this for its turn is dropped."""
_TUNSETIFF, _TUN_WITHOUT_HEADER, _NEWNET = 0x400454CA, 0x1001, 0x40000000


def missing() -> str:
    """Why there can be no namespaces here; empty if there can."""
    tools = [tool for tool in ("ip", "nsenter", "unshare") if shutil.which(tool) is None]
    if os.geteuid() != 0 or tools or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return f"needs root, /dev/net/tun, ip, nsenter and unshare (missing: {', '.join(tools) or 'rights'})"
    probe = subprocess.run(["unshare", "-n", "-m", "true"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else f"cannot make namespaces: {probe.stderr.decode().strip()}"


class Networks:
    """near, far: what a command is to be prefixed with to run there; its pid is the command's own.

    rtt_s, mbit_s, loss, up: of the link, which may be changed at any time. rtt_s: of a round trip. mbit_s: 10⁶ bits/s
    each way, 0 for no limit. loss: share of packets. hidden: a directory that is empty for the far side.
    """

    def __init__(
        self, hidden: Path, *, rtt_s: float = 0.0, mbit_s: float = 0.0, loss: float = 0.0, seed: int = 0
    ) -> None:
        self.rtt_s, self.mbit_s, self.loss, self.up = rtt_s, mbit_s, loss, True
        self._rng = random.Random(seed)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._closing = False
        self._holders: list[subprocess.Popen[bytes]] = []
        self._devices: list[int] = []
        self.near = self._namespace("true", NEAR, FAR)
        self.far = self._namespace(f"mount -t tmpfs none {hidden}", FAR, NEAR)
        self._thread = threading.Thread(target=self._run, name="link")
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for device in (*self._devices, self._wake):
            os.close(device)
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _namespace(self, prepare: str, own: str, peer: str) -> list[str]:
        command = ["unshare", "-n", "-m", "sh", "-c", f"{prepare} && echo ready && exec sleep infinity"]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE)
        self._holders.append(holder)
        assert holder.stdout is not None
        with holder.stdout as said:
            assert said.readline() == b"ready\n"
        enter = ["nsenter", "-t", str(holder.pid), "-n", "-m"]
        opener = threading.Thread(target=self._open_device, args=(holder.pid,))
        opener.start()
        opener.join()
        for arguments in ("link set lo up", f"addr add {own} peer {peer} dev link0", "link set link0 up"):
            subprocess.run([*enter, "ip", *arguments.split()], check=True)
        return enter

    def _open_device(self, pid: int) -> None:
        """On a thread of its own, as it enters the namespace for good."""
        with open(f"/proc/{pid}/ns/net", "rb") as space:
            if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"link0", _TUN_WITHOUT_HEADER))
        self._devices.append(device)

    def _run(self) -> None:
        """Carry packets until it is closed."""
        poller = select.poll()
        for descriptor in (*self._devices, self._wake):
            poller.register(descriptor, select.POLLIN)
        way = dict(zip(self._devices, reversed(self._devices), strict=True))
        free_at = dict.fromkeys(self._devices, 0.0)
        under_way: list[tuple[float, int, int, bytes]] = []
        numbers = itertools.count()
        while not self._closing:
            left = under_way[0][0] - time.monotonic() if under_way else 1.0
            for descriptor, _ in poller.poll(max(0.0, left * 1000)):
                if descriptor == self._wake:
                    continue
                with contextlib.suppress(BlockingIOError):
                    for _ in range(64):
                        packet, now = os.read(descriptor, 1 << 16), time.monotonic()
                        begin = max(now, free_at[descriptor])
                        if not self.up or self._rng.random() < self.loss or begin - now > QUEUE_S:
                            continue
                        sent = begin + (len(packet) * 8 / self.mbit_s / 1e6 if self.mbit_s else 0.0)
                        free_at[descriptor] = sent
                        heapq.heappush(under_way, (sent + self.rtt_s / 2, next(numbers), way[descriptor], packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, sink, packet = heapq.heappop(under_way)
                with contextlib.suppress(OSError):
                    os.write(sink, packet)
