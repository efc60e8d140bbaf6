"""What a contract says of a target: what tells it from others, and under which names its files may be written."""

from __future__ import annotations

import msgspec
import pytest

from specd.protocol.contract import FINGERPRINT, TEMPLATES, TargetContract, is_file_name

CONTRACT = TargetContract(
    model="tiny", model_type="llama", hidden_size=8, num_layers=6, vocab_size=64, dtype="float32", weights="abc",
    tokenizer="def", chat_template="",
)  # fmt: skip


def test_a_fingerprint_has_a_part_for_each_fact_about_states() -> None:
    assert CONTRACT.fingerprint == "llama:8:6:64:float32:abc:def:"
    assert dict(zip(FINGERPRINT, CONTRACT.fingerprint.split(":"), strict=True))["weights"] == "abc"
    for name in FINGERPRINT:
        changed = msgspec.structs.replace(CONTRACT, **{name: 9 if isinstance(getattr(CONTRACT, name), int) else "x"})
        assert changed.fingerprint != CONTRACT.fingerprint
    assert msgspec.structs.replace(CONTRACT, model="other", artifacts={}).fingerprint == CONTRACT.fingerprint


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.model", "a b", "vocab..json", f"{TEMPLATES}/tool_use.jinja", f"{TEMPLATES}/a b.jinja"],
)
def test_plain_names_and_those_of_chat_templates_are_file_names(name: str) -> None:
    assert is_file_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".bashrc", "/etc/x", "../x", "a/b", "a/", "a\0", TEMPLATES + "/", f"{TEMPLATES}/x.py"]
    + [f"{TEMPLATES}/{rest}" for rest in (".jinja", "../x.jinja", "a/x.jinja", "./x.jinja")]
    + [f"{before}{TEMPLATES}/x.jinja" for before in ("/", "./", "../", "a/")],
)  # fmt: skip
def test_paths_are_none(name: str) -> None:
    assert not is_file_name(name)
