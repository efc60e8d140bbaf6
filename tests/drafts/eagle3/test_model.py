"""The EAGLE-3 network: its shape beside a target, the names of its tensors, and where its head begins."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from drafts import HIDDEN, TARGET, VOCAB
from eagle import CONFIG, parts
from specd.drafts.eagle3.model import Eagle3Draft, Eagle3Shape, draft_shape
from specd.drafts.eagle3.objective import Eagle3
from specd.drafts.eagle3.settings import Eagle3Config
from specd.errors import ConfigError

SHAPE = draft_shape(CONFIG, TARGET, (1, 3, 4))


def test_it_takes_its_shape_from_the_target() -> None:
    assert (SHAPE.hidden_size, SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_dim) == (HIDDEN, 4, 2, 8)
    assert (SHAPE.vocab_size, SHAPE.draft_vocab_size, SHAPE.rope_theta) == (VOCAB, 60, 5000.0)
    own = Eagle3Config(num_heads=8, num_kv_heads=4, head_dim=4, intermediate_size=20, draft_vocab_size=0)
    shape = draft_shape(own, {"text_config": TARGET, "model_type": "wrapper"}, (1, 3, 4))
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.intermediate_size) == (8, 4, 4, 20)
    assert shape.draft_vocab_size == VOCAB
    assert draft_shape(Eagle3Config(), TARGET, (1, 3, 4)).draft_vocab_size == VOCAB  # 32,000 at most


def test_tensors_have_the_published_names() -> None:
    names = {name: list(tensor.shape) for name, tensor in Eagle3Draft(SHAPE).state_dict().items()}
    assert names == {
        "fc.weight": [32, 96],
        "midlayer.self_attn.q_proj.weight": [32, 64],
        "midlayer.self_attn.k_proj.weight": [16, 64],
        "midlayer.self_attn.v_proj.weight": [16, 64],
        "midlayer.self_attn.o_proj.weight": [32, 32],
        "midlayer.mlp.gate_proj.weight": [48, 32],
        "midlayer.mlp.up_proj.weight": [48, 32],
        "midlayer.mlp.down_proj.weight": [32, 48],
        "midlayer.hidden_norm.weight": [32],
        "midlayer.input_layernorm.weight": [32],
        "midlayer.post_attention_layernorm.weight": [32],
        "norm.weight": [32],
        "lm_head.weight": [60, 32],
        "d2t": [60],
    }
    normed = Eagle3Draft(msgspec.structs.replace(SHAPE, fc_norm=True)).state_dict()
    assert normed.keys() - names.keys() == {f"fc_norm.{tap}.weight" for tap in range(3)}


def test_the_head_begins_with_the_targets_rows() -> None:
    target = parts()
    draft = Eagle3(CONFIG, target, seed=4).draft
    assert torch.equal(draft.lm_head.weight, target.lm_head[draft.vocabulary])
    assert torch.equal(draft.fc.weight, Eagle3(CONFIG, target, seed=4).draft.fc.weight)
    assert not torch.equal(draft.fc.weight, Eagle3(CONFIG, target, seed=5).draft.fc.weight)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is not a positive even number"),
        ({"draft_vocab_size": 98}, "draft_vocab_size 98 exceeds the target's vocabulary of 97"),
        ({"taps": (1, 7)}, r"taps \[1, 7\] leave the legal range"),
        ({"intermediate_size": 0}, "must be positive"),
    ],
)
def test_shapes_that_cannot_be(changes: dict[str, Any], reason: str) -> None:
    assert SHAPE.problem() is None
    broken: Eagle3Shape = msgspec.structs.replace(SHAPE, **changes)
    found = broken.problem()
    assert found is not None
    with pytest.raises(ConfigError, match=reason):
        raise ConfigError(found)


def test_a_target_without_a_size_is_refused() -> None:
    without = {key: value for key, value in TARGET.items() if key != "intermediate_size"}
    with pytest.raises(ConfigError, match="no key 'intermediate_size': an EAGLE-3 draft takes its shape from it"):
        draft_shape(CONFIG, without, (1, 3, 4))
    with pytest.raises(ConfigError, match="num_heads 4 is not a multiple"):
        draft_shape(Eagle3Config(num_kv_heads=3), TARGET, (1, 3, 4))
