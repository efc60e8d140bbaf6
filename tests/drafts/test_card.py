"""The README of an exported draft carries the commands that serve it, and what goes wrong otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from drafts import CONFIG as DRAFT
from drafts import make_draft
from eagle import make_eagle
from specd.drafts.card import card, sglang, vllm, with_section

WINDOW = {"sliding_window": 6}


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({}, [], ["is_causal", "V2 model runner"]),
        (WINDOW, [], ["is_causal", "V2 model runner"]),
        (
            WINDOW | {"sliding_causal": False},
            ["SGLang from 0.5.18 on: older ones ignore is_causal"],
            ["V2"],
        ),
        (WINDOW | {"full_layers": 1}, ["vLLM needs its V2 model runner"], ["is_causal"]),
    ],
)
def test_dflash(tmp_path: Path, changes: dict[str, Any], said: list[str], unsaid: list[str]) -> None:
    make_draft(msgspec.structs.replace(DRAFT, **changes)).export(tmp_path, {"README.md": b"the target's"})
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\ntags:\n- speculative-decoding\n- dflash\n---\n\n# DFlash draft for tiny\n")
    for part in (
        "--model-path tiny --speculative-draft-model-path DRAFT --speculative-algorithm DFLASH",
        "vllm serve tiny --speculative-config "
        """'{"method": "dflash", "model": "DRAFT", "num_speculative_tokens": 3}'""",
        "| taps | 1, 3, 5 |",
        *said,
    ):
        assert part in text
    assert not [part for part in unsaid if part in text]


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({}, ""),
        ({"norm_before_residual": True}, "Not with SGLang, which ignores norm_before_residual"),
        ({"norm_before_fc": True}, "SGLang from 0.5.17 on"),
    ],
)
def test_eagle3(tmp_path: Path, shape: dict[str, Any], said: str) -> None:
    make_eagle(shape=shape).export(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for part in (
        "# EAGLE-3 draft for tiny",
        "--speculative-algorithm EAGLE3 --speculative-num-steps 4 --speculative-eagle-topk 1 "
        "--speculative-num-draft-tokens 5",
        '{"method": "eagle3", "model": "DRAFT", "num_speculative_tokens": 4}',
        said,
    ):
        assert part in text
    assert yaml.safe_load(text.split("---\n")[1])["tags"] == ["speculative-decoding", "eagle3"]
    assert ("SGLang from" in text, "Not with" in text) == ("SGLang from" in said, "Not with" in said)


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    make_draft().export(tmp_path / "draft")
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "draft").iterdir()}
    assert modes.keys() == {"README.md", "config.json", "model.safetensors"}
    assert len(set(modes.values())) == 1
    (tmp_path / "new").touch()
    assert modes["model.safetensors"] == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize(
    ("target", "served"),
    [("qwen3-8b", "Qwen/Qwen3-8B"), ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"), ("/my models/it's", "'/my models/it'\"'\"'s'")],
)
def test_engines_are_given_a_target_that_they_know(target: str, served: str) -> None:
    assert f" --model-path {served} --spec" in sglang(target, "")
    assert f"vllm serve {served} --spec" in vllm(target, "eagle3", 3)


def test_a_hub_reads_whose_draft_it_is() -> None:
    for target, base in (
        ("qwen3-8b", "Qwen/Qwen3-8B"),
        ("a/b-1.0", "a/b-1.0"),
        ("/a/b", None),
        ("synthetic:hidden=8", None),
    ):
        head = card("DFlash", target, {}, {}, []).decode().split("---\n")[1]
        assert yaml.safe_load(head).get("base_model") == base


def test_a_section_stands_once_and_last() -> None:
    once = with_section("# A\n\ntext\n", "Training", ["one", "", "more"])
    assert once == "# A\n\ntext\n\n## Training\n\none\n\nmore\n"
    assert with_section(once, "Training", ["two"]) == "# A\n\ntext\n\n## Training\n\ntwo\n"
    assert with_section("", "Training", ["two"]) == "## Training\n\ntwo\n"
