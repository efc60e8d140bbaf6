"""`specd push` against a hub on this machine: what arrives is a draft that others can serve."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml

from drafts import make_draft
from hub import Hub
from specd.cli.main import run
from specd.evaluate.results import EVALS
from specd.train.directory import RunFacts
from specd.train.export import PROVENANCE, DraftFacts, sign

MODEL = "/secret/my models/Qwen3-8B"


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    """An exported draft whose target was a directory, called as in its README."""
    draft = tmp_path / "draft"
    make_draft(figures={"model": MODEL}).export(
        draft, {"tokenizer.json": b"{}", "additional_chat_templates/a.jinja": b"a"}
    )
    facts = RunFacts(
        started="then", target={"model": MODEL, "fingerprint": "f"}, draft={}, data={}, transports={}, machine={},
        config={"method": "dflash", "target": {"model": MODEL, "tokenizer": "/secret/tokens"}},
    )  # fmt: skip
    sign(draft, facts, 7, 9)
    (draft / EVALS["untrained"]).write_bytes(b"{}")
    return draft


def push(hub: Hub, *arguments: str, token: str = "hf_write") -> subprocess.CompletedProcess[str]:
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-P", "-m", "specd", "push", *arguments]
    return subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False, timeout=120)


def test_what_arrives_is_a_draft_that_others_can_serve(draft: Path) -> None:
    with Hub() as hub:
        done = push(hub, str(draft), "me/my-draft", "--base", "Qwen/Qwen3-8B", "--private")
        assert done.returncode == 0, done.stderr
        assert f"pushed to {hub.url}/me/my-draft, revision c0ffee" in done.stdout
    files = hub.repositories["me/my-draft"]
    assert hub.private["me/my-draft"]
    assert hub.messages == ["Draft at step 7"]
    assert files.keys() == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", PROVENANCE,
        "additional_chat_templates/a.jinja",
    }  # fmt: skip
    assert files["model.safetensors"] == (draft / "model.safetensors").read_bytes()
    text = files["README.md"].decode()
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "Qwen/Qwen3-8B"
    assert "vllm serve Qwen/Qwen3-8B --speculative-config" in text
    assert '"model": "me/my-draft"' in text
    assert "--model-path Qwen/Qwen3-8B --speculative-draft-model-path me/my-draft " in text
    assert not [name for name, content in files.items() if b"secret" in content or b"DRAFT" in content]
    facts = msgspec.json.decode(files[PROVENANCE], type=DraftFacts)
    assert (facts.target["model"], facts.step) == ("Qwen/Qwen3-8B", 7)


def test_what_cannot_be_pushed_says_why_in_a_line(draft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests run with HF_HUB_OFFLINE=1."""
    for arguments, code, said in (
        (("me/d",), 2, f"target is {MODEL!r}, which nobody else has: give --base OWNER/NAME"),
        (("a/b/c", "--base", "a/b"), 2, "repository 'a/b/c': "),
        (("me/d", "--base", "a/b"), 1, "the hub cannot be reached, nothing was pushed"),
    ):
        assert run(["-q", "push", str(draft), *arguments]) == code
        assert said in capsys.readouterr().err
    with Hub() as hub:
        done = push(hub, str(draft), "me/d", "--base", "a/b", token="hf_read")
    assert done.returncode == 2
    assert "the hub does not let you write to 'me/d' (401): log in with `hf auth login`" in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.repositories == {}
