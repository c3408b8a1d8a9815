"""The pictures of a learning-rate study: what is drawn, once, and how plotly and matplotlib draw it.

A chart is a few curves and how its axes run; the page shows it interactively, and a PNG holds many of them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from emonavi import page
from emonavi.bench.peers import YARDSTICK
from emonavi.bench.summary import Entry, Study, share
from emonavi.page import lr_label

__all__ = ["STYLES", "Chart", "Style", "figure", "pictured", "png", "profile", "style", "sweep", "traces"]

TOP = 3.0  # times the yardstick: what is worse is drawn here

_BLUE, _ORANGE, _GREEN, _PINK, _RED, _SKY = page.PALETTE


@dataclass(frozen=True)
class Style:
    """Colour, kind of line and marker; no two entries share all three, and ours are thick."""

    colour: str = page.GREY
    dash: str = "longdash"
    marker: str = "star"
    thick: bool = False


STYLES = {
    "AdamW + cosine": Style(page.GREY, "dash", "square", thick=True),
    "Lion + cosine": Style(_GREEN, "dash", "square"),
    "EmoFact rule + cosine": Style(_ORANGE, "dash", "square"),
    "EmoNavi raw": Style(_BLUE, "solid", "circle", thick=True),
    "EmoNavi calm": Style(_BLUE, "dot", "circle", thick=True),
    "EmoFact raw": Style(_ORANGE, "solid", "circle", thick=True),
    "EmoFact calm": Style(_ORANGE, "dot", "circle", thick=True),
    "EmoLynx raw": Style(_GREEN, "solid", "circle", thick=True),
    "EmoLynx calm": Style(_GREEN, "dot", "circle", thick=True),
    "EmoClan raw": Style(_BLUE, "dash", "diamond", thick=True),
    "EmoClan calm": Style(_BLUE, "dashdot", "diamond", thick=True),
    "EmoZeal raw": Style(_ORANGE, "dash", "diamond", thick=True),
    "EmoZeal calm": Style(_ORANGE, "dashdot", "diamond", thick=True),
    "EmoNeco raw": Style(_GREEN, "dash", "diamond", thick=True),
    "EmoNeco calm": Style(_GREEN, "dashdot", "diamond", thick=True),
    "Emotional(AdamW) raw": Style(_SKY, "solid", "square", thick=True),
    "Emotional(AdamW) calm": Style(_SKY, "dot", "square", thick=True),
    "Emotional(SGD) raw": Style(_PINK, "solid", "square", thick=True),
    "Emotional(SGD) calm": Style(_PINK, "dot", "square", thick=True),
    "Emotional(Muon) raw": Style(_RED, "solid", "square", thick=True),
    "Emotional(Muon) calm": Style(_RED, "dot", "square", thick=True),
    "SGD": Style(_PINK, "dashdot", "x"),
    "Muon": Style(_RED, "dashdot", "x"),
    "AdamW": Style(page.GREY, "solid", "diamond"),
    "Prodigy": Style(_RED, "solid", "diamond"),
    "Prodigy + cosine": Style(_RED, "dash", "square"),
    "ScheduleFree AdamW": Style(_PINK, "solid", "diamond"),
    "MoMo-Adam": Style(_GREEN, "solid", "triangle-up"),
    "Adafactor": Style(_ORANGE, "dashdot", "triangle-down"),
    "Lion": Style(_GREEN, "dashdot", "triangle-down"),
    "EmoNavi (pytorch_optimizer)": Style(_SKY, "solid", "x"),
    "EmoNavi v1": Style(_SKY, "dot", "triangle-up"),
    "EmoNavi v3": Style(_SKY, "dash", "triangle-down"),
    "EmoNavi v4": Style(_SKY, "dashdot", "diamond"),
}
# A PNG holds as many as these, and these before others: of more, nobody tells one line from another.
_PICTURED = (
    *("EmoNavi raw", "EmoNavi calm", "EmoFact raw"),
    *(YARDSTICK, "AdamW", "Prodigy", "ScheduleFree AdamW", "MoMo-Adam"),
)
_MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "x": "x",
    "star": "*",
}


def style(label: str) -> Style:
    """Return the style of an entry; an optimizer that is not in the table is grey with stars."""
    return STYLES.get(label, Style())


@dataclass(frozen=True)
class Curve:
    """One line of a chart; ``words`` are what a pointer on it shows."""

    label: str
    x: list[float]
    y: list[float]
    words: list[str]


@dataclass(frozen=True)
class Chart:
    """Curves and their axes. A range that is None fits the data."""

    title: str
    x_title: str
    y_title: str
    curves: list[Curve] = field(default_factory=list)
    x_log: bool = False
    y_log: bool = False
    x_ticks: dict[float, str] = field(default_factory=dict)
    y_ticks: dict[float, str] = field(default_factory=dict)
    y_range: tuple[float, float] | None = None
    markers: bool = False
    line: float | None = None  # a horizontal one


# --- What is drawn


def pictured(study: Study) -> list[str]:
    """The labels that the PNGs show: of many, those that are asked for most."""
    labels = [entry.label for entry in study.entries]
    shown = sorted(labels, key=lambda label: label not in _PICTURED)[: len(_PICTURED)]
    return [label for label in labels if label in shown]


def profile(study: Study, split: str) -> Chart:
    """Share of the pairs that are within a factor of the tuned yardstick."""
    taus = [0.9 * (TOP / 0.9) ** (i / 80) for i in range(81)]
    chart = Chart(
        *(f"{split} tasks", f"loss / best {YARDSTICK}", "share of pairs within"),
        x_log=True,
        x_ticks={tau: f"{tau:g}" for tau in (0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0)},
        y_ticks={i / 5: f"{i / 5:.0%}" for i in range(6)},
        y_range=(-0.02, 1.02),
    )
    for entry in study.entries:
        if pairs := study.pairs(entry, study.tasks(split)):
            shares = [share(pairs, tau) for tau in taus]
            words = [f"{y:.0%} within {tau:.2f}" for y, tau in zip(shares, taus, strict=True)]
            chart.curves.append(Curve(entry.label, taus, shares, words))
    return chart


def sweep(study: Study, task: str) -> Chart:
    """Loss over the yardstick's best against the lr."""
    curves = []
    for entry in study.entries:
        ratios = study.ratios(entry, [task]).get(task, {})
        words = [f"lr {lr_label(lr)}: {ratio:.3g}" for lr, ratio in ratios.items()]
        curves.append(Curve(entry.label, list(ratios), [min(ratio, TOP) for ratio in ratios.values()], words))
    low = min((y for curve in curves for y in curve.y), default=1.0)
    return Chart(
        *(f"{task}: loss / best {YARDSTICK}", "lr", "", curves),
        x_log=True,
        y_log=True,
        markers=True,
        line=1.0,
        x_ticks={10.0**e: lr_label(10.0**e) for e in range(-5, 1)},
        y_ticks={y: f"{y:g}" for y in (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, TOP)},
        y_range=(min(low, 0.95) / 1.03, TOP * 1.04),
    )


