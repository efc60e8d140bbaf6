"""Layers that return a residual which they have added already, over the fake SGLang."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fake_sglang
from fake_sglang import ModelRunner
from fills import make_fill, read
from specd.config.settings import TargetConfig
from specd.errors import TargetError
from specd.protocol.capture import CaptureSpec
from specd.targets.registry import load_target
from specd.targets.sglang.plain import handed_on
from specd.targets.sglang.target import SGLangTarget

SPEC = CaptureSpec(taps=(0, 2), final=True, dtype="float32")


class Whole(fake_sglang.Layer):
    """As LFM2's: its hidden states are the stream, and it ignores the residual."""

    def forward(self, hidden: Any, residual: torch.Tensor | None, *, batch: Any) -> Any:
        added, before = super().forward(hidden, None, batch=batch)
        return before + added, before


class Ignoring(fake_sglang.Norm):
    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        return super().forward(hidden)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TargetConfig:
    fake_sglang.install(monkeypatch, "0.5.17")
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.setattr(ModelRunner, "layer", Whole)
    published = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(published))
    (tmp_path / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    return TargetConfig(model=f"{tmp_path}/", backend="sglang", device="cpu", max_forward_tokens=100)


def test_hidden_states_that_are_the_stream_get_nothing_added(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_sglang, "Norm", Ignoring)
    target = load_target(config)
    assert isinstance(target, SGLangTarget)
    assert target._engine is not None
    fill = make_fill((7, 1, 23), SPEC)
    target.run([fill])
    torch.testing.assert_close(read(fill), fake_sglang.plain(target._engine.runner.model, fill))
    target.close()


def test_a_model_that_adds_such_a_residual_at_its_end_is_refused(config: TargetConfig) -> None:
    """As Granite's hybrid in SGLang: neither form of its taps gives what lm_head reads."""
    with pytest.raises(TargetError, match=r"does not end in the norm of its last layer's output.*use another backend"):
        load_target(config)


def test_other_ranks_hear_only_of_forwards_that_run() -> None:
    """Layers that take no residual, as from 0.5.22 on, cannot be read: a rank that ran it would wait for us."""
    engine: Any = SimpleNamespace(layers=[torch.nn.Linear(2, 2)])
    assert handed_on(engine, np.arange(5, dtype=np.int32), lambda: pytest.fail("it was announced")) is None
