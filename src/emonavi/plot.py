"""``emonavi plot``: what optimizers felt, from TensorBoard's event files to one PNG and one HTML page.

Needs ``emonavi[demo]``.
"""

from __future__ import annotations

import html
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import emonavi
from emonavi import page
from emonavi.events import Curve, Run, read
from emonavi.page import lr_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["PANELS", "Panel", "draw"]

_DASHES = ("solid", "dot", "dash", "dashdot")
_FEW = len(page.PALETTE)  # runs that have a colour each, and dashes for their curves
_MOST = _FEW * len(_DASHES)  # runs that can be told apart


@dataclass(frozen=True)
class Panel:
    """What is shown together."""

    title: str
    tags: dict[str, str]  # regular expression of a tag -> name of its curve; the first is the most telling
    meaning: str
    first: str = ""  # the meaning where only the first curve is shown
    log: bool = False  # wherever the values are above 0 and more than a decade apart
    limit: float = math.inf  # the most that is shown, on either side of 0
    plain: bool = True  # ticks as plain numbers, instead of 1e-3
    noisy: bool = False  # its mean is drawn over it
    late: bool = False  # a 0 at the first step says that there is no value yet

    def of_many(self) -> Panel:
        """The panel for more runs than there are colours: with its first curve only."""
        tag, name = next(iter(self.tags.items()))
        return replace(self, title=self.title.split(",")[0], tags={tag: name}, meaning=self.first or self.meaning)

    def curves(self, run: Run) -> list[Curve]:
        """The curves of a run; groups with the same lr are one."""
        found: list[Curve] = []
        for pattern, name in self.tags.items():
            for tag, points in run.tags.items():
                late = int(self.late and next(iter(points.values()), None) == 0)
                steps, values = list(points)[late:], list(points.values())[late:]
                match = re.fullmatch(pattern, tag)
                if match and values and all(values != curve.values for curve in found):
                    found.append(Curve(match.expand(name), steps, values))
        return found

    def span(self, curves: list[Curve]) -> tuple[float, float, bool]:
        """The range that holds these curves, and whether it is logarithmic."""
        values = [v for curve in curves for v in curve.values if math.isfinite(v)] or [0.0]
        low, high = min(values), max(values)
        if math.isfinite(self.limit):
            bound = 1.05 * min(self.limit, max(1.0, high, -low))
            return -bound, bound, False
        if self.log and low > 0 and high >= 10 * low:
            return low / 1.15, high * 1.15, True
        pad = 0.05 * ((high - low) or abs(high) or 1.0)
        return low - pad, high + pad, False


PANELS = (
    Panel(
        "loss", {"emo/loss_short": "short", "emo/loss_long": "long"},
        "as it is remembered: the short memory holds about 3 steps, the long one 100",
        first="as it is remembered, over about 3 steps", log=True,
    ),
    Panel(
        "effective lr", {r"emo/lr/group_(\d+)": r"group \1"},
        "the learning rate that acts: lr times drive, for each group where they differ",
        first="the learning rate that acts, in the first group: lr times drive", log=True, plain=False,
    ),
    Panel(
        "scalar, tension", {"emo/scalar": "scalar", "emo/tension": "tension"},
        f"scalar: {page.MEANINGS['scalar']}. tension: how far the short memory of the loss stands above its medium "
        "one, in units of that noise; beyond 4 it leaves the panel",
        first=page.MEANINGS["scalar"], limit=4.0, noisy=True,
    ),
    Panel("trust", {"emo/trust": "trust"}, page.MEANINGS["trust"], noisy=True, late=True),
    Panel("drive", {"emo/drive": "drive"}, page.MEANINGS["drive"], log=True),
    Panel(
        "gradient norm", {"emo/grad_norm": "norm"}, "of all gradients together, before any is scaled", log=True,
        noisy=True,
    ),
)  # fmt: skip


class Line(NamedTuple):
    """A curve and how it is drawn: ``faint`` behind its mean."""

    curve: Curve
    run: str
    colour: str
    dash: str
    faint: bool

    @property
    def dot(self) -> bool:
        """Whether it is a single point, which no line shows."""
        return sum(map(math.isfinite, self.curve.values)) == 1