def traces(study: Study, task: str, key: str) -> Chart:
    """Effective lr (``lr``) or train loss (``loss``) against the step: ours at each lr, the yardstick at its best."""
    curves = []
    tuned = study.losses(task, Entry(YARDSTICK))
    for row in (row for row in study.rows if row["task"] == task and row["seed"] == 0 and row["trace"]):
        shadowed = Entry(row["optimizer"], "calm", shadow=True)
        best = row["optimizer"] == YARDSTICK and row["lr"] == min(tuned, key=tuned.__getitem__)
        if best or (shadowed in study.entries and row["lr"] in study.lrs):
            points = [(x, y) for x, y in zip(row["trace"]["step"], row["trace"][key], strict=True) if y is not None]
            label = YARDSTICK if best else Entry(row["optimizer"], shadow=True).label
            words = [f"from lr {lr_label(row['lr'])}: {y:.3g}" for _, y in points]
            curves.append(Curve(label, [x for x, _ in points], [y for _, y in points], words))
    name = {"lr": "effective lr", "loss": "train loss"}[key]
    values = [y for curve in curves for y in curve.y] or [1.0]
    log = min(values) > 0  # a policy's loss is not
    ticks = {10.0**e: lr_label(10.0**e) for e in range(-9, 2)}
    if key == "loss":
        ticks = page.ticks(min(values), max(values), plain=True) if log else {}
    return Chart(f"{task}: {name}", "step", "", curves, y_log=log, y_ticks=ticks)


