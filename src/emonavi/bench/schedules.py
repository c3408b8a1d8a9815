"""``emonavi bench schedules``: does a scheduler matter? The same runs at a constant lr and under five schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim import lr_scheduler

import emonavi
from emonavi.bench.figures import loss_of
from emonavi.bench.ledger import Row
from emonavi.bench.tables import plain
from emonavi.bench.tasks import TASKS
from emonavi.page import lr_label

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SCHEDULES", "Cell", "cells", "lines", "measure"]

_EPOCHS = 20  # of a run: after each, a plateau is looked for in the held-out loss, as torch's documentation has it
NAMES = ("digits", "diabetes", "flow", "lora", "mlp", "gru", "patches", "density")
NEAR = 1.1


def _triangle(optimizer: torch.optim.Optimizer, steps: int) -> lr_scheduler.LambdaLR:
    """Linear warm-up from 0 over a tenth of the steps, then a linear decay to 0."""
    warm = max(1, steps // 10)
    return lr_scheduler.LambdaLR(optimizer, lambda k: min(k / warm, (steps - k) / (steps - warm)))


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, int], Any]] = {
    "constant": lambda optimizer, steps: lr_scheduler.ConstantLR(optimizer, 1.0),
    "cosine": lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, steps),
    "warm-up from 0, linear": _triangle,
    "OneCycle": lambda optimizer, steps: lr_scheduler.OneCycleLR(
        optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=steps
    ),
    "plateau": lambda optimizer, steps: lr_scheduler.ReduceLROnPlateau(optimizer, patience=2),
    "step": lambda optimizer, steps: lr_scheduler.StepLR(optimizer, max(1, steps // 3)),
}


class Cell(NamedTuple):
    """What defines a run."""

    task: str
    optimizer: str
    lr: float
    schedule: str
    seed: int


def cells(optimizers: Sequence[str], seeds: int = 1) -> list[Cell]:
    """Each schedule at a usual and at a high lr."""
    return [
        Cell(task, name, lr, schedule, seed)
        for task in NAMES for name in optimizers for lr in (1e-3, 1e-1) for schedule in SCHEDULES
        for seed in range(seeds)
    ]  # fmt: skip


def measure(cell: Cell) -> Row:
    """Train once under the schedule."""
    task = TASKS[cell.task]
    torch.manual_seed(cell.seed)
    problem = task.build(cell.seed)
    optimizer = emonavi.create(cell.optimizer, problem.params, lr=cell.lr, use_shadow=True)
    schedule = SCHEDULES[cell.schedule](optimizer, task.steps)
    for step in range(task.steps):
        optimizer.zero_grad()
        problem.loss(step).backward()
        optimizer.step()
        if not isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
            schedule.step()
        elif (step + 1) % max(1, task.steps // _EPOCHS) == 0:
            schedule.step(problem.val())
    figures: Row = {"split": task.split, "raw": problem.val()}
    with optimizer.calm():
        figures["calm"] = problem.val()
    return figures


def lines(rows: Sequence[Row]) -> Iterator[Table]:
    """A table for each optimizer: final losses over that of the best schedule for the task and lr, raw / calm."""
    for optimizer in dict.fromkeys(r["optimizer"] for r in rows):
        ours = [r for r in rows if r["optimizer"] == optimizer]
        names = [name for name in SCHEDULES if any(r["schedule"] == name for r in ours)]
        title = f"{optimizer}: final loss over that of the best schedule, raw weights / the shadow's"
        table = plain(title, ("", "lr", *names), gap=1)
        ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for task, lr in dict.fromkeys((r["task"], r["lr"]) for r in ours):
            some = [r for r in ours if (r["task"], r["lr"]) == (task, lr)]
            best = {kind: min(loss_of(r[kind]) for r in some) for kind in ("raw", "calm")}
            shown: dict[str, list[str]] = {name: [] for name in names}
            for row in some:
                raw, calm = (loss_of(row[kind]) / best[kind] for kind in ("raw", "calm"))
                ratios[row["schedule"]].append((raw, calm))
                shown[row["schedule"]].append(f"{raw:.2f}/{calm:.2f}")
            table.add_row(task, lr_label(lr), *("\n".join(shown[name]) for name in names))
        table.add_section()
        columns = [list(zip(*ratios[name], strict=True)) for name in names]
        near = ["/".join(str(sum(ratio <= NEAR for ratio in kind)) for kind in column) for column in columns]
        table.add_row(f"≤ {NEAR:.2f}", f"of {len(ratios[names[0]])}", *near)
        table.add_row("worst", "", *("/".join(f"{max(kind):.2f}" for kind in column) for column in columns))
        yield table
