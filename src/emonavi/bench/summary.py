"""What a ledger of ``bench lr`` says: losses as multiples of a yardstick's at its best lr, and sentences about them.

A *pair* is a task and an lr; over several seeds the loss of a pair is their mean. The pairs that all are measured over
have an lr at which more than half of the optimizers ran: the yardsticks' half decades and an optimizer's own default
lr are left out where the others did not run there.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from emonavi.bench.figures import loss_of, mean_ratio
from emonavi.bench.peers import CONTENDERS, OWN_RULE, YARDSTICK
from emonavi.page import lr_label

__all__ = ["CAP", "NEAR", "Entry", "Line", "Study", "marks", "width"]

NEAR = (1.10, 1.25, 1.40)  # times the yardstick: what is counted
CAP = 100.0  # a run that exploded counts as this in a mean: otherwise one decides them all

_NUMBER, _LOSS = (int, float), (int, float, type(None))  # a loss that was no finite number is null
_HOLDS: dict[str, Any] = {
    **dict.fromkeys(("task", "optimizer", "split", "reason", "made_by", "hardware"), str),
    **{"lr": _NUMBER, "seed": int, "steps": int, "raw": _LOSS, "calm": _LOSS, "versions": dict, "trace": dict},
}


@dataclass(frozen=True)
class Entry:
    """An optimizer and which of its weights were evaluated."""

    optimizer: str
    figure: str = "raw"  # or "calm"
    shadow: bool = False  # it has both

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"{self.optimizer} {self.figure}" if self.shadow else self.optimizer


@dataclass(frozen=True)
class Line:
    """A line of the summary table. Ratios are of the loss to the yardstick's at its best lr."""

    entry: Entry
    pairs: int
    mean: float  # geometric, over the pairs
    shares: tuple[float, ...]  # of the pairs within each of NEAR
    worst: float
    widths: tuple[float, ...]  # decades of lr within the first two of NEAR, mean over tasks
    at_default: float  # geometric mean over tasks at its own default lr
    at_best: float  # and at the best of its lrs for each task


class Study:
    """The rows of a ledger, of the latest budget of each task.

    Raises:
        ValueError: a row is not what ``bench lr`` writes.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for number, row in enumerate(rows, start=1):
            _check(row, number)
        latest = {(r["task"], r["optimizer"], r["lr"], r["seed"], r["steps"]): r for r in rows}
        self.steps: dict[str, int] = {r["task"]: r["steps"] for r in latest.values()}
        self.rows = [r for r in latest.values() if r["steps"] == self.steps[r["task"]]]
        self.splits: dict[str, str] = {r["task"]: r["split"] for r in self.rows}
        ran = {r["optimizer"] for r in self.rows}
        self.optimizers = [name for name in CONTENDERS if name in ran] + sorted(ran - set(CONTENDERS))
        shadowed = {r["optimizer"] for r in self.rows if r["calm"] is not None}
        self.entries = [
            Entry(name, figure, name in shadowed)
            for name in self.optimizers
            for figure in ("raw", "calm")
            if figure == "raw" or name in shadowed
        ]

    def tasks(self, split: str) -> list[str]:
        """Return the tasks of a split; ``long`` are those of three times the steps, of either split."""
        if split == "long":
            return [task for task in self.splits if task.endswith("-3x")]
        return [task for task, its in self.splits.items() if its == split]

    @cached_property
    def _losses(self) -> dict[tuple[str, str, str], dict[float, float]]:
        """Mean losses over the seeds by task, optimizer and figure, then by lr."""
        found: dict[tuple[str, str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in self.rows:
            for figure in ("raw", "calm"):
                found[row["task"], row["optimizer"], figure][row["lr"]].append(loss_of(row[figure]))
        return {key: {lr: statistics.fmean(some) for lr, some in sorted(by_lr.items())} for key, by_lr in found.items()}

    def losses(self, task: str, entry: Entry) -> dict[float, float]:
        """Losses of a task by lr; infinite where the run diverged."""
        return self._losses.get((task, entry.optimizer, entry.figure), {})

    def best(self, task: str, optimizer: str) -> float:
        """Loss of an optimizer at its best lr; nan where there is none above 0, so that nothing can be a multiple."""
        best = min(self.losses(task, Entry(optimizer)).values(), default=math.nan)
        return best if 0 < best < math.inf else math.nan

    def at_best(self, task: str) -> str:
        """Say what the yardstick reaches."""
        losses = self.losses(task, Entry(YARDSTICK))
        if not losses:
            return f"no run of {YARDSTICK}"
        lr = min(losses, key=losses.__getitem__)
        return f"{YARDSTICK} {losses[lr]:.4g} at lr {lr_label(lr)}"

    @cached_property
    def lrs(self) -> list[float]:
        """The lrs of the pairs."""
        ran: dict[float, set[str]] = defaultdict(set)
        for row in self.rows:
            ran[row["lr"]].add(row["optimizer"])
        return sorted(lr for lr, names in ran.items() if 2 * len(names) > len(self.optimizers))

    def ratios(self, entry: Entry, tasks: Sequence[str], base: str = YARDSTICK) -> dict[str, dict[float, float]]:
        """All losses of an entry over the base's at its best lr, by task and lr; tasks without a base are left out."""
        found = {}
        for task in tasks:
            best = self.best(task, base)
            if not math.isnan(best) and (losses := self.losses(task, entry)):
                found[task] = {lr: loss / best for lr, loss in losses.items()}
        return found

    def pairs(self, entry: Entry, tasks: Sequence[str], base: str = YARDSTICK) -> list[float]:
        """Return the ratios at the lrs that count."""
        found = self.ratios(entry, tasks, base)
        return [ratio for by_lr in found.values() for lr, ratio in by_lr.items() if lr in self.lrs]

    def line(self, entry: Entry, tasks: Sequence[str], base: str = YARDSTICK) -> Line | None:
        """Sum an entry up over some tasks; None where it has no pair there."""
        pairs = self.pairs(entry, tasks, base)
        by_task = self.ratios(entry, tasks, base).values()
        if not pairs:
            return None
        known = CONTENDERS.get(entry.optimizer)
        defaults = [by_lr[known.default_lr] for by_lr in by_task if known and known.default_lr in by_lr]
        return Line(
            entry,
            len(pairs),
            _mean(pairs),
            tuple(share(pairs, tau) for tau in NEAR),
            max(pairs),
            tuple(statistics.fmean(width(by_lr, tau) for by_lr in by_task) for tau in NEAR[:2]),
            _mean(defaults),
            _mean([min(by_lr.values()) for by_lr in by_task]),
        )

    def lines(self, split: str) -> list[Line]:
        """Return the summary table of a split."""
        found = (self.line(entry, self.tasks(split)) for entry in self.entries)
        return [line for line in found if line is not None]

    def own_lines(self, split: str) -> list[Line]:
        """Return the lines of the siblings over their own rules, tuned, where that is not the yardstick."""
        bases = ((entry, OWN_RULE.get(entry.optimizer, YARDSTICK)) for entry in self.entries)
        found = (self.line(entry, self.tasks(split), base) for entry, base in bases if base != YARDSTICK)
        return [line for line in found if line is not None]


