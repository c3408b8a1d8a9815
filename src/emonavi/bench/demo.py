"""``emonavi demo``: four tasks, four optimizers, three learning rates, spread over spawned worker processes.

The parent trains nothing. It hands out runs, writes ``results.jsonl``, draws the progress and ends with the report.
A run that raises, or a worker that dies, costs that one run only.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from emonavi.bench import demo_report
from emonavi.bench.demo_folder import Findings, Result, sentences
from emonavi.bench.demo_run import Progress, Run, train
from emonavi.bench.provenance import made_on
from emonavi.bench.tables import console
from emonavi.bench.tasks import DEMO
from emonavi.bench.workers import Failure, crew, stop_on_sigint
from emonavi.page import lr_label
from emonavi.terminal import MOOD_STYLE

__all__ = ["LRS", "OPTIMIZERS", "run_demo"]

OPTIMIZERS = ("EmoNavi", "EmoFact", "EmoLynx", "AdamW")
LRS = (1e-5, 1e-3, 1e-1)
# Columns of what the workers are at, and their widths.
_CREW = {"now training": 22, "": 10, "step": 7, "loss": 9, "drive": 7, "trust": 5, "mood": 7, "/s": 4}
_GAP = 2


def run_demo(folder: Path, *, quick: bool, seed: int, workers: int, command: str) -> int:
    """Train everything, write the folder and print the report; return the exit code (0, 1 failed runs, 130 Ctrl-C)."""
    steps = {name: task.quick_steps if quick else task.steps for name, task in DEMO.items()}
    runs = [
        Run(task, optimizer, lr, seed, steps[task.name])
        for task in DEMO.values()
        for lr in LRS
        for optimizer in OPTIMIZERS
    ]
    folder.mkdir(parents=True, exist_ok=True)
    plan = {
        "command": command,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seed": seed,
        "quick": quick,
        "workers": workers,
        **made_on(),
        "optimizers": OPTIMIZERS,
        "lrs": LRS,
        "tasks": [
            {"name": task.name, "title": task.title, "metric": task.metric, "steps": steps[task.name]}
            for task in DEMO.values()
        ],
    }
    (folder / "run.json").write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")

    terminal = console()
    board = Board(runs, min(workers, len(runs)), quick)
    with stop_on_sigint() as stopped:
        with board.shown(terminal):
            _execute(runs, folder, board, stopped)
        return _finish(folder, terminal, len(runs), bool(stopped))


def _finish(folder: Path, console: Console, planned: int, stopped: bool) -> int:
    """Report what is finished, say where it is, and choose the exit code."""
    found = Findings.load(folder)
    if found.results:
        with console.status("writing the report") if console.is_terminal else contextlib.nullcontext():
            demo_report.write(found)
        coloured = console.color_system is not None and not console.no_color
        console.print(demo_report.table(found, console.width, coloured))
        for sentence in sentences(found):
            console.print(sentence, style="bold" if not stopped else None)
            console.print()
        console.print(demo_report.contents(found))
    if stopped:
        console.print(f"\nStopped: {len(found.results)} of {planned} runs finished, kept in {folder}", soft_wrap=True)
        return 130
    if failed := sum(r.status == "failed" for r in found.results.values()):
        console.print(f"\n{failed} of {planned} runs failed; tracebacks: {folder / 'worker.log'}", soft_wrap=True)
    return 1 if failed else 0


# --- Runs


def _execute(runs: list[Run], folder: Path, board: Board, stopped: list[int]) -> None:
    """Keep all workers busy until everything is done or Ctrl-C."""
    waiting, last_task = list(runs), [""] * len(board.slots)

    def take(slot: int) -> Run | None:
        if not waiting:
            return None
        run = _take(waiting, last_task[slot])
        last_task[slot] = run.task.name
        return run

    stream, log = partial(train, folder=folder), folder / "worker.log"
    at_work = crew(len(board.slots), stream, log, take, stopped, ends=lambda content: isinstance(content, Result))
    with contextlib.closing(at_work) as messages:
        for slot, run, content in filter(None, messages):
            if content is None:
                board.begin(slot, run)
            elif isinstance(content, Progress):
                board.progress(slot, content)
            else:
                result = run.failed(content.reason) if isinstance(content, Failure) else content
                result.append(folder / "results.jsonl")
                board.finish(slot, result)


def _take(waiting: list[Run], last_task: str) -> Run:
    """Give a worker more of the task that it has set up, else the task with most runs waiting."""
    counts = Counter(run.task.name for run in waiting)
    name = last_task if last_task in counts else counts.most_common(1)[0][0]
    return waiting.pop(next(i for i, run in enumerate(waiting) if run.task.name == name))


# --- Progress


@dataclass
class Slot:
    """What a worker is at."""

    run: Run
    since: float = field(default_factory=time.monotonic)
    progress: Progress | None = None

    def seconds_left(self, usual: float) -> float:
        """Estimate from this run's own speed, before the first report from the usual time of its task."""
        if self.progress is not None:
            return (self.run.steps - self.progress.step) / max(self.progress.rate, 1e-9)
        return max(usual - (time.monotonic() - self.since), 0.0)


