"""The HTML of a report: what goes into it is text, never markup."""

from __future__ import annotations

import msgspec

from specd.report import page
from specd.report.chart import Chart, Series

CHART = Chart(series=[Series(name="<s>", colour="#000", y=[1.0])], x=[1], labels=["<l>"], x_label="x", y_label="y")


def test_texts_are_escaped() -> None:
    parts = [
        page.tile("<1>", "a & b", '"x"'),
        page.table("<t>", {"<k>": "<v>", "n": 3}),
        page.definitions({"<d>": "m"}),
        page.picture("<p>", CHART, "<c>"),
        page.settings({"<d>": "<v>"}),
    ]
    whole = page.document("<title>", "".join(parts))
    assert "<title>&lt;title&gt;</title>" in whole
    for name in ("<1>", "<t>", "<k>", "<v>", "<d>", "<p>", "<c>", "<s>", "<l>"):
        assert name not in whole.replace("<title>", "")
    assert whole.count("&lt;p&gt;") == 2, "heading and alternative text"


def test_a_picture_has_a_legend_where_it_has_several_lines() -> None:
    assert "legend" not in page.picture("p", CHART, "c")
    two = msgspec.structs.replace(CHART, series=[*CHART.series, Series(name="<b>", colour="#111", y=[2.0])])
    assert '<ul class="legend">' in page.picture("p", two, "c")


def test_columns_have_a_head_each() -> None:
    made = page.columns(["a", "<b>"], {"lr": ["1", "<2>"]})
    assert made.count("<th") == 3
    assert "&lt;b&gt;" in made
    assert "<td>&lt;2&gt;</td>" in made
