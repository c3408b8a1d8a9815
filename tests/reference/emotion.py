"""The presets' feeling, and what is fixed of the adaptive one, on plain floats."""

import math


def running_mean(values, rate):
    """The mean of all values until there are 1/rate of them, an exponential one of that rate from then on."""
    mean = 0.0
    for n, value in enumerate(values, start=1):
        mean += max(rate, 1 / n) * (value - mean)
    return mean


def first_drive(weights, lr):
    """min(1, (3e-3 rms + 1e-8) / lr) over all weights."""
    numbers = [x for w in weights for x in w.reshape(-1).tolist()]
    rms = math.sqrt(sum(x * x for x in numbers) / len(numbers))
    return min(1.0, (3e-3 * rms + 1e-8) / lr)


class PresetFeeling:
    """Scalar, ratio, trust, norm control and should_stop of one generation, loss by loss."""

    def __init__(self, generation, *, lr, use_trust=True, max_norm=1.0, min_lr=1e-6):
        self.generation = generation
        self.lr = lr
        self.use_trust = use_trust and generation == "v4"
        self.max_norm = max_norm if generation == "v4" else 0.0
        self.min_lr = min(min_lr, lr)
        self.short = self.long = None
        self.scalar = 0.0
        self.norm_avg = 0.0
        self.scalars = []

    def feel(self, loss):
        self.short = loss if self.short is None else 0.3 * loss + 0.7 * self.short
        self.long = loss if self.long is None else 0.01 * loss + 0.99 * self.long
        habit = 1 + abs(self.scalar) if self.generation == "v4" else 1
        self.scalar = math.tanh(5 * (self.short - self.long) / habit)
        self.scalars.append(self.scalar)

    @property
    def ratio(self):
        s = self.scalar
        if self.generation != "v1":
            return abs(s) if abs(s) > 0.1 else 0.0
        if s > 0.6:
            return 0.7 + 0.2 * s
        if s < -0.6:
            return 0.1
        return 0.3 if abs(s) > 0.3 else 0.0

    @property
    def trust(self):
        return 1 - self.scalar**2 if self.use_trust else 1.0

    @property
    def step_size(self):
        return self.lr if self.generation == "v1" else self.lr * (1 - abs(self.scalar))

    def end_step(self, norm):
        """Norm control, which acts from the next step on."""
        self.norm_avg = 0.9 * self.norm_avg + 0.1 * norm
        if self.max_norm and self.norm_avg > self.max_norm:
            self.lr = max(self.min_lr, self.lr * 0.95 ** (self.norm_avg / self.max_norm))

    @property
    def should_stop(self):
        last = self.scalars[-32:]
        if len(last) < 32:
            return False
        mean = sum(last) / 32
        variance = sum((s - mean) ** 2 for s in last) / 32
        return sum(map(abs, last)) / 32 < 0.05 and variance < 0.005
