"""`specd start`: run a daemon in the foreground, or detached from the terminal."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import msgspec
import typer

from specd import units
from specd.cli.replay import kept
from specd.cli.settings import daemon_config, given
from specd.config.load import load_yaml
from specd.config.settings import DaemonConfig, SubscriberConfig
from specd.errors import ConfigError, DaemonError
from specd.log import error_in
from specd.paths import make_runtime_dir

if TYPE_CHECKING:
    from specd.protocol.messages import StatusReport

EXAMPLES = (
    "Examples: `specd start --model smollm2-135m` · "
    "`specd start --model Qwen3-8B --load-format dummy --num-layers 4 --detach` · "
    "`specd start --model Qwen3-8B --trainers 4 --depth 2` · "
    "`specd start --model Qwen3-8B --replay /nvme/states --replay-gb 500` · "
    "`specd start --model Qwen3-8B --endpoint tcp://192.0.2.7:7070 --key gpu1`"
)
TARGET, SHAPE, REPLAY, PLACE = "Target", "Ring", "Replay", "Endpoint"


def start(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Preset, local directory or hub name.", rich_help_panel=TARGET)
    ] = "",
    backend: Annotated[str, typer.Option(help="auto, sglang, transformers or synthetic.", rich_help_panel=TARGET)] = "",
    load_format: Annotated[
        str, typer.Option(help="auto reads weights, dummy draws random ones.", rich_help_panel=TARGET)
    ] = "",
    tokenizer: Annotated[
        str, typer.Option(help="Directory of its tokenizer, for a preset with dummy weights.", rich_help_panel=TARGET)
    ] = "",
    preset: Annotated[
        str, typer.Option(help="Take this preset's recipe; else the model's own.", rich_help_panel=TARGET)
    ] = "",
    num_layers: Annotated[
        int | None, typer.Option(help="Cut the model's depth (dummy weights only).", rich_help_panel=TARGET)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=TARGET)] = "",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=TARGET)] = "",
    exact: Annotated[
        bool | None,
        typer.Option("--exact/--merged", help="One batch a forward: bit-identical results.", rich_help_panel=TARGET),
    ] = None,
    tp: Annotated[
        int | None, typer.Option("--tp", help="GPUs to spread the target over (SGLang).", rich_help_panel=TARGET)
    ] = None,
    memory_fraction: Annotated[
        float | None,
        typer.Option(help="Share of a GPU's free memory for weights and KV cache (SGLang).", rich_help_panel=TARGET),
    ] = None,
    attention_backend: Annotated[
        str, typer.Option(help="SGLang's attention: auto, triton, fa3, flashinfer, …", rich_help_panel=TARGET)
    ] = "",
    slots: Annotated[int | None, typer.Option(help="Slots of the ring.", rich_help_panel=SHAPE)] = None,
    slot_tokens: Annotated[int | None, typer.Option(help="Longest batch, in tokens.", rich_help_panel=SHAPE)] = None,
    trainers: Annotated[
        int | None,
        typer.Option(min=1, help="Trainers at once, ranks of a run each: a ring for so many.", rich_help_panel=SHAPE),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(min=0, help="With --trainers: batches each has in flight [default: 2].", rich_help_panel=SHAPE),
    ] = None,
    lag_gb: Annotated[
        float | None,
        typer.Option("--lag-gb", help="Memory for what slower trainers of a share still need.", rich_help_panel=SHAPE),
    ] = None,
    transports: Annotated[
        str, typer.Option(help="What to serve: auto for all that works here, or cuda_ipc,shm,…", rich_help_panel=SHAPE)
    ] = "",
    replay: Annotated[
        str,
        typer.Option(
            "--replay", metavar="<path>", help="Keep states here over epochs, on a local disk.", rich_help_panel=REPLAY
        ),
    ] = "",
    replay_gb: Annotated[
        float | None, typer.Option("--replay-gb", help="How much of that disk, in GB.", rich_help_panel=REPLAY)
    ] = None,
    replay_ram_gb: Annotated[
        float | None, typer.Option("--replay-ram-gb", help="Keep states in so much memory.", rich_help_panel=REPLAY)
    ] = None,
    replay_encoding: Annotated[
        str,
        typer.Option(
            "--replay-encoding", help="raw, or float8_e4m3fn: twice as many, rounded.", rich_help_panel=REPLAY
        ),
    ] = "",
    endpoint: Annotated[
        str, typer.Option("--endpoint", "-e", help="ipc://… or tcp://ADDRESS:PORT.", rich_help_panel=PLACE)
    ] = "",
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure", help="TCP without keys, unencrypted, for everybody.", rich_help_panel=PLACE),
    ] = None,
    key: Annotated[
        str, typer.Option("--key", help="Over TCP: this daemon's key, by name or path.", rich_help_panel=PLACE)
    ] = "",
    insecure_data: Annotated[
        bool | None,
        typer.Option("--insecure-data", help="With a key: also nccl and nixl, unencrypted.", rich_help_panel=PLACE),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics",
            help="Prometheus metrics at PORT of this machine, or ADDRESS:PORT.",
            rich_help_panel=PLACE,
        ),
    ] = "",
    detach: Annotated[
        bool, typer.Option("--detach/--foreground", help="Return once it is ready; it logs to a file.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of a DaemonConfig; flags win over it.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting by path, e.g. --set ring.lease_ttl_s=10.")
    ] = None,
    ready_fd: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Run a daemon that hosts a target model and serves its hidden states."""
    flags = {
        "target": {
            "model": model,
            "backend": backend,
            "load_format": load_format,
            "tokenizer": tokenizer,
            "num_layers": num_layers,
            "device": device,
            "dtype": dtype,
            "exact": exact,
            "tp": tp,
            "memory_fraction": memory_fraction,
            "attention_backend": attention_backend,
        },
        "ring": {"slots": slots, "slot_tokens": slot_tokens, "lag_gb": lag_gb} | _ring_for(trainers, depth, slots),
        "transports": [name.strip() for name in transports.split(",") if name.strip()],
        "replay": {
            "dir": os.path.abspath(os.path.expanduser(replay)) if replay else "",
            "gb": replay_gb,
            "ram_gb": replay_ram_gb,
            "encoding": replay_encoding,
        },
        "endpoint": endpoint,
        "insecure": insecure,
        "auth": {"key": key},
        "insecure_data": insecure_data,
        "metrics": metrics,
    }
    daemon = daemon_config(load_yaml(config) if config else {}, given(flags), settings or [], preset=preset)
    if problem := daemon.problem():
        raise ConfigError(problem)
    if detach:
        raise typer.Exit(_detach(daemon))
    raise typer.Exit(_serve(daemon, ready_fd))


