"""What does each transport give on this machine, next to a raw copy of the same size, and which one would auto take?

A child process serves, this one fetches; `inproc` has both here. Each row alternates the transport's transfers with
plain copies between two warm buffers by the same means (torch's `copy_`, one thread), so that drift meets both alike.
"""

from __future__ import annotations

import os
import platform
import secrets
import statistics
import subprocess
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from specd.capture import CaptureSpec
from specd.errors import TransportError
from specd.packing import slot_bytes
from specd.transport import Client, SlotRef, Transport, check_ref, choose, load, names, pattern
from specd.transports.host import Host, LocalHost, SpawnedHost

if TYPE_CHECKING:
    import torch
    from rich.table import Table

MIB: Final = 1 << 20
SIZES: Final = (4096, 64 << 10, MIB, 16 * MIB, 64 * MIB, 256 * MIB)
BATCH: Final = "3,072 tokens × 5 taps × 2,048, bfloat16"
BATCH_BYTES: Final = slot_bytes(CaptureSpec(taps=(1, 12, 23, 34, 45)), 2048, 3072)
ROW_S: Final = 2.0
"""Measured time a row may take when the number of iterations is left open."""
MIN_ITERATIONS: Final = 10
MAX_ITERATIONS: Final = 500
WARM_UP: Final = 3
DEADLINE_S: Final = 60.0
PROBE_BYTES: Final = 64 << 10
SESSION: Final = b"bench"


def run(
    transports: Sequence[str] | None = None, sizes: Sequence[int] | None = None, iterations: int = 0
) -> dict[str, Any]:
    """Measure and return what `specd bench transport --json` prints.

    transports: names, all that can be served from host memory when empty. sizes: bytes, the default sweep and one real
    batch when empty. iterations: timed transfers a row, 0 for as many as two seconds allow (10 to 500).
    Raises TransportError when a transport that was named cannot run; one that was not is listed under `skipped`.
    """
    import torch

    plan = [(size, "") for size in sizes] if sizes else [*((size, "") for size in SIZES), (BATCH_BYTES, BATCH)]
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        auto, reasons = _auto()
        for name in transports or names():
            try:
                rows += _measure(name, plan, iterations)
            except TransportError as error:
                if transports:
                    raise
                skipped[name] = str(error)
    finally:
        torch.set_num_threads(threads)
    return {"machine": machine(), "auto": auto, "auto_reasons": reasons, "rows": rows, "skipped": skipped}


def render(result: dict[str, Any]) -> Table:
    """The result as a table for the terminal."""
    from rich.table import Table

    facts = result["machine"]
    table = Table(
        title=f"transports on {facts['cpu']}, {facts['cores']} cores",
        caption="\n".join(
            [
                f"auto takes {result['auto'] or 'none'}",
                *(f"not {name}: {reason}" for name, reason in {**result["auto_reasons"], **result["skipped"]}.items()),
                "p50, p99: announcement → usable tensor. ratio: of the raw copy's speed, same size, same run.",
            ]
        ),
    )
    table.add_column("transport")
    for column in ("size", "p50", "p99", "GB/s", "raw GB/s", "ratio", "CPU s/GB", "verified"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            row["transport"],
            _size(row["size_bytes"]) + (" (batch)" if row["shape"] else ""),
            _time(row["p50_us"]),
            _time(row["p99_us"]),
            f"{row['gb_per_s']:.2f}",
            f"{row['raw_gb_per_s']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['trainer_cpu_s_per_gb'] + row['daemon_cpu_s_per_gb']:.2f}",
            "every byte" if row["verified"] else "[red]WRONG[/red]",
        )
    return table


def machine() -> dict[str, Any]:
    """The facts that figures depend on. load_1m: processes that wanted a core in the last minute, ours included."""
    import torch
    import zmq

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1m": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyzmq": zmq.__version__,
        "libzmq": zmq.zmq_version(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "commit": _commit(),
        "copy_threads": 1,
    }


def _auto() -> tuple[str, dict[str, str]]:
    """What `choose` takes between two processes here, and why not the others; no name when none works."""
    try:
        choice = choose("auto", names(), False, _probe)
    except TransportError as error:
        return "", {"any": str(error)}
    return choice.name, choice.reasons


def _probe(name: str) -> str | None:
    """Move one small verified slot from a child."""
    import torch

    transport, nonce = load(name), secrets.token_bytes(16)
    ref = SlotRef(0, 1, PROBE_BYTES)
    into = torch.zeros(PROBE_BYTES, dtype=torch.uint8)
    with closing(_host(name, transport, PROBE_BYTES)) as host, closing(transport.client("cpu")) as client:
        client.attach(host.accept(SESSION, client.hello()), DEADLINE_S)
        host.fill(ref.slot, ref.generation, nonce, ref.nbytes)
        _transfer(transport, host, client, ref, into)
    return None if _holds(into, nonce) else "the bytes that arrived are not the ones that were sent"


