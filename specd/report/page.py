"""The HTML page of a report: one file without outside assets, for screen, phone and paper."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specd.errors import CheckpointError
from specd.report import chart
from specd.report.chart import Chart

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
<script>{script}</script>
</body>
</html>
"""


def document(title: str, body: str) -> str:
    """A whole page. title: plain text. body: HTML, escaped by its maker."""
    return _PAGE.format(title=text(title), style=_STYLE, body=body, script=_SCRIPT)


def save(path: Path, whole: str) -> None:
    """Write a page. Raises CheckpointError where that fails."""
    try:
        path.write_text(whole, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}; name another file with --to") from None


def text(value: str) -> str:
    """Plain text as HTML."""
    return html.escape(value)


def tile(value: str, name: str, remark: str) -> str:
    """One figure, large."""
    return f"<div><b>{text(value)}</b><span>{text(name)}</span><small>{text(remark)}</small></div>"


def picture(title: str, drawn: Chart, caption: str) -> str:
    """A chart with its legend and caption; its values show under the pointer."""
    return (
        f"<figure><h2>{text(title)}</h2>{chart.legend(drawn) if len(drawn.series) > 1 else ''}"
        f'<div class="chart">{chart.svg(drawn, title)}<div class="tip" role="status" hidden></div></div>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def settings(values: Mapping[str, Any]) -> str:
    """What was set, in a strip."""
    pairs = (f"<div><dt>{text(name)}</dt><dd>{text(str(value))}</dd></div>" for name, value in values.items())
    return f'<dl class="settings">{"".join(pairs)}</dl>'


def columns(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table with a column for each head, under an empty corner."""
    head = "".join(f'<th scope="col">{text(one)}</th>' for one in heads)
    body = "".join(
        f'<tr><th scope="row">{text(name)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in rows.items()
    )
    return f'<div class="wide"><table><tr><td></td>{head}</tr>{body}</table></div>'


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
.chart { position: relative; }
.chart > svg { width: 100%; height: auto; display: block; touch-action: pan-y; }
.chart text { font-size: 13px; fill: #374151; font-variant-numeric: tabular-nums; }
.chart .grid { stroke: #e5e7eb; stroke-width: .8; }
.chart .axis { stroke: #6b7280; stroke-width: .9; }
.chart .rule { stroke: #1f2937; stroke-width: .8; stroke-dasharray: 3 2; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: 0 0 .25rem; padding: 0;
  font-size: .8125rem; color: #374151; }
.legend i, .tip i { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .4em; }
.tip { position: absolute; top: .5rem; pointer-events: none; background: #fffffff2; border: 1px solid #d1d5db;
  border-radius: 4px; padding: .3rem .55rem; font-size: .8125rem; line-height: 1.35; max-width: 70%;
  box-shadow: 0 1px 4px #0002; font-variant-numeric: tabular-nums; }
.tip b { display: block; font-weight: 600; }
.tip span { display: block; }
.settings { margin-top: 1rem; display: grid; grid-template-columns: repeat(auto-fill, minmax(min(170px, 45%), 1fr));
  gap: .35rem 1.5rem; font-size: .8125rem; }
.settings dt { font-weight: 400; color: #6b7280; }
.settings dd { overflow-wrap: anywhere; line-height: 1.3; }
.wide { overflow-x: auto; }
.wide th { width: auto; }
.wide td { font-variant-numeric: tabular-nums; min-width: 7rem; }
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
_SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-points]")) {
  const points = JSON.parse(svg.dataset.points), rule = svg.querySelector(".rule");
  const tip = svg.parentElement.querySelector(".tip"), width = svg.viewBox.baseVal.width;
  let shown = -1;
  const row = ([name, colour, said]) => {
    const line = document.createElement("span"), mark = document.createElement("i");
    mark.style.background = colour;
    line.append(mark, name + " " + said[shown]);
    return line;
  };
  const show = index => {
    shown = Math.max(0, Math.min(points.at.length - 1, index));
    const x = points.at[shown], head = document.createElement("b");
    rule.setAttribute("x1", x); rule.setAttribute("x2", x); rule.setAttribute("visibility", "visible");
    head.textContent = points.labels[shown];
    tip.replaceChildren(head, ...points.lines.map(row));
    const share = 100 * x / width;
    tip.style.left = share < 50 ? `calc(${share}% + 8px)` : "auto";
    tip.style.right = share < 50 ? "auto" : `calc(${100 - share}% + 8px)`;
    tip.hidden = false;
  };
  const hide = () => { tip.hidden = true; rule.setAttribute("visibility", "hidden"); shown = -1; };
  const point = event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * width;
    let best = 0;
    points.at.forEach((at, index) => { if (Math.abs(at - x) < Math.abs(points.at[best] - x)) best = index; });
    show(best);
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", event => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (move) { event.preventDefault(); show(shown + move); }
    if (event.key === "Escape") hide();
  });
}
"""
