"""What all pictures and pages share: colours, axes, and one HTML file that needs no network.

A page is light and dark, readable on a phone, and draws its plots when they come near the screen. matplotlib and plotly
are imported where they are used: they take a second that the start of a command does not need.
"""

from __future__ import annotations

import html
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    *("DASHES", "GREY", "MEANINGS", "PALETTE", "Chip", "Dash", "any_script", "as_it_is", "definitions", "document"),
    *("legend", "lr_label", "panels", "plot", "prepare", "said", "sample", "scale", "ticks"),
]

# Okabe and Ito's palette: distinct for every kind of colour vision, without yellow and black, which vanish on one of
# the two backgrounds.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
GREY = "#808080"  # of a baseline, and of what belongs to nobody
_FEW_CHIPS = 6  # that may take two lines of a phone; of more there is one line, which scrolls

MEANINGS = {
    "scalar": "what the loss feels like, -1 to 1: above 0 it rises beyond its own noise, below 0 it improves",
    "drive": "the factor on your lr that the optimizer has found by itself",
    "trust": "does today's gradient agree with the last step? above 0 that step was too short, below 0 too long",
}


class Dash(NamedTuple):
    """A kind of line, as matplotlib and as SVG say it."""

    matplotlib: Any
    svg: str


# By plotly's names.
DASHES = {
    "solid": Dash("-", "none"),
    "dot": Dash(":", "2 4"),
    "dash": Dash("--", "8 5"),
    "dashdot": Dash("-.", "8 4 2 4"),
    "longdash": Dash((0, (8, 3)), "12 4"),
}


class Chip(NamedTuple):
    """A name in the key of the plots, with its line: ``dash`` as plotly says it."""

    name: str
    colour: str
    dash: str = "solid"


# --- Names of runs and folders, which are the user's


# Fonts for what matplotlib's own has no letters for.
_FAR_FONTS = ("Noto Sans CJK JP", "IPAexGothic", "Hiragino Sans", "Yu Gothic", "MS Gothic", "PingFang SC", "SimHei")


@contextmanager
def any_script() -> Iterator[None]:
    """What matplotlib makes and writes meanwhile may have names in any script, as far as there are fonts for it."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    families = [*matplotlib.rcParams["font.family"], *(name for name in _FAR_FONTS if name in installed)]
    with matplotlib.rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a box says so
        yield


def as_it_is(name: str, width: int = 90, lines: int = 1) -> str:
    """A name for matplotlib, which would take two dollars for a formula, broken into lines of ``width`` letters.

    What is too long for ``lines`` of them loses its middle: names of runs differ at their ends.
    """
    width = width if name.isascii() else width * 5 // 8  # letters of far scripts are wider
    most = width * lines
    if len(name) > most:
        name = f"{name[: most // 2]}…{name[1 - (most + 1) // 2 :]}"
    return "\n".join(textwrap.wrap(name, width)).replace("$", r"\$")


# --- Axes and panels


def lr_label(lr: float) -> str:
    """Write a learning rate as people say it: 1e-3 instead of 0.001 or 1e-03."""
    mantissa, exponent = f"{lr:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def ticks(low: float, high: float, plain: bool = False) -> dict[float, str]:
    """Return round places on a logarithmic axis and their labels: as people write an lr, or as plain numbers."""
    return {tick: f"{tick:,g}" if plain else lr_label(tick) for tick in _round_numbers(low, high)}


def _round_numbers(low: float, high: float) -> list[float]:
    """Return round numbers for a logarithmic axis: 1, 2, 5 in each decade, over more than two decades 1 only."""
    heads = (1, 2, 5) if high < 100 * low else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{head}e{decade}") for decade in decades for head in heads]
    return [tick for tick in ticks if low <= tick <= high]


def prepare(
    axis: Axes, low: float, high: float, log: bool, at: Mapping[float, str] | None = None, direction: str = "y"
) -> None:
    """Give an axis of matplotlib its range, its scale and the house's look; without ``at`` its ticks are its own."""
    from matplotlib.ticker import NullFormatter

    getattr(axis, f"set_{direction}scale")("log" if log else "linear")
    if at:  # ticks widen the axis: the limits come after them
        getattr(axis, f"set_{direction}ticks")(list(at), list(at.values()))
        getattr(axis, f"{direction}axis").set_minor_formatter(NullFormatter())
    getattr(axis, f"set_{direction}lim")(low, high)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def scale(
    update: Callable[..., Any],
    log: bool,
    span: tuple[float, float] | None = None,
    at: Mapping[float, str] | None = None,
    **more: Any,
) -> None:
    """The same for plotly, through a figure's ``update_xaxes`` or ``update_yaxes``; without ``span`` it fits."""
    if span:
        more["range"] = [math.log10(end) for end in span] if log else list(span)
    if at:
        more |= {"tickvals": list(at), "ticktext": list(at.values())}
    update(type="log" if log else "linear", **more)


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


