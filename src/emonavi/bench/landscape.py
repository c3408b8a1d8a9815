"""``emonavi bench landscape``: paths on functions of two variables, from lrs over five decades.

They have no noise, no batches and no scale but that of two numbers, so they show how an optimizer moves, and say little
about training. Weight decay is off: it would pull every path to the origin, which is no minimum of most of them.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emonavi import page
from emonavi.bench.figures import json_line
from emonavi.bench.lr import switch
from emonavi.bench.peers import CONTENDERS
from emonavi.bench.provenance import made_on
from emonavi.bench.tables import plain
from emonavi.page import lr_label
from emonavi.registry import SIBLINGS

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LRS", "PEERS", "STEPS", "SURFACES", "Surface", "Walk", "build", "run", "tables", "walk"]

LRS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PEERS = ("AdamW", "Adafactor", "Lion", "Prodigy", "ScheduleFree AdamW")
STEPS = 500

_DRAWN = 400  # points of a path


@dataclass(frozen=True)
class Surface:
    """A function of two variables whose lowest value is 0, where a path begins, and what a picture shows of it."""

    title: str
    value: Callable[[Tensor, Tensor], Tensor]
    start: tuple[float, float]
    minima: tuple[tuple[float, float], ...]
    x_range: tuple[float, float]
    y_range: tuple[float, float]


SURFACES = {
    "quadratic": Surface(
        "ill-conditioned quadratic, x^2 + 1000 y^2", lambda x, y: x**2 + 1000 * y**2,
        (-1.5, 1.0), ((0.0, 0.0),), (-2.0, 2.0), (-1.5, 1.5),
    ),
    "rosenbrock": Surface(
        "Rosenbrock", lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2,
        (-1.5, 2.0), ((1.0, 1.0),), (-2.0, 2.0), (-1.0, 3.0),
    ),
    "beale": Surface(
        "Beale", lambda x, y: (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2,
        (-2.0, 2.0), ((3.0, 0.5),), (-4.5, 4.5), (-4.5, 4.5),
    ),
    "himmelblau": Surface(
        "Himmelblau", lambda x, y: (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2,
        (-0.5, -1.0), ((3.0, 2.0), (-2.805118, 3.131312), (-3.779310, -3.283186), (3.584428, -1.848126)),
        (-5.0, 5.0), (-5.0, 5.0),
    ),
    "rastrigin": Surface(
        "Rastrigin", lambda x, y: 20 + x**2 + y**2 - 10 * (torch.cos(2 * math.pi * x) + torch.cos(2 * math.pi * y)),
        (-3.3, 2.6), ((0.0, 0.0),), (-4.5, 4.5), (-4.5, 4.5),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Walk:
    """One path: where it went, and the value of the function there."""

    surface: str
    optimizer: str
    lr: float
    points: list[tuple[float, float]]  # the start is the first
    end: tuple[float, float]  # where an optimizer with two sets of weights evaluates
    value: float  # there; no finite number if it diverged

    def row(self) -> dict[str, Any]:
        """Return what is kept: all but the path."""
        near = min(math.dist(self.end, minimum) for minimum in SURFACES[self.surface].minima)
        kept = {"surface": self.surface, "optimizer": self.optimizer, "lr": self.lr, "end": list(self.end)}
        return kept | {"value": self.value, "distance": near}


def build(name: str, point: torch.nn.Parameter, lr: float) -> Any:
    """Construct a sibling or a peer at its defaults but for the lr, and without weight decay."""
    make = CONTENDERS[name].build if name in PEERS else SIBLINGS[name.lower()].cls
    optimizer: Any = make([point], lr)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    return optimizer


def walk(surface: str, optimizer: str, lr: float, steps: int = STEPS) -> Walk:
    """Follow the gradient from the surface's start."""
    place = SURFACES[surface]
    point = torch.nn.Parameter(torch.tensor(place.start))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peers, about their own options
        made = build(optimizer, point, lr)
        switch(made, "train")
        points = [place.start]
        for _ in range(steps):
            made.zero_grad()
            place.value(*point).backward()
            made.step()
            points.append(_pair(point))
    switch(made, "eval")
    with torch.no_grad():
        return Walk(surface, optimizer, lr, points, _pair(point), place.value(*point).item())


