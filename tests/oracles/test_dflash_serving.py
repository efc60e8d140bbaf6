"""SGLang's and vLLM's own DFlash classes compute what the draft computes, whatever it sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from drafts import CONFIG, make_draft
from peer_serving import apart, in_sglang, in_vllm, one_block
from specd.drafts.dflash.objective import DFlash

SEEN: list[dict[str, Any]] = [
    {},
    {"sliding_window": 6},
    {"sliding_window": 6, "sliding_causal": False},
    {"num_layers": 3, "sliding_window": 6, "full_layers": 1},
]


def strong(settings: dict[str, Any]) -> DFlash:
    objective = make_draft(msgspec.structs.replace(CONFIG, **settings))
    with torch.no_grad():
        for parameter in objective.module.parameters():
            parameter.mul_(10) if parameter.dim() > 1 else parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()))
    return objective


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("settings", SEEN)
@torch.no_grad()
def test_sglang(tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    objective = strong(settings)
    _, states = in_sglang(objective, tmp_path / "draft", monkeypatch, "DFlashDraftModel")
    assert apart(states, one_block(objective)[2]) < 1e-5


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("settings", SEEN)
@torch.no_grad()
def test_vllm(tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    objective = strong(settings)
    name = ("vllm.model_executor.models.qwen3_dflash", "DFlashQwen3ForCausalLM")
    with in_vllm(objective, tmp_path / "draft", monkeypatch, name, "dflash") as (_, states):
        assert apart(states, one_block(objective)[2]) < 1e-5
