"""Functions of coordinates: a photograph as a network, and an equation that a network has to satisfy."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emonavi.bench.tasks import data
from emonavi.bench.tasks.problem import Problem, Split, Task, epoch_batch, generator, initialised, split

__all__ = ["BY_NAME", "TASKS"]


# --- A photograph


@cache
def _pixels() -> Split:
    """Coordinates (n, 2) in [-1, 1] and colours (n, 3) in [0, 1] of china.jpg at a quarter of its resolution."""
    image = F.avg_pool2d(data.photograph("china.jpg"), 4)
    rows, columns = (torch.linspace(-1, 1, count) for count in image.shape[1:])
    return split(torch.cartesian_prod(rows, columns), image.flatten(1).T)


class _Photo(nn.Module):
    """Fourier features, the same for every seed, and an MLP: (n, 2) coordinates to (n, 3) colours."""

    frequencies: Tensor

    def __init__(self, features: int = 64, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", 8 * torch.randn(2, features, generator=generator(0, 1, 0)))
        self.inner = nn.Sequential(
            *(nn.Linear(2 * features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
        )

    def forward(self, places: Tensor) -> Tensor:
        phases = places @ self.frequencies
        colours: Tensor = self.inner(torch.cat([phases.sin(), phases.cos()], dim=1))
        return colours


def _photo(seed: int) -> Problem:
    x, y, x_val, y_val = _pixels()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return epoch_batch(seed, step, inputs=x, targets=y, size=256)

    return Problem(initialised(seed, _Photo), F.mse_loss, batch, (x_val, y_val))


# --- The heat equation: u_t = DIFFUSION u_xx for x and t in [0, 1], u = 0 at both walls

_DIFFUSION = 0.05
_INTERIOR, _EDGE = 96, 64  # points a batch
_EDGE_WEIGHT = 3.0


def _temperature(points: Tensor) -> Tensor:
    """Exact solution at points (n, 2) of x and t, from sin(pi x) + sin(2 pi x) / 2 at t = 0."""
    x, t = points.unbind(1)
    modes = ((1, 1.0), (2, 0.5))
    parts = [a * (k * math.pi * x).sin() * (-_DIFFUSION * (k * math.pi) ** 2 * t).exp() for k, a in modes]
    return torch.stack(parts).sum(0)


class _HeatNet(nn.Module):
    """Points inside and at the edge (n, 2) to the equation's residuals inside, then the weighted temperatures there."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1), nn.Flatten(0))
        )

    def forward(self, inside: Tensor, edge: Tensor) -> Tensor:
        points = inside.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.inner(points).sum(), points, create_graph=True)
        (curvature,) = torch.autograd.grad(slope[:, 0].sum(), points, create_graph=True)
        residual = slope[:, 1] - _DIFFUSION * curvature[:, 0]
        return torch.cat([residual, _EDGE_WEIGHT * self.inner(edge)])


def _relative_error(model: Any, points: Tensor, exact: Tensor) -> Tensor:
    """Root mean squared error of a solution over the root mean square of the exact one."""
    off: Tensor = model.inner(points) - exact
    return (off.square().mean() / exact.square().mean()).sqrt()


def _heat(seed: int) -> Problem:
    def batch(step: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        source = generator(seed, 0, step)
        inside, edge = (torch.rand(count, 2, generator=source) for count in (_INTERIOR, _EDGE))
        half = _EDGE // 2
        edge[:half, 1] = 0  # the start
        edge[half:, 0] = edge[half:, 0].round()  # the walls
        return (inside, edge), torch.cat([torch.zeros(_INTERIOR), _EDGE_WEIGHT * _temperature(edge)])

    grid = torch.cartesian_prod(torch.linspace(0, 1, 41), torch.linspace(0, 1, 41))
    return Problem(initialised(seed, _HeatNet), F.mse_loss, batch, (grid, _temperature(grid)), _relative_error)


# --- A swing that comes to rest: u'' + 2 DAMPING u' + STIFFNESS u = 0 for t in [0, 1], from u = 1 at rest

_DAMPING, _STIFFNESS = 2.0, 100.0


def _swing(times: Tensor) -> Tensor:
    """Exact solution at times (n, 1)."""
    frequency = math.sqrt(_STIFFNESS - _DAMPING**2)
    phase, fading = frequency * times, (-_DAMPING * times).exp()
    return (fading * (phase.cos() + _DAMPING / frequency * phase.sin())).squeeze(1)


class _SwingNet(nn.Module):
    """Times (n, 1) to the equation's residuals there, over its stiffness, and to what the start lacks of 1 at rest."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1), nn.Flatten(0))
        )

    def forward(self, times: Tensor) -> Tensor:
        points = torch.cat([torch.zeros(1, 1), times]).requires_grad_()
        u = self.inner(points)
        (speed,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (force,) = torch.autograd.grad(speed.sum(), points, create_graph=True)
        residual = (force + 2 * _DAMPING * speed).squeeze(1) / _STIFFNESS + u
        return torch.cat([residual[1:], 10 * (u[:1] - 1), speed[0]])


def _oscillation(seed: int) -> Problem:
    def batch(step: int) -> tuple[Tensor, Tensor]:
        return torch.rand(64, 1, generator=generator(seed, 0, step)), torch.zeros(66)

    times = torch.linspace(0, 1, 201)[:, None]
    return Problem(initialised(seed, _SwingNet), F.mse_loss, batch, (times, _swing(times)), _relative_error)


BY_NAME = (Task("swing", "damped swing, physics-informed", "relative error", 600, 200, _oscillation),)
TASKS = (
    Task("photo", "china, coordinate network", "mean squared error", 400, 134, _photo, "test", "sklearn"),
    Task("heat", "heat equation, physics-informed", "relative error", 500, 167, _heat, "test"),
)
