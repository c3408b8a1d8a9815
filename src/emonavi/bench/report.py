"""What a demo's run folder says: figures and sentences, a table for the terminal, PNG plots and one HTML page.

matplotlib and plotly are imported where they are used: they take a second that the start of the demo does not need.
"""

from __future__ import annotations

import html
import math
import re
from string import Template
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from emonavi.bench import Curves, Findings, Result, axis_range, factor, log_ticks, lr_label, sentences

__all__ = ["contents", "loss_text", "short", "table", "write"]

# Okabe and Ito's palette: distinct for every kind of colour vision. The baseline is grey and dashed.
COLOURS = {"EmoNavi": "#0072B2", "EmoFact": "#E69F00", "EmoLynx": "#009E73", "AdamW": "#808080"}
_NEAR, _FAR = 1.1, 1.5  # times the best of the task: what counts as good, and as bad
_SERIES = (("loss", "train loss"), ("lr", "effective lr"), ("scalar", "emotional scalar"))


def write(found: Findings) -> None:
    """Write one PNG per task and ``report.html`` into the run folder."""
    curves = {task["name"]: found.curves(task["name"]) for task in found.begun()}
    for task in found.begun():
        if curves[task["name"]]:
            _write_png(found, task, curves[task["name"]])
    (found.folder / "report.html").write_text(_page(found, curves), encoding="utf-8")


# --- In the terminal


def short(result: Result | None, best: float) -> Text:
    """Write a loss in at most four characters, coloured by its distance from the best of its task."""
    if result is None or result.status != "done":
        return _cell(result, best)
    x = result.val_loss
    words = f"{x:.2g}" if x < 0.01 else f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"
    if x >= 1e4:
        words = f"{x / 1e3:.0f}k" if x < 1e6 else f"{x:.0e}".replace("e+0", "e").replace("e+", "e")
    return Text(words, style=_cell(result, best).style)


def table(found: Findings) -> RenderableType:
    """Return the result table: one block per task."""
    blocks: list[RenderableType] = []
    for task in found.begun():
        block = Table(box=None, padding=(0, 2), header_style="dim")
        block.add_column(task["name"], width=8)
        for lr in found.plan["lrs"]:
            block.add_column(f"lr {lr_label(lr)}", justify="right", width=11)
        block.add_column("worst / best", justify="right")
        best = min(found.losses(task["name"]), default=1.0)
        for optimizer in found.plan["optimizers"]:
            row = found.row(task["name"], optimizer)
            cells = [_cell(result, best).append("*" if found.is_best(result) else " ") for result in row]
            block.add_row(optimizer, *cells, _spread(found.spread(task["name"], optimizer)))
        blocks += [Text(_title(found, task), style="bold"), block, ""]
    blocks += [Text(reason, style="red") for reason in _reasons(found)]
    legend = (
        "Final loss on held-out data, lower is better; * best of its row, green: near the best of its task, red: far, "
        "nan: diverged. Short runs with one seed: differences of a few per cent may be chance."
    )
    return Group(*blocks, Text(legend, style="dim"), "")


def _reasons(found: Findings) -> list[str]:
    """Say why runs failed, each reason once."""
    return sorted({f"{r.optimizer} failed: {r.reason}" for r in found.results.values() if r.status == "failed"})


def _title(found: Findings, task: dict[str, Any]) -> str:
    starts = [r.start_loss for r in found.results.values() if r.task == task["name"] and r.status != "failed"]
    before = f", untrained {loss_text(starts[0])}" if starts else ""
    return f"{task['title']} ({task['metric']}{before})"


def loss_text(x: float) -> str:
    """Write a loss with four digits."""
    return f"{x:.2e}" if x >= 1e6 else f"{x:,.0f}" if x >= 1000 else f"{x:#.4g}"


def _state(result: Result | None, best: float) -> str:
    if result is None or result.status != "done":
        return "missing" if result is None else "bad"
    return "near" if result.val_loss <= _NEAR * best else "far" if result.val_loss > _FAR * best else "middle"