# --- The page


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """Return a page that stands alone: plotly and the figures of ``plot`` are inside.

    ``style`` and ``script`` are what it has beyond the common ones.
    """
    from plotly.offline import get_plotlyjs

    parts = {"title": html.escape(title), "body": body, "style": style, "script": script, "plotly": get_plotlyjs()}
    return Template(_HTML).substitute(parts, accent=PALETTE[0], good=PALETTE[2], bad=PALETTE[4])


def plot(figure: Any) -> str:
    """Return the element in which the page draws a figure once it comes near."""
    data = figure.to_json().replace("</", "<\\/")  # inside a script element
    height = f"min-height: {figure.layout.height}px"
    return f'<div class="plot" style="{height}"><script type="application/json">{data}</script></div>'


def said(sentences: Iterable[str]) -> str:
    """Set off the sentences that say what was found."""
    return f'<div class="said">{"".join(f"<p>{_unbroken(html.escape(words))}</p>" for words in sentences)}</div>'


def _unbroken(words: str) -> str:
    """Keep a browser from breaking a line inside 1e-3."""
    return re.sub(r"\d+e-\d+", r'<span class="whole">\g<0></span>', words)


def definitions(entries: Mapping[str, Any]) -> str:
    """Return a list of words and what they stand for."""
    pairs = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in entries.items())
    return f"<dl>{''.join(pairs)}</dl>"


def sample(colour: str, dash: str = "solid") -> str:
    """Return a piece of a line, for a key."""
    return (
        f'<svg class="sample" width="28" height="6"><path d="M0 3h28" stroke="{colour}" stroke-width="3" '
        f'stroke-dasharray="{DASHES[dash].svg}"/></svg>'
    )


def legend(chips: Iterable[Chip]) -> str:
    """Return the key of all plots, which stays in sight; a click on a name hides its lines, or shows them again."""
    buttons = [
        f'<button aria-pressed="true">{sample(chip.colour, chip.dash)}{html.escape(chip.name)}</button>'
        for chip in chips
    ]
    return f'<div class="key{" many" if len(buttons) > _FEW_CHIPS else ""}">{"".join(buttons)}</div>'


_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>$title</title><style>
:root { --ink: #1d2329; --soft: #5b6570; --page: #fff; --line: #dfe3e8; --accent: $accent;
  --near: ${good}24; --bad: ${bad}26 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9aa4ae; --page: #14171a; --line: #2c3238 } }
* { box-sizing: border-box } body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif }
main { max-width: 1180px; margin: auto; padding: 24px 16px 64px } h1 { margin: 0; font-size: 1.7rem }
h2 { font-size: 1.1rem; margin: 44px 0 10px } .soft, dt, th { color: var(--soft); font-weight: 400 }
p { max-width: 76ch } .said { border-left: 3px solid var(--accent); padding-left: 14px; margin: 20px 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
td, th { padding: 5px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
tr > :first-child { text-align: left; padding-left: 0; color: var(--ink) } .missing { color: var(--soft) }
.whole { white-space: nowrap } .near { background: var(--near) } .far, .bad { background: var(--bad) }
.key { position: sticky; top: 0; z-index: 2; background: var(--page); padding: 8px 0; display: flex; gap: 4px 16px;
  flex-wrap: wrap } .key button { all: unset; cursor: pointer; white-space: nowrap; font-size: 14px }
.key button:focus-visible { outline: 2px solid var(--accent) } .key [aria-pressed=false] { opacity: .35 }
.sample { margin-right: 6px; vertical-align: middle }
.plots { display: grid; gap: 12px; margin-top: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)) }
.plots > * { min-width: 0 } dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px }
dd { margin: 0; overflow-wrap: anywhere } @media (max-width: 600px) {
  .many { flex-wrap: nowrap; overflow-x: auto }
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