# --- How it is drawn


def figure(chart: Chart, height: int = 400) -> Any:
    """Return a chart as a plotly figure."""
    made = page.panels(1, height, chart.title)
    for curve in chart.curves:
        look = style(curve.label)
        made.add_scatter(
            **{"x": curve.x, "y": curve.y, "name": curve.label, "text": curve.words},
            mode="lines+markers" if chart.markers else "lines",
            line={"color": look.colour, "width": 2.4 if look.thick else 1.3, "dash": look.dash},
            marker={"symbol": look.marker, "size": 7 if look.thick else 5},
            hovertemplate="%{text}<extra>%{fullData.name}</extra>",
        )
    page.scale(made.update_xaxes, chart.x_log, None, chart.x_ticks, title=chart.x_title)
    page.scale(made.update_yaxes, chart.y_log, chart.y_range, chart.y_ticks, title=chart.y_title)
    if chart.line is not None:
        made.add_hline(chart.line, line={"color": page.GREY, "width": 1})
    made.update_layout(hovermode="closest")
    return made


def png(charts: Sequence[Chart], columns: int, shown: Collection[str]) -> bytes:
    """Draw charts side by side, of each the curves that are shown, with one legend: in a free place if there is one."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(charts) / columns)
    free, beside = rows * columns - len(charts), max(1, 4 * columns // 3)
    below = 0.0 if free else 0.3 + 0.25 * math.ceil(len(shown) / beside)
    sheet = Figure(figsize=(3.6 * columns, 2.8 * rows + below), dpi=110, layout="constrained")
    axes = sheet.subplots(rows, columns, squeeze=False).flatten()
    for axis, chart in zip(axes, charts, strict=False):
        _draw(axis, chart, shown)
    for axis in axes[len(charts) :]:
        axis.set_axis_off()
    lines = {line.get_label(): line for axis in axes for line in axis.lines if line.get_label() in shown}
    key: dict[str, Any] = {"handles": list(lines.values()), "labels": list(lines), "frameon": False}
    if any(curve.label not in shown for chart in charts for curve in chart.curves):
        key["title"] = "all others are in report.html"
    if lines and free:
        axes[-1].legend(**key, loc="center", alignment="left")
    elif lines:  # a bench that has just begun has none, nor has one whose yardstick diverged
        sheet.legend(**key, loc="outside lower center", ncols=beside)
    content = io.BytesIO()
    sheet.savefig(content)
    return content.getvalue()


def _draw(axis: Any, chart: Chart, shown: Collection[str]) -> None:
    curves = [curve for curve in chart.curves if curve.label in shown]
    for curve in curves:
        look = style(curve.label)
        mark = {"marker": _MARKERS[look.marker], "markersize": 4} if chart.markers else {}
        wide, dash = 2.0 if look.thick else 1.2, page.DASHES[look.dash].matplotlib
        axis.plot(curve.x, curve.y, color=look.colour, lw=wide, ls=dash, label=curve.label, **mark)
    axis.set(title=chart.title, xlabel=chart.x_title, ylabel=chart.y_title)
    axis.tick_params("x", labelsize=9)
    xs, ys = ([v for curve in curves for v in getattr(curve, name)] for name in ("x", "y"))
    for direction, log, ticks, values, fixed in (
        ("x", chart.x_log, chart.x_ticks, xs, None),
        ("y", chart.y_log, chart.y_ticks, ys, chart.y_range),
    ):
        low, high = fixed or (min(values, default=0.1), max(values, default=1.0))
        if not fixed:
            pad = 1.02 * (high / low) ** 0.02 if log else 1.0
            low, high = low / pad, high * pad
        page.prepare(axis, low, high, log, ticks, direction)
    if not xs:
        axis.text(0.5, 0.5, "nothing to draw", transform=axis.transAxes, ha="center", color=page.GREY)
    if chart.line is not None:
        axis.axhline(chart.line, color=page.GREY, lw=0.8)
