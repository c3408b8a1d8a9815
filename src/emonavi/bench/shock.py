"""``emonavi bench shock``: what one bad step, or another task, does to a run, and whether it recovers.

At 40 % of a run something happens. Its held-out loss is compared with that of the undisturbed run, same seed and same
batches, 50 steps or a tenth of the run later (whichever is more), and at the end. A task that switches (inputs
change their sign) is compared with a fresh run on the new task, as long as what was left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import emonavi
from emonavi.bench import loss_of
from emonavi.bench.ledger import Row
from emonavi.bench.runner import EMOTIONAL
from emonavi.bench.tasks import TASKS, Problem

__all__ = ["SHOCKS", "Cell", "cells", "lines", "measure"]

NAMES = ("digits", "diabetes", "lora", "autoencoder", "mlp", "cnn", "density", "patches")
PEERS = ("AdamW", "AdamW + clip")  # at lr 1e-3; clipped to norm 1
RECOVERED = 1.05


def _labels(problem: Problem, step: int) -> Tensor:
    """The loss of a batch whose targets belong to its neighbours."""
    inputs, targets = problem.batch(step)
    return problem.criterion(problem.model(inputs), targets.roll(1, 0))  # type: ignore[union-attr]


def _times(factor: float) -> Callable[[list[nn.Parameter]], None]:
    def spoil(params: list[nn.Parameter]) -> None:
        for p in params:
            if p.grad is not None:
                p.grad.mul_(factor)

    return spoil


# What happens to the loss before backward, or to the gradients after it.
LOSSES: dict[str, Callable[[Problem, int], Tensor]] = {
    "loss x10": lambda problem, step: problem.loss(step) * 10,
    "loss x1000": lambda problem, step: problem.loss(step) * 1000,
    "loss NaN": lambda problem, step: problem.loss(step) * math.nan,
    "loss inf": lambda problem, step: problem.loss(step) * math.inf,
    "wrong labels": _labels,
}
GRADIENTS = {"gradient x1e6": _times(1e6), "gradient NaN": _times(math.nan)}
SWITCHES = ("switch", "switch, reset")
SHOCKS = (*LOSSES, *GRADIENTS, *SWITCHES)
_UNDISTURBED, _FRESH = "none", "fresh"


class Cell(NamedTuple):
    """What defines a run."""

    task: str
    optimizer: str
    lr: float
    shock: str
    seed: int


def cells(optimizers: Sequence[str] = EMOTIONAL, seeds: int = 1) -> list[Cell]:
    """Every shock at the default lr; EmoNavi also at lr 1 and 10; peers beside."""
    runs = [(name, 1e-3) for name in (*optimizers, *PEERS)] + [("EmoNavi", lr) for lr in (1.0, 10.0)]
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
    params = [p for p in problem.model.parameters() if p.requires_grad]
    optimizer: Any = (
        torch.optim.AdamW(params, lr=cell.lr)
        if cell.optimizer in PEERS
        else emonavi.create(cell.optimizer, params, lr=cell.lr)
    )
    at = int(0.4 * task.steps)
    soon = at + max(50, task.steps // 10)
    figures: Row = {"split": task.split, "soon": math.inf}
    for step in range(at if cell.shock == _FRESH else 0, task.steps):
        if step == at and cell.shock in (*SWITCHES, _FRESH):
            problem = _switched(problem)
        if step == at and cell.shock == "switch, reset":
            optimizer.reset_emotion()
        spoilt = step == at
        optimizer.zero_grad()
        (LOSSES[cell.shock] if spoilt and cell.shock in LOSSES else Problem.loss)(problem, step).backward()
        if spoilt and cell.shock in GRADIENTS:
            GRADIENTS[cell.shock](params)
        if cell.optimizer == "AdamW + clip":
            nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if step + 1 == soon:
            figures["soon"] = problem.val()
    return figures | {"end": problem.val()}


def _switched(problem: Problem) -> Problem:
    """The same data seen through the looking-glass: inputs change their sign."""

    def batch(step: int) -> Any:
        inputs, targets = problem.batch(step)
        return -inputs, targets  # type: ignore[operator]

    inputs, targets = problem.held_out
    return replace(problem, batch=batch, held_out=(-inputs, targets))  # type: ignore[operator]


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """For each shock and optimizer: how many runs recovered, and the worst."""
    table = {(r["optimizer"], r["lr"], r["task"], r["seed"], r["shock"]): r for r in rows}
    yield f"runs within {RECOVERED} of the undisturbed one, soon after / at the end; worst at the end"
    for shock in SHOCKS:
        for name, lr in dict.fromkeys((r["optimizer"], r["lr"]) for r in rows):
            found = [
                (row, table[(*key[:4], _FRESH if shock in SWITCHES else _UNDISTURBED)])
                for key, row in table.items()
                if (key[0], key[1], key[4]) == (name, lr, shock)
            ]
            if found:
                yield f"{shock:14} {name} lr {lr:g}: {_recovery(found, shock in SWITCHES)}"


def _recovery(found: Sequence[tuple[Row, Row]], switched: bool) -> str:
    ends = sorted((_over(row["end"], base["end"]), row["task"]) for row, base in found)
    soon = [_over(row["soon"], base["soon"]) for row, base in found]
    near = f"{sum(ratio <= RECOVERED for ratio in soon)} / " if not switched else ""
    return f"{near}{sum(r <= RECOVERED for r, _ in ends)} of {len(found)}, worst {ends[-1][0]:.2f} ({ends[-1][1]})"


def _over(value: float | None, base: float | None) -> float:
    """A loss over another; a run that is lost is lost, whatever the other is."""
    return loss_of(value) / loss_of(base) if math.isfinite(loss_of(value)) else math.inf
