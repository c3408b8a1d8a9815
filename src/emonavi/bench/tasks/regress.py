"""Regressions: raw targets with losses in the thousands and millions, and a density whose loss is negative."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emonavi.bench.tasks import data
from emonavi.bench.tasks.problem import Problem, Split, Task, epoch_batch, initialised, split

__all__ = ["DIABETES", "TASKS"]

_FEATURE_NOISE = 0.3  # of standardised inputs: 295 samples are few for an MLP


@cache
def _diabetes_data() -> Split:
    """Standardised inputs (by the training part's statistics), targets as they are."""
    x, y, x_val, y_val = split(*data.sklearn_arrays("load_diabetes", scaled=False))
    mean, std = x.mean(0), x.std(0)
    return (x - mean) / std, y.float(), (x_val - mean) / std, y_val.float()


def _mlp(features: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs)))


def _regressor(features: int) -> nn.Module:
    return _mlp(features, 1).append(nn.Flatten(0))


def _regression(seed: int, arrays: Callable[[], Split]) -> Problem:
    x, y, x_val, y_val = arrays()
    batch = partial(epoch_batch, seed, inputs=x, targets=y, size=32, noise=_FEATURE_NOISE)
    return Problem(initialised(seed, partial(_regressor, x.shape[1])), F.mse_loss, batch, (x_val, y_val))


# --- A density: how bright is a pixel, given the ones above and to the left


_SENSOR_NOISE = 0.2  # five grey levels: keeps a few edges in flat surroundings from deciding the score


@cache
def _neighbourhoods() -> Split:
    """Every third pixel in both directions of the flower's green: 24 neighbours already seen, and the pixel.

    In tenths of full brightness above the left neighbour. Every third row of windows is held out.
    """
    green = data.photograph("flower.jpg")[1]
    windows = green.unfold(0, 4, 3).unfold(1, 7, 3)  # (rows, columns, 4, 7); the pixel is the middle of the last row
    windows = 10 * (windows - windows[:, :, 3:, 2:3])
    held_out = torch.arange(len(windows)) % 3 == 2
    train, val = (part.flatten(0, 1).flatten(1) for part in (windows[~held_out], windows[held_out]))
    return train[:, :24], train[:, 24], val[:, :24], val[:, 24]


def _negative_log_likelihood(output: Tensor, targets: Tensor) -> Tensor:
    """Of a Gaussian, in nats; ``output`` (n, 2): mean and logarithm of the variance above that of the sensor."""
    mean, log_excess = output.unbind(1)
    variance = _SENSOR_NOISE**2 + log_excess.exp()
    return 0.5 * (variance.log() + (targets - mean).square() / variance + math.log(2 * math.pi)).mean()


def _inverse_likelihood(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Exponential of the mean negative log-likelihood, positive where that is not: a ratio of 1.10 is 0.095 nats."""
    return _negative_log_likelihood(model(inputs), targets).exp()


def _density(seed: int) -> Problem:
    x, y, x_val, y_val = _neighbourhoods()
    batch = partial(epoch_batch, seed, inputs=x, targets=y, size=64)
    model = initialised(seed, partial(_mlp, x.shape[1], 2))
    return Problem(model, _negative_log_likelihood, batch, (x_val, y_val), _inverse_likelihood)


_DIABETES, _AUTOMPG = (partial(_regression, arrays=arrays) for arrays in (_diabetes_data, data.autompg))
DIABETES = Task("diabetes", "diabetes, MLP on raw targets", "mean squared error", 360, 120, _DIABETES, needs="sklearn")
TASKS = (
    DIABETES,
    Task("autompg", "cars' weights in pounds, MLP", "mean squared error", 400, 134, _AUTOMPG, "test", "mlxtend"),
    Task("density", "a pixel from its neighbours, Gaussian", "exp(nats)", 400, 134, _density, "test", "sklearn"),
)