def _pair(point: Tensor) -> tuple[float, float]:
    x, y = point.tolist()
    return x, y


def run(out: Path, optimizers: Sequence[str], steps: int, command: str) -> Iterator[Table | str]:
    """Walk on all surfaces and yield a table of each, and the files: ``landscape.json`` and a PNG for each surface."""
    rows: list[dict[str, Any]] = []
    pictures = []
    for name in SURFACES:
        walks = [walk(name, optimizer, lr, steps) for optimizer in optimizers for lr in LRS]
        rows += [found.row() for found in walks]
        pictures.append(_draw(walks, out / f"landscape-{name}.png"))
        yield from tables(rows[-len(walks) :])
    record = {"command": command, **made_on(), "steps": steps}
    lines = ",\n".join(json_line(row).rstrip() for row in rows)
    file = out / "landscape.json"
    file.write_text(f'{json.dumps(record)[:-1]}, "walks": [\n{lines}\n]}}\n', encoding="utf-8")
    yield from (str(path) for path in (file, *pictures))


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """Where each path ends, one table for each surface: the value of the function above its lowest, which is 0."""
    for surface in dict.fromkeys(row["surface"] for row in rows):
        table = plain(f"{SURFACES[surface].title}: value at the end", ("", *(f"lr {lr_label(lr)}" for lr in LRS)))
        for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
            ends = {r["lr"]: r["value"] for r in rows if (r["surface"], r["optimizer"]) == (surface, optimizer)}
            table.add_row(optimizer, *(_said(ends[lr]) for lr in LRS))
        yield table


def _said(value: float | None) -> str:
    return "diverged" if value is None or not math.isfinite(value) else f"{value:.1e}"


def _draw(walks: Sequence[Walk], path: Path) -> Path:
    """Draw the paths: a row for each optimizer, a column for each lr."""
    from matplotlib.figure import Figure
    from PIL import Image  # matplotlib's own way to a PNG

    surface = SURFACES[walks[0].surface]
    names = list(dict.fromkeys(found.optimizer for found in walks))
    sheet = Figure(figsize=(1.75 * len(LRS) + 0.5, 1.6 * len(names) + 0.6), dpi=80, layout="constrained")
    axes = sheet.subplots(len(names), len(LRS), squeeze=False, sharex=True, sharey=True)
    x, y = (torch.linspace(*span, 160) for span in (surface.x_range, surface.y_range))
    height = torch.log1p(surface.value(*torch.meshgrid(x, y, indexing="xy")))
    for found, axis in zip(walks, axes.flat, strict=True):
        axis.contour(x, y, height, levels=10, colors=page.GREY, linewidths=0.4, alpha=0.6)
        stride = math.ceil(len(found.points) / _DRAWN)
        shown = found.points[::stride]
        axis.plot(*zip(*shown, strict=True), color=page.PALETTE[0], lw=1.1)
        axis.plot(*surface.start, "o", color=page.GREY, ms=3)
        axis.plot(*zip(*surface.minima, strict=True), "x", color=page.PALETTE[4], ms=5)
        axis.plot(*found.end, "o", color=page.PALETTE[2], ms=4)
        axis.set(xlim=surface.x_range, ylim=surface.y_range, xticks=[], yticks=[])
        axis.set_xlabel(_said(found.value), fontsize=8)
    for axis, lr in zip(axes[0], LRS, strict=True):
        axis.set_title(f"lr {lr_label(lr)}", fontsize=9)
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name, fontsize=8)
    sheet.suptitle(f"{surface.title}: from grey to green, minima are crosses; below, the value at the end", fontsize=10)
    drawn = io.BytesIO()
    sheet.savefig(drawn)
    Image.open(drawn).quantize(48).save(path, optimize=True)  # a quarter of the size
    return path
