"""``emonavi bench lowbit``: what memories and weights of fewer bits cost, in the held-out loss at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import emonavi
from emonavi.bench import loss_of
from emonavi.bench.ledger import Row
from emonavi.bench.tasks import TASKS

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


class Cell(NamedTuple):
    """What defines a run."""

    task: str
    optimizer: str
    lr: float
    storage: str
    seed: int


def cells(optimizers: Sequence[str], seeds: int = 1) -> list[Cell]:
    """Each way to store, at the default lr."""
    return [
        Cell(task, name, 1e-3, storage, seed)
        for seed in range(seeds) for task in NAMES for name in optimizers for storage in STORAGE
    ]  # fmt: skip


def measure(cell: Cell) -> Row:
    """Train once; the held-out loss at the end."""
    task = TASKS[cell.task]
    torch.manual_seed(cell.seed)
    problem = task.build(cell.seed)
    if cell.storage.startswith(_WEIGHTS):
        in_bfloat16(problem.model)
    params = [p for p in problem.model.parameters() if p.requires_grad]
    optimizer = emonavi.create(cell.optimizer, params, lr=cell.lr, **STORAGE[cell.storage])
    for step in range(task.steps):
        optimizer.zero_grad()
        problem.loss(step).backward()
        optimizer.step()
    return {"split": task.split, "raw": problem.val()}


def in_bfloat16(model: nn.Module) -> None:
    """Weights and activations in bfloat16; outputs in float32 again, for the loss."""

    def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.bfloat16() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    model.bfloat16()
    model.register_forward_pre_hook(narrow)
    model.register_forward_hook(lambda module, args, output: output.float())


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Final losses over that of float32 with the same seed: the geometric mean over the seeds, task by task."""
    whole = {(r["task"], r["optimizer"], r["seed"]): loss_of(r["raw"]) for r in rows if r["storage"] == "float32"}
    for optimizer in dict.fromkeys(r["optimizer"] for r in rows):
        tasks = [t for t in NAMES if any((r["task"], r["optimizer"]) == (t, optimizer) for r in rows)]
        yield f"{optimizer:28}" + "".join(f"{t:>10}" for t in tasks) + f"{'mean':>10}"
        for storage in STORAGE:
            logs: dict[str, list[float]] = {}
            for r in rows:
                key = (r["task"], optimizer, r["seed"])
                if (r["optimizer"], r["storage"]) == (optimizer, storage) and key in whole:
                    logs.setdefault(r["task"], []).append(math.log(loss_of(r["raw"]) / whole[key]))
            means = [sum(logs[t]) / len(logs[t]) if t in logs else math.nan for t in tasks]
            shown = [math.exp(x) for x in (*means, sum(means) / len(means))] if means else []
            yield f"{storage:28}" + "".join(f"{x:10.3f}" for x in shown)
