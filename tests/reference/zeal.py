"""Adafactor with momentum, one tensor; as published, Adafactor after a step of today's gradient."""

import numpy as np

from .clan import rising
from .fact import FactReference
from .navi import NaviReference


class ZealReference:
    """Matrices: m over sqrt(R C), R and C with beta2; a share w = clip(2 s, 0, 1) of 0.5 sign(m). Vectors: Adam."""

    def __new__(cls, shape, *, betas, eps, corrects_bias=True):
        if len(shape) < 2:
            return Vector(shape, betas=betas, eps=eps, corrects_bias=corrects_bias)
        return super().__new__(cls if corrects_bias else PublishedZeal)

    def __init__(self, shape, *, betas, eps, corrects_bias=True):
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.steps = 0
        self.taken = np.zeros(shape)
        self.first = np.zeros(shape)
        self.row = np.zeros((shape[0], *[1] * (len(shape) - 1)))
        self.col = np.zeros((1, *shape[1:]))

    def _metric(self):
        bias = 1 - self.beta2**self.steps if self.steps else 1.0
        return np.sqrt(self.row * self.col) / bias + self.eps

    def update(self, p, g, lr, decay, trust=1.0, scalar=0.0):
        metric = self._metric()
        last = (1 - self.beta1**self.steps) * self.taken  # as it was, without the correction of its bias
        sums = (np.sum(g * last), np.sum(g * g / metric), np.sum(last * last * metric))

        self.steps += 1
        share = rising(scalar)
        row = np.sqrt((g * g).mean(axis=tuple(range(1, g.ndim)), keepdims=True) + self.eps**2)
        col = np.sqrt((g * g).mean(axis=0, keepdims=True) + self.eps**2)
        self.first = self.beta1 * self.first + (1 - self.beta1) * g
        self.row = self.beta2 * self.row + (1 - self.beta2) * row
        self.col = self.beta2 * self.col + (1 - self.beta2) * col
        average = self.first / (1 - self.beta1**self.steps)
        self.taken = (1 - share) * average / self._metric() + share * 0.5 * np.sign(self.first)
        return decay * p - lr * self.taken, sums

    def state(self):
        return {"exp_avg": self.first, "exp_avg_row": self.row, "exp_avg_col": self.col}


class Vector(NaviReference):
    """Adam, whatever the scalar."""

    def update(self, p, g, lr, decay, trust=1.0, scalar=0.0):
        return super().update(p, g, lr, decay)


class PublishedZeal(ZealReference):
    """|s| > 0.6: first p -= lr sign(g); else |s| > 0.1: p -= lr softsign((1 - b1) g) (|g| + eps). Then Adafactor."""

    def __init__(self, shape, *, betas, eps, corrects_bias=False):
        self.beta1, self.eps = betas[0], eps
        self.fact = FactReference(shape, betas=betas, eps=eps, corrects_bias=False)

    def update(self, p, g, lr, decay, trust=1.0, scalar=0.0):
        blend = (1 - self.beta1) * g
        if abs(scalar) > 0.6:
            p = p - lr * np.sign(blend)
        elif abs(scalar) > 0.1:
            p = p - lr * blend / (1 + np.abs(blend)) * (np.sqrt(np.sum(g * g)) + self.eps)
        return self.fact.update(p, g, lr, decay)[0], None

    def state(self):
        return self.fact.state()
