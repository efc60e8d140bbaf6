"""A chart: what is drawn where, what shows under the pointer, and that texts stay texts."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import pytest

from specd.report import chart
from specd.report.chart import INNER_H, INNER_W, Chart, Series


def drawn(**changes: Any) -> Chart:
    values: dict[str, Any] = {
        "series": [Series(name="a", colour="#000", y=[0.0, 5.0, None, 10.0])],
        "x": [1, 2, 3, 4],
        "labels": ["one", "two", "three", "four"],
        "x_label": "step",
        "y_label": "loss",
        "top": 10.0,
    }
    return Chart(**(values | changes))


def tree(one: Chart, title: str = "t") -> ElementTree.Element:
    return ElementTree.fromstring(chart.svg(one, title))


def corners(element: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in element.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


def test_a_line_goes_from_corner_to_corner_and_stops_where_nothing_is_known() -> None:
    root = tree(drawn())
    first, alone = (corners(line) for line in root.iter("polyline"))
    assert first == [(0.0, INNER_H), (pytest.approx(INNER_W / 3, abs=0.1), INNER_H / 2)]
    assert alone == [(INNER_W, 0.0)]
    assert len(list(root.iter("circle"))) == 1, "a lone point is seen, too"


def test_the_pointer_gets_every_value() -> None:
    root = tree(drawn(value="{:.1f} nats".format))
    points = json.loads(root.attrib["data-points"])
    assert points["labels"] == ["one", "two", "three", "four"]
    assert points["lines"] == [["a", "#000", ["0.0 nats", "5.0 nats", "–", "10.0 nats"]]]
    assert points["at"] == sorted(points["at"])
    assert len(points["at"]) == 4


def test_a_stack_stands_on_what_is_below() -> None:
    parts = [Series(name=name, colour="#000", y=[2.0, 4.0]) for name in ("a", "b")]
    root = tree(drawn(series=parts, x=[1, 2], labels=["1", "2"], stacked=True))
    below, above = (corners(area) for area in root.iter("polygon"))
    assert [y for _, y in below] == pytest.approx([0.8 * INNER_H, 0.6 * INNER_H, INNER_H, INNER_H])
    assert [y for _, y in above] == pytest.approx([0.6 * INNER_H, 0.2 * INNER_H, 0.6 * INNER_H, 0.8 * INNER_H])


def test_one_point_of_a_stack_is_as_wide_as_the_frame() -> None:
    root = tree(drawn(series=[Series(name="a", colour="#000", y=[2.0])], x=[1], labels=["1"], stacked=True))
    assert {x for x, _ in corners(next(root.iter("polygon")))} == {0.0, INNER_W}


def test_names_are_text() -> None:
    one = drawn(series=[Series(name="</svg><b>'\"", colour="#000", y=[1.0] * 4)], note="<i>", x_label="<u>")
    words = {text.text for text in tree(one, '"<p>').iter("text")}
    assert {"<i>", "<u>"} <= words
    for part in (chart.svg(one, '"<p>'), chart.legend(one)):
        assert "<b>" not in part


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0, 0.3, [0, 0.1, 0.2, 0.3]), (1, 2400, [500, 1000, 1500, 2000]), (3, 3, [3])],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert chart.round_ticks(low, high) == pytest.approx(ticks)
