"""Adafactor without momentum, one tensor, float64."""

import numpy as np

from .navi import NaviReference


class FactReference:
    """Two or more dimensions: R, C running means of root mean squares; p = decay p - lr g / (sqrt(R C) + eps).

    Vectors and scalars follow Adam. ``places`` are the flat coordinates that reflection remembers (None: all).
    """

    def __new__(cls, shape, **options):
        if len(shape) < 2:
            options.pop("places", None)
            return NaviReference(shape, **options, trusted="first")
        return super().__new__(cls)

    def __init__(self, shape, *, betas, eps, corrects_bias=True, places=None):
        self.beta = betas[0]
        self.eps = eps
        self.corrects_bias = corrects_bias
        self.steps = 0
        self.row = np.zeros((shape[0], *[1] * (len(shape) - 1)))
        self.col = np.zeros((1, *shape[1:]))
        self.places = np.arange(int(np.prod(shape))) if places is None else np.asarray(places)
        self.sample = np.zeros(len(self.places))

    def update(self, p, g, lr, decay, trust=1.0):
        self.steps += 1
        # Adaptive: floor and bias correction make the run independent of the loss's scale; presets: as published.
        floor = self.eps**2 if self.corrects_bias else self.eps
        bias = 1 - self.beta**self.steps if self.corrects_bias else 1.0
        square = g**2
        row = np.sqrt(square.mean(axis=tuple(range(1, g.ndim)), keepdims=True) + floor)
        col = np.sqrt(square.mean(axis=0, keepdims=True) + floor)
        self.row = self.beta * self.row + (1 - self.beta) * trust * row
        self.col = self.beta * self.col + (1 - self.beta) * trust * col
        metric = np.sqrt(self.row * self.col) / bias + self.eps

        some, its_metric = g.reshape(-1)[self.places], metric.reshape(-1)[self.places]
        scale = g.size / len(self.places)
        pairs = ((some, self.sample), (some, some), (self.sample, self.sample))
        sums = tuple(scale * np.sum(a * b / its_metric) for a, b in pairs)
        self.sample = 0.9 * self.sample + 0.1 * some
        return decay * p - lr * g / metric, sums

    def state(self):
        return {"exp_avg_row": self.row, "exp_avg_col": self.col} | (
            {"exp_avg_sample": self.sample} if self.corrects_bias else {}
        )
