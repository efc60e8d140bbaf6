"""Charts of benchmarks: PNG or SVG, by the name of the file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from specd.bench import charts
from specd.errors import ConfigError


def draw(figure: Figure) -> None:
    figure.subplots().plot([1, 2])


@pytest.mark.parametrize(("name", "begin"), [("x.png", b"\x89PNG"), ("x.svg", b"<?xml")])
def test_the_name_says_the_format(tmp_path: Path, name: str, begin: bytes) -> None:
    charts.write(tmp_path / name, draw, 2, 1)
    assert (tmp_path / name).read_bytes().startswith(begin)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x.html", r"x\.html': expected a file that ends in \.png or \.svg, such as 'x\.png'; .* --json prints"),
        ("x", "such as 'x.png'"),
        ("missing/x.png", "its directory does not exist"),
    ],
)
def test_a_file_that_will_not_do(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^--chart '.*{reason}"):
        charts.check(tmp_path / name)


def test_matplotlib_is_asked_for_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="matplotlib"):
        charts.check(tmp_path / "x.png")
