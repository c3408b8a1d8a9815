"""What the reports' HTML pages share: one file without network, light and dark, readable on a phone; plots are drawn
when they come near the screen.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from string import Template
from typing import Any, NamedTuple

__all__ = ["Chip", "facts", "finish", "legend", "page", "plot", "said"]


class Chip(NamedTuple):
    """A name in the key of the plots, with its line: ``dash`` as plotly says it."""

    name: str
    colour: str
    dash: str = "solid"


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """Return a whole page; ``style`` and ``script`` are what it has beyond the common ones."""
    from plotly.offline import get_plotlyjs

    parts = {"title": title, "body": body, "style": style, "script": script, "plotly": get_plotlyjs()}
    return Template(_HTML).substitute(parts)


def said(sentences: list[str]) -> str:
    """Set off the sentences that say what was found."""
    return f'<div class="said">{"".join(f"<p>{_unbroken(html.escape(words))}</p>" for words in sentences)}</div>'


def _unbroken(words: str) -> str:
    """Keep a browser from breaking a line inside 1e-3."""
    return re.sub(r"\d+e-\d+", r'<span class="whole">\g<0></span>', words)


def facts(pairs: Mapping[str, Any]) -> str:
    """List terms and what is to be said of them."""
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{html.escape(str(words))}</dd>' for name, words in pairs.items())}</dl>"


def legend(chips: Iterable[Chip]) -> str:
    """Return the key of all plots, which stays in sight; a click on a name hides its lines, or shows them again."""
    kinds = {"solid": "solid", "dot": "dotted"}  # CSS knows one kind of dashes
    buttons = (
        f'<button aria-pressed="true"><i style="border-color: {chip.colour}; border-top-style: '
        f'{kinds.get(chip.dash, "dashed")}"></i>{html.escape(chip.name)}</button>'
        for chip in chips
    )
    return f'<div class="key">{"".join(buttons)}</div>'


def finish(figure: Any, heading: str, height: int) -> None:
    """Give a plotly figure the look of the page, which sets the colour of its words."""
    axis = {"gridcolor": "rgba(128,128,128,.22)", "zeroline": False, "automargin": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis, title_standoff=4)
    figure.update_layout(template="none", showlegend=False, dragmode=False, height=height)
    figure.update_layout(title={"text": heading, "font": {"size": 14}}, margin={"l": 62, "r": 8, "t": 36, "b": 40})
    figure.update_layout(font={"size": 12, "family": "system-ui, sans-serif"})
    figure.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")


def plot(figure: Any) -> str:
    """Put a figure into the page."""
    data = figure.to_json().replace("</", "<\\/")  # inside a script element
    style = f"min-height: {figure.layout.height}px"
    return f'<div class="plot" style="{style}"><script type="application/json">{data}</script></div>'


_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>$title</title><style>
:root { --ink: #1d2329; --soft: #5b6570; --page: #fff; --line: #dfe3e8; --near: #009e7324; --bad: #d55e0026 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9aa4ae; --page: #14171a; --line: #2c3238 } }
* { box-sizing: border-box } body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif }
main { max-width: 1180px; margin: auto; padding: 24px 16px 64px } h1 { margin: 0; font-size: 1.7rem }
h2 { font-size: 1.1rem; margin: 44px 0 10px } .soft, dt, th { color: var(--soft); font-weight: 400 }
p { max-width: 76ch } .said { border-left: 3px solid #0072b2; padding-left: 14px; margin: 20px 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
td, th { padding: 5px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
tr > :first-child { text-align: left; padding-left: 0; color: var(--ink) } .missing { color: var(--soft) }
.whole { white-space: nowrap } .near { background: var(--near) } .far, .bad { background: var(--bad) }
.key { position: sticky; top: 0; z-index: 2; background: var(--page); padding: 8px 0; display: flex; gap: 4px 16px;
  flex-wrap: wrap } .key button { all: unset; cursor: pointer; white-space: nowrap; font-size: 14px }
.key button:focus-visible { outline: 2px solid #0072b2 } .key [aria-pressed=false] { opacity: .35 }
.key i { display: inline-block; width: 24px; border-top: 3px; margin-right: 6px; vertical-align: middle }
.plots { display: grid; gap: 12px; margin-top: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)) }
.plot { min-width: 0 } dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px }
dd { margin: 0; overflow-wrap: anywhere } @media (max-width: 600px) {
  .key { flex-wrap: nowrap; overflow-x: auto }
  td, th { padding: 5px 4px; font-size: 14px } th { white-space: normal } }
$style</style></head><body><main>
$body</main><script>$plotly</script><script>
const ink = () => ({ "font.color": getComputedStyle(document.documentElement).getPropertyValue("--soft").trim() });
const drawn = [], hidden = new Set();
const near = new IntersectionObserver(seen => seen.filter(e => e.isIntersecting).forEach(({ target }) => {
  near.unobserve(target);
  const { data, layout } = JSON.parse(target.firstChild.textContent);
  layout.font.color = ink()["font.color"];
  data.forEach(trace => trace.visible = !hidden.has(trace.name));
  Plotly.newPlot(target, data, layout, { responsive: true, displayModeBar: false });
  drawn.push(target);
}), { rootMargin: "600px" });
document.querySelectorAll(".plot").forEach(plot => near.observe(plot));
matchMedia("(prefers-color-scheme: dark)").onchange = () => drawn.forEach(plot => Plotly.relayout(plot, ink()));
document.querySelectorAll(".key button").forEach(button => button.onclick = () => {
  const name = button.textContent;
  hidden.delete(name) || hidden.add(name);
  button.setAttribute("aria-pressed", !hidden.has(name));
  drawn.forEach(plot => Plotly.restyle(plot, { visible: plot.data.map(trace => !hidden.has(trace.name)) }));
});
$script</script></body></html>
"""
