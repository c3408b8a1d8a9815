"""``emonavi bench autonomous``: workers that train alone and merge, beside workers that agree at every step.

K workers each hold every K-th sample (of text: a K-th of it), and begin alike. ``sync`` is DDP: one optimizer, the mean
of all gradients at every step. ``mean`` takes the mean of the weights every H steps and at the end, ``outer`` takes
DiLoCo's outer step instead; ``shared`` is ``mean`` of the emotions' drives as well, and ``moments`` of the first
memories. The workers run one after another in one process; a test shows that processes come to the same weights.

Bytes are those that each worker sends in a ring all-reduce, 2 (K - 1) / K times the size of what is reduced. For the
time, its line has 100 Mbit/s, and 50 ms for each of the ring's 2 (K - 1) hops.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import emonavi
from emonavi import page
from emonavi.autonomous import Merger, nesterov
from emonavi.bench.figures import factor, loss_of
from emonavi.bench.ledger import Row
from emonavi.bench.provenance import made_on
from emonavi.bench.tables import plain
from emonavi.bench.tasks import TASKS, Problem, data
from emonavi.bench.tasks.text import CharTransformer, next_character
from emonavi.emotion import Emotion
from emonavi.page import lr_label
from emonavi.registry import FAMILY

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Cell", "cells", "draw", "lines", "measure", "shard", "traffic"]

NAMES = ("cnn", "charlm", "lora")
STEPS = 320
PERIODS = (1, 16, 64, 256, STEPS)  # the last: at the end only
MANY = (1, 10, 100, 1000)
PEER, PEER_LRS = "AdamW", (3e-3, 1e-2)
NEAR, FEW = 1.03, 0.02  # what is aimed at: this near to sync's loss, with this share of its bytes

_BYTES_A_SECOND, _LATENCY = 100e6 / 8, 0.05
_CONTEXT = 24  # characters
_LOSS_BYTES = 4 * 8  # of the emotion's own all-reduce at every step of sync


class Cell(NamedTuple):
    """What defines a run."""

    task: str
    optimizer: str
    lr: float
    workers: int
    scheme: str  # "sync", "mean", "outer", "shared" or "moments"
    period: int
    steps: int  # of the fastest worker
    speeds: int  # the fastest worker over the slowest
    seed: int


def cells(optimizers: Sequence[str], seeds: int = 1) -> list[Cell]:
    """What is asked for first: four workers; then many of unlike speed, and other numbers of them."""
    ours, peers = [(name, 1e-3) for name in optimizers], [(PEER, lr) for lr in PEER_LRS]
    sync, few = [("sync", 1)], [("mean", 64), ("mean", STEPS), ("outer", 64)]
    every = [("mean", period) for period in PERIODS]
    variants = [(name, period) for name in ("shared", "moments") for period in (64, 16)]

    def block(workers: int, schemes: Sequence[tuple[str, int]], some: Sequence[tuple[str, float]]) -> list[Cell]:
        return [
            Cell(task, name, lr, workers, scheme, period, STEPS, 1, seed)
            for name, lr in some
            for task in NAMES
            for scheme, period in schemes
            for seed in range(seeds)
        ]

    many = [
        Cell("softmax", name, 1e-3, workers, scheme, 32, 96, 8, seed)
        for name in optimizers for workers in MANY for scheme in ("mean", "shared")[: 1 + (workers == 10)]
        for seed in range(seeds)
    ]  # fmt: skip
    plan = (
        *(
            block(4, sync + few, ours),
            block(4, every, ours),
            block(4, variants, [one for one in ours if one[0] == "EmoNavi"]),
        ),
        *(block(4, sync + few, peers), block(1, sync, ours + peers), many),
        *(block(workers, sync + few, some) for some in (ours, peers) for workers in (2, 8)),
        block(4, every, peers),
    )
    return list(dict.fromkeys(cell for part in plan for cell in part))


def shard(name: str, seed: int, rank: int, workers: int) -> Problem:
    """The problem of one worker: its own part of the training data; weights and held-out data are everyone's."""
    if name == "charlm":
        train, val = data.source_code()
        return next_character(seed, CharTransformer, (train.chunk(workers)[rank], val), _CONTEXT)
    problem = TASKS[name].build(seed)
    batch: Any = problem.batch
    part = {key: batch.keywords[key][rank::workers] for key in ("inputs", "targets")}
    size = min(batch.keywords["size"], len(part["targets"]))
    return replace(problem, batch=partial(batch, **part, size=size))


def measure(cell: Cell) -> Row:
    """Train all workers; the held-out loss at the end, what each worker has sent, and the time of one of its steps."""
    torch.manual_seed(cell.seed)
    problems = [shard(cell.task, cell.seed, rank, cell.workers) for rank in range(cell.workers)]
    started = time.process_time()
    figures = _synchronous(cell, problems) if cell.scheme == "sync" else _autonomous(cell, problems)
    seconds = time.process_time() - started - figures.pop("looking")
    figures |= {"step_seconds": seconds / figures["worker_steps"], "val": problems[0].val()}
    return figures | made_on()