def _ring_for(trainers: int | None, depth: int | None, slots: int | None) -> dict[str, int]:
    """The ring in which `trainers` always have `depth` batches in flight each, beside the one in use."""
    if trainers is None:
        if depth is not None:
            raise ConfigError(f"--depth {depth} says how deep a ring is for each of --trainers: give their number too")
        return {}
    if slots is not None:
        raise ConfigError(
            f"--slots {slots} with --trainers {trainers}: expected one of the two; --trainers W --depth D stands for "
            f"W·(D + 1) slots, so give ring.max_sessions by --set beside --slots"
        )
    each = SubscriberConfig().depth if depth is None else depth
    return {"slots": trainers * (each + 1), "max_sessions": trainers}


def _serve(daemon: DaemonConfig, ready_fd: int) -> int:
    from specd.daemon.serve import serve

    if ready_fd >= 0:
        os.set_inheritable(ready_fd, False)  # the worker must not hold it open

    def announce(report: StatusReport) -> None:
        line = ready_line(report)
        typer.echo(line)
        if ready_fd >= 0:
            os.write(ready_fd, f"{line}\n".encode())
            os.close(ready_fd)

    serve(daemon, on_ready=announce)
    return 0


def _detach(daemon: DaemonConfig) -> int:
    """Start the same daemon in a session of its own, and wait until it is ready or has failed."""
    log_path = make_runtime_dir() / f"{re.sub(r'[^A-Za-z0-9]+', '-', daemon.endpoint)[-80:].strip('-')}.log"
    reader, writer = os.pipe()
    with open(log_path, "ab", opener=_private) as log, open(reader, "rb") as ready:
        begin = log.tell()
        command = [sys.executable, "-P", "-m", "specd", *_verbosity(), "start", "--ready-fd", str(writer)]
        for key, value in msgspec.to_builtins(daemon).items():
            command += ["--set", f"{key}={json.dumps(value)}"]
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=(writer,)
        )
        os.close(writer)
        try:
            line = ready.readline().decode()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if line:
        typer.echo(f"{line.rstrip()} · pid {child.pid} · log {log_path}")
        child.returncode = 0  # it runs on without this process: never wait for it
        return 0
    code = child.wait()
    with open(log_path, "rb") as written:
        raise _failure(written, begin, code, log_path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _verbosity() -> list[str]:
    level = logging.getLogger("specd").level
    return ["--verbose"] if level == logging.DEBUG else ["--quiet"] if level == logging.WARNING else []


def _failure(log: IO[bytes], begin: int, code: int, path: Path) -> DaemonError | ConfigError:
    """The error of a detached daemon that ended before it was ready, from its log."""
    log.seek(begin)
    lines = log.read().decode(errors="replace").splitlines()
    said = [error for line in lines if (error := error_in(line))]
    message = said[-1] if said else f"the daemon ended with exit code {code} before it was ready; its log is {path}"
    return (ConfigError if code == 2 else DaemonError)(message)


def ready_line(report: StatusReport) -> str:
    """One line: where the daemon listens, what it hosts, its ring, what it serves and its host memory."""
    parts = [f"specd ready at {', '.join(report.endpoints)}"]
    if (contract := report.contract) is not None:
        parts.append(
            f"{contract.model} ({contract.num_layers} layers, hidden {contract.hidden_size}, {contract.dtype})"
        )
    if (ring := report.ring) is not None:
        nbytes = ring.num_slots * ring.slot_bytes
        parts.append(
            f"ring {ring.num_slots} slots × {ring.slot_tokens} tokens = {nbytes:,} bytes ({units.size(nbytes)})"
            f"{_for_trainers(ring.num_slots, report.max_sessions)}"
        )
    if report.lag_cells:
        parts.append(f"lag window of {report.lag_cells:,} batches")
    if report.replay is not None:
        parts.append(f"replay {kept(report.replay)}")
    if report.transports:
        parts.append(f"serves {', '.join(report.transports)}")
    parts.append(f"host memory {units.size(resident_bytes({report.pid, report.worker_pid}))}")
    return " · ".join(parts)


def _for_trainers(slots: int, most: int) -> str:
    """How many trainers a ring takes, and how many batches each has in flight when all are there."""
    return f" for {most} trainer{'s' * (most > 1)} at depth {(slots - most) // most}" if most else ""


def resident_bytes(pids: set[int]) -> int:
    """Resident memory of local processes, in total; an unreadable one counts 0."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        if found := re.search(r"^VmRSS:\s+(\d+) kB", text, re.MULTILINE):
            total += int(found[1]) * 1024
    return total
