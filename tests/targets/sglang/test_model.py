"""Where SGLang's models keep their parts, and the positions of those that read images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specd.errors import TargetError
from specd.targets.sglang.model import liven, parts
from specd.targets.sglang.versions import uses_mrope, version_of

DECODER = SimpleNamespace(layers=["layer"], norm="norm", embed_tokens="embedding")
TOP: dict[str, Any] = {"lm_head": "lm_head", "logits_processor": "head"}


@pytest.mark.parametrize(
    "model",
    [
        SimpleNamespace(model=DECODER, **TOP),
        SimpleNamespace(model=SimpleNamespace(language_model=DECODER), **TOP),
        SimpleNamespace(language_model=SimpleNamespace(model=DECODER, **TOP)),
        SimpleNamespace(language_model=DECODER, **TOP),
        SimpleNamespace(thinker=SimpleNamespace(model=DECODER, **TOP)),
    ],
    ids=["bare", "inner wrapper", "a causal LM inside", "a decoder inside", "thinker"],
)
def test_parts_are_found_bare_and_wrapped(model: Any) -> None:
    found: Any = parts(model)
    assert (found.layers, found.norm, found.embedding) == (["layer"], "norm", "embedding")
    assert (found.lm_head, found.head) == ("lm_head", "head")


def test_a_model_laid_out_in_another_way_is_named() -> None:
    with pytest.raises(TargetError, match=r"SGLang's Linear is not laid out as expected \(.*layers.*use --backend"):
        parts(torch.nn.Linear(2, 2))


def test_dummy_recurrent_layers_remember_and_mix() -> None:
    layer: Any = torch.nn.Module()
    layer.conv1d = torch.nn.Linear(4, 64, bias=False)
    layer.A_log, layer.dt_bias = (torch.nn.Parameter(torch.full((8,), 1e-3)) for _ in range(2))
    model = torch.nn.ModuleDict({"linear_attn": layer, "norm": torch.nn.LayerNorm(4)})
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(-1e-3, 1e-3)
    model.requires_grad_(False)
    liven(model, 0)
    decay = torch.exp(-layer.A_log.exp() * torch.nn.functional.softplus(layer.dt_bias))
    assert bool(((decay > 0.94) & (decay < 0.97)).all())
    assert 0.4 < float(layer.conv1d.weight.std()) < 0.6
    drawn = layer.conv1d.weight.clone()
    liven(model, 0)
    assert torch.equal(layer.conv1d.weight, drawn)
    liven(model, 1)
    assert not torch.equal(layer.conv1d.weight, drawn)


@pytest.mark.parametrize(
    ("config", "runner", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"model_is_mrope": True}, None, True),
        ({"model_is_mrope": False}, None, False),
    ],
)
def test_who_says_that_positions_have_three_axes(config: dict[str, bool], runner: bool | None, expected: bool) -> None:
    made = SimpleNamespace(model_config=SimpleNamespace(**config))
    if runner is not None:
        made.model_is_mrope = runner
    assert uses_mrope(made) is expected


def test_versions_are_three_numbers() -> None:
    assert [version_of(text) for text in ("0.5.17.post1", "0.6", "0.5.22rc1")] == [(0, 5, 17), (0, 6, 0), (0, 5, 22)]