def _optimizer(cell: Cell, problem: Problem) -> Any:
    if cell.optimizer == PEER:
        return torch.optim.AdamW(problem.params, lr=cell.lr)
    return emonavi.create(cell.optimizer, problem.params, lr=cell.lr, process_group=None)


def _synchronous(cell: Cell, problems: Sequence[Problem]) -> Row:
    """DDP, in one process: the mean of the gradients, one optimizer, and the mean of the losses for its emotion."""
    model = problems[0].model
    optimizer = _optimizer(cell, problems[0])
    problems = [replace(problem, model=model) for problem in problems]
    for step in range(cell.steps):
        optimizer.zero_grad()
        for problem in problems:
            (problem.loss(step) / cell.workers).backward()
        optimizer.step()
    trained = sum(p.numel() for p in problems[0].params)
    sent = [4 * trained] + [_LOSS_BYTES] * (cell.optimizer != PEER)
    return {"sent": sent, "times": cell.steps, "worker_steps": cell.steps * cell.workers, "looking": 0.0}


class _Shared(Merger):
    """The logarithms of the drives, the emotion's and each tensor's, become the mean, too."""

    def _followers(self) -> list[Tensor]:
        vector, place, drives = self._felt()
        self._drives = torch.stack([vector[place].float(), *(drive.log() for drive in drives)])
        return [*super()._followers(), self._drives]

    def _felt(self) -> tuple[Tensor, int, list[Tensor]]:
        vector, place = self.optimizer.param_groups[0]["emotion"], Emotion().index("log_drive")
        return vector, place, [self.optimizer.state[p]["drive"] for p in self._params()]

    def accept(self, mean: Tensor) -> None:
        super().accept(mean)
        vector, place, drives = self._felt()
        vector[place] = self._drives[0]
        torch._foreach_copy_(drives, list(self._drives[1:].exp().unbind()))


class _Moments(Merger):
    """The first memories become the mean, too: of Adam's kind only, and for twice the bytes."""

    def _followers(self) -> list[Tensor]:
        return super()._followers() + [self.optimizer.state[p]["exp_avg"] for p in self._params()]


_MERGERS: dict[str, Callable[..., Merger]] = {
    "mean": Merger, "outer": partial(Merger, outer=nesterov), "shared": _Shared, "moments": _Moments
}  # fmt: skip


def _autonomous(cell: Cell, problems: Sequence[Problem]) -> Row:
    optimizers = [_optimizer(cell, problem) for problem in problems]
    mergers = [_MERGERS[cell.scheme](p.model, o) for p, o in zip(problems, optimizers, strict=True)]
    made = [0] * cell.workers
    times, alone, looked = 0, math.nan, 0.0
    for end in [*range(cell.period, cell.steps, cell.period), cell.steps]:
        for rank, (problem, optimizer, merger) in enumerate(zip(problems, optimizers, mergers, strict=True)):
            until = round(end * pace(cell, rank))
            for step in range(made[rank], until):
                optimizer.zero_grad()
                problem.loss(step).backward()
                optimizer.step()
                merger.step()
            made[rank] = until
        if end == cell.steps:
            looked = time.process_time()
            alone = problems[0].val()
            looked = time.process_time() - looked
        mean = torch.stack([merger.offer() / cell.workers for merger in mergers]).sum(0)
        for merger in mergers:
            merger.accept(mean)
        times += 1
    sent = [mean.numel() * mean.element_size()]
    return {"sent": sent, "times": times, "worker_steps": sum(made), "alone": alone, "looking": looked}


def pace(cell: Cell, rank: int) -> float:
    """How many steps a worker makes while the fastest makes one; evenly spread on a logarithmic scale."""
    return float(cell.speeds ** -(rank / max(cell.workers - 1, 1)))


# --- What was found

_ADDED = {"mean": "", "outer": ", outer", "shared": ", drives", "moments": ", memory"}
_COLOURS = {**dict(zip(FAMILY, cycle(page.PALETTE), strict=False)), PEER: page.GREY}
_MARKS: dict[str, dict[str, Any]] = {"mean": {"marker": "o"}, "outer": {"marker": "s", "ls": "", "mfc": "none"}}


def traffic(row: Row) -> tuple[float, float]:
    """Bytes that a worker sends in a run, and seconds that its line takes for them."""
    workers = row["workers"]
    if workers == 1:
        return 0.0, 0.0
    sent = [2 * (workers - 1) / workers * size for size in row["sent"]]
    seconds = [size / _BYTES_A_SECOND + 2 * (workers - 1) * _LATENCY for size in sent]
    return sum(sent) * row["times"], sum(seconds) * row["times"]


def _label(row: Row) -> str:
    if row["scheme"] == "sync":
        return "sync" if row["workers"] > 1 else "alone"
    at = f"H = {row['period']}" if row["period"] < row["steps"] else "at the end"
    return at + _ADDED[row["scheme"]]


