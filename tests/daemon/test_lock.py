"""The lock of an endpoint: where its files lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from specd.daemon.lock import owned
from specd.errors import ConfigError


def test_an_endpoint_elsewhere_needs_no_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/nowhere")
    tmp_path.chmod(0o700)
    with owned(f"ipc://{tmp_path}/d.sock") as prefix:
        assert prefix == tmp_path / "d.sock"
    with pytest.raises(ConfigError, match="set XDG_RUNTIME_DIR"), owned("tcp://127.0.0.1:7070"):
        pass
