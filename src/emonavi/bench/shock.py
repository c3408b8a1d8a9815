"""``emonavi bench shock``: what one bad step, or another task, does to a run, and whether it recovers.

At 40 % of a run, or in its first steps, something happens, once or several times in a row. Its held-out loss is
compared with that of the undisturbed run, same seed and same batches, 50 steps or a tenth of the run later (whichever
is more), and at the end. A task that switches (inputs change their sign) is compared with a fresh run on the new task,
as long as what was left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import emonavi
from emonavi.bench.figures import loss_of
from emonavi.bench.ledger import Row
from emonavi.bench.tables import plain
from emonavi.bench.tasks import TASKS, Problem
from emonavi.page import lr_label

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SHOCKS", "Cell", "cells", "lines", "measure"]

NAMES = ("digits", "diabetes", "lora", "autoencoder", "mlp", "cnn", "density", "patches")
PEERS = ("AdamW", "AdamW + clip")  # at lr 1e-3; clipped to norm 1
RECOVERED = 1.05


def _labels(problem: Problem, step: int) -> Tensor:
    """The loss of a batch whose targets belong to its neighbours."""
    inputs, targets = problem.batch(step)
    return problem.criterion(problem.model(inputs), targets.roll(1, 0))  # type: ignore[union-attr]


def _inputs(problem: Problem, step: int) -> Tensor:
    """The loss of a batch that nobody has normalised."""
    inputs, targets = problem.batch(step)
    return problem.criterion(problem.model(100 * inputs), targets)


def _loss_times(factor: float) -> Callable[[Problem, int], Tensor]:
    return lambda problem, step: problem.loss(step) * factor


def _gradients_times(factor: float) -> Callable[[list[nn.Parameter]], None]:
    def spoil(params: list[nn.Parameter]) -> None:
        for p in params:
            if p.grad is not None:
                p.grad.mul_(factor)

    return spoil


class Shock(NamedTuple):
    """What happens to the loss before backward and to the gradients after it, when, and how many times in a row."""

    loss: Callable[[Problem, int], Tensor] = Problem.loss
    gradients: Callable[[list[nn.Parameter]], None] | None = None
    at: int | None = None  # None: at 40 % of the run
    times: int = 1

    def first(self, steps: int) -> int:
        """The step at which it happens."""
        return int(0.4 * steps) if self.at is None else self.at


SPOILT = {
    "loss x10": Shock(_loss_times(10)),
    "loss x1000": Shock(_loss_times(1000)),
    "loss x1000, first step": Shock(_loss_times(1000), at=0),
    "loss x1000, sixth step": Shock(_loss_times(1000), at=5),
    "loss NaN": Shock(_loss_times(math.nan)),
    "loss inf": Shock(_loss_times(math.inf)),
    "wrong labels": Shock(_labels),
    "inputs x100": Shock(_inputs),
    "inputs x100, five times": Shock(_inputs, times=5),
    "gradient x1e6": Shock(gradients=_gradients_times(1e6)),
    "gradient NaN": Shock(gradients=_gradients_times(math.nan)),
}
SWITCHES = ("switch", "switch, reset")
SHOCKS = (*SPOILT, *SWITCHES)
_UNDISTURBED, _FRESH = "none", "fresh"


class Cell(NamedTuple):
    """What defines a run."""

    task: str
    optimizer: str
    lr: float
    shock: str
    seed: int


def cells(optimizers: Sequence[str], seeds: int = 1) -> list[Cell]:
    """Every shock at the default lr; EmoNavi also at lr 1 and 10; peers beside."""
    runs = [(name, 1e-3) for name in (*optimizers, *PEERS)]
    runs += [("EmoNavi", lr) for lr in (1.0, 10.0) if "EmoNavi" in optimizers]
    kinds = (_UNDISTURBED, _FRESH, *SHOCKS)
    return [
        Cell(task, name, lr, shock, seed) for task in NAMES for name, lr in runs for shock in kinds
        for seed in range(seeds)
        if not (name in PEERS and shock == "switch, reset")
    ]  # fmt: skip


def measure(cell: Cell) -> Row:
    """Train once, with the shock; the held-out loss soon after it and at the end."""
    task = TASKS[cell.task]
    torch.manual_seed(cell.seed)
    problem = task.build(cell.seed)
    params = problem.params
    optimizer: Any = (
        torch.optim.AdamW(params, lr=cell.lr)
        if cell.optimizer in PEERS
        else emonavi.create(cell.optimizer, params, lr=cell.lr)
    )
    shock = SPOILT.get(cell.shock, Shock())
    at = shock.first(task.steps)
    looks = {_soon(shock, task.steps) for shock in SPOILT.values()}  # the undisturbed run is compared with all of them
    soon: dict[str, float] = {}
    for step in range(at if cell.shock == _FRESH else 0, task.steps):
        if step == at and cell.shock in (*SWITCHES, _FRESH):
            problem = _switched(problem)
        if step == at and cell.shock == "switch, reset":
            optimizer.reset_emotion()
        spoilt = cell.shock in SPOILT and at <= step < at + shock.times
        optimizer.zero_grad()
        (shock.loss if spoilt else Problem.loss)(problem, step).backward()
        if spoilt and shock.gradients is not None:
            shock.gradients(params)
        if cell.optimizer == "AdamW + clip":
            nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if step + 1 in looks:
            soon[str(step + 1)] = problem.val()
    return {"split": task.split, "soon": soon, "end": problem.val()}


def _soon(shock: Shock, steps: int) -> int:
    """By when a run should have recovered: 50 steps or a tenth of the run after the last of it."""
    return shock.first(steps) + shock.times - 1 + max(50, steps // 10)


def _switched(problem: Problem) -> Problem:
    """The same data seen through the looking-glass: inputs change their sign."""

    def batch(step: int) -> Any:
        inputs, targets = problem.batch(step)
        return -inputs, targets  # type: ignore[operator]

    inputs, targets = problem.held_out
    return replace(problem, batch=batch, held_out=(-inputs, targets))  # type: ignore[operator]


def lines(rows: Sequence[Row]) -> Iterator[Table]:
    """A table of how many runs recovered from each shock, soon after it and at the end, and the worst of them."""
    table = {(r["optimizer"], r["lr"], r["task"], r["seed"], r["shock"]): r for r in rows}
    heads = ("shock", "optimizer", "lr", "soon", "at the end", "worst", "on")
    shown = plain(f"runs within {RECOVERED} of the undisturbed one", heads, left=("optimizer", "on"), gap=1)
    for shock in SHOCKS:
        title = shock
        for name, lr in dict.fromkeys((r["optimizer"], r["lr"]) for r in rows):
            found = [
                (row, table[(*key[:4], _FRESH if shock in SWITCHES else _UNDISTURBED)])
                for key, row in table.items()
                if (key[0], key[1], key[4]) == (name, lr, shock)
            ]
            if found:
                shown.add_row(title, name, lr_label(lr), *_recovery(found, SPOILT.get(shock)))
                title = ""
        shown.add_section()
    yield shown


def _recovery(found: Sequence[tuple[Row, Row]], shock: Shock | None) -> list[str]:
    """How many recovered soon and at the end, the worst at the end, and its task."""
    ends = sorted((_over(row["end"], base["end"]), row["task"]) for row, base in found)
    near = ""
    if shock is not None:  # a switch is compared at the end only
        looks = [str(_soon(shock, TASKS[row["task"]].steps)) for row, _ in found]
        soon = [_over(row["soon"][at], base["soon"][at]) for (row, base), at in zip(found, looks, strict=True)]
        near = str(sum(ratio <= RECOVERED for ratio in soon))
    recovered = f"{sum(ratio <= RECOVERED for ratio, _ in ends)} of {len(found)}"
    return [near, recovered, f"{ends[-1][0]:.2f}", ends[-1][1]]


def _over(value: float | None, base: float | None) -> float:
    """A loss over another; a run that is lost is lost, whatever the other is."""
    return loss_of(value) / loss_of(base) if math.isfinite(loss_of(value)) else math.inf
