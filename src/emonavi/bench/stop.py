"""``emonavi bench stop``: when ``should_stop`` speaks on a budget four times too long, and what running on brings.

Beside it the published rule (the last 32 scalars of v3 are small and still), on the same losses.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import emonavi
from emonavi.bench.figures import loss_of
from emonavi.bench.ledger import Row
from emonavi.bench.tables import plain
from emonavi.bench.tasks import TASKS
from emonavi.presets import PRESETS

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Cell", "cells", "lines", "measure"]

TOO_LONG = 4
_LOOKS = 100  # evaluations in a run
_HEADS = ("rule", "stops", "saved", "raw", "calm", "fires in the first tenth")


class Cell(NamedTuple):
    """What defines a run."""

    task: str
    optimizer: str
    seed: int
    steps: int


def cells(optimizers: Sequence[str], seeds: int = 1) -> list[Cell]:
    """All tasks but the long ones, which are these tasks again."""
    names = [name for name in TASKS if not name.endswith("-3x")]
    return [Cell(t, o, s, TOO_LONG * TASKS[t].steps) for t in names for o in optimizers for s in range(seeds)]


def measure(cell: Cell) -> Row:
    """Train to the end of the budget; what each rule says after every step, and the loss on held-out data."""
    torch.manual_seed(cell.seed)
    problem = TASKS[cell.task].build(cell.seed)
    optimizer = emonavi.create(cell.optimizer, problem.params, use_shadow=True)
    published = PRESETS["v3"]
    state = published.unpack(torch.tensor(published.initial(), dtype=torch.float64), plain=True)
    said: dict[str, list[bool]] = {"should_stop": [], "published": []}
    figures: Row = {"split": TASKS[cell.task].split, "at": [], "raw": [], "calm": [], "losses": []}
    every = max(1, cell.steps // _LOOKS)
    for step in range(cell.steps):
        optimizer.zero_grad()
        loss = problem.loss(step)
        loss.backward()
        optimizer.step()
        figures["losses"].append(loss.item())
        state = published.feel(state, loss.item(), 0)
        said["should_stop"].append(optimizer.should_stop)
        said["published"].append(bool(published.should_stop(state)))
        if (step + 1) % every == 0:
            figures["at"].append(step + 1)
            figures["raw"].append(problem.val())
            with optimizer.calm():
                figures["calm"].append(problem.val())
    return figures | {name: _spoke(flags) for name, flags in said.items()}


def _spoke(flags: list[bool]) -> dict[str, int | None]:
    """The step at which a rule first says stop, and the one from which it says so to the end."""
    first = flags.index(True) + 1 if any(flags) else None
    still = len(flags) - flags[::-1].index(False) + 1 if False in flags else 1
    return {"first": first, "stays": still if flags[-1] else None}


def lines(rows: Sequence[Row]) -> Iterator[Table]:
    """Tables of what was found, for the tasks seen while designing and the others: a row for each rule."""
    for split in ("dev", "test"):
        title = f"{split} tasks: held-out loss where it stops for good, over the run's best; median, worst"
        table = plain(title, ("", *_HEADS), left=("rule", *_HEADS[3:]))
        for optimizer in dict.fromkeys(r["optimizer"] for r in rows):
            some = [r for r in rows if r["split"] == split and r["optimizer"] == optimizer]
            for rule in ("should_stop", "published"):
                if some:
                    table.add_row(optimizer, rule, *_verdict(some, rule))
        if table.row_count:
            yield table


def _verdict(rows: Sequence[Row], rule: str) -> list[str]:
    stopped = [r for r in rows if r[rule]["stays"] is not None]
    early = [r["task"] for r in rows if r[rule]["first"] is not None and r[rule]["first"] < 0.1 * r["steps"]]
    saved = [1 - r[rule]["stays"] / r["steps"] if r in stopped else 0.0 for r in rows]
    said = [f"{len(stopped)} of {len(rows)}", f"{statistics.median(saved):.0%}"]
    for weights in ("raw", "calm"):
        ratios = sorted((_ratio(r, rule, weights), r["task"]) for r in stopped)
        if ratios:
            middle = statistics.median(ratio for ratio, _ in ratios)
            said.append(f"{middle:.2f}, {ratios[-1][0]:.2f} ({ratios[-1][1]})")
        else:
            said.append("-")
    return [*said, ", ".join(early) or "none"]


def _ratio(row: dict[str, Any], rule: str, weights: str) -> float:
    """Held-out loss at the first look after the stop, over the best of the whole run."""
    values = [loss_of(v) for v in row[weights]]
    there = next((v for at, v in zip(row["at"], values, strict=True) if at >= row[rule]["stays"]), values[-1])
    return there / min(values)