def _host(name: str, transport: type[Transport], nbytes: int) -> Host:
    if "host" not in transport.traits.memory:
        raise TransportError(f"{name} serves device memory only")
    if transport.traits.scope == "process":
        return LocalHost(transport, 1, nbytes)
    return SpawnedHost(name, 1, nbytes)


def _measure(name: str, plan: Sequence[tuple[int, str]], iterations: int) -> list[dict[str, Any]]:
    """All rows of one transport."""
    transport = load(name)
    largest = max(size for size, _ in plan)
    with closing(_host(name, transport, largest)) as host, closing(transport.client("cpu")) as client:
        begin = time.perf_counter()
        client.attach(host.accept(SESSION, client.hello()), DEADLINE_S)
        setup_ms = (time.perf_counter() - begin) * 1e3
        rows = []
        for index, (size, shape) in enumerate(plan):
            ref = SlotRef(0, 2 * index + 1, size)
            check_ref(ref, 1, largest)
            row = {"transport": name, "size_bytes": size, **_row(transport, host, client, ref, iterations)}
            rows.append({**row, "shape": shape, "setup_ms": round(setup_ms, 3)})
        return rows


def _row(transport: type[Transport], host: Host, client: Client, ref: SlotRef, iterations: int) -> dict[str, Any]:
    """Time `ref` and raw copies of its size in turn, then compare every byte."""
    import torch

    nonce, size = secrets.token_bytes(16), ref.nbytes
    host.fill(ref.slot, ref.generation, nonce, size)
    source = torch.from_numpy(pattern(nonce, size).copy())
    copy, into = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)

    def pair() -> tuple[float, float, float]:
        """Seconds of one raw copy and one transfer, and CPU seconds of the transfer on this side."""
        begin = time.perf_counter()
        copy.copy_(source)
        raw = time.perf_counter() - begin
        cpu = time.process_time()
        begin = time.perf_counter()
        _transfer(transport, host, client, ref, into)
        wire = time.perf_counter() - begin
        return raw, wire, time.process_time() - cpu

    warm = [sum(pair()[:2]) for _ in range(WARM_UP)]
    count = iterations or max(MIN_ITERATIONS, min(MAX_ITERATIONS, int(ROW_S / min(warm))))
    cpu = host.cpu_s()
    raws, wires, cpus = (list(column) for column in zip(*(pair() for _ in range(count)), strict=True))
    daemon_cpu = 0.0 if isinstance(host, LocalHost) else host.cpu_s() - cpu
    verified = _holds(into, nonce)
    again = SlotRef(ref.slot, ref.generation + 1, size)
    fresh = secrets.token_bytes(16)
    host.fill(again.slot, again.generation, fresh, size)
    _transfer(transport, host, client, again, into)
    verified = verified and _holds(into, fresh)

    p50, raw = statistics.median(wires), statistics.median(raws)
    gigabytes = size * count / 1e9
    return {
        "p50_us": round(p50 * 1e6, 2),
        "p99_us": round(float(np.quantile(wires, 0.99)) * 1e6, 2),
        "gb_per_s": round(size / p50 / 1e9, 4),
        "raw_gb_per_s": round(size / raw / 1e9, 4),
        "ratio": round(raw / p50, 4),
        "verified": verified,
        "iterations": count,
        "min_us": round(min(wires) * 1e6, 2),
        "p25_us": round(float(np.quantile(wires, 0.25)) * 1e6, 2),
        "p75_us": round(float(np.quantile(wires, 0.75)) * 1e6, 2),
        "raw_p50_us": round(raw * 1e6, 2),
        "raw_min_us": round(min(raws) * 1e6, 2),
        "trainer_cpu_s_per_gb": round(sum(cpus) / gigabytes, 4),
        "daemon_cpu_s_per_gb": round(daemon_cpu / gigabytes, 4),
    }


def _transfer(transport: type[Transport], host: Host, client: Client, ref: SlotRef, into: torch.Tensor) -> None:
    if transport.traits.needs_recv_ready:
        host.announce(SESSION, ref)
    client.fetch(ref, into, DEADLINE_S)


def _holds(found: torch.Tensor, nonce: bytes) -> bool:
    return bool(np.array_equal(found.numpy(), pattern(nonce, found.numel())))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _commit() -> str:
    """The commit this file is at, with `-dirty` for local changes; empty outside a checkout of specd."""
    here = Path(__file__).resolve()
    command = ["git", "-C", str(here.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(
            ["git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name], check=True, capture_output=True
        )
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _size(nbytes: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", MIB), ("KiB", 1 << 10)):
        if nbytes >= factor:
            return f"{nbytes / factor:g} {unit}"
    return f"{nbytes} B"


def _time(us: float) -> str:
    return f"{us / 1e3:.2f} ms" if us >= 1000 else f"{us:.0f} µs"