def _cell(result: Result | None, best: float) -> Text:
    if result is None:
        return Text("-", style="dim")
    words = {"done": loss_text(result.val_loss), "diverged": "nan", "failed": "failed"}[result.status]
    style = {"near": "green", "middle": "", "far": "red", "bad": "bold red"}[_state(result, best)]
    return Text(words, style=style)


def _spread(spread: float) -> str:
    return "-" if math.isnan(spread) else "diverges" if math.isinf(spread) else factor(spread)


def contents(found: Findings) -> RenderableType:
    """Say where the run folder is and what lies in it."""
    listing = Table.grid(padding=(0, 2))
    for name, what in (
        ("report.html", "tables and curves; opens in a browser, needs no network"),
        ("*.png", "the curves, one picture a task"),
        ("results.jsonl", "one line a finished run; every step of each run is in history/"),
        ("tb/", "what the optimizers felt, for TensorBoard:"),
    ):
        listing.add_row(name, what)
    command = Text(f"tensorboard --logdir {found.folder / 'tb'}", style="cyan")
    return Group(Text(f"Run folder: {found.folder}", style="bold"), listing, command)


# --- Curves


def _write_png(found: Findings, task: dict[str, Any], curves: Curves) -> None:
    """Draw a task's curves: a row for each series, a column for each learning rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    lrs, optimizers = found.plan["lrs"], found.plan["optimizers"]
    figure = Figure(figsize=(4 * len(lrs), 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(_SERIES), len(lrs), sharex=True, sharey="row", squeeze=False)
    for column, lr in enumerate(lrs):
        axes[0, column].set_title(f"lr {lr_label(lr)}")
        for row, (key, title) in enumerate(_SERIES):
            axis = axes[row, column]
            low, high, log = axis_range(curves, key)
            axis.set_yscale("log" if log else "linear")
            if log and key == "loss":
                axis.set_yticks(log_ticks(low, high), [f"{tick:,g}" for tick in log_ticks(low, high)])
                axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_ylim(low, high)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            for name in (name for name in optimizers if (name, lr) in curves):
                steps, values, dash = curves[name, lr]["step"], curves[name, lr][key], "--" if name == "AdamW" else "-"
                axis.plot(steps, values, dash, color=COLOURS[name], lw=1.6, label=name)
            if column == 0:
                axis.set_ylabel(title)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    lines = {line.get_label(): line for axis in axes[0] for line in axis.lines}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(_title(found, task), fontsize=13)
    figure.savefig(found.folder / f"{task['name']}.png")


def _figure_json(found: Findings, lr: float, curves: Curves) -> str:
    """Build the interactive panels of one task at one learning rate."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(_SERIES), cols=1, shared_xaxes=True, vertical_spacing=0.05)
    for row, (key, title) in enumerate(_SERIES, start=1):
        low, high, log = axis_range(curves, key)
        span = [math.log10(low), math.log10(high)] if log else [low, high]
        ticks: dict[str, Any] = {}
        if log:
            at = log_ticks(low, high)
            ticks = {"tickvals": at, "ticktext": [f"{t:,g}" if key == "loss" else lr_label(t) for t in at]}
        figure.update_yaxes(row=row, title=title, type="log" if log else "linear", range=span, **ticks)
        for name in found.plan["optimizers"]:
            values = curves.get((name, lr))
            if values is None or (key == "scalar" and name == "AdamW"):
                continue
            line = {"color": COLOURS[name], "width": 1.8, "dash": "dash" if name == "AdamW" else "solid"}
            figure.add_scatter(
                **{"row": row, "col": 1, "x": values["step"], "y": values[key], "mode": "lines", "name": name},
                **{"line": line, "hovertemplate": "%{y:.4g}"},
            )
    axis = {"gridcolor": "rgba(128,128,128,.22)", "zeroline": False, "automargin": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis, title_standoff=4)
    figure.update_xaxes(row=len(_SERIES), title="step")
    figure.update_layout(template="none", showlegend=False, dragmode=False, hovermode="x unified", height=520)
    heading = {"text": f"lr {lr_label(lr)}", "font": {"size": 14}}
    figure.update_layout(title=heading, margin={"l": 62, "r": 8, "t": 36, "b": 40})
    figure.update_layout(font={"size": 12, "family": "system-ui, sans-serif"})  # the page sets the colour
    figure.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")
    data: str = figure.to_json()
    return data.replace("</", "<\\/")  # inside a script element


