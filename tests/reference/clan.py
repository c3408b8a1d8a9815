"""The clan: one of three rules as published; Adam with a share of sign steps under the adaptive emotion."""

import numpy as np

from .fact import FactReference
from .lynx import LynxReference
from .navi import NaviReference


def rising(scalar):
    """clip(2 s, 0, 1)."""
    return min(1.0, max(0.0, 2 * scalar))


class ClanReference(NaviReference):
    """u = (1 - w) m_hat / (sqrt(v_hat) + eps) + w 0.5 sign(m), w = clip(2 s, 0, 1); p = decay p - lr u."""

    def __new__(cls, shape, *, betas, eps, corrects_bias=True):
        if not corrects_bias:
            return PublishedClan(shape, betas, eps)
        return super().__new__(cls)

    def __init__(self, shape, **options):
        super().__init__(shape, **options)
        self.taken = np.zeros(shape)

    def _metric(self):
        return np.sqrt(self.second) / self._root(self.steps) + self.eps

    def update(self, p, g, lr, decay, trust=1.0, scalar=0.0):
        metric = self._metric()
        last = (1 - self.beta1**self.steps) * self.taken  # as it was, without the correction of its bias
        sums = (np.sum(g * last), np.sum(g * g / metric), np.sum(last * last * metric))

        super().update(p, g, lr, decay)
        share = rising(scalar)
        average = self.first / (1 - self.beta1**self.steps)
        self.taken = (1 - share) * average / self._metric() + share * 0.5 * np.sign(self.first)
        return decay * p - lr * self.taken, sums


class PublishedClan:
    """|s| > 0.6: Lion with betas 0.9, 0.99; else |s| > 0.3: Adafactor; else Adam. Only the chosen one learns."""

    def __init__(self, shape, betas, eps):
        same = {"eps": eps, "corrects_bias": False}
        self.navi = NaviReference(shape, betas=betas, **same)
        self.fact = FactReference(shape, betas=betas, **same)
        self.lynx = LynxReference(shape, betas=(0.9, 0.99), **same)

    def update(self, p, g, lr, decay, trust=1.0, scalar=0.0):
        size = abs(scalar)
        chosen = self.lynx if size > 0.6 else self.fact if size > 0.3 else self.navi
        return chosen.update(p, g, lr, decay)[0], None

    def state(self):
        fact = self.fact.state()
        if "exp_avg" in fact:
            fact = {f"fact_{name}": value for name, value in fact.items()}
        return {**self.navi.state(), **fact, "lynx_exp_avg": self.lynx.memory}