def _lines(panel: Panel, runs: list[Run]) -> list[Line]:
    """The curves of a panel: with a colour each for a single run, else with a colour for each run, and dashes.

    Of more runs than there are colours only the first curve is drawn, and the dashes tell the runs apart.
    """
    lines: list[Line] = []
    few = len(runs) <= _FEW
    found = [panel.curves(run)[: None if few else 1] for run in runs]
    log = panel.span([curve for curves in found for curve in curves])[2]
    for place, (run, curves) in enumerate(zip(runs, found, strict=True)):
        for number, curve in enumerate(curves):
            colour = page.PALETTE[number % len(page.PALETTE)] if len(runs) == 1 else _colour(runs, place)
            dash = _DASHES[(number if few else place // len(page.PALETTE)) % len(_DASHES)]
            lines.append(Line(curve.thinned(), run.label, colour, dash, panel.noisy))
            if panel.noisy:
                lines.append(Line(curve.smoothed(log).thinned(), run.label, colour, dash, False))
    return lines


def _colour(runs: list[Run], place: int) -> str:
    """A run's own colour; grey where there is no other run."""
    return page.GREY if len(runs) == 1 else page.PALETTE[place % len(page.PALETTE)]


@dataclass(frozen=True)
class Scene:
    """All runs of a folder, and what each panel shows of them."""

    folder: Path
    runs: list[Run]
    panels: list[tuple[Panel, list[Line]]]
    marks: list[tuple[int, int, str]]  # should_stop: from, to, colour

    @classmethod
    def load(cls, folder: Path) -> Scene:
        """Read a folder."""
        try:
            runs = read(folder, _MOST)
        except ValueError as error:
            if str(error).endswith("fewer runs") and (part := _part(folder)):
                raise ValueError(f"{error}, such as {part}") from error
            raise
        panels = PANELS if len(runs) <= _FEW else [panel.of_many() for panel in PANELS]
        shown = [(panel, lines) for panel in panels if (lines := _lines(panel, runs))]
        marks = [(*stretch, _colour(runs, place)) for place, run in enumerate(runs) for stretch in run.stops()]
        return cls(folder, runs, shown, marks)

    @property
    def alone(self) -> bool:
        """Whether there is a single run: its curves have colours, and no name is needed."""
        return len(self.runs) == 1

    def key(self) -> dict[str, Line]:
        """A line of each run that has one."""
        drawn = {line.run: line for _, lines in self.panels for line in lines}
        return {} if self.alone else {run.label: drawn[run.label] for run in self.runs if run.label in drawn}

    def names(self, lines: list[Line]) -> dict[str, Line]:
        """A line for each curve of a panel that has several; grey, where the colours stand for runs."""
        drawn = {x.curve.name: x if self.alone else x._replace(colour=page.GREY) for x in lines if not x.faint}
        return drawn if len(drawn) > 1 else {}


def _part(folder: Path) -> Path | None:
    """A folder right below that holds some runs, and no more than can be told apart."""
    homes = {file.parent for file in folder.rglob("*tfevents*")}
    counts = {part: sum(home.is_relative_to(part) for home in homes) for part in sorted(folder.iterdir())}
    return next((part for part, count in counts.items() if 0 < count <= _MOST), None)


def draw(folder: Path, out: Path) -> tuple[Path, Path, int]:
    """Draw all runs at or below ``folder`` into ``out``; return the picture, the page and the number of runs.

    Raises:
        ValueError: there is no such folder, or nothing in it that can be drawn, or more runs than can be told apart.
        OSError: ``out`` cannot be written.
    """
    scene = Scene.load(folder)
    if not scene.panels:
        known = ", ".join(sorted({tag for run in scene.runs for tag in run.tags}))
        raise ValueError(f"the event files in {folder} hold no curve to draw, only {known}: is the log complete?")
    out.mkdir(parents=True, exist_ok=True)
    png, site = out / "emonavi-plot.png", out / "emonavi-plot.html"
    _write_png(png, scene)
    site.write_text(_page(scene), encoding="utf-8")
    return png, site, len(scene.runs)


# --- The picture


@page.any_script()
def _write_png(path: Path, scene: Scene) -> None:
    from matplotlib.figure import Figure

    count, rows = len(scene.panels), math.ceil(len(scene.panels) / 2)
    figure = Figure(figsize=(12, 3 * rows + 0.6), dpi=110, layout="constrained")
    axes = list(figure.subplots(rows, 2, sharex=True, squeeze=False).flat)
    for axis, (panel, lines) in zip(axes, scene.panels, strict=False):
        _draw_panel(axis, panel, lines, scene)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[max(0, count - 2) : count]:
        axis.set_xlabel("step")
    figure.suptitle(page.as_it_is(str(scene.folder)), fontsize=12)
    figure.set_figheight(figure.get_figheight() + _add_key(figure, scene))
    figure.savefig(path)


def _draw_panel(axis: Axes, panel: Panel, lines: list[Line], scene: Scene) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high, log = panel.span([line.curve for line in lines])
    page.prepare(axis, low, high, log, page.ticks(low, high, plain=True) if log and panel.plain else None)
    axis.set_title(panel.title, loc="left", fontsize=11)
    axis.tick_params(labelbottom=True)
    axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    for line in lines:
        style = page.DASHES["solid" if line.faint else line.dash].matplotlib
        width, alpha = (0.7, 0.3) if line.faint else (1.6, 1.0)
        mark = "o" if line.dot else ""
        axis.plot(line.curve.steps, line.curve.values, marker=mark, ls=style, c=line.colour, lw=width, alpha=alpha)
    for start, end, colour in scene.marks:
        axis.axvline(start, color=colour, ls=(0, (1, 2)), lw=1.2)
        if scene.alone:
            axis.axvspan(start, end, color=colour, alpha=0.12, lw=0)
    if names := scene.names(lines):  # beside the title, where no curve runs through them
        samples = [_sample(line) for line in names.values()]
        columns = min(4, len(names))
        legend = axis.legend(samples, list(names), loc="lower right", ncols=columns, frameon=False, fontsize=9)
        legend.set_bbox_to_anchor((1, 1))


def _sample(line: Line) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=line.colour, ls=page.DASHES[line.dash].matplotlib)


def _add_key(figure: Figure, scene: Scene) -> float:
    """Write the names of the runs below the panels, in as many columns as fit; return the height in inches."""
    from matplotlib.lines import Line2D

    key = [(_sample(line), page.as_it_is(name)) for name, line in scene.key().items()]
    if scene.marks:
        key.append((Line2D([], [], color=page.GREY, ls=(0, (1, 2))), "should_stop"))
    for columns in range(min(4, len(key)), 0, -1):
        samples, labels = zip(*key, strict=True)
        legend = figure.legend(samples, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        box = legend.get_window_extent()
        if columns == 1 or box.width < figure.bbox.width:
            return box.height / figure.dpi
        legend.remove()
    return 0.0


# --- The page


def _figure(panel: Panel, lines: list[Line], scene: Scene) -> Any:
    low, high, log = panel.span([line.curve for line in lines])
    figure = page.panels(1, 270, panel.title)
    page.scale(figure.update_yaxes, log, (low, high), page.ticks(low, high, panel.plain) if log else None)
    for line in lines:
        curve, run, colour, dash, faint = line
        name = curve.name if scene.alone else f"{run} {curve.name}" if scene.names(lines) else run
        look = {"color": colour, "width": 0.8 if faint else 1.8, "dash": "solid" if faint else dash}
        how = {"hoverinfo": "skip", "opacity": 0.3} if faint else {"hovertemplate": "%{y:.4g}"}
        how["mode"] = "markers" if line.dot else "lines"
        figure.add_scatter(x=curve.steps, y=curve.values, name=html.escape(name), line=look, **how)
    for start, end, colour in scene.marks:
        figure.add_vline(start, line={"color": colour, "width": 1.5, "dash": "dot"})
        if scene.alone:
            figure.add_vrect(start, end, fillcolor=colour, opacity=0.15, line_width=0)
    if len(scene.runs) > _FEW:
        figure.update_layout(hovermode="closest")  # a list of all would hide the panel
    return figure


def _page(scene: Scene) -> str:
    plots = ""
    for panel, lines in scene.panels:
        names = "".join(
            f"<span>{page.sample(line.colour, line.dash)}{name}</span>" for name, line in scene.names(lines).items()
        )
        plots += f'<div>{page.plot(_figure(panel, lines, scene))}<p class="names">{names}</p></div>'
    rows, key = "", scene.key()
    for run in scene.runs:
        cells = "".join(f"<td>{cell}</td>" for cell in _cells(run))
        sample = page.sample(key[run.label].colour, key[run.label].dash) if run.label in key else ""
        rows += f"<tr><th>{sample}{html.escape(run.label)}</th>{cells}</tr>"
    meanings = {panel.title: panel.meaning for panel, _ in scene.panels}
    meanings["should_stop"] = "a dotted line where it became True: there was next to nothing left to learn"
    few = len(scene.runs) <= _FEW
    return page.document(
        f"emonavi plot {scene.folder}",
        "<h1>What the optimizer felt</h1>"
        f'<p class="soft">{html.escape(str(scene.folder))}. The table says how each run ended. '
        f"{'' if few else 'Of so many runs, a panel shows one curve each. '}Where a curve is noisy, the strong line is "
        "its mean over ten steps on either side at most, in a long run over 1 % of it.</p>"
        '<div class="wide"><table><tr><th>run</th><th>steps</th><th>loss</th><th>effective lr</th><th>drive</th>'
        f'<th>trust</th><th>should_<wbr>stop</th></tr>{rows}</table></div><div class="plots">{plots}</div>'
        f"<h2>How to read the curves</h2>{page.definitions(meanings)}"
        f'<p class="soft">Drawn by emonavi {emonavi.__version__}.</p>',
        _STYLE,
    )


_STYLE = """
.names { margin: 0 0 0 62px; font-size: 13px; min-height: 1.5em }
.names span { margin-right: 14px; white-space: nowrap; display: inline-block }
.wide tr > :first-child { white-space: nowrap }
"""


def _cells(run: Run) -> list[str]:
    """Where a run stands at its end."""
    loss, lr, drive, trust = (run.last(f"emo/{tag}") for tag in ("loss_short", "lr/group_0", "drive", "trust"))
    rate = "nan" if math.isnan(lr) else lr_label(float(f"{lr:.2g}"))
    cells = [f"{run.steps:,}", f"{loss:.4g}", rate, f"{drive:.3g}", f"{trust:+.2f}"]
    stops = run.stops()
    return ["-" if "nan" in cell else cell for cell in cells] + [f"from {stops[0][0]:,}" if stops else "-"]
