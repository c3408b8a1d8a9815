"""Lion, one tensor, float64."""

import numpy as np


class LynxReference:
    """p = decay p - lr sign((1-b1) g + b1 trust m); m = b2 m + (1-b2) g."""

    def __init__(self, shape, *, betas, eps, corrects_bias=True):
        self.beta1, self.beta2 = betas
        self.memory = np.zeros(shape)

    def update(self, p, g, lr, decay, trust=1.0):
        size = np.sum(np.abs(g))
        sums = (np.sum(g * np.sign(self.memory)), size, size)
        direction = np.sign((1 - self.beta1) * g + self.beta1 * trust * self.memory)
        self.memory = self.beta2 * self.memory + (1 - self.beta2) * g
        return decay * p - lr * direction, sums

    def state(self):
        return {"exp_avg": self.memory}
