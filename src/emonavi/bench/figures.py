"""Figures as all benches write and read them, and what they make of many."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["factor", "json_line", "loss_of", "mean_ratio", "running_mean"]


def json_line(row: dict[str, Any]) -> str:
    """Write one line of strict JSON, with null for what is no finite number: JSON knows neither nan nor infinity."""
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def loss_of(value: float | None) -> float:
    """A figure as read from such a line: a loss that was no finite number is infinite."""
    return math.inf if value is None or not math.isfinite(value) else float(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mean_ratio(ratios: Iterable[float]) -> float:
    """Return the geometric mean; a ratio of 0, which has no logarithm, counts as the smallest number above it."""
    return statistics.geometric_mean([max(ratio, sys.float_info.min) for ratio in ratios])


def factor(x: float) -> str:
    """Write a ratio."""
    return f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:,.0f}"


def running_mean(values: list[float], rate: float = 0.05) -> list[float]:
    """Smooth from the first value on; what is no finite number leaves a gap and does not enter."""
    smooth, weight, mean = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            mean += rate * (value - mean)
            weight += rate * (1 - weight)
        smooth.append(mean / weight if math.isfinite(value) else math.nan)  # corrected for the start at 0
    return smooth
