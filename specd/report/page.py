"""The HTML page that reports and charts are written to: one file, nothing from outside, for screen, phone and paper."""

from __future__ import annotations

import html

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
_STYLE = """
:root {{ color: #1f2937; background: #fff; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
body {{ margin: 0; }}
main {{ max-width: {width}px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }}
h1 {{ font-size: 1.75rem; line-height: 1.2; margin: 0; font-weight: 650; letter-spacing: -0.01em; }}
h2 {{ font-size: 1rem; margin: 0 0 .5rem; font-weight: 650; }}
"""


def document(title: str, body: str, style: str, width_px: int) -> str:
    """A whole page. title: plain text. body: HTML, escaped by its maker. style: CSS behind the common one."""
    return _PAGE.format(title=html.escape(title), style=_STYLE.format(width=width_px) + style, body=body)
