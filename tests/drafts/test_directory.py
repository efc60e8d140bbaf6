"""A draft's directory: found in a run, read, and known by its content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafts import make_draft
from specd.drafts.directory import conversion, digest, draft_directory, read_config, weight_files
from specd.errors import CheckpointError


def test_a_run_is_a_name_for_its_draft(tmp_path: Path) -> None:
    make_draft().export(tmp_path / "run" / "draft")
    assert (
        draft_directory(tmp_path / "run") == draft_directory(str(tmp_path / "run" / "draft")) == tmp_path / "run/draft"
    )
    assert draft_directory(tmp_path / "elsewhere") == tmp_path / "elsewhere"


def test_a_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    draft = make_draft()
    draft.export(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "README.md").write_text("other words")
    first = digest(tmp_path / "one")
    assert first == digest(tmp_path / "two")
    weights = load_file(tmp_path / "two" / "model.safetensors")
    weights["norm.weight"][0] += 1
    save_file(weights, tmp_path / "two" / "model.safetensors")
    assert digest(tmp_path / "two") != first
    config = read_config(tmp_path / "one") | {"rms_norm_eps": 1.0}
    (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    assert digest(tmp_path / "one") != first
    (tmp_path / "one" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is no draft directory"):
        digest(tmp_path / "one")


@pytest.mark.parametrize(
    ("content", "reason"), [("[1]", "holds a list"), ("{", "is no draft directory"), ("\xff", "is no")]
)
def test_what_is_no_config_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=reason):
        read_config(tmp_path)


def test_one_file_of_weights_goes_before_an_index(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or model\.safetensors\.index\.json"):
        weight_files(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part.safetensors"}}')
    assert weight_files(tmp_path) == [tmp_path / "part.safetensors"]
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("names", [["pytorch_model.bin"], ["pytorch_model-1.bin", "pytorch_model-2.bin"], ["draft.pt"]])
def test_pickled_weights_are_named_beside_a_remedy(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        torch.save({}, tmp_path / name)
    with pytest.raises(CheckpointError, match=f"pickled weights, {', '.join(names)}") as refused:
        weight_files(tmp_path)
    assert str(refused.value).endswith(conversion(names))
    assert "weights_only=True" in conversion(names)