# --- The page


def _page(found: Findings, curves: dict[str, Curves]) -> str:
    from plotly.offline import get_plotlyjs

    plan = found.plan
    key = "".join(f'<span><i style="background:{COLOURS[n]}"></i>{n}</span>' for n in plan["optimizers"])
    facts = {
        "Command": plan["command"],
        "Started": plan["started"],
        "Seed": plan["seed"],
        "Hardware": f"{plan['hardware']}; {plan['workers']} worker processes with one thread each",
        "Versions": ", ".join(f"{name} {version}" for name, version in plan["versions"].items()),
        "Steps": ", ".join(f"{task['name']} {task['steps']}" for task in plan["tasks"]),
        "Finished": f"{len(found.results)} of {len(plan['tasks']) * len(plan['optimizers']) * len(plan['lrs'])} runs",
    }
    return Template(_HTML).substitute(
        said="".join(f"<p>{_unbroken(html.escape(words))}</p>" for words in sentences(found) + _reasons(found)),
        facts="".join(f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items()),
        sections="".join(_section(found, task, curves[task["name"]]) for task in found.begun()),
        key=key,
        plotly=get_plotlyjs(),
    )


def _unbroken(words: str) -> str:
    """Keep a browser from breaking a line inside 1e-3."""
    return re.sub(r"\d+e-\d+", r'<span class="whole">\g<0></span>', words)


def _section(found: Findings, task: dict[str, Any], curves: Curves) -> str:
    name = task["name"]
    best = min(found.losses(name), default=1.0)
    rows = ""
    for optimizer in found.plan["optimizers"]:
        cells = ""
        for result in found.row(name, optimizer):
            words = f"<b>{_cell(result, best)} ★</b>" if found.is_best(result) else _cell(result, best)
            cells += f'<td class="{_state(result, best)}">{words}</td>'
        rows += f"<tr><th>{optimizer}</th>{cells}<td>{_spread(found.spread(name, optimizer))}</td></tr>"
    head = "".join(f"<th>lr {lr_label(lr)}</th>" for lr in found.plan["lrs"])
    plots = ""
    for lr in found.plan["lrs"]:
        if any(rate == lr for _, rate in curves):
            data = _figure_json(found, lr, curves)
            plots += f'<div class="plot"><script type="application/json">{data}</script></div>'
    return (
        f'<section><h2>{html.escape(_title(found, task))}</h2><div class="wide"><table><tr><th>{name}</th>{head}'
        f'<th>worst / best</th></tr>{rows}</table></div><div class="plots">{plots}</div></section>'
    )


_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>emonavi demo</title><style>
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
.plot { min-height: 520px; min-width: 0 } dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px }
dd { margin: 0; overflow-wrap: anywhere } @media (max-width: 600px) {
  td, th { padding: 5px 4px; font-size: 14px } th { white-space: normal } }
</style></head><body><main>
<h1>emonavi demo</h1><p class="soft">Loss-aware optimizers at three learning rates, beside AdamW.</p>
<div class="said">$said</div>
<p class="soft">Tables: final loss on held-out data, lower is better; ★ best of its row; green: within 10 % of the best
of its task; red: more than half as high again, diverged (nan) or failed. Short runs with one seed: differences of a
few per cent may be chance.</p>
<div class="key">$key</div>
$sections
<h2>How to read the curves</h2><dl>
<dt>train loss</dt><dd>running mean; a run that explodes leaves through the top</dd>
<dt>effective lr</dt><dd>the learning rate that acts: lr times drive</dd>
<dt>scalar</dt><dd>what the loss feels like, -1 to 1: above 0 it rises beyond its own noise, below 0 it improves</dd>
<dt>drive</dt><dd>the factor on your lr that the optimizer has found by itself</dd>
<dt>trust</dt><dd>does today's gradient agree with the last step? above 0 that step was too short, below 0 too long</dd>
<dt>mood</dt><dd>what it does, in a word: growing, steady, easing off, braking while the loss rises, resting after a
shock, done</dd></dl>
<h2>How this was made</h2><dl>$facts</dl>
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
