"""The machine a benchmark ran on: processor, GPUs, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from specd.memory import cuda
from specd.train.directory import cpu_model

CUPY = ("cupy-cuda13x", "cupy-cuda12x")


def machine() -> dict[str, Any]:
    """Facts to print beside figures; those about GPUs are empty where there is none.

    load_1m: the load average of the last minute, this process included.
    """
    import torch
    import zmq

    count = torch.cuda.device_count()
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1m": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "pyzmq": zmq.__version__,
        "libzmq": zmq.zmq_version(),
        "gpus": [
            {"name": torch.cuda.get_device_name(index), "uuid": cuda.uuid(f"cuda:{index}")} for index in range(count)
        ],
        "peer_access": count > 1 and torch.cuda.can_device_access_peer(1, 0),
        "driver": driver() if count else "",
        "cuda": torch.version.cuda or "",
        "nccl": nccl_version(),
        "nccl4py": version("nccl4py"),
        "cupy": cupy_version(),
        "commit": commit(),
        "copy_threads": 1,
    }


def gpu_names(facts: dict[str, Any]) -> str:
    """The GPUs among these facts, `2 × NVIDIA H200`; empty without any."""
    names = [gpu["name"] for gpu in facts["gpus"]]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def version(distribution: str) -> str:
    """The version of an installed package; empty if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cupy_version() -> str:
    """The version of cupy and its package, `14.2 (cupy-cuda13x)`; empty without cupy."""
    return next((f"{version(name)} ({name})" for name in CUPY if version(name)), "")


def driver() -> str:
    """The version of the NVIDIA driver; empty without one."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0].split()
        found = [word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()]
        if found:
            return found[0]
    except (OSError, IndexError):
        pass
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def commit() -> str:
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


def nccl_version() -> str:
    """The version of the NCCL inside torch, `2.28.9`; empty without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return ""
    from torch.cuda import nccl

    version_of: Any = nccl.version  # untyped
    return ".".join(map(str, version_of()))
