"""The files of a target that is hosted by the trainer, where its data is prepared before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from specd.cli.hosting import laid_out
from specd.targets.source import Source


def test_files_of_a_target_lie_as_a_daemon_gives_them(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with laid_out(Source(name="t", config={"vocab_size": 7}, path=tmp_path)) as files:
        names = {str(file.relative_to(files)) for file in files.rglob("*") if file.is_file()}
        assert names == {"config.json", "tokenizer.json", "additional_chat_templates/tools.jinja"}
        assert json.loads((files / "config.json").read_bytes()) == {"vocab_size": 7}
    assert not files.exists()


def test_a_target_without_a_directory_has_its_config_alone() -> None:
    with laid_out(Source(name="t", config={})) as files:
        assert [file.name for file in files.iterdir()] == ["config.json"]