def _check(row: Mapping[str, Any], number: int) -> None:
    """Refuse a row in which what is read here is missing, or of another kind."""
    for name, kind in _HOLDS.items():
        if name not in row:
            raise ValueError(f"row {number} lacks {name!r}")
        if not isinstance(row[name], kind):
            raise ValueError(f"in row {number}, {name} is {row[name]!r}")
    if not 0 < row["lr"] < math.inf:
        raise ValueError(f"in row {number}, lr is {row['lr']}")
    columns = [row["trace"].get(name) for name in ("step", "lr", "loss")] if row["trace"] else []
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        raise ValueError(f"in row {number}, trace has no lists step, lr and loss of one length")


def share(ratios: Sequence[float], tau: float) -> float:
    """Share of the ratios that are at most tau."""
    return sum(ratio <= tau for ratio in ratios) / len(ratios) if ratios else math.nan


def width(by_lr: Mapping[float, float], tau: float) -> float:
    """Decades of lr at which the ratio is at most tau; each lr stands for the stretch to the middle of its neighbours.

    So grids of other spacing can be compared; from 1e-5 to 1 it is 5 at most.
    """
    places = [math.log10(lr) for lr in sorted(by_lr)]
    middles = [(a + b) / 2 for a, b in pairwise(places)]
    edges = [places[0], *middles, places[-1]]
    spans = (b - a for a, b in pairwise(edges))
    return sum(span for span, lr in zip(spans, sorted(by_lr), strict=True) if by_lr[lr] <= tau)


def _mean(ratios: Sequence[float]) -> float:
    """Geometric mean, each ratio capped."""
    return mean_ratio(min(ratio, CAP) for ratio in ratios) if ratios else math.nan


# --- The marks


def marks(study: Study) -> list[tuple[bool, str]]:
    """Say of each mark whether it is reached, in a sentence with the figures; only of those that can be judged."""
    split = "test" if study.tasks("test") else "dev"
    tasks = study.tasks(split)
    said = []
    for letter, figure, bound, name in (("a", "calm", 1.40, "mark"), ("b", "raw", 1.25, "goal")):
        ratios = study.pairs(Entry("EmoNavi", figure), tasks)
        if ratios:
            near, all_ = share(ratios, 1.10), share(ratios, bound)
            words = (
                f"({letter}) EmoNavi {figure} is within 1.10 of AdamW + cosine at its best lr on {near:.0%} of "
                f"{len(ratios)} {split} pairs ({name}: 90 %) and within {bound:.2f} on {all_:.0%} ({name}: all; "
                f"worst {times(max(ratios))})"
            )
            said.append((near >= 0.9 and all_ == 1, words))
    for optimizer in ("EmoLynx", "EmoFact"):
        ratios = study.pairs(Entry(optimizer, "calm"), tasks, OWN_RULE[optimizer])
        if ratios:
            near = share(ratios, 1.15)
            words = (
                f"(c) {optimizer} calm is within 1.15 of {OWN_RULE[optimizer]} at its best lr on {near:.0%} of "
                f"{len(ratios)} {split} pairs (mark: 75 %)"
            )
            said.append((near >= 0.75, words))
    for rival in ("Prodigy", "Prodigy + cosine"):
        said += _against(study, rival, tasks, split)
    return said


def _against(study: Study, rival: str, tasks: Sequence[str], split: str) -> list[tuple[bool, str]]:
    ours, theirs = (study.line(Entry(name), tasks) for name in ("EmoNavi", rival))
    if ours is None or theirs is None:
        return []
    words = (
        f"(d) EmoNavi raw has a geometric mean of {times(ours.mean)} over the {split} pairs and "
        f"{times(ours.at_default)} at its default lr, {rival} {times(theirs.mean)} and {times(theirs.at_default)}"
    )
    return [(ours.mean < theirs.mean and not ours.at_default >= theirs.at_default, words)]


def times(ratio: float) -> str:
    """Write a ratio."""
    if math.isnan(ratio):
        return "-"
    return "inf" if math.isinf(ratio) else f"{ratio:.3f}" if ratio < 10 else f"{ratio:.3g}".replace("e+0", "e")
