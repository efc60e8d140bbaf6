"""The error tree, and the helpers that turn other libraries' errors into its messages."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from specd import errors
from specd.errors import (
    CheckpointError,
    ConfigError,
    SpecdError,
    TransportError,
    first_line,
    missing_extra,
    pip_install,
    writing,
)


def test_every_error_is_one_of_the_tree_as_it_is_drawn() -> None:
    kinds = {
        name for name, found in vars(errors).items() if isinstance(found, type) and found.__module__ == "specd.errors"
    }
    assert all(issubclass(getattr(errors, name), SpecdError) for name in kinds)
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in kinds)
    assert len(kinds) <= 12
    assert (TransportError("x").lost, TransportError("x", lost=True).lost) == (False, True)


def test_a_missing_package_says_how_to_get_it() -> None:
    found = missing_extra("matplotlib", "report")
    assert isinstance(found, ConfigError)
    assert "matplotlib" in str(found)
    assert str(found).endswith(f"install it with: {pip_install('report')}")


Installed = Callable[[str, str | None], None]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Puts a specd on the path, with the metadata that an installer leaves, and takes this copy for it from then on."""

    def install(place: str, direct_url: str | None) -> None:
        site = tmp_path / place
        info = site / "specd_daemon-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: specd-daemon\nVersion: 1.0\n")
        if direct_url is not None:
            (info / "direct_url.json").write_text(direct_url)
        monkeypatch.syspath_prepend(site)
        monkeypatch.setattr(errors, "__file__", str(site / "specd" / "errors.py"))

    return install


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with a name that a shell would take apart."""
    place = tmp_path / "my specd's $tree"
    place.mkdir()
    (place / "pyproject.toml").write_text(f'[project]\nname = "{errors.DISTRIBUTION}"\n')
    return place


def test_what_runs_in_its_source_tree_is_installed_from_there(
    tree: Path, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In editable mode, or found through PYTHONPATH while another copy is installed."""
    installed("elsewhere", None)
    monkeypatch.setattr(errors, "__file__", str(tree / "specd" / "errors.py"))
    assert shlex.split(pip_install("cuda13,nccl")) == ["pip", "install", "-e", f"{tree}[cuda13,nccl]"]


def test_what_was_built_from_a_source_tree_is_built_from_it_again(tree: Path, installed: Installed) -> None:
    installed("site", json.dumps({"url": tree.as_uri(), "dir_info": {}}))
    assert shlex.split(pip_install("nixl")) == ["pip", "install", f"{tree}[nixl]"]
    (tree / "pyproject.toml").write_text("[project]\nname = 'another'\n")
    assert pip_install("nixl") == "pip install 'specd-daemon[nixl]'"


@pytest.mark.parametrize(
    "direct_url",
    [
        pytest.param(None, id="index"),
        pytest.param('{"url": "file:///dist/specd_daemon-1.0-py3-none-any.whl", "archive_info": {}}', id="wheel"),
        pytest.param('{"url": "https://host/specd", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}', id="git"),
        pytest.param('{"url": "file:///gone/specd", "dir_info": {"editable": false}}', id="removed tree"),
    ],
)
def test_what_is_installed_is_asked_for_by_its_name(direct_url: str | None, installed: Installed) -> None:
    installed("site", direct_url)
    assert pip_install("sglang") == "pip install 'specd-daemon[sglang]'"


def test_a_copy_is_told_from_others_on_the_path(tree: Path, installed: Installed, tmp_path: Path) -> None:
    installed("later", json.dumps({"url": tree.as_uri(), "dir_info": {}}))
    installed("first", None)
    assert pip_install("hub") == "pip install 'specd-daemon[hub]'"
    with pytest.MonkeyPatch.context() as patch:  # the later one is searched only for what the first one lacks
        patch.setattr(errors, "__file__", str(tmp_path / "later" / "specd" / "errors.py"))
        assert shlex.split(pip_install("hub"))[-1] == f"{tree}[hub]"
        patch.setattr(errors, "__file__", str(tmp_path / "unpacked" / "specd" / "errors.py"))
        assert pip_install("hub") == "pip install 'specd-daemon[hub]'", "no distribution has it"


def test_what_cannot_be_written_says_where_and_what_to_do(tmp_path: Path) -> None:
    place = tmp_path / "none" / "run.json"
    said = rf"cannot write {place}: {os.strerror(2)}; free some space there, then go on with `specd resume RUN`"
    with pytest.raises(CheckpointError, match=said), writing(place):
        place.write_text("{}")
    with pytest.raises(ValueError, match="not ours"), writing(place):
        raise ValueError("not ours")


@pytest.mark.parametrize(
    ("error", "line"),
    [(OSError("first\nsecond"), "first"), (ValueError("  \n lead\n"), "lead"), (KeyError(), "KeyError")],
)
def test_of_another_librarys_error_one_line_is_kept(error: BaseException, line: str) -> None:
    assert first_line(error) == line
