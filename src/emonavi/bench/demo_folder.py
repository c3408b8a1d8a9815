"""The record that a demo leaves, a run folder, and what can be said of it.

It holds ``run.json`` (what was planned), ``results.jsonl`` (one line a finished run) and ``history/`` (every step of
each run).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emonavi.bench.figures import factor, json_line, mean_ratio, running_mean
from emonavi.page import lr_label

__all__ = ["Curves", "Findings", "Result", "axis_range", "history_path", "read_history", "read_results", "sentences"]

Curves = dict[tuple[str, float], dict[str, list[float]]]  # by optimizer and learning rate; columns of the history

_POINTS = 200  # of a curve: more than a screen shows, few enough for a light page


def _row(line: str) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in json.loads(line).items()}


def history_path(folder: Path, task: str, optimizer: str, lr: float) -> Path:
    """Return the file with one line for each step of a run."""
    return folder / "history" / f"{task}-{optimizer}-{lr_label(lr)}.jsonl"


@dataclass(frozen=True)
class Result:
    """What came of a run: one line of ``results.jsonl``. Losses that are no finite number are stored as null."""

    task: str
    optimizer: str
    lr: float
    seed: int
    steps: int
    status: str  # "done"; "diverged": the validation loss is no finite number; "failed": an exception, see reason
    train_loss: float = math.nan
    val_loss: float = math.nan
    start_loss: float = math.nan  # validation loss before the first step
    seconds: float = 0.0
    skipped_steps: int = 0
    reason: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def append(self, path: Path) -> None:
        """Append this result to a JSON-lines file."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json_line(asdict(self)))


