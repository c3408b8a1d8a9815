"""What a demo's run folder says: figures and sentences, a table for the terminal, PNG plots and one HTML page.

matplotlib and plotly are imported where they are used: they take a second that the start of the demo does not need.
"""

from __future__ import annotations

import html
import math
import shlex
from string import Template
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from emonavi import page
from emonavi.bench.demo_folder import Curves, Findings, Result, axis_range, sentences
from emonavi.bench.figures import factor
from emonavi.page import lr_label

__all__ = ["contents", "loss_text", "short", "table", "write"]

COLOURS = dict(zip(("EmoNavi", "EmoFact", "EmoLynx"), page.PALETTE, strict=False))
COLOURS["AdamW"] = page.GREY
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


def table(found: Findings, width: int = 80, coloured: bool = True) -> RenderableType:
    """Return the result table: one block per task. Of less than 75 columns it takes 40, and leaves the last one out."""
    wide = width >= 75
    blocks: list[RenderableType] = []
    for task in found.begun():
        block = Table(box=None, padding=(0, 2) if wide else (0, 1, 0, 0), header_style="dim")
        block.add_column(task["name"], width=8)
        for lr in found.plan["lrs"]:
            block.add_column(f"lr {lr_label(lr)}", justify="right", width=11 if wide else 9)
        if wide:
            block.add_column("worst / best", justify="right")
        best = min(found.losses(task["name"]), default=1.0)
        for optimizer in found.plan["optimizers"]:
            row = found.row(task["name"], optimizer)
            cells = [_cell(result, best).append("*" if found.is_best(result) else " ") for result in row]
            spread = [_spread(found.spread(task["name"], optimizer))] if wide else []
            block.add_row(optimizer, *cells, *spread)
        blocks += [Text(_title(found, task), style="bold"), block, ""]
    blocks += [Text(reason, style="red") for reason in _reasons(found)]
    colours = ", green: near the best of its task, red: far" if coloured else ""
    legend = (
        f"Final loss on held-out data, lower is better; * best of its row{colours}, nan: diverged. Short runs with one "
        "seed: differences of a few per cent may be chance."
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
        ("tb/", "what the optimizers felt, for TensorBoard or, of one task, emonavi plot:"),
    ):
        listing.add_row(name, what)
    felt = found.folder / "tb"
    commands = (["tensorboard", "--logdir", str(felt)], ["emonavi", "plot", str(felt / found.begun()[0]["name"])])
    shown = (Text(shlex.join(command), style="cyan") for command in commands)
    return Group(Text(f"Run folder: {found.folder}", style="bold"), listing, *shown)


# --- Curves


def _dash(optimizer: str) -> str:
    """Set the baseline off."""
    return "dash" if optimizer == "AdamW" else "solid"


def _write_png(found: Findings, task: dict[str, Any], curves: Curves) -> None:
    """Draw a task's curves: a row for each series, a column for each learning rate."""
    from matplotlib.figure import Figure

    lrs, optimizers = found.plan["lrs"], found.plan["optimizers"]
    figure = Figure(figsize=(4 * len(lrs), 8), dpi=110, layout="constrained")
    axes = figure.subplots(len(_SERIES), len(lrs), sharex=True, sharey="row", squeeze=False)
    for column, lr in enumerate(lrs):
        axes[0, column].set_title(f"lr {lr_label(lr)}")
        for row, (key, title) in enumerate(_SERIES):
            axis = axes[row, column]
            low, high, log = axis_range(curves, key)
            page.prepare(axis, low, high, log, page.ticks(low, high, plain=True) if log and key == "loss" else None)
            for name in (name for name in optimizers if (name, lr) in curves):
                steps, values, dash = curves[name, lr]["step"], curves[name, lr][key], page.DASHES[_dash(name)]
                axis.plot(steps, values, ls=dash.matplotlib, color=COLOURS[name], lw=1.6, label=name)
            if column == 0:
                axis.set_ylabel(title)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    lines = {line.get_label(): line for axis in axes[0] for line in axis.lines}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(_title(found, task), fontsize=13)
    figure.savefig(found.folder / f"{task['name']}.png")


def _figure(found: Findings, lr: float, curves: Curves) -> Any:
    """Build the interactive panels of one task at one learning rate."""
    figure = page.panels(len(_SERIES), 520, f"lr {lr_label(lr)}")
    for row, (key, title) in enumerate(_SERIES, start=1):
        low, high, log = axis_range(curves, key)
        at = page.ticks(low, high, key == "loss") if log else None
        page.scale(figure.update_yaxes, log, (low, high), at, row=row, title=title)
        for name in found.plan["optimizers"]:
            values = curves.get((name, lr))
            if values is None or (key == "scalar" and name == "AdamW"):
                continue
            line = {"color": COLOURS[name], "width": 1.8, "dash": _dash(name)}
            figure.add_scatter(
                **{"row": row, "col": 1, "x": values["step"], "y": values[key], "mode": "lines", "name": name},
                **{"line": line, "hovertemplate": "%{y:.4g}"},
            )
    return figure


# --- The page


def _page(found: Findings, curves: dict[str, Curves]) -> str:
    plan = found.plan
    chips = (page.Chip(name, COLOURS[name], _dash(name)) for name in plan["optimizers"])
    made = {
        "Command": plan["command"],
        "Started": plan["started"],
        "Seed": plan["seed"],
        "Hardware": f"{plan['hardware']}; {plan['workers']} worker processes with one thread each",
        "Versions": ", ".join(f"{name} {version}" for name, version in plan["versions"].items()),
        "Steps": ", ".join(f"{task['name']} {task['steps']}" for task in plan["tasks"]),
        "Finished": f"{len(found.results)} of {len(plan['tasks']) * len(plan['optimizers']) * len(plan['lrs'])} runs",
    }
    body = Template(_BODY).substitute(
        said=page.said(sentences(found) + _reasons(found)),
        sections="".join(_section(found, task, curves[task["name"]]) for task in found.begun()),
        key=page.legend(chips),
        meanings=page.definitions(_CURVES | page.MEANINGS | _MOODS),
        made=page.definitions(made),
    )
    return page.document("emonavi demo", body)


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
            plots += page.plot(_figure(found, lr, curves))
    return (
        f'<section><h2>{html.escape(_title(found, task))}</h2><div class="wide"><table><tr><th>{name}</th>{head}'
        f'<th>worst / best</th></tr>{rows}</table></div><div class="plots">{plots}</div></section>'
    )


_CURVES = {
    "train loss": "running mean; a run that explodes leaves through the top",
    "effective lr": "the learning rate that acts: lr times drive",
}
_MOODS = {
    "mood": "what it does, in a word: growing, steady, easing off, braking while the loss rises, resting after a "
    "shock, done"
}
_BODY = """<h1>emonavi demo</h1><p class="soft">Loss-aware optimizers at three learning rates, beside AdamW.</p>
$said
<p class="soft">Tables: final loss on held-out data, lower is better; ★ best of its row; green: within 10 % of the best
of its task; red: more than half as high again, diverged (nan) or failed. Short runs with one seed: differences of a
few per cent may be chance.</p>
$key
$sections
<h2>How to read the curves</h2>$meanings
<h2>How this was made</h2>$made
"""
