"""Adam, one tensor, float64."""

import numpy as np


class NaviReference:
    """m = b1 m + (1-b1) g; v = b2 v + (1-b2) trust g^2; p = decay p - lr m_hat / (sqrt(v_hat) + eps).

    ``trusted`` names the memory that ``trust`` scales: EmoFact's vectors scale the first one.
    """

    def __init__(self, shape, *, betas, eps, corrects_bias=True, trusted="second"):
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.corrects_bias = corrects_bias
        self.trusted = trusted
        self.steps = 0
        self.first = np.zeros(shape)
        self.second = np.zeros(shape)

    def _root(self, steps):
        return np.sqrt(1 - self.beta2**steps) if self.corrects_bias and steps else 1.0

    def update(self, p, g, lr, decay, trust=1.0):
        """The new parameter and the sums <g,u>, <g,g/d>, <m,u> with the step taken last."""
        metric = np.sqrt(self.second) / self._root(self.steps) + self.eps
        last = self.first / metric
        sums = (np.sum(g * last), np.sum(g * g / metric), np.sum(self.first * last))

        self.steps += 1
        first_trust, second_trust = (trust, 1.0) if self.trusted == "first" else (1.0, trust)
        self.first = self.beta1 * self.first + (1 - self.beta1) * first_trust * g
        self.second = self.beta2 * self.second + (1 - self.beta2) * second_trust * g * g
        average = self.first / (1 - self.beta1**self.steps) if self.corrects_bias else self.first
        return decay * p - lr * average / (np.sqrt(self.second) / self._root(self.steps) + self.eps), sums

    def state(self):
        return {"exp_avg": self.first, "exp_avg_sq": self.second}