def read_results(path: Path) -> list[Result]:
    """Read ``results.jsonl`` in the order of writing; no file means no result yet."""
    if not path.exists():
        return []
    return [Result(**_row(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def read_history(path: Path) -> dict[str, list[float]]:
    """Read a run's history as columns; what a step has not measured is nan."""
    rows = [_row(line) for line in path.read_text(encoding="utf-8").splitlines()]
    keys = ("step", "loss", "val", "lr", "scalar", "drive", "trust")
    return {key: [row.get(key, math.nan) for row in rows] for key in keys}


@dataclass(frozen=True)
class Findings:
    """A run folder, read."""

    folder: Path
    plan: dict[str, Any]
    results: dict[tuple[str, str, float], Result]

    @classmethod
    def load(cls, folder: Path) -> Findings:
        """Read a run folder, finished or not."""
        plan = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        results = {(r.task, r.optimizer, r.lr): r for r in read_results(folder / "results.jsonl")}
        return cls(folder, plan, results)

    def begun(self) -> list[dict[str, Any]]:
        """Return the tasks with at least one finished run, in the planned order."""
        seen = {result.task for result in self.results.values()}
        return [task for task in self.plan["tasks"] if task["name"] in seen]

    def row(self, task: str, optimizer: str) -> list[Result | None]:
        """Results over the learning rates, None where a run is not finished."""
        return [self.results.get((task, optimizer, lr)) for lr in self.plan["lrs"]]

    def losses(self, task: str, optimizer: str | None = None) -> list[float]:
        """Finite losses of a task, of one optimizer or of all."""
        optimizers = self.plan["optimizers"] if optimizer is None else [optimizer]
        return [r.val_loss for name in optimizers for r in self.row(task, name) if r and r.status == "done"]

    def is_best(self, result: Result | None) -> bool:
        """Tell whether a run is the best of its row."""
        if result is None or result.status != "done":
            return False
        return result.val_loss == min(self.losses(result.task, result.optimizer))

    def spread(self, task: str, optimizer: str) -> float:
        """Worst over best loss: infinite where a run diverged, nan while a run is missing or has failed."""
        row = self.row(task, optimizer)
        losses = self.losses(task, optimizer)
        if any(r is None or r.status == "failed" for r in row) or min(losses, default=1.0) <= 0:
            return math.nan
        return max(losses) / min(losses) if len(losses) == len(row) else math.inf

    def curves(self, task: str) -> Curves:
        """Read the histories of a task's finished runs, thinned; the loss is a running mean over about 20 steps."""
        curves: Curves = {}
        for result in self.results.values():
            path = history_path(self.folder, task, result.optimizer, result.lr)
            if result.task != task or result.status == "failed" or not path.exists():
                continue
            columns = read_history(path)
            columns["loss"] = running_mean(columns["loss"])
            stride = math.ceil(len(columns["step"]) / _POINTS) or 1
            curves[result.optimizer, result.lr] = {key: values[::stride] for key, values in columns.items()}
        return curves

    def has_twins(self, task: str, optimizer: str) -> bool:
        """Tell whether two learning rates led to exactly the same losses."""
        losses = [(r.train_loss, r.val_loss) for r in self.row(task, optimizer) if r and r.status == "done"]
        return len(set(losses)) < len(losses)

    def count(self, optimizer: str, status: str) -> int:
        """Number of an optimizer's runs that ended so."""
        return sum(r.optimizer == optimizer and r.status == status for r in self.results.values())


def axis_range(curves: Curves, key: str) -> tuple[float, float, bool]:
    """Return one range for all panels that show this column, and whether it is logarithmic."""
    if key == "scalar":
        return -1.05, 1.05, False
    values = [v for columns in curves.values() for v in columns[key] if math.isfinite(v)]
    low, high = min(values, default=0.1), max(values, default=1.0)
    if key == "loss" and values:  # a run that explodes leaves through the top instead of flattening the others
        firsts = [columns[key][0] for columns in curves.values() if math.isfinite(columns[key][0])]
        high = min(high, 3 * max(firsts, default=high))
    if low <= 0 or (key == "loss" and high < 10 * low):
        return low - 0.05 * (high - low), high + 0.05 * (high - low), False
    return low / 1.15, high * 1.15, True


def sentences(found: Findings) -> list[str]:
    """Say what was measured, in plain words; optimizers with failed runs and unfinished tasks are left out."""
    names = [name for name in found.plan["optimizers"] if not found.count(name, "failed")]
    tasks = [t["name"] for t in found.plan["tasks"] if all(None not in found.row(t["name"], n) for n in names)]
    # A task at which an optimizer only diverged has no factor.
    tasks = [t for t in tasks if all(min(found.losses(t, n), default=0.0) > 0 for n in names)]
    if not tasks or not names:
        return ["There is no task at which every optimizer has all its runs and a loss: nothing to compare."]
    left_out = [n for n in found.plan["optimizers"] if n not in names]
    mean = over = f"geometric mean over {len(tasks)} tasks" if len(tasks) > 1 else f"on {tasks[0]}"
    diverged = [f"{found.count(n, 'diverged')} run(s) of {n}" for n in names if found.count(n, "diverged")]
    if diverged:
        over += f"; without {_and(diverged)} that diverged"
    factors = [f"{factor(mean_ratio(_ratio(found, t, n, max, n) for t in tasks))} with {n}" for n in names]
    lrs = [lr_label(lr) for lr in found.plan["lrs"]]
    said = [
        f"Between the best and the worst lr from {lrs[0]} to {lrs[-1]} the final loss changes by a factor of "
        f"{_and(factors)} ({over})."
    ]
    siblings = [n for n in names if n != "AdamW"]
    if "AdamW" in names and siblings:
        pairs = []
        for n in siblings:
            best, worst = (factor(mean_ratio(_ratio(found, t, n, pick, "AdamW") for t in tasks)) for pick in (min, max))
            pairs.append(f"{n} ends at {best} to {worst}")
        said.append(
            f"In units of AdamW's loss at the best of its {len(lrs)} lrs, from their own best to their own worst lr "
            f"{_and(pairs)} ({mean}; below 1 is better). Three lrs two decades apart miss AdamW's best one: over the "
            "best of eleven, with a cosine, EmoNavi is at about 1.0 on the demo's four tasks (emonavi bench lr)."
        )
    if left_out:
        said.append(f"Left out here, because runs failed: {_and(left_out)}.")
    said.append(f"The lowest loss: {_and([_winner(found, t, names) for t in tasks])}.")
    if any(found.has_twins(t, n) for t in tasks for n in siblings):
        said.append(
            "Where a row shows the same figure twice, the runs are the same by construction: the first lr is the "
            "smaller of yours and 0.3 % of the weights' root mean square."
        )
    return said


def _ratio(found: Findings, task: str, optimizer: str, pick: Callable[[list[float]], float], base: str) -> float:
    return pick(found.losses(task, optimizer)) / min(found.losses(task, base))


def _winner(found: Findings, task: str, names: list[str]) -> str:
    best = min((min(found.losses(task, n)), n) for n in names)
    lr = next(r.lr for r in found.row(task, best[1]) if r and r.val_loss == best[0])
    return f"on {task} {best[1]} (lr {lr_label(lr)})"


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
