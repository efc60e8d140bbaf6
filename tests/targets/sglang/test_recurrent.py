"""Hybrid targets over the fake SGLang: a state a sequence, however many share a forward, and none of the last one's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_sglang
import fake_sglang_recurrent
from fake_sglang import VERSIONS, ModelRunner
from fake_sglang_recurrent import STATE_BYTES
from fills import make_fill, read
from specd.config.settings import TargetConfig
from specd.errors import TargetError
from specd.protocol.capture import CaptureSpec
from specd.targets.registry import load_target
from specd.targets.sglang import recurrent
from specd.targets.sglang.target import SGLangTarget

SPEC = CaptureSpec(taps=(0, 2), final=True, dtype="float32")
MANY = (5, 1, 9, 2, 7, 3, 4, 6)


@pytest.fixture(params=(*VERSIONS, "0.5.16"))
def config(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TargetConfig:
    fake_sglang.install(monkeypatch, request.param)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.setattr(ModelRunner, "hybrid", True)
    kinds = ["linear_attention", "full_attention"] * 2 + ["full_attention"]
    published = {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], "layer_types": kinds}
    (tmp_path / "config.json").write_text(json.dumps(published | {"max_position_embeddings": 64}))
    (tmp_path / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    return TargetConfig(model=f"{tmp_path}/", backend="sglang", device="cpu", max_forward_tokens=100)


def load(config: TargetConfig) -> tuple[SGLangTarget, Any]:
    """A target, and SGLang's runner in it."""
    target = load_target(config)
    assert isinstance(target, SGLangTarget)
    assert target._engine is not None
    return target, target._engine.runner


def test_each_sequence_has_a_state_of_its_own(config: TargetConfig) -> None:
    target, runner = load(config)
    for _ in range(2):  # nothing is left of the first forward
        fills = [make_fill(MANY, SPEC), make_fill((6,), SPEC, seed=3)]
        target.run(fills)
        for fill in fills:
            torch.testing.assert_close(read(fill), fake_sglang.plain(runner.model, fill))
    assert runner.req_to_token_pool.mamba_pool.cleared[-1] == list(range(1, 10))
    target.close()


def test_memory_bounds_the_sequences_of_a_forward_not_of_a_batch(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = 3 * STATE_BYTES * recurrent.SHARE
    monkeypatch.setattr(recurrent, "_memory", lambda device: memory)
    target, runner = load(config)
    assert runner.max_running_requests == 3
    fills = [make_fill(MANY[:4], SPEC), make_fill(MANY[4:], SPEC, seed=3)]
    pool = runner.req_to_token_pool.mamba_pool
    pool.cleared.clear()
    target.run(fills)
    assert pool.cleared == [[1, 2, 3], [1, 2, 3], [1, 2]]
    for fill in fills:
        torch.testing.assert_close(read(fill), fake_sglang.plain(runner.model, fill))
    target.close()


@pytest.mark.parametrize("config", ["0.5.17"], indirect=True)
def test_what_recording_graphs_leaves_in_the_padding_is_no_fault(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = ModelRunner.init_cuda_graphs

    def record(runner: Any) -> None:
        without(runner)
        runner.req_to_token_pool.mamba_pool.mamba_cache.temporal[:, 0] = 1

    monkeypatch.setattr(ModelRunner, "init_cuda_graphs", record)
    load(config)[0].close()


@pytest.mark.parametrize("config", ["0.5.17"], indirect=True)
def test_a_state_that_all_sequences_share_is_refused(config: TargetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def shared(memory: Any, row: int, seen: torch.Tensor) -> torch.Tensor:
        states = memory.table.mamba_pool.mamba_cache.temporal[memory.layer]
        sums: torch.Tensor = seen.cumsum(0) + states[0]
        states[0] = sums[-1]
        return sums

    monkeypatch.setattr(fake_sglang_recurrent.Memory, "summed", shared)
    with pytest.raises(TargetError, match=r"of 2 sequences in slots \[0\], expected slots 1…2.*--backend transformers"):
        load_target(config)


@pytest.mark.parametrize("config", ["0.5.17"], indirect=True)
def test_states_that_outlive_their_forward_are_refused(config: TargetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_sglang_recurrent.Pool, "clear_slots", lambda pool, slots: None)
    with pytest.raises(TargetError, match=r"after layer 0.*differ between two forwards of the same tokens"):
        load_target(config)


@pytest.mark.parametrize("config", ["0.5.17"], indirect=True)
def test_recurrent_layers_without_a_pool_are_refused(config: TargetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRunner, "hybrid", False)
    with pytest.raises(TargetError, match=r"recurrent layers \(layers of kind linear_attention\).*no pool of states"):
        load_target(config)
