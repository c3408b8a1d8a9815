"""``emonavi report``: what a learning-rate study found, in the terminal, as PNGs and as one HTML page."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from string import Template

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from emonavi import page
from emonavi.bench.lr_plots import figure, pictured, png, profile, style, sweep, traces
from emonavi.bench.peers import OWN_RULE, YARDSTICK
from emonavi.bench.summary import CAP, NEAR, Line, Study, marks, times
from emonavi.page import lr_label

__all__ = ["table", "verdicts", "write"]

_SPLITS = {
    "test": "Test tasks",
    "dev": "Dev tasks, seen while designing",
    "long": "Long runs: tasks with three times the steps, of either split",
}
_HEADS = (
    *("mean", *(f"within {tau:.2f}" for tau in NEAR), "worst"),
    *(*(f"decades within {tau:.2f}" for tau in NEAR[:2]), "at default lr", "at best lr", "pairs"),
)
# For 80 columns.
_SHORT_HEADS = (
    *("mean", *(f"≤{tau:g}" for tau in NEAR), "worst"),
    *(*(f"decs\n≤{tau:g}" for tau in NEAR[:2]), "own\nlr", "best\nlr"),
)
_MARKS = (
    "A mark is a bound that ours should keep, a goal a stricter one beyond it: (a) of EmoNavi's calm weights and (b) "
    f"of its raw ones, beside {YARDSTICK}; (c) of EmoLynx and EmoFact, beside their own rules + cosine; (d) of "
    "EmoNavi, beside Prodigy."
)


def _explained(study: Study) -> str:
    lrs = ", ".join(map(lr_label, study.lrs))
    return (
        f"All figures are losses on held-out data over that of {YARDSTICK} at the best of its lrs for that task and "
        f"budget; lower is better, 1.000 is as good. Pairs: task x lr, lr in {lrs}. Mean: geometric, a ratio above "
        f"{CAP:.0f} counts as that. Decades: how much of the lrs from 1e-5 to 1 (5 decades) is within that factor, "
        "mean over the tasks. Own lr: its default. Best lr: chosen anew for each task, with hindsight. raw: the "
        "weights as trained; calm: the shadow's. + cosine: with warm-up and a cosine to 0, which know the horizon. "
        "inf: a run diverged."
    )


# --- In the terminal


def table(study: Study, width: int = 80) -> RenderableType:
    """Return the summary: one block for each split, without the last columns where they do not fit."""
    blocks: list[RenderableType] = []
    least = len(_SHORT_HEADS)
    for title, lines in _tables(study):
        rows = [[line.entry.label, *(word for word, _ in _cells(line))] for line in lines]
        fit = _fitting([["", *_SHORT_HEADS], *(row[: len(_SHORT_HEADS) + 1] for row in rows)], width)
        least = min(least, fit - 1)
        block = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, header_style="dim")
        block.add_column("", overflow="fold")
        for head in _SHORT_HEADS[: fit - 1]:
            block.add_column(head, justify="right", no_wrap=True)
        for row, line in zip(rows, lines, strict=True):
            block.add_row(*row[:fit], style="bold" if line.entry.shadow else None)
        blocks += [Text(title, style="bold"), block, ""]
    if least < len(_SHORT_HEADS):
        absent = ", ".join(head.replace("\n", " ") for head in _SHORT_HEADS[least:])
        blocks.append(f"Columns that do not fit everywhere: {absent} (a wider terminal, or report.html).\n")
    return Group(*blocks, Text(f"{_explained(study)} {_MARKS}", style="dim"), "")


def _fitting(rows: list[list[str]], width: int) -> int:
    """How many columns fit, a blank between each two; two at least."""
    spans = (1 + max(len(part) for cell in column for part in cell.split("\n")) for column in zip(*rows, strict=True))
    return max(2, sum(end - 1 <= width for end in accumulate(spans)))


def verdicts(study: Study) -> list[str]:
    """Say which marks are reached, and what is missing."""
    said = [f"{'Reached' if reached else 'Missed'}: {words}." for reached, words in marks(study)]
    if not said:
        said = [
            f"No mark can be judged yet: that needs runs of {YARDSTICK} and of EmoNavi, or of EmoLynx or EmoFact "
            "and of their own rules + cosine, these with a loss above 0."
        ]
    wanted = len(study.entries) * len(study.splits) * len(study.lrs)
    there = sum(len(study.pairs(entry, list(study.splits))) for entry in study.entries)
    if there < wanted:
        said.append(f"Incomplete: {wanted - there} of {wanted} figures are missing, so these compare unlike things.")
    return said


def _tables(study: Study) -> Iterable[tuple[str, list[Line]]]:
    """Titles and lines of all tables that have any."""
    for split, title in _SPLITS.items():
        tasks = study.tasks(split)
        if lines := study.lines(split):
            yield f"{title} ({len(tasks)}: {', '.join(tasks)})", lines
        if split != "long" and (lines := study.own_lines(split)):
            rules = ", ".join(f"{name} over {rule}" for name, rule in OWN_RULE.items() if rule != YARDSTICK)
            yield f"The same tasks, over each one's own rule at its best lr ({rules})", lines


def _cells(line: Line) -> list[tuple[str, float]]:
    """Words and the number that they are sorted by."""
    cells = [(times(line.mean), line.mean), *((f"{share:.0%}", share) for share in line.shares)]
    cells += [(times(line.worst), line.worst), *((f"{width:.1f}", width) for width in line.widths)]
    return [
        *cells,
        *((times(ratio), ratio) for ratio in (line.at_default, line.at_best)),
        (f"{line.pairs}", line.pairs),
    ]


# --- Files


def write(study: Study, folder: Path, source: str) -> list[Path]:
    """Write ``report.html`` and the PNGs; returns their paths."""
    tasks = list(study.splits)
    shown = pictured(study)
    pictures = {
        "profiles": ([profile(study, split) for split in _SPLITS if study.tasks(split)], 2),
        "loss-vs-lr": ([sweep(study, task) for task in tasks], 3),
        "effective-lr": ([traces(study, task, "lr") for task in tasks], 3),
    }
    files = {"report.html": _page(study, source).encode(errors="replace")}  # a file may be called anything
    for name, (charts, columns) in pictures.items():
        files[f"{name}.png"] = png(charts, min(columns, len(charts)), shown)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():  # only now that all are made: there is no half of a report
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def _page(study: Study, source: str) -> str:
    chips = [page.Chip(entry.label, style(entry.label).colour, style(entry.label).dash) for entry in study.entries]
    made_by = Counter(row["made_by"] for row in study.rows)
    failed = Counter((r["optimizer"], r["reason"]) for r in study.rows if r["reason"])
    made = {
        "Command": "emonavi bench lr",
        "Ledger": source,
        "Runs": f"{len(study.rows)}, {len({row['seed'] for row in study.rows})} seed(s)",
        "Made by": ", ".join(f"{name} ({count} runs)" for name, count in sorted(made_by.items())),
        "Versions": "; ".join(sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in study.rows})),
        "Hardware": "; ".join(sorted({row["hardware"] for row in study.rows})),
        "Steps": ", ".join(f"{task} {steps}" for task, steps in study.steps.items()),
        "Lost runs": "; ".join(f"{name}: {why} ({count})" for (name, why), count in failed.most_common(20)) or "none",
    }
    body = Template(_BODY).substitute(
        said=page.said(verdicts(study)),
        marks=html.escape(_MARKS),
        explained=html.escape(_explained(study)),
        tables="".join(_html_table(title, lines) for title, lines in _tables(study)),
        key=page.legend(chips),
        profiles="".join(page.plot(figure(profile(study, split))) for split in _SPLITS if study.tasks(split)),
        tasks="".join(_section(study, task) for task in study.splits),
        made=page.definitions(made),
    )
    return page.document("emonavi bench lr", body, _STYLE, _SCRIPT)


def _html_table(title: str, lines: list[Line]) -> str:
    heads = "".join(f"<th><button>{head}</button></th>" for head in ("optimizer", *_HEADS))
    rows = ""
    for line in lines:
        cells = "".join(
            f'<td data-value="{1e99 if math.isinf(value) or math.isnan(value) else value:.6g}">{words}</td>'
            for words, value in _cells(line)
        )
        rows += f"<tr{' class=ours' if line.entry.shadow else ''}><th>{html.escape(line.entry.label)}</th>{cells}</tr>"
    return (
        f'<h2>{html.escape(title)}</h2><div class="wide"><table class="sorts"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _section(study: Study, task: str) -> str:
    long = ", long: three times the steps" if task in study.tasks("long") else ""
    best = html.escape(study.at_best(task))
    charts = (sweep(study, task), traces(study, task, "lr"), traces(study, task, "loss"))
    plots = "".join(page.plot(figure(chart, 360)) for chart in charts if chart.curves)
    return (
        f"<section><h3>{html.escape(task)} <small>{study.splits[task]}, {study.steps[task]} steps{long}; {best}</small>"
        f'</h3><div class="plots">{plots}</div></section>'
    )


_STYLE = """
h3 { margin: 36px 0 0 } small { color: var(--soft); font-weight: 400 } .wide { padding-bottom: 6px }
.sorts button { all: unset; cursor: pointer } .sorts button:focus-visible { outline: 2px solid var(--accent) }
.sorts thead th { white-space: normal; min-width: 4.5em; vertical-align: bottom } .ours { background: #80808026 }
.sorts tr > :first-child { position: sticky; left: 0; background: var(--page); white-space: normal; min-width: 9em }
.sorts .ours > :first-child { font-weight: 600 }
[aria-sort=ascending] button::after { content: " ▲" } [aria-sort=descending] button::after { content: " ▼" }
"""
_SCRIPT = """
document.querySelectorAll(".sorts thead button").forEach(button => button.onclick = () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const up = head.ariaSort != "ascending", value = row => row.cells[head.cellIndex].dataset.value;
  [...head.parentElement.cells].forEach(cell => cell.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const words = row => row.cells[head.cellIndex].textContent;
  const order = (a, b) => value(a) === undefined ? words(a).localeCompare(words(b)) : value(a) - value(b);
  body.append(...[...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)));
});
"""
_BODY = """<h1>emonavi bench lr</h1><p class="soft">How well optimizers train when nobody tunes the learning rate.</p>
$said
<p class="soft">$marks</p>
$tables
<p class="soft">$explained Tinted: this library's optimizers. A click on a column's head sorts.</p>
<h2>Curves</h2><p class="soft">Tap a name to hide or show it. In the tasks' first pictures what is worse than 3 is
drawn at 3. Effective lr and train loss: ours from each lr, AdamW + cosine at its best.</p>
$key
<div class="plots two">$profiles</div>
$tasks
<h2>How this was made</h2>$made
"""
