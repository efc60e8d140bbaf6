"""A checkpoint on disk, and the settings of an SGLang target of it over a fake SGLang, of each form there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fake_sglang
from fake_sglang import VERSIONS
from specd.config.settings import TargetConfig


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    return tmp_path


@pytest.fixture(params=VERSIONS)
def config(request: pytest.FixtureRequest, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> TargetConfig:
    fake_sglang.install(monkeypatch, request.param)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    return TargetConfig(model=f"{checkpoint}/", backend="sglang", device="cpu", max_forward_tokens=100)
