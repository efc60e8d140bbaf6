"""Files and users as they also are: a byte order mark, gzip, a name that is not UTF-8, no home."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from chats import talk, write_target
from specd.cli.main import run

LINES = (json.dumps({"messages": talk("Name a colour.", "Blue is one.")}) + "\n").encode() * 2


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SPECD_CACHE", str(tmp_path / "cache"))
    return str(write_target(tmp_path / "target"))


def test_files_of_windows_and_compressed_ones_are_counted(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in {"bom.jsonl": b"\xef\xbb\xbf" + LINES, "packed.jsonl.gz": gzip.compress(LINES)}.items():
        (tmp_path / name).write_bytes(data)
        assert run(["data", "stats", str(tmp_path / name), "--model", target, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["report"]["samples"] == 2


@pytest.mark.parametrize("setting", ["data", "output", "model"])
def test_a_path_that_is_not_utf8_is_refused_before_anything_is_written(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    paths = {"data": str(tmp_path / "data.jsonl"), "output": str(tmp_path / "run"), "model": target}
    Path(paths["data"]).write_bytes(LINES)
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    if setting != "output":
        Path(paths[setting]).rename(odd)
    paths[setting] = odd
    arguments = [word for key, path in paths.items() for word in (f"--{key}", path)]
    before = sorted(tmp_path.iterdir())
    assert run(["train", "dflash", *arguments, "--set", "draft.mask_token_id=9"]) == 2
    assert "caf\\xe9' is not UTF-8" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_user_without_a_home_is_told_which_variable_to_set(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_bytes(LINES)
    for name in ("SPECD_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert run(["data", "stats", str(tmp_path / "data.jsonl"), "--model", target]) == 2
    assert "has no home directory: HOME is not set" in (said := capsys.readouterr().err)
    assert "set SPECD_CACHE" in said
