"""What all pictures and pages share: colours, panels, and one HTML file that needs no network.

matplotlib and plotly are imported where they are used: they take a second that the start of a command does not need.
"""

from __future__ import annotations

import html
import re
from string import Template
from typing import TYPE_CHECKING, Any

from emonavi.bench import log_ticks, lr_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MEANINGS", "PALETTE", "definitions", "document", "panels", "plot", "prepare", "ticks", "unbroken"]

# Okabe and Ito's palette: distinct for every kind of colour vision, without yellow and black, which vanish on one of
# the two backgrounds.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")

MEANINGS = {
    "scalar": "what the loss feels like, -1 to 1: above 0 it rises beyond its own noise, below 0 it improves",
    "drive": "the factor on your lr that the optimizer has found by itself",
    "trust": "does today's gradient agree with the last step? above 0 that step was too short, below 0 too long",
}


def ticks(low: float, high: float, plain: bool = False) -> tuple[list[float], list[str]]:
    """Return round places on a logarithmic axis and their labels: as people write an lr, or as plain numbers."""
    at = log_ticks(low, high)
    return at, [f"{tick:,g}" if plain else lr_label(tick) for tick in at]


def prepare(axis: Axes, low: float, high: float, log: bool, plain: bool = False) -> None:
    """Give an axis of matplotlib its range, its scale and the house's look; without ``plain`` its ticks are its own."""
    from matplotlib.ticker import NullFormatter

    axis.set_yscale("log" if log else "linear")
    if log and plain:
        axis.set_yticks(*ticks(low, high, plain))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(low, high)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def panels(rows: int, height: int, heading: str) -> Any:
    """Return a figure of plotly with panels below each other, in the house's look."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.05)
    axis = {"gridcolor": "rgba(128,128,128,.22)", "zeroline": False, "automargin": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis, title_standoff=4)
    figure.update_xaxes(row=rows, title="step")
    figure.update_layout(template="none", showlegend=False, dragmode=False, hovermode="x unified", height=height)
    figure.update_layout(title={"text": heading, "font": {"size": 14}}, margin={"l": 62, "r": 8, "t": 36, "b": 40})
    figure.update_layout(font={"size": 12, "family": "system-ui, sans-serif"})  # the page sets the colour
    figure.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")
    return figure


def plot(figure: Any) -> str:
    """Return the element in which the page draws a figure once it comes near."""
    data: str = figure.to_json()
    height = int(figure.layout.height)
    safe = data.replace("</", "<\\/")  # inside a script element
    return f'<div class="plot" style="min-height:{height}px"><script type="application/json">{safe}</script></div>'


def definitions(entries: dict[str, Any]) -> str:
    """Return a list of words and what they stand for."""
    return "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in entries.items())


def unbroken(words: str) -> str:
    """Keep a browser from breaking a line inside 1e-3."""
    return re.sub(r"\d+e-\d+", r'<span class="whole">\g<0></span>', words)


def document(title: str, body: str) -> str:
    """Return a page that stands alone: style, plotly and the figures of ``plot`` are inside."""
    from plotly.offline import get_plotlyjs

    return Template(_HTML).substitute(title=html.escape(title), body=body, plotly=get_plotlyjs())


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
.key { position: sticky; top: 0; z-index: 1; background: var(--page); padding: 8px 0 } .key span { margin-right: 18px }
.key i { display: inline-block; width: 20px; height: 4px; margin-right: 6px; vertical-align: middle }
.plots { display: grid; gap: 12px; margin-top: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)) }
.plots > * { min-width: 0 } dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px }
dd { margin: 0; overflow-wrap: anywhere } @media (max-width: 600px) {
  td, th { padding: 5px 4px; font-size: 14px } th { white-space: normal } }
</style></head><body><main>
$body
</main><script>$plotly</script><script>
const ink = () => ({ "font.color": getComputedStyle(document.documentElement).getPropertyValue("--soft").trim() });
const drawn = [];
const near = new IntersectionObserver(seen => seen.filter(e => e.isIntersecting).forEach(({ target }) => {
  near.unobserve(target);
  const { data, layout } = JSON.parse(target.firstChild.textContent);
  layout.font.color = ink()["font.color"];
  Plotly.newPlot(target, data, layout, { responsive: true, displayModeBar: false });
  drawn.push(target);
}), { rootMargin: "600px" });
document.querySelectorAll(".plot").forEach(plot => near.observe(plot));
matchMedia("(prefers-color-scheme: dark)").onchange = () => drawn.forEach(plot => Plotly.relayout(plot, ink()));
</script></body></html>
"""
