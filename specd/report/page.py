"""The HTML page of a report: one file without outside assets, for screen, phone and paper."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from typing import Any

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def document(title: str, body: str) -> str:
    """A whole page. title: plain text. body: HTML, escaped by its maker."""
    return _PAGE.format(title=text(title), style=_STYLE, body=body)


def text(value: str) -> str:
    """Plain text as HTML."""
    return html.escape(value)


def tile(value: str, name: str, remark: str) -> str:
    """One figure, large."""
    return f"<div><b>{text(value)}</b><span>{text(name)}</span><small>{text(remark)}</small></div>"


def picture(title: str, svg: str, caption: str) -> str:
    """A figure with its caption."""
    # As an image of its own: identifiers inside one picture cannot meet those of another.
    data = base64.b64encode(svg.encode()).decode()
    return (
        f'<figure><h2>{text(title)}</h2><img alt="{text(title)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def table(title: str, rows: Mapping[str, Any]) -> str:
    """Names and values under a heading."""
    cells = "".join(f"<tr><th>{text(str(key))}</th><td>{text(str(value))}</td></tr>" for key, value in rows.items())
    return f"<div><h2>{text(title)}</h2><table>{cells}</table></div>"


def definitions(meanings: Mapping[str, str]) -> str:
    """Terms and what they mean."""
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{text(said)}.</dd>" for name, said in meanings.items()) + "</dl>"


_STYLE = """
:root { color: #1f2937; background: #fff; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
body { margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; font-weight: 650; letter-spacing: -0.01em; }
h2 { font-size: 1rem; margin: 0 0 .5rem; font-weight: 650; }
header p { margin: .4rem 0 0; color: #4b5563; }
section { margin-top: 2.25rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 1.25rem 1.5rem;
  border-top: 1px solid #d1d5db; border-bottom: 1px solid #d1d5db; padding: 1.25rem 0; }
.tiles div { display: flex; flex-direction: column; }
.tiles b { font-size: 1.65rem; line-height: 1.2; font-weight: 650; font-variant-numeric: tabular-nums; }
.tiles small { color: #6b7280; }
.pictures, .tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.pictures { gap: 2.25rem 2.5rem; }
figure { margin: 0; break-inside: avoid; }
img { width: 100%; height: auto; display: block; }
figcaption { color: #4b5563; font-size: .875rem; margin-top: .35rem; }
dl { margin: 0; display: grid; grid-template-columns: minmax(9rem, max-content) 1fr; gap: .35rem 1.5rem; }
dl { font-size: .9375rem; }
dt { font-weight: 600; }
dd { margin: 0; color: #374151; max-width: 65ch; }
.tables { gap: 2rem 2.5rem; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
tr { border-top: 1px solid #e5e7eb; }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0; overflow-wrap: anywhere; }
th { font-weight: 500; color: #4b5563; width: 40%; }
pre { font-size: .8125rem; background: #f9fafb; padding: 1rem; margin: 0; white-space: pre-wrap; columns: 2 20rem; }
@media (max-width: 560px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
@media print {
  :root { font-size: 12px; }
  main { max-width: none; padding: 0; }
  section { break-inside: avoid; margin-top: 1.25rem; }
}
"""