def _best(rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
    """The best lr's row of each task, optimizer, number of workers, scheme and seed; ours have one lr only."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in Cell._fields if name != "lr")
        if key not in best or loss_of(row["val"]) < loss_of(best[key]["val"]):
            best[key] = row
    return best


def _against(row: Row, best: dict[tuple[Any, ...], Row]) -> Row | None:
    """The synchronous run of the same workers."""
    wanted = {"scheme": "sync", "period": 1}
    return best.get(tuple((row | wanted)[name] for name in Cell._fields if name != "lr"))


def lines(rows: Sequence[Row]) -> Iterator[Table | str]:
    """A table for each task (held-out loss of a worker before its last merge, and after it), and the verdicts.

    ``drives`` or Adam's ``memory`` are shared at the merges, too; ``outer`` takes an outer step.
    """
    best = _best(rows)
    for task in dict.fromkeys(row["task"] for row in rows):
        yield _table(task, [row for row in best.values() if row["task"] == task], best)
    yield from _verdicts(best)


def _table(task: str, rows: Sequence[Row], best: dict[tuple[Any, ...], Row]) -> Table:
    heads = ("workers", "optimizer", "scheme", "own", "merged", "over sync", "sent MB", "of sync", "time")
    table = plain(f"{task}: {TASKS[task].title}", heads, left=("optimizer", "scheme"), gap=1)
    order = sorted(rows, key=lambda r: (r["workers"], r["optimizer"] == PEER, r["optimizer"], r["scheme"] != "sync",
                                        r["scheme"], r["period"], r["seed"]))  # fmt: skip
    for row in order:
        sync = _against(row, best)
        size, line = traffic(row)
        own = [f"{factor(loss_of(row['val']) / loss_of(sync['val']))}" if sync else "-"]
        share = f"{size / traffic(sync)[0]:.1%}" if sync and traffic(sync)[0] else "-"
        alone = f"{loss_of(row['alone']):#.4g}" if "alone" in row else "-"
        name = f"{row['optimizer']} {lr_label(row['lr'])}" if row["optimizer"] == PEER else row["optimizer"]
        compute = row["step_seconds"] * row["steps"]
        table.add_row(
            str(row["workers"]), name, _label(row), alone, f"{loss_of(row['val']):#.4g}", *own,
            f"{size / 1e6:.2f}", share, f"{compute + line:.0f} s",
        )  # fmt: skip
    return table


def _verdicts(best: dict[tuple[Any, ...], Row]) -> Iterator[str]:
    """Whether four workers and H = 64 come within reach of sync, task by task."""
    for row in best.values():
        sync = _against(row, best)
        if (row["workers"], row["scheme"], row["period"], row["speeds"]) != (4, "mean", 64, 1) or sync is None:
            continue
        ratio, share = loss_of(row["val"]) / loss_of(sync["val"]), traffic(row)[0] / traffic(sync)[0]
        reached = "within reach" if ratio <= NEAR and share <= FEW else "not within reach"
        yield (
            f"{row['task']}, {row['optimizer']}, 4 workers, H = 64, seed {row['seed']}: {ratio:.3f} of sync's loss for "
            f"{share:.2%} of its bytes: {reached} ({NEAR:.2f}, {FEW:.0%})"
        )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw what merging costs and saves, a panel for each task: the loss and the bytes of four workers over DDP's."""
    from matplotlib.figure import Figure

    best = _best([row for row in rows if row["workers"] == 4])
    tasks, names = (list(dict.fromkeys(row[what] for row in best.values())) for what in ("task", "optimizer"))
    if not tasks:
        return
    figure = Figure(figsize=(4.2 * len(tasks), 4.4), dpi=110, layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks, strict=True):
        axis.set(title=task, xlabel="bytes sent, over DDP's")
        page.prepare(axis, 0.002, 1.5, True, {share: f"{share:.1%}" for share in (0.003, 0.016, 0.06, 1)}, "x")
        page.prepare(axis, 0.8, 3, True, page.ticks(0.8, 3, plain=True) | {1.1: "1.1", 1.5: "1.5"})
        axis.axhspan(0.8, NEAR, color=page.GREY, alpha=0.15, lw=0)
        axis.axvline(FEW, color=page.GREY, lw=0.8, ls=":")
        periods: dict[str, float] = {}
        for (name, colour), (scheme, mark) in product(_COLOURS.items(), _MARKS.items()):
            if name not in names:
                continue
            some = [r for r in best.values() if (r["task"], r["optimizer"], r["scheme"]) == (task, name, scheme)]
            both = [(r, s) for r in some if (s := _against(r, best))]
            found = [(traffic(r)[0] / traffic(s)[0], loss_of(r["val"]) / loss_of(s["val"])) for r, s in both]
            for (row, _), (share, _) in zip(both, found, strict=True):
                periods[str(row["period"]) if row["period"] < row["steps"] else "end"] = share
            axis.plot(
                *zip(*sorted(found), strict=True) if found else ((), ()),
                label=f"{name}, {scheme}",
                color=colour,
                **mark,
            )
        above = axis.secondary_xaxis("top")
        above.set_xticks(list(periods.values()), list(periods))
        above.set_xticks([], minor=True)
        above.set_xlabel("H: steps between two merges")
    axis.legend(frameon=False)
    figure.supylabel("held-out loss, over DDP's")
    figure.savefig(path)
