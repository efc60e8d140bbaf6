"""The machine: facts that are there with and without a GPU, and nothing for what is not."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from specd.bench import machine as module
from specd.bench.machine import commit, cupy_version, driver, gpu_names, machine, nccl_version, version


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_its_facts_are_empty() -> None:
    facts = machine()
    assert (facts["gpus"], facts["peer_access"], facts["driver"], facts["nccl"]) == ([], False, "", "")
    assert facts["cores"] >= 1
    assert facts["torch"] == torch.__version__
    assert gpu_names(facts) == ""


def test_gpus_of_a_kind_are_counted() -> None:
    gpus = [{"name": name} for name in ("H200", "L4", "H200")]
    assert gpu_names({"gpus": gpus}) == "2 × H200, 1 × L4"


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.match(r"\d+\.", version("pytest"))
    assert version("no-such-package") == ""
    monkeypatch.setattr(module, "version", lambda name: "14.2" if name == "cupy-cuda12x" else "")
    assert cupy_version() == "14.2 (cupy-cuda12x)"
    monkeypatch.setattr(module, "version", lambda name: "")
    assert cupy_version() == ""


def files(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    """Make every file read as `text`, or as missing."""

    def read_text(path: Path, **_: Any) -> str:
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read_text)


@pytest.mark.usefixtures("no_gpu")
def test_a_processor_is_named_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch, "processor\t: 0\nmodel name\t: Example CPU 9000\n")
    assert machine()["cpu"] == "Example CPU 9000"
    files(monkeypatch, None)
    assert machine()["cpu"] == platform.machine()


def test_the_driver_says_its_version_in_one_of_two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch, "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n")
    assert driver() == "580.159.04"
    files(monkeypatch, None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout="575.1\n575.1\n"))
    assert driver() == "575.1"

    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert driver() == ""
    assert commit() == "", "there is no git either"


def test_nccl_is_the_one_inside_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 28, 9))
    assert nccl_version() == "2.28.9"
