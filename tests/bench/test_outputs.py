"""Files that a benchmark writes: refused early, replaced when whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from specd.bench import outputs
from specd.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/x.json", "its directory does not exist"),
        (".", "it is a directory; name a file in it"),
        ("/dev/null", "it is no plain file, and one would take its place; name another"),
        ("x" * 255, r"it cannot be written \(File name too long\); name another file"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^--save '/.*{reason}"):
        outputs.check("--save", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    outputs.check("--save", path)
    assert not path.exists()
    for content in (b"one", b"two"):
        outputs.write(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
