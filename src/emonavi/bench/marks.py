"""How far from AdamW tuned: final losses of untuned siblings over those of AdamW at its best lr, on the demo's tasks.

AdamW is swept over half decades from 1e-5 to 1, each sibling runs at three lrs, all with the same seeds and budgets.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import emonavi
from emonavi.bench import lr_label
from emonavi.bench.runner import EMOTIONAL, hardware, versions
from emonavi.bench.tasks import DEMO

__all__ = ["Cell", "measure", "report", "train"]

ADAMW_LRS = [10.0 ** (e / 2) for e in range(-10, 1)]
LRS = [1e-5, 1e-3, 1e-1]
# The same run, told another way: nothing may change when a loss is shifted or scaled.
VARIANTS = {"": (1.0, 0.0), "loss - 1000": (1.0, -1000.0), "loss * 1e-6": (1e-6, 0.0)}


class Cell(NamedTuple):
    """One run."""

    task: str
    optimizer: str
    lr: float
    seed: int
    variant: str = ""


def train(cell: Cell) -> dict[str, Any]:
    """Train once; the final loss on held-out data, of the raw weights and, for ours, of the shadow's."""
    torch.set_num_threads(1)
    task = DEMO[cell.task]
    problem = task.build(cell.seed)
    params = [p for p in problem.model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if cell.optimizer == "AdamW":
        optimizer = torch.optim.AdamW(params, lr=cell.lr)
    else:
        optimizer = emonavi.create(cell.optimizer, params, lr=cell.lr, use_shadow=True)
    factor, shift = VARIANTS[cell.variant]
    for step in range(task.steps):
        optimizer.zero_grad()
        (problem.loss(step) * factor + shift).backward()
        optimizer.step()
    result: dict[str, Any] = {**cell._asdict(), "raw": problem.val()}
    if isinstance(optimizer, emonavi.EmoOptimizer):
        with optimizer.calm():
            result["calm"] = problem.val()
    return result


def measure(seeds: int, workers: int) -> Iterator[dict[str, Any]]:
    """Run the whole grid in parallel processes; yields the results as they come."""
    tasks, numbers = list(DEMO), range(seeds)
    cells = [Cell(t, "AdamW", lr, s) for t in tasks for lr in ADAMW_LRS for s in numbers]
    cells += [Cell(t, o, lr, s) for t in tasks for o in EMOTIONAL for lr in LRS for s in numbers]
    told = [v for v in VARIANTS if v]
    cells += [Cell("diabetes", o, 1e-3, s, v) for o in EMOTIONAL for s in numbers for v in told]
    cells.sort(key=lambda c: c.task)  # a worker keeps what a task has to set up
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(train, cells, chunksize=4)


def report(out: Path | None, seeds: int, workers: int) -> Iterator[str]:
    """Measure, and say what was found line by line; the figures go to ``out`` as JSON."""
    start = time.perf_counter()
    results = list(measure(seeds, workers))
    means: dict[tuple[str, str, float, str], dict[str, float]] = {}
    grouped: dict[tuple[str, str, float, str], list[dict[str, Any]]] = defaultdict(list)
    for r in results:
        grouped[r["task"], r["optimizer"], r["lr"], r["variant"]].append(r)
    for key, some in grouped.items():
        means[key] = {k: statistics.fmean(r[k] for r in some) for k in ("raw", "calm") if k in some[0]}
    yield f"{len(results)} runs, {seeds} seeds, {time.perf_counter() - start:.0f} s. Mean final loss on held-out data"
    yield "over that of AdamW (constant lr) at the best of 11 lrs from 1e-5 to 1: raw weights / the shadow's."
    for task in DEMO:
        swept = {lr: means[task, "AdamW", lr, ""]["raw"] for lr in ADAMW_LRS}
        best = min((lr for lr in swept if math.isfinite(swept[lr])), key=swept.__getitem__)
        yield f"\n{task}: AdamW {swept[best]:.4g} at lr {best:.0e}"
        for name in EMOTIONAL:
            cells = [means[task, name, lr, ""] for lr in LRS]
            shown = "   ".join(
                f"lr {lr_label(lr)} {c['raw'] / swept[best]:.2f} / {c['calm'] / swept[best]:.2f}"
                for lr, c in zip(LRS, cells, strict=True)
            )
            yield f"  {name}   {shown}"
            for variant in VARIANTS:
                if variant and (task, name, 1e-3, variant) in means:
                    yield f"    {variant}: {means[task, name, 1e-3, variant]['raw'] / swept[best]:.2f}"
    if out is not None:
        rows = sorted(results, key=lambda r: [str(r[k]) for k in Cell._fields])
        out.write_text(
            json.dumps({"hardware": hardware(), "versions": versions(), "seeds": seeds, "runs": rows}, indent=0) + "\n"
        )
