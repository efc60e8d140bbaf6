"""The HTML of a report: what goes into it is text, never markup."""

from __future__ import annotations

import base64

from specd.report import page


def test_texts_are_escaped() -> None:
    parts = [
        page.tile("<1>", "a & b", '"x"'),
        page.table("<t>", {"<k>": "<v>", "n": 3}),
        page.definitions({"<d>": "m"}),
        page.picture("<p>", "<svg></svg>", "<c>"),
    ]
    whole = page.document("<title>", "".join(parts))
    assert "<title>&lt;title&gt;</title>" in whole
    for name in ("<1>", "<t>", "<k>", "<v>", "<d>", "<p>", "<c>"):
        assert name not in whole.replace("<title>", "")
    assert whole.count("&lt;p&gt;") == 2, "heading and alternative text"


def test_a_picture_is_an_image_of_its_own() -> None:
    svg = '<svg id="a"/>'
    assert f"base64,{base64.b64encode(svg.encode()).decode()}" in page.picture("p", svg, "c")
    assert svg not in page.picture("p", svg, "c")
