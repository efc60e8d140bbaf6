"""The package that is built holds what it should: the folders on disk, the links, the data, and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import specd
from specd.errors import DISTRIBUTION

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("transports", "cli", "bench", "configs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """Names of the files in the wheel, and in the source distribution."""
    out = tmp_path_factory.mktemp("dist")
    # Built from a copy: a build leaves folders behind, and tests must not.
    source = tmp_path_factory.mktemp("source")
    names = ["pyproject.toml", "README.md", "LICENSE", "specd", *LINKED]
    present = [name for name in names if (ROOT / name).exists()]
    subprocess.run(["cp", "--recursive", "--no-dereference", *present, str(source)], cwd=ROOT, check=True)
    (source / "README.md").touch()
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive, tarfile.open(sdist) as tar:
        return archive.namelist(), tar.getnames()


def folders() -> set[Path]:
    """All folders below specd/ with Python files, links followed; without those that are declared as data."""
    found = {path.parent for path in (ROOT / "specd").glob("*.py")}
    for name in [path.name for path in (ROOT / "specd").iterdir() if path.is_dir()]:
        found |= {path.parent for path in (ROOT / "specd" / name).rglob("*.py")}
    return found - {ROOT / "specd" / "configs" / "demo"}


def test_declared_packages_are_the_folders_on_disk() -> None:
    on_disk = {".".join(folder.relative_to(ROOT).parts) for folder in folders()}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_every_package_has_an_init() -> None:
    assert [str(folder) for folder in folders() if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("name", LINKED)
def test_links_resolve_to_the_top_level_folders(name: str) -> None:
    link = ROOT / "specd" / name
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == ROOT / name
    assert PROJECT["tool"]["setuptools"]["package-dir"][f"specd.{name}"] == name


def test_wheel_holds_only_specd_with_its_data(built: tuple[list[str], list[str]]) -> None:
    wheel, _ = built
    assert {name.split("/")[0] for name in wheel} == {"specd", f"specd_daemon-{specd.__version__}.dist-info"}
    expected = {"specd/py.typed", *(f"specd/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml"))}
    expected |= {f"specd/configs/demo/{path.name}" for path in (ROOT / "configs" / "demo").glob("*") if path.is_file()}
    expected |= {str(path.relative_to(ROOT)) for folder in folders() for path in folder.glob("*.py")}
    assert expected == {name for name in wheel if name.startswith("specd/")}


def test_source_distribution_holds_the_linked_folders(built: tuple[list[str], list[str]]) -> None:
    _, sdist = built
    for name in LINKED:
        assert any(entry.endswith(f"/{name}/__init__.py") for entry in sdist), name


def test_nobody_imports_the_top_level_folders() -> None:
    """`transports` is specd.transports, and tests import their helpers without `tests.`: it is no package."""
    wrong = re.compile(rf"^\s*(?:from|import)\s+(?:{'|'.join((*LINKED, 'tests'))})\b", re.MULTILINE)
    files = [path for folder in ("specd", "tests", *LINKED) for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    assert [path.name for path in files if wrong.search(path.read_text())] == []


def test_messages_know_the_name_of_the_distribution() -> None:
    assert DISTRIBUTION == PROJECT["project"]["name"] == "specd-daemon"


def test_version_stands_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", specd.__version__)
