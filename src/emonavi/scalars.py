"""One arithmetic for 0-d tensors and for plain numbers.

The emotion is a hundred operations on single numbers. As 0-d tensors they run on any device without waiting for it, in
a CUDA graph or under a compiler; on the CPU plain numbers take a twentieth of the time. Each function here takes either
kind and returns the same kind, so that the emotion is written once. None branches on a tensor's value.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Number",
    "clamp",
    "exp",
    "isfinite",
    "like",
    "log",
    "negate",
    "number",
    "rsqrt",
    "sqrt",
    "tanh",
    "where",
    "widest",
]

Number: TypeAlias = Any  # a float (or bool, for a flag), or a 0-d tensor


def like(sample: Number, value: Number) -> Number:
    """The value as the sample's kind of number. A tensor becomes a float only if the sample is one."""
    if isinstance(sample, Tensor):
        return value.to(sample) if isinstance(value, Tensor) else sample.new_full((), float(value))
    return value.item() if isinstance(value, Tensor) else float(value)


def where(flag: Number, yes: Number, no: Number) -> Number:
    """``yes`` where the flag is True, else ``no``."""
    if isinstance(flag, Tensor):
        if not isinstance(yes, Tensor) and not isinstance(no, Tensor):
            yes = like(number(flag), yes)  # torch.where of two plain numbers is float32
        return torch.where(flag, yes, no)
    return yes if flag else no


def widest(device: torch.device) -> torch.dtype:
    """The dtype of sums, and of the emotion, on a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def number(flag: Number) -> Number:
    """1 for True and 0 for False."""
    return flag.to(widest(flag.device)) if isinstance(flag, Tensor) else float(flag)


def negate(flag: Number) -> Number:
    """Logical not."""
    return torch.logical_not(flag) if isinstance(flag, Tensor) else not flag


def clamp(x: Number, low: Number = -math.inf, high: Number = math.inf) -> Number:
    """The nearest number from ``low`` to ``high``; NaN stays NaN."""
    if isinstance(x, Tensor):
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            return torch.clamp(torch.clamp(x, min=low), max=high)
        return torch.clamp(x, low, high)
    return low if x < low else high if x > high else x


def isfinite(x: Number) -> Number:
    """Whether it is neither infinite nor NaN."""
    return torch.isfinite(x) if isinstance(x, Tensor) else math.isfinite(x)


def exp(x: Number) -> Number:
    """The exponential of x."""
    return torch.exp(x) if isinstance(x, Tensor) else math.exp(x)


def log(x: Number) -> Number:
    """Natural logarithm; minus infinity for 0."""
    if isinstance(x, Tensor):
        return torch.log(x)
    return -math.inf if x == 0 else math.log(x)


def sqrt(x: Number) -> Number:
    """Square root."""
    return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)


def rsqrt(x: Number) -> Number:
    """One over the square root, of a number above 0."""
    return torch.rsqrt(x) if isinstance(x, Tensor) else 1 / math.sqrt(x)


def tanh(x: Number) -> Number:
    """Hyperbolic tangent."""
    return torch.tanh(x) if isinstance(x, Tensor) else math.tanh(x)
