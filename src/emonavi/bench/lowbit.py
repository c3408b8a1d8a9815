"""``emonavi bench lowbit``: what memories and weights of fewer bits cost, in the held-out loss at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import emonavi
from emonavi.bench.figures import loss_of, mean_ratio
from emonavi.bench.ledger import Row
from emonavi.bench.tables import plain
from emonavi.bench.tasks import TASKS
from emonavi.page import lr_label

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["STORAGE", "Cell", "cells", "in_bfloat16", "lines", "measure"]

NAMES = ("digits", "mlp", "vit", "patches", "charlm")
_WEIGHTS = "bf16 weights"  # and activations
STORAGE: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16 state": {"state_dtype": "bf16"},
    "8bit state": {"state_dtype": "8bit"},
    _WEIGHTS: {},
    f"{_WEIGHTS} and state": {"state_dtype": "bf16"},
    f"{_WEIGHTS}, 8bit state": {"state_dtype": "8bit"},
    f"{_WEIGHTS}, to the nearest": {"stochastic_rounding": False},
}
_USUAL, _CAREFUL = 1e-3, 1e-5  # the second as in a careful fine-tune: reflection may not lengthen the steps


class Cell(NamedTuple):
    """What defines a run."""

    task: str
    optimizer: str
    lr: float
    storage: str
    seed: int


def cells(optimizers: Sequence[str], seeds: int = 1) -> list[Cell]:
    """Each way to store at the usual lr, and to keep weights at a small one that stays as it is."""
    usual = [(task, _USUAL, storage) for task in NAMES for storage in STORAGE]
    careful = [
        (task, _CAREFUL, storage)
        for task in ("mlp", "patches") for storage in STORAGE if "state_dtype" not in STORAGE[storage]
    ]  # fmt: skip
    return [
        Cell(task, name, lr, storage, seed)
        for seed in range(seeds) for name in optimizers for task, lr, storage in (*usual, *careful)
    ]  # fmt: skip


def measure(cell: Cell) -> Row:
    """Train once; the held-out loss before and at the end."""
    task = TASKS[cell.task]
    torch.manual_seed(cell.seed)
    problem = task.build(cell.seed)
    if cell.storage.startswith(_WEIGHTS):
        in_bfloat16(problem.model)
    options = STORAGE[cell.storage] | ({"use_trust": False} if cell.lr == _CAREFUL else {})
    optimizer = emonavi.create(cell.optimizer, problem.params, lr=cell.lr, **options)
    before = problem.val()
    for step in range(task.steps):
        optimizer.zero_grad()
        problem.loss(step).backward()
        optimizer.step()
    return {"split": task.split, "before": before, "raw": problem.val()}


def in_bfloat16(model: nn.Module) -> None:
    """Weights and activations in bfloat16; outputs in float32 again, for the loss."""

    def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.bfloat16() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    model.bfloat16()
    model.register_forward_pre_hook(narrow)
    model.register_forward_hook(lambda module, args, output: output.float())


def lines(rows: Sequence[Row]) -> Iterator[Table]:
    """Means over the seeds: final loss over that of float32, and at the small lr the share of float32's fall."""
    table = {(r["optimizer"], r["lr"], r["storage"], r["task"], r["seed"]): r for r in rows}
    for optimizer, lr in dict.fromkeys((r["optimizer"], r["lr"]) for r in rows):
        tasks = [t for t in NAMES if any(key[0] == optimizer and key[1] == lr and key[3] == t for key in table)]
        what = "final loss over float32's" if lr == _USUAL else "fall over float32's, use_trust=False"
        shown = plain(f"{optimizer}, lr {lr_label(lr)}: {what}", ("", *tasks))
        for storage in STORAGE:
            means = []
            for t in tasks:
                pairs = [
                    (row, table[optimizer, lr, "float32", t, key[4]])
                    for key, row in table.items()
                    if key[:4] == (optimizer, lr, storage, t) and (optimizer, lr, "float32", t, key[4]) in table
                ]
                means.append(f"{_mean(pairs, falls=lr == _CAREFUL):.3f}" if pairs else "")
            if any(means):
                shown.add_row(storage, *means)
        yield shown


def _mean(pairs: Sequence[tuple[Row, Row]], falls: bool) -> float:
    """Mean over the seeds: geometric of final losses, plain of falls, which may be none at all."""
    if falls:
        return fmean((r["before"] - r["raw"]) / (base["before"] - base["raw"]) for r, base in pairs)
    return mean_ratio(loss_of(r["raw"]) / loss_of(base["raw"]) for r, base in pairs)
