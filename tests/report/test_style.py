"""The look of charts: formats, the same bytes for the same picture, and matplotlib's absence."""

from __future__ import annotations

import re
import sys

import matplotlib
import pytest
from matplotlib.figure import Figure

from specd.errors import ConfigError, pip_install
from specd.report import style


def draw(figure: Figure) -> None:
    figure.subplots().plot([1, 2], [3, 4])


def test_a_picture_has_its_format_and_always_the_same_bytes() -> None:
    before = dict(matplotlib.rcParams)
    assert style.render(draw, 2, 1, "png").startswith(b"\x89PNG")
    svg = style.render(draw, 2, 1, "svg")
    assert b"<svg" in svg
    assert svg == style.render(draw, 2, 1, "svg")
    assert dict(matplotlib.rcParams) == before, "the settings are those of one picture"


def test_colours_differ() -> None:
    colours = [style.BLUE, style.SKY, style.ORANGE, style.GREEN, style.RED, style.PURPLE, style.INK, style.GREY]
    assert len(set(colours)) == len(colours)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=re.escape(pip_install("report"))):
        style.render(draw, 2, 1, "png")
