"""``emonavi bench lr``: tasks x optimizers x learning rates x seeds, one line of a ledger each.

"At its best lr" must not be decided by a coarse grid: the yardsticks are always searched over half decades.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console

from emonavi.bearer import Bearer
from emonavi.bench.figures import running_mean
from emonavi.bench.ledger import Ledger, Row, fill
from emonavi.bench.peers import CONTENDERS, OWN_RULE, YARDSTICK, Contender
from emonavi.bench.provenance import made_on
from emonavi.bench.tasks import OPTIONAL, TASKS, Problem

__all__ = ["HALF_DECADES", "QUICK_OPTIMIZERS", "QUICK_TASKS", "STANDARD", "Cell", "grid", "run", "switch", "train"]

HALF_DECADES = tuple(float(f"{10 ** (e / 2):.2e}") for e in range(-10, 1))  # 1e-5 to 1
STANDARD = (1e-5, 1e-3, 1e-2, 1e-1, 1.0)
# Under five minutes on two cores.
QUICK_TASKS = ("digits", "diabetes")
QUICK_OPTIMIZERS = (YARDSTICK, "EmoNavi", "EmoFact", "EmoLynx", "AdamW", "Prodigy")

_POINTS = 60  # of a trace
_TRAIN_MEAN = 20  # steps
_LOST = 20  # losses in a row that are no finite number: no weight comes back from that


class Cell(NamedTuple):
    """What defines a run. A change of the budget is another run."""

    task: str
    optimizer: str
    lr: float
    seed: int
    steps: int


def train(cell: Cell) -> Row:
    """Train once and return the figures. A run that diverges is a result; only a task that cannot be built raises."""
    contender = CONTENDERS[cell.optimizer]
    task = (TASKS | OPTIONAL)[cell.task]
    torch.manual_seed(cell.seed)
    problem = task.build(cell.seed)
    figures: Row = {"raw": math.inf, "calm": None, "reason": "", "train": math.inf, "skipped_steps": 0, "trace": {}}
    figures |= {"split": task.split, "made_by": contender.version(), **made_on()}
    losses: list[float] = []
    rates: list[float] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peers, about their own options
            optimizer = contender.build(problem.params, cell.lr)
            figures["reason"] = _loop(cell, contender, problem, optimizer, losses, rates)
            figures |= _evaluate(contender, problem, optimizer)
    except Exception as error:
        figures["reason"] = f"{type(error).__name__}: {error}"[:200]
    if losses:
        figures["train"] = sum(losses[-_TRAIN_MEAN:]) / len(losses[-_TRAIN_MEAN:])
        figures["trace"] = _trace(cell.steps, losses, rates)
    if not figures["reason"] and not math.isfinite(figures["raw"]):
        figures["reason"] = f"the validation loss is {figures['raw']}"
    if figures["reason"]:  # a run that was given up has weights, but is not the run that was asked for
        figures["raw"] = figures["calm"] = None
    return figures


def _loop(
    cell: Cell, contender: Contender, problem: Problem, optimizer: Any, losses: list[float], rates: list[float]
) -> str:
    """Train, and note losses and effective lrs. Returns why the run is lost, or nothing."""
    bad = 0
    switch(optimizer, "train")
    for step in range(cell.steps):
        if contender.warm_up is not None:
            for group in optimizer.param_groups:
                group["lr"] = cell.lr * contender.factor(step, cell.steps)
        optimizer.zero_grad()
        loss = problem.loss(step)
        loss.backward()
        contender.step(optimizer, loss)
        losses.append(loss.item())
        if step in _shown(cell.steps):
            rates.append(contender.rate(optimizer))
        bad = 0 if math.isfinite(losses[-1]) else bad + 1
        if bad == _LOST:
            return f"the training loss is {losses[-1]} from step {step + 2 - _LOST} on"
    return ""


def _evaluate(contender: Contender, problem: Problem, optimizer: Any) -> Row:
    switch(optimizer, "eval")
    found: Row = {"raw": problem.val()}
    if contender.ours:
        found["skipped_steps"] = optimizer.emotion.skipped_steps
    if contender.shadow:
        with optimizer.calm():
            found["calm"] = problem.val()
    return found


def switch(optimizer: Any, mode: str) -> None:
    """ScheduleFree keeps two sets of weights and wants to know which are needed. Of ours the raw ones are."""
    if not isinstance(optimizer, Bearer) and callable(switch := getattr(optimizer, mode, None)):
        switch()


def _shown(steps: int) -> range:
    """Steps, counted from 0, that a trace shows; the last one is among them."""
    stride = math.ceil(steps / _POINTS)
    return range((steps - 1) % stride, steps, stride)


def _trace(steps: int, losses: list[float], rates: list[float]) -> Row:
    """A thinned course, with four digits: it is drawn, not computed with."""
    smooth = running_mean(losses)
    at = [step for step in _shown(steps) if step < len(losses)]
    lrs, means = ([float(f"{value:.4g}") for value in values] for values in (rates, (smooth[step] for step in at)))
    return {"step": [step + 1 for step in at], "lr": lrs, "loss": means}


# --- The grid


def grid(tasks: Sequence[str], optimizers: Sequence[str], lrs: Sequence[float], seeds: int) -> list[Cell]:
    """Return the cells of a grid, yardsticks first.

    An optimizer also runs at its own default lr, and the yardsticks that the chosen are measured by run whether or not
    they are chosen.
    """
    needed = {YARDSTICK, *optimizers, *(OWN_RULE[name] for name in optimizers if name in OWN_RULE)}
    known = TASKS | OPTIONAL
    cells = []
    for contender in (c for c in CONTENDERS.values() if c.name in needed):
        rates: Sequence[float] = HALF_DECADES if contender.tuned else (*lrs, contender.default_lr)
        cells += [
            Cell(task, contender.name, lr, seed, known[task].steps)
            for task in tasks
            for seed in range(seeds)
            for lr in dict.fromkeys(rates)
        ]
    # Task by task within each stage: a worker keeps what a task had to set up.
    places = {name: place for place, name in enumerate(tasks)}
    return sorted(cells, key=lambda cell: (not CONTENDERS[cell.optimizer].tuned, places[cell.task]))


def run(
    cells: Sequence[Cell], ledger: Ledger[Cell], *, workers: int, rerun_ours: bool, command: str, console: Console
) -> int:
    """Fill the ledger; return the exit code (0, 1 some cells gave no row, 130 Ctrl-C)."""
    todo = ledger.missing(cells)
    now = CONTENDERS["EmoNavi"].version()
    ours = [cell for cell in cells if cell in ledger.rows and CONTENDERS[cell.optimizer].ours]
    old = [cell for cell in ours if ledger.rows[cell].get("made_by") != now]
    if old and rerun_ours:
        todo = [cell for cell in cells if cell in {*todo, *old}]
    elif old:
        console.print(f"{len(old)} rows of ours are of other sources than {now}: --rerun-ours makes them anew")
    said = [f"emonavi report {ledger.path}  shows what was found"]
    return fill(
        ledger, cells, train, lambda rows: said, todo=todo,
        workers=workers, title="bench lr", command=command, console=console,
    )  # fmt: skip
