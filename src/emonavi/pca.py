"""``emonavi plot --pca``: the ways of the weights, each in the plane of its first two principal components, in one PNG.

Needs ``emonavi[demo]``. Two components of a high-dimensional random walk explain most of its variance too, and draw it
as an arc (Antognini and Sohl-Dickstein 2018, https://arxiv.org/abs/1806.08805): a smooth bow is no finding by itself.
"""

from __future__ import annotations

import io
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emonavi import page
from emonavi.events import label, reading
from emonavi.trajectory import FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Way", "draw", "explained", "project", "read"]

_COLUMNS = 4
_WIDE = 32  # letters that fit over a panel


@dataclass(frozen=True)
class Way:
    """Where the sampled weights of one run went: ``weights`` is of shape (records, coordinates)."""

    label: str
    steps: Tensor
    weights: Tensor


def read(folder: Path) -> tuple[list[Way], list[str]]:
    """Read every record of weights at or below a folder, in the order of their names; and why others are left out.

    Raises:
        ValueError: there is no such folder, no record in it, or none that can be drawn.
    """
    with reading(folder):
        files = sorted(folder.rglob(FILE))
    if not files:
        raise ValueError(
            f"{folder} holds no {FILE}: record it with emonavi.monitor.trajectory(optimizer, folder) around the loop"
        )
    ways, reasons = [], []
    for file in files:
        try:
            ways.append(_read(file, folder))
        except ValueError as error:
            reasons.append(str(error))
    if not ways:
        raise ValueError(reasons[0] + (f"; nor can the other {len(files) - 1} be drawn" if len(files) > 1 else ""))
    return ways, reasons


def _read(file: Path, folder: Path) -> Way:
    with reading(file.parent):
        data = io.BytesIO(file.read_bytes())
    try:
        held = dict(torch.load(data, weights_only=True))
        steps, weights = held["steps"], held["weights"].double()
        finite = weights.isfinite().all(1)  # a run that diverged is drawn up to there
        way = Way(label(file.parent, folder), steps[finite], weights[finite])
    except Exception as error:
        raise ValueError(f"{file} is no record of weights ({type(error).__name__}): record it anew") from error
    if (count := len(way.steps)) < 3:
        samples = f"{count} finite sample{'s' * (count != 1)}"
        raise ValueError(f"{file} holds {samples}: three are needed for a plane, and most come when the run ends")
    if (wide := weights.shape[1]) < 2:
        raise ValueError(f"{file} holds samples of {wide} weight{'s' * (wide != 1)}: two are needed for a plane")
    return way


def project(way: Way) -> Tensor:
    """The points of a way in the plane of its own first two principal components, its start in the origin.

    Returns shape (records, 2), in the units of the weights. In one plane for all runs the widest way would hide the
    others.
    """
    plane: Tensor = torch.linalg.svd(way.weights - way.weights.mean(0), full_matrices=False).Vh[:2]
    return (way.weights - way.weights[0]) @ plane.T


def explained(way: Way, points: Tensor) -> tuple[float, float]:
    """Share of the variance along a way that lies in each of the two directions; 0 where nothing moved."""
    total = way.weights.var(0, correction=0).sum().item()
    first, second = points.var(0, correction=0).tolist()
    return (first / total, second / total) if total > 0 else (0.0, 0.0)


def draw(folder: Path, out: Path) -> tuple[Path, list[str]]:
    """Draw all runs at or below ``folder`` side by side; return the picture, and a line on each run.

    Raises:
        ValueError: there is no such folder, or no run in it that can be drawn.
        OSError: ``out`` cannot be written.
    """
    ways, reasons = read(folder)
    planes = [project(way) for way in ways]
    out.mkdir(parents=True, exist_ok=True)
    path = out / "emonavi-pca.png"
    _write_png(path, ways, planes)
    lines = [_said(way, points) for way, points in zip(ways, planes, strict=True)]
    return path, lines + [f"left out: {reason}" for reason in reasons]


def _said(way: Way, points: Tensor) -> str:
    one, two = explained(way, points)
    far = (way.weights[-1] - way.weights[0]).norm().item()
    return f"{way.label}: {one:.0%} and {two:.0%} of the variance, {way.steps[-1]} steps, end {far:.3g} from the start"


@page.any_script()
def _write_png(path: Path, ways: list[Way], planes: list[Tensor]) -> None:
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(ways))
    rows = math.ceil(len(ways) / columns)
    sheet = Figure(figsize=(3.1 * columns + 0.4, 3.1 * rows + 0.8), dpi=90, layout="constrained")
    axes = list(sheet.subplots(rows, columns, squeeze=False).flat)
    for axis, way, points in zip(axes, ways, planes, strict=False):
        _draw(axis, way, points)
    for axis in axes[len(ways) :]:
        axis.remove()
    title = "weights in two principal components: start grey, end green; colour is the share of the steps"
    sheet.suptitle(textwrap.fill(title, _WIDE * columns), fontsize=11)
    sheet.savefig(path)


def _draw(axis: Axes, way: Way, points: Tensor) -> None:
    one, two = explained(way, points)
    x, y = points.unbind(1)
    axis.plot(x, y, color=page.GREY, lw=0.6, alpha=0.6)
    axis.scatter(x, y, c=way.steps, cmap="viridis", s=5, zorder=2)
    axis.plot(0, 0, "o", color=page.GREY, ms=7, zorder=3)
    axis.plot(x[-1], y[-1], "o", color=page.PALETTE[2], ms=7, zorder=3)
    axis.set_title(page.as_it_is(way.label, _WIDE, 3), fontsize=9)
    axis.set(xlabel=f"first component, {one:.0%}", ylabel=f"second, {two:.0%}")
    axis.set_aspect("equal", "datalim")  # a distance is the same in both directions
    axis.grid(alpha=0.25)
