"""What linters do not see: machine paths, another project's name for pip, files that grew too long."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MACHINE_PATH = re.compile(r"/(?:home|root|Users|work)/[A-Za-z0-9_.-]+")
# On the package index the bare name is another project: with extras, as an installer's argument, as a dependency.
WRONG_NAME = re.compile(
    r"(?<![\w.-])specd(?:\\?\[|==|>=|~=)"
    r"|\b(?:pip3? install|uv add|uvx|pipx install)(?:\s+-[\w-]+)*[\s'\"f]+specd(?![\w./-])"
    r"|\bdependencies\s*=\s*\[[^\]]*(?:\"specd\"|'specd')"
)
MAX_LINES = 400
BINARY = {".png", ".parquet", ".safetensors", ".gz", ".jpg"}


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Files that are in the repository or would be added to it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_no_machine_paths(files: list[Path]) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        if path.suffix not in BINARY
        for match in MACHINE_PATH.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "pip install '{}[nccl]'",
        r"match=r'pip install \'{}\[hub\]'",
        "pip install {}",
        "`pip install -U {}` first",
        '"with pip install "\n    "\'{}\', or"',
        "uv add {}",
        'dependencies = [\n    "msgspec",\n    "{}",\n]',
        "{}>=0.1",
    ],
)
def test_the_wrong_name_is_recognised(text: str) -> None:
    assert WRONG_NAME.search(text.format("specd"))
    assert not WRONG_NAME.search(text.format("specd-daemon"))


def test_nobody_is_told_to_install_another_project(files: list[Path]) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        if path.suffix not in BINARY
        for match in WRONG_NAME.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_no_file_is_too_long(files: list[Path]) -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files if path.suffix == ".py"}
    assert {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_file_is_too_large(files: list[Path]) -> None:
    assert [str(path.relative_to(ROOT)) for path in files if path.stat().st_size > 1 << 20] == []


def test_every_module_begins_with_its_sentence(files: list[Path]) -> None:
    def opening(path: Path) -> str:
        return path.read_text(encoding="utf-8").lstrip()[:3]

    sources = [path for path in files if path.suffix == ".py"]
    silent = [str(path.relative_to(ROOT)) for path in sources if path.stat().st_size and opening(path) != '"""']
    assert silent == []
