"""How long a step takes, beside torch's own AdamW, in one run.

Machines are noisy and so are their neighbours: the optimizers take turns, and what counts is the ratio of medians.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import emonavi
from emonavi.bearer import Bearer
from emonavi.bench.runner import hardware, versions

__all__ = ["LISTS", "measure", "report"]

LISTS: dict[str, list[tuple[int, ...]]] = {
    "25 M in 75 tensors": [(577, 578)] * 75,
    "400 tiny tensors": [(16, 4)] * 400,
    "LoRA, 500 thin matrices": [(768, 4), (4, 768)] * 250,
}
CONTENDERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "AdamW loop": lambda params: torch.optim.AdamW(params, foreach=False),
    "AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
    "Emotional(AdamW foreach)": lambda params: _wrapped(torch.optim.AdamW(params, foreach=True)),
    "Emotional(AdamW fused)": lambda params: _wrapped(torch.optim.AdamW(params, fused=True)),
    "EmoNavi": lambda params: emonavi.EmoNavi(params, capture=False),
    "EmoFact": lambda params: emonavi.EmoFact(params, capture=False),
    "EmoLynx": lambda params: emonavi.EmoLynx(params, capture=False),
}


def _wrapped(optimizer: torch.optim.Optimizer) -> emonavi.Emotional:
    return emonavi.Emotional(optimizer, capture=False)


def measure(shapes: list[tuple[int, ...]], rounds: int = 15, warm_up: int = 3) -> dict[str, dict[str, float]]:
    """Median milliseconds of a step for each contender, and bytes of state per parameter.

    Each contender has its own parameters of the given shapes, and one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps: dict[str, Callable[[], Any]] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name, build in CONTENDERS.items():
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p) * 1e-2
        optimizers[name] = build(params)
        hears = {"loss": 1.0} if isinstance(optimizers[name], Bearer) else {}
        steps[name] = partial(optimizers[name].step, **hears)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warm_up + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    torch.set_num_threads(threads)
    return {n: {"ms": statistics.median(times[n]), "state_bytes": _state_bytes(optimizers[n])} for n in steps}


def _state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of state tensors per parameter, the per-tensor scalars left out."""
    held: int = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.dim())
    count: int = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    return held / count


def report(out: Path | None = None, rounds: int = 15) -> list[str]:
    """Measure all lists; returns the lines of a table and writes the figures as JSON where ``out`` says."""
    figures: dict[str, Any] = {
        "hardware": hardware(),
        "versions": versions(),
        "load": os.getloadavg()[0],
        "rounds": rounds,
        "lists": {},
    }
    lines = [f"{hardware()}, torch {torch.__version__}, 1 thread, load {figures['load']:.1f}"]
    for name, shapes in LISTS.items():
        result = figures["lists"][name] = measure(shapes, rounds)
        base = result["AdamW foreach"]["ms"]
        lines += ["", f"{name:26} {'ms':>8} {'ratio':>7} {'state bytes/param':>18}"]
        lines += [f"  {n:24} {r['ms']:8.2f} {r['ms'] / base:7.2f} {r['state_bytes']:18.3f}" for n, r in result.items()]
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")
    return lines
