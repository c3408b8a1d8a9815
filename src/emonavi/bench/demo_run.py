"""One run: a task, an optimizer and a learning rate, in the plain loop that every user writes.

``train`` is a generator: it yields a ``Progress`` now and then, and at the end one ``Result``. Beside it lie two
records of every step: a JSON-lines file under ``history/`` and TensorBoard event files under ``tb/``.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

import emonavi
from emonavi.bench.demo_folder import Result, history_path
from emonavi.bench.figures import json_line
from emonavi.bench.provenance import versions
from emonavi.bench.tasks import Problem, Task
from emonavi.page import lr_label
from emonavi.registry import FAMILY

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Progress", "Run", "train"]

_VAL_EVERY = 50  # steps: often enough to see the course, rare enough not to cost more than the training
_TRAIN_MEAN = 20  # steps: a single batch is too noisy to be called the final training loss
_YIELD_EVERY = 0.1  # seconds: faster than the eye reads, slower than a step costs


@dataclass(frozen=True)
class Run:
    """What is to be trained, and for how many steps."""

    task: Task
    optimizer: str
    lr: float
    seed: int
    steps: int

    @property
    def path(self) -> str:
        """Folder of this run below ``tb/``."""
        return f"{self.task.name}/{self.optimizer}/{lr_label(self.lr)}"

    def failed(self, reason: str) -> Result:
        """Record that the run ended with an exception."""
        return Result(self.task.name, self.optimizer, self.lr, self.seed, self.steps, "failed", reason=reason)


@dataclass(frozen=True)
class Progress:
    """Where a run stands; the emotional figures are None for an optimizer without emotion."""

    step: int
    loss: float
    rate: float
    drive: float | None = None
    trust: float | None = None
    mood: str = ""


def train(run: Run, folder: Path) -> Iterator[Progress | Result]:
    """Train and yield where the run stands; the last item is its ``Result``. Exceptions pass to the caller."""
    from torch.utils.tensorboard import SummaryWriter  # a second that the parent, which only hands out runs, saves

    history = history_path(folder, run.task.name, run.optimizer, run.lr)
    history.parent.mkdir(parents=True, exist_ok=True)
    with SummaryWriter(str(folder / "tb" / run.path), max_queue=1000) as board, history.open("w") as file:
        torch.manual_seed(run.seed)
        problem = run.task.build(run.seed)
        optimizer = _optimizer(run, problem, board)
        result = yield from _loop(run, problem, optimizer, board, file)
    yield result  # once the files are closed


def _optimizer(run: Run, problem: Problem, board: SummaryWriter) -> torch.optim.Optimizer:
    """Build the optimizer with its defaults, so that the learning rate is all that differs."""
    source, extra = (emonavi, {"writer": board}) if run.optimizer in FAMILY else (torch.optim, {})
    made: torch.optim.Optimizer = getattr(source, run.optimizer)(problem.params, lr=run.lr, **extra)
    return made


def _loop(
    run: Run, problem: Problem, optimizer: Any, board: SummaryWriter, file: TextIO
) -> Generator[Progress, None, Result]:
    emotional = run.optimizer in FAMILY
    start_loss = val = problem.val()
    board.add_scalar("loss/val", val, 0)
    recent: deque[float] = deque(maxlen=_TRAIN_MEAN)
    started = reported = time.perf_counter()
    reported_step = 0
    for step in range(1, run.steps + 1):
        # The whole integration: the library hears the loss at backward by itself, as in a user's own loop.
        optimizer.zero_grad()
        loss = problem.loss(step - 1)
        loss.backward()
        optimizer.step()

        recent.append(loss.item())
        row: dict[str, Any] = {"step": step, "loss": recent[-1], "lr": _learning_rate(optimizer)}
        board.add_scalar("loss/train", recent[-1], step)
        mood = ""
        if emotional:
            feeling = optimizer.emotion
            row |= {"scalar": feeling.scalar, "drive": feeling.drive, "trust": feeling.trust}
            mood = feeling.mood
        else:
            # The tag of the siblings, so that TensorBoard draws all of them in one chart.
            board.add_scalar("emo/lr/group_0", row["lr"], step)
        if step % _VAL_EVERY == 0 or step == run.steps:
            row["val"] = val = problem.val()
            board.add_scalar("loss/val", val, step)
        file.write(json_line(row))

        now = time.perf_counter()
        if now - reported >= _YIELD_EVERY:
            rate = (step - reported_step) / (now - reported)
            yield Progress(step, recent[-1], rate, row.get("drive"), row.get("trust"), mood)
            reported, reported_step = now, step
    return Result(
        *(run.task.name, run.optimizer, run.lr, run.seed, run.steps),
        status="done" if math.isfinite(val) else "diverged",
        train_loss=sum(recent) / len(recent),
        val_loss=val,
        start_loss=start_loss,
        seconds=round(time.perf_counter() - started, 3),
        skipped_steps=optimizer.emotion.skipped_steps if emotional else 0,
        versions=versions(),
    )


def _learning_rate(optimizer: Any) -> float:
    """Return the rate that acts in the first group (the tasks have one group only)."""
    rates = getattr(optimizer, "effective_lr", None) or [group["lr"] for group in optimizer.param_groups]
    return float(rates[0])
