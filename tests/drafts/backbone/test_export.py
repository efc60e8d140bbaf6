"""Draft directories: written, read back, refused, and equal to the published implementation on the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafts import load_draft, save_draft
from specd.drafts.backbone.network import Backbone
from specd.drafts.backbone.shape import draft_shape
from specd.drafts.block_attention import BlockLayout, plain_attention
from specd.drafts.dflash.settings import DFlashConfig
from specd.errors import CheckpointError, ConfigError

HIDDEN, VOCAB, BLOCK = 48, 97, 6
TARGET: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "rms_norm_eps": 1e-4,
    "max_position_embeddings": 512,
    "rope_theta": 700.0,
    "tie_word_embeddings": True,
}


def make_draft(seed: int = 0, shape: dict[str, Any] | None = None, **changes: Any) -> Backbone:
    config = msgspec.structs.replace(DFlashConfig(num_layers=2, block_size=BLOCK, mask_token_id=3), **changes)
    draft = Backbone(msgspec.structs.replace(draft_shape(config, TARGET, (1, 4, 9)), **(shape or {})), seed)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in draft.parameters():
            # Larger than at the start of training, and no gain left at 1: every part must matter.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 1.0))
    return draft


def published(path: Path) -> Any:
    module = pytest.importorskip("dflash.model", reason="the published implementation is a development dependency")
    return module.DFlashDraftModel.from_pretrained(path, dtype=torch.float32).eval()


def states(length: int) -> Tensor:
    return torch.randn(length, 3 * HIDDEN, generator=torch.Generator().manual_seed(length))


def noise(blocks: int) -> Tensor:
    return torch.randn(blocks * BLOCK, HIDDEN, generator=torch.Generator().manual_seed(100 + blocks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draft_is_read_back_as_written(tmp_path: Path, dtype: torch.dtype) -> None:
    draft = make_draft(sliding_window=9)
    save_draft(draft, tmp_path / "run" / "draft", dtype=dtype, files={"tokenizer.json": b"{}"})
    again = load_draft(tmp_path / "run" / "draft")
    assert again.shape == draft.shape
    for (name, ours), theirs in zip(draft.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours.to(dtype).float(), theirs), name
    assert (tmp_path / "run" / "draft" / "tokenizer.json").read_bytes() == b"{}"
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["draft"]


def test_config_has_the_published_keys(tmp_path: Path) -> None:
    save_draft(make_draft(), tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    expected = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": BLOCK,
        "num_target_layers": 12,
        "num_hidden_layers": 2,
        "dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 4, 9]},
        "layer_types": ["full_attention"] * 2,
        "dtype": "bfloat16",
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_theta": 700.0,
        "tie_word_embeddings": True,
    }
    assert {key: config[key] for key in expected} == expected
    weights = load_file(tmp_path / "draft" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not [name for name in weights if "embed" in name or "lm_head" in name]


def test_chat_templates_lie_beside_a_draft_as_beside_its_target(tmp_path: Path) -> None:
    name = "additional_chat_templates/tool_use.jinja"
    save_draft(make_draft(), tmp_path / "draft", files={"chat_template.jinja": b"a", name: b"b"})
    assert (tmp_path / "draft" / name).read_bytes() == b"b"


def test_an_older_draft_is_replaced(tmp_path: Path) -> None:
    save_draft(make_draft(), tmp_path / "draft", files={"old.txt": b"x"})
    save_draft(make_draft(num_layers=1), tmp_path / "draft")
    assert load_draft(tmp_path / "draft").shape.num_layers == 1
    assert not (tmp_path / "draft" / "old.txt").exists()


def test_a_directory_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the draft"):
        save_draft(make_draft(), tmp_path / "file" / "draft")
    # A file name that cannot exist fails half-way; the draft of before stays.
    save_draft(make_draft(), tmp_path / "draft")
    with pytest.raises(CheckpointError, match="cannot write the draft"):
        save_draft(make_draft(num_layers=1), tmp_path / "draft", files={"x" * 300: b""})
    assert load_draft(tmp_path / "draft").shape.num_layers == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["draft", "file"]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, {}),
        ({"sliding_window": 8}, {}),
        ({"sliding_window": 8, "sliding_causal": False}, {}),
        ({"sliding_window": 8, "full_layers": 1}, {}),
        ({"sliding_window": 8, "full_layers": 1}, {"is_causal": True}),
        ({}, {"rope_scaling": YARN}),
        ({}, {"rope_scaling": LLAMA3, "attention_bias": True}),
    ],
)
def test_one_block_equals_the_published_forward(tmp_path: Path, changes: dict[str, Any], shape: dict[str, Any]) -> None:
    draft = make_draft(shape=shape, **changes)
    save_draft(draft, tmp_path / "draft", dtype=torch.float32)
    theirs = published(tmp_path / "draft")
    assert {name: tuple(p.shape) for name, p in theirs.state_dict().items()} == {
        name: tuple(p.shape) for name, p in draft.state_dict().items()
    }
    assert theirs.config.rope_parameters["rope_theta"] == 700.0
    assert (theirs.block_size, theirs.mask_token_id, list(theirs.target_layer_ids)) == (BLOCK, 3, [1, 4, 9])
    for length in (1, 21):
        taps, block = states(length), noise(1)
        layout = BlockLayout(
            starts=np.zeros(1, np.int64), anchors=np.array([length]), block_size=BLOCK, num_context=length
        )
        with torch.no_grad():
            ours = draft(
                taps,
                torch.arange(length),
                block,
                torch.arange(length, length + BLOCK),
                plain_attention(layout, torch.device("cpu")),
            )
            expected = theirs(
                position_ids=torch.arange(length + BLOCK)[None], noise_embedding=block[None], target_hidden=taps[None]
            )[0]
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_the_published_package_feeds_it_what_its_target_reads(tmp_path: Path) -> None:
    draft = make_draft(shape={"input_embedding_scale": 7.5, "output_multiplier": 0.5, "final_logit_softcapping": 9.0})
    table = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(4))
    save_draft(draft, tmp_path / "draft", dtype=torch.float32, embedding=draft.scaled(table))
    theirs = published(tmp_path / "draft")
    module = pytest.importorskip("dflash.model", reason="the published implementation is a development dependency")
    assert module._draft_value(theirs.config, "input_embedding_scale", 1.0) == 7.5
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in draft.state_dict().items())
    hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(5))
    products = hidden @ table.T
    torch.testing.assert_close(
        theirs.compute_logits(hidden, lambda x: x @ table.T), 9.0 * torch.tanh(products * 0.5 / 9.0)
    )
    assert load_draft(tmp_path / "draft").shape == draft.shape


def test_a_packed_training_forward_equals_one_published_call_a_block(tmp_path: Path) -> None:
    draft = make_draft()
    save_draft(draft, tmp_path / "draft", dtype=torch.float32)
    theirs = published(tmp_path / "draft")
    lengths = (19, 3, 12)
    chosen: list[list[int]] = [[1, 7, 18], [], [2, 11]]
    begins = np.array([0, 19, 22], np.int64)
    starts = np.repeat(begins, [len(part) for part in chosen])
    relative = np.concatenate([np.array(part, np.int64) for part in chosen])
    layout = BlockLayout(starts=starts, anchors=starts + relative, block_size=BLOCK, num_context=sum(lengths))
    taps, blocks = states(sum(lengths)), noise(len(relative))
    with torch.no_grad():
        ours = draft(
            taps,
            torch.cat([torch.arange(length) for length in lengths]),
            blocks,
            torch.from_numpy((relative[:, None] + np.arange(BLOCK)).reshape(-1)),
            plain_attention(layout, torch.device("cpu")),
        )
        for index, (start, p) in enumerate(zip(starts.tolist(), relative.tolist(), strict=True)):
            rows = slice(index * BLOCK, (index + 1) * BLOCK)
            expected = theirs(
                position_ids=torch.arange(p + BLOCK)[None],
                noise_embedding=blocks[None, rows],
                target_hidden=taps[None, start : start + p],
            )[0]
            torch.testing.assert_close(ours[rows], expected, atol=1e-5, rtol=1e-5)


def test_a_draft_saved_by_the_published_implementation_loads_here(tmp_path: Path) -> None:
    draft = make_draft()
    save_draft(draft, tmp_path / "ours", dtype=torch.float32)
    published(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load_draft(tmp_path / "theirs")
    assert again.shape == draft.shape
    assert all(torch.equal(a, b) for a, b in zip(draft.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["DFlash2DraftModel"]}, "architectures is .*DFlash2DraftModel.*expected"),
        ({"model_type": "llama"}, "model_type is 'llama', expected 'qwen3'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_type is 'longrope', expected default, "),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 5}, "sliding_window 5 is shorter than a block"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ({"dflash_config": {"target_layer_ids": [1, 4, 9]}}, "no key 'mask_token_id'"),
        ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": [4, 1]}}, "not strictly ascending"),
        ({"dflash_config": {"mask_token_id": 1000, "target_layer_ids": [1]}}, "mask_token_id 1000"),
        ({"hidden_size": "big"}, "hidden_size"),
    ],
)
def test_configs_of_other_drafts_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_draft(make_draft(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConfigError, match=message):
        load_draft(tmp_path)


def test_broken_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no draft directory"):
        load_draft(tmp_path / "missing")
    save_draft(make_draft(), tmp_path / "draft")
    file = tmp_path / "draft" / "model.safetensors"
    weights = load_file(file)
    save_file({name: tensor for name, tensor in weights.items() if name != "fc.weight"}, file)
    with pytest.raises(CheckpointError, match=r"first 'fc.weight': found none, expected \[48, 144\]"):
        load_draft(tmp_path / "draft")
    save_file({**weights, "norm.weight": torch.ones(7)}, file)
    with pytest.raises(CheckpointError, match=r"first 'norm.weight': found \[7\], expected \[48\]"):
        load_draft(tmp_path / "draft")
    file.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="no draft directory"):
        load_draft(tmp_path / "draft")
    (tmp_path / "draft" / "config.json").write_text("[]")
    save_file(weights, file)
    with pytest.raises(CheckpointError, match="holds a list"):
        load_draft(tmp_path / "draft")
