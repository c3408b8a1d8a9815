"""What hearing the loss costs: the backward of a model of 100 million parameters, with and without listeners.

The weights are many and the batch is small, so that little arithmetic hides the overhead. Processor time is what is
taken, since a neighbour that gets the core for a while does not count in it. The variants take turns in an order that
changes with each round, and the figure is the median of the ratios within a round.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import emonavi
from emonavi.bench.provenance import hardware, made_on
from emonavi.bench.workers import torch_threads

__all__ = ["LISTENERS", "MARKS", "measure", "report"]

LISTENERS = (0, 1, 4)
MARKS = {1: 1.01, 4: 1.05}  # the ratios that may not be passed

_BATCH = 4  # rows that go through the model


def measure(width: int = 500, layers: int = 400, rounds: int = 100, warm_up: int = 3) -> dict[int, dict[str, Any]]:
    """Milliseconds of a backward and its ratio to one that nobody hears, by the number of listeners.

    Args:
        width: of each layer; a layer has about its square of parameters.
        layers: number of ``Linear`` layers, each with a bias.
        rounds: timed backward passes of each variant.
        warm_up: rounds before those.

    Example:
        >>> figures = measure(width=4, layers=3, rounds=2, warm_up=1)
        >>> sorted(figures), figures[0]["ratio"]
        ([0, 1, 4], 1.0)
    """
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    x = torch.randn(_BATCH, width)
    times: dict[int, list[float]] = {n: [] for n in LISTENERS}
    with torch_threads(1):
        for turn in range(warm_up + rounds):
            first = turn % len(LISTENERS)
            for n in LISTENERS[first:] + LISTENERS[:first]:
                with _listening(model, n):
                    took = _backward(model, x)
                if turn >= warm_up:
                    times[n].append(1e3 * took)
    return {n: _summary(times[n], times[0]) for n in LISTENERS}


@contextmanager
def _listening(model: nn.Module, count: int) -> Iterator[None]:
    """As many optimizers as asked for, each with its own run of layers, as fused groups have them."""
    params = list(model.parameters())
    size = -(-len(params) // max(count, 1))
    parts = [params[i * size : (i + 1) * size] for i in range(count)]
    optimizers = [emonavi.EmoNavi(part) for part in parts if part]
    yield
    optimizers.clear()


def _backward(model: nn.Module, x: torch.Tensor) -> float:
    loss = model(x).square().mean()
    gc.disable()  # a collection belongs to nobody
    start = time.process_time()
    loss.backward()
    took = time.process_time() - start
    gc.enable()
    model.zero_grad()
    return took


def _summary(mine: list[float], unheard: list[float]) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(mine, unheard, strict=True))
    low, high = (ratios[int(q * (len(ratios) - 1))] for q in (0.25, 0.75))
    return {"ms": statistics.median(mine), "ratio": statistics.median(ratios), "quartiles": [low, high]}


def report(out: Path | None = None, rounds: int = 100) -> list[str]:
    """Measure; returns the lines of a table and writes the figures as JSON where ``out`` says."""
    load = os.getloadavg()[0]
    result = measure(rounds=rounds)
    lines = [
        f"{hardware()}, torch {torch.__version__}, 1 thread, load {load:.1f}",
        "",
        f"{'listeners':>9} {'ms':>8} {'ratio':>8} {'quartiles':>17} {'mark':>7}",
    ]
    for n, r in result.items():
        mark = f"{MARKS[n]:7.2f}" if n in MARKS else ""
        lines.append(f"{n:9} {r['ms']:8.2f} {r['ratio']:8.4f} {r['quartiles'][0]:8.4f} {r['quartiles'][1]:8.4f} {mark}")
    if out is not None:
        figures = {
            **made_on(), "load": load, "rounds": rounds,
            "model": f"400 Linear(500, 500), batch {_BATCH}", "marks": MARKS, "listeners": result,
        }  # fmt: skip
        out.write_text(json.dumps(figures, indent=1) + "\n")
    return lines
