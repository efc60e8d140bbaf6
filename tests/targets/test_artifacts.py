"""What of a target's files trainers can fetch, and what tells one tokenizer or chat template from another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

from chats import CHATML, MARKED, write_tokenizer
from specd.protocol.contract import TEMPLATES
from specd.targets.artifacts import Artifacts
from specd.targets.source import Source, resolve
from specd.targets.transforms import Transforms

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 400,
}
TOOL_USE = f"{TEMPLATES}/tool_use.jinja"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    place = write_tokenizer(tmp_path / "target")
    (place / "config.json").write_text(json.dumps(SHAPE))
    return place


def artifacts(directory: Path) -> Artifacts:
    table = torch.zeros(400, 8)
    return Artifacts(resolve(f"{directory}/"), SHAPE, {"embedding": table, "lm_head": table})


def digests(directory: Path) -> tuple[str, str]:
    """Those of the tokenizer and the chat template, in the contract."""
    contract = artifacts(directory).contract(
        Source(name="t", config=SHAPE), LlamaConfig(**SHAPE), "llama", "float32", "w", Transforms()
    )
    return contract.tokenizer, contract.chat_template


def several_templates(directory: Path, *, files: bool) -> None:
    """Save the tokenizer with two templates, as transformers does: in files, or in a list in its config."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = {"default": CHATML, "tool_use": MARKED}
    (directory / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(directory, save_jinja_files=files)


@pytest.mark.parametrize("files", [True, False])
def test_a_tokenizer_of_several_templates_is_whole_where_its_artifacts_are(
    directory: Path, tmp_path: Path, files: bool
) -> None:
    several_templates(directory, files=files)
    found = artifacts(directory)
    assert (TOOL_USE in found.files) is files
    there = tmp_path / "there"
    for name in found.files:
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(bytes(found.read(name)))
    tokenizer: Any = AutoTokenizer.from_pretrained(there)
    assert tokenizer.chat_template == {"default": CHATML, "tool_use": MARKED}


def test_a_further_template_tells_targets_apart_and_not_their_tokenizers(directory: Path) -> None:
    plain = digests(directory)
    several_templates(directory, files=True)
    several = digests(directory)
    (directory / TOOL_USE).write_text(CHATML)
    other = digests(directory)
    (directory / TOOL_USE).rename(directory / TEMPLATES / "rag.jinja")
    renamed = digests(directory)
    assert len({plain[1], several[1], other[1], renamed[1]}) == 4
    assert several[0] == other[0] == renamed[0]


def test_what_is_no_template_stays(directory: Path) -> None:
    several_templates(directory, files=True)
    (directory / TEMPLATES / "notes.txt").write_text("x")
    (directory / TEMPLATES / ".tool_use.jinja").write_text("x")
    assert [name for name in artifacts(directory).files if name.startswith(TEMPLATES)] == [TOOL_USE]


def test_a_processors_template_is_one_where_there_is_no_other(directory: Path) -> None:
    tokenizer, template = digests(directory)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": MARKED}))
    assert "chat_template.json" in artifacts(directory).files
    assert digests(directory) == (tokenizer, template)
    (directory / "chat_template.jinja").unlink()
    assert digests(directory)[0] == tokenizer
    assert digests(directory)[1] not in ("", template)
    (directory / "chat_template.json").unlink()
    assert digests(directory) == (tokenizer, "")
