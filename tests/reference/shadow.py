"""The presets' shadow, one tensor, float64."""


class PresetShadow:
    """First r > 0: the shadow is the parameter. Later, p moves by r to the shadow, then the shadow a little to p."""

    def __init__(self, generation):
        self.rate = 0.1 if generation == "v4" else 0.05
        self.value = None

    def lean(self, p, ratio, trust):
        if ratio <= 0:
            return p
        if self.value is None:
            self.value = p.copy()
            return p
        p = (1 - ratio) * p + ratio * self.value
        self.value = self.value + self.rate * trust * (p - self.value)
        return p
