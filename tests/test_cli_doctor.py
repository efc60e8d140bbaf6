"""`specd doctor` about what moves states between GPUs: tried where there is one, and where not, why."""

from __future__ import annotations

import pytest
import torch

from specd.cli import doctor
from specd.cli.main import run


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
    finding = doctor.Finding(name="owl", kind="transport", works=False, note="pip install 'specd[owl]'")
    monkeypatch.setattr(doctor, "check_transport", lambda name: finding)
    monkeypatch.setenv("COLUMNS", "200")
    run(["doctor"])
    assert "specd[owl]" in capsys.readouterr().out


def test_versions_of_what_gpus_need_are_listed() -> None:
    assert {"cupy", "nccl4py", "nixl-cu13", "torch"} <= set(doctor.machine()["packages"])


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
