"""Lion with a soft sign, one tensor; as published, with its soft sign in one band of the scalar."""

import numpy as np

from .clan import rising


class NecoReference:
    """c = (1-b1) g + b1 m; u = (1-w) 2 c / (|c| + mean |c|) + w sign(c), w = clip(2 s, 0, 1); p = decay p - lr u."""

    def __new__(cls, shape, *, betas, eps, corrects_bias=True):
        return super().__new__(cls if corrects_bias else PublishedNeco)

    def __init__(self, shape, *, betas, eps, corrects_bias=True):
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.share = 0.0
        self.memory = np.zeros(shape)

    def _direction(self, blend):
        size = np.abs(blend)
        soft = 2 * blend / (size + size.mean()) if size.any() else 0 * blend
        return (1 - self.share) * soft + self.share * np.sign(blend)

    def update(self, p, g, lr, decay, trust=1.0, scalar=0.0):
        last = self._direction(self.memory)
        most = np.sum(np.abs(g) * np.abs(last))
        sums = (np.sum(g * last), most, most)

        self.share = rising(scalar)
        direction = self._direction((1 - self.beta1) * g + self.beta1 * self.memory)
        self.memory = self.beta2 * self.memory + (1 - self.beta2) * g
        return decay * p - lr * direction, sums

    def state(self):
        return {"exp_avg": self.memory}


class PublishedNeco(NecoReference):
    """0.2 < |s| <= 0.5: softsign(c) (|g| + eps); else sign(c) where sign(c) = sign(g)."""

    def update(self, p, g, lr, decay, trust=1.0, scalar=0.0):
        blend = (1 - self.beta1) * g + self.beta1 * self.memory
        direction = np.sign(blend) * (np.sign(blend) == np.sign(g))
        if 0.2 < abs(scalar) <= 0.5:
            direction = blend / (1 + np.abs(blend)) * (np.sqrt(np.sum(g * g)) + self.eps)
        self.memory = self.beta2 * self.memory + (1 - self.beta2) * g
        return decay * p - lr * direction, None
