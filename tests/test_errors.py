"""The error tree, and the helpers that turn other libraries' errors into its messages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from specd import errors
from specd.errors import CheckpointError, ConfigError, SpecdError, TransportError, first_line, missing_extra, writing


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
    assert "pip install 'specd[report]'" in str(found)


def test_what_cannot_be_written_says_where_and_what_to_do(tmp_path: Path) -> None:
    place = tmp_path / "none" / "run.json"
    said = rf"cannot write {place}: {os.strerror(2)}; free some space.*--resume"
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