class Board:
    """What the user sees while the runs go on: one live picture in a terminal, else a line for each finished run."""

    def __init__(self, runs: list[Run], workers: int, quick: bool) -> None:
        self.runs = runs
        self.quick = quick
        self.slots: list[Slot | None] = [None] * workers  # never resized: the display reads it from its own thread
        self.results: dict[tuple[str, str, float], Result] = {}
        self.seconds: dict[str, list[float]] = {run.task.name: [] for run in runs}
        self.started = time.monotonic()
        self.console: Console | None = None

    @contextlib.contextmanager
    def shown(self, console: Console) -> Iterator[None]:
        """Draw as long as the block lasts. The picture vanishes with it: the final table says more."""
        headline = f"{len(self.runs)} runs on {len(self.slots)} worker(s){', quick' if self.quick else ''}"
        if console.is_terminal and console.file.isatty():
            with Live(self, console=console, refresh_per_second=5, transient=True):
                yield
        else:
            self.console = console
            console.print(f"emonavi demo: {headline}; one line for each finished run")
            yield

    def begin(self, slot: int, run: Run) -> None:
        """Note that a worker has begun a run."""
        self.slots[slot] = Slot(run)

    def progress(self, slot: int, progress: Progress) -> None:
        """Note where a worker's run stands."""
        if (current := self.slots[slot]) is not None:
            current.progress = progress

    def finish(self, slot: int, result: Result) -> None:
        """Note that a worker's run has ended."""
        self.slots[slot] = None
        self.seconds[result.task].append(result.seconds)
        self.results[result.task, result.optimizer, result.lr] = result
        if self.console is not None:
            outcome = f"val loss {result.val_loss:<10.5g} train {result.train_loss:<10.5g} {result.seconds:.1f} s"
            if result.status == "failed":
                outcome = f"failed: {result.reason}"
            where = f"{result.task:<9}{result.optimizer:<8} lr {lr_label(result.lr)}"
            self.console.print(f"[{len(self.results)}/{len(self.runs)}] {where}  {outcome}", soft_wrap=True)

    def _left(self) -> str:
        """Time left: each waiting run takes as long as its task's runs usually do, as far as anything is known."""
        usual = {task: statistics.median(times) for task, times in self.seconds.items() if times}
        for slot in filter(None, self.slots):
            if slot.progress is not None and slot.progress.rate:
                usual.setdefault(slot.run.task.name, slot.run.steps / slot.progress.rate)
        if not usual:
            return "-:--"
        unknown = statistics.mean(usual.values())
        ahead = Counter(run.task.name for run in self.runs)
        ahead.subtract(task for task, *_ in self.results)
        ahead.subtract(slot.run.task.name for slot in self.slots if slot)
        seconds = sum(count * usual.get(task, unknown) for task, count in ahead.items())
        seconds += sum(slot.seconds_left(usual.get(slot.run.task.name, unknown)) for slot in self.slots if slot)
        return _clock(seconds / len(self.slots))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The picture, as wide as the terminal: what does not fit is left out or stands below, and no figure is cut."""
        yield self._head(options.max_width)
        yield ""
        yield self._crew(options.max_width)
        blocks = [self._block(task) for task in self.seconds]
        widest = max(console.measure(block).maximum for block in blocks)
        names = Table(box=None, padding=0, header_style="dim", title=" ")
        names.add_column("val loss", no_wrap=True)
        for optimizer in OPTIMIZERS:
            names.add_row(optimizer)
        beside = max(1, (options.max_width - console.measure(names).maximum) // (widest + _GAP))
        for first in range(0, len(blocks), beside):
            row = Table.grid(padding=(0, _GAP, 0, 0))
            row.add_row(names, *blocks[first : first + beside])
            yield ""
            yield row

    def _head(self, width: int) -> Table:
        done = sum(slot.progress.step / slot.run.steps for slot in self.slots if slot and slot.progress)
        bar = ProgressBar(total=len(self.runs), completed=len(self.results) + done, complete_style="cyan")
        clock = f"{_clock(time.monotonic() - self.started)}  left {self._left()}"
        count = f"{len(self.results)}/{len(self.runs)} runs  {clock}"
        parts: list[RenderableType] = [Text("emonavi demo", style="bold"), bar, count]
        if width < 60:
            del parts[:2]
        head = Table.grid(padding=(0, _GAP), expand=True)
        for part in parts:
            head.add_column(no_wrap=True, ratio=1 if part is bar else None)
        head.add_row(*parts)
        return head

    def _crew(self, width: int) -> Table:
        """What each worker is at: of a narrow terminal without the bar, then without the last columns."""
        shown = dict(_CREW)
        while len(shown) > 1 and sum(shown.values()) + len(shown) - 1 > width:
            shown.pop("" if "" in shown else next(reversed(shown)))
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
        for name, wide in shown.items():
            left = name in ("now training", "", "mood")
            table.add_column(name, width=wide, no_wrap=True, justify="left" if left else "right")
        for slot in self.slots:
            cells = {"now training": Text("waiting", style="dim")} if slot is None else _cells(slot)
            table.add_row(*(cells.get(name, "") for name in shown))
        return table

    def _block(self, task: str) -> Table:
        """Final val losses of a task so far: a row for each optimizer, a column for each learning rate."""
        done = [r.val_loss for r in self.results.values() if r.task == task and r.status == "done"]
        best = min(done, default=1.0)
        table = Table(
            box=None, padding=(0, 1, 0, 0), pad_edge=False, title=task, title_style="bold", header_style="dim"
        )
        for lr in LRS:
            table.add_column(lr_label(lr), justify="right", min_width=4, no_wrap=True)
        for optimizer in OPTIMIZERS:
            table.add_row(*(demo_report.short(self.results.get((task, optimizer, lr)), best) for lr in LRS))
        return table


def _cells(slot: Slot) -> dict[str, RenderableType]:
    """What is known of a run, by the columns of the crew."""
    run, at = slot.run, slot.progress or Progress(0, math.nan, 0.0)
    return {
        "now training": f"{run.task.name} {run.optimizer} {lr_label(run.lr)}",
        "": ProgressBar(total=run.steps, completed=at.step, width=_CREW[""], complete_style="cyan"),
        "step": f"{at.step}/{run.steps}" if at.step else Text("set-up", style="dim"),
        "loss": "" if math.isnan(at.loss) else demo_report.loss_text(at.loss),
        "drive": "" if at.drive is None else f"{at.drive:.2g}",
        "trust": "" if at.trust is None else f"{at.trust:+.2f}",
        "mood": Text(at.mood, style=MOOD_STYLE.get(at.mood, "")),
        "/s": f"{at.rate:.0f}" if at.rate else "",
    }


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
