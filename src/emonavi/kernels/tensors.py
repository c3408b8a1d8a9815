"""What kernels ask of tensors: plain memory, in one order, of the right sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from emonavi.fact import emofact
from emonavi.memories import sample_size

__all__ = ["PLAIN_TYPES", "in_one_order", "in_order", "misfit", "plain"]

PLAIN_TYPES = {Tensor, Parameter}  # subclasses may have no memory of their own


def plain(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> bool:
    """Whether all are plain CPU tensors of this dtype, no subclasses: those may have no memory of their own."""
    same = dtype is None or {t.dtype for t in tensors} <= {dtype}
    return same and set(map(type, tensors)) <= PLAIN_TYPES and all([t.is_cpu for t in tensors])


def in_one_order(params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    """Whether all are contiguous, and no gradient is a lazily negated view."""
    return all(map(Tensor.is_contiguous, chain(params, grads))) and not any(map(Tensor.is_neg, grads))


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one range of memory without holes or overlap, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def in_order(columns: list[list[Tensor]], row_major: bool) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """Columns whose tensors share one element order, and (tensor, copy) pairs of what has to be copied back."""
    columns[1] = [g.resolve_neg() for g in columns[1]]
    if all([t.is_contiguous() for column in columns for t in column]):
        return columns, []
    ordered, home = [list(column) for column in columns], []
    for i, row in enumerate(zip(*columns, strict=True)):
        stride = row[0].stride()
        if not row_major and _dense(row[0]) and all(t.stride() == stride for t in row):
            continue
        for k, tensor in enumerate(row):
            ordered[k][i] = tensor.contiguous()
            if k != 1 and ordered[k][i] is not tensor:
                home.append((tensor, ordered[k][i]))
    return ordered, home


def misfit(rule: Callable[..., Any], lists: Mapping[str, list[Tensor]]) -> str | None:
    """What is wrong with the sizes of the tensors, if anything: a kernel would run past the end of a smaller one."""
    for name, tensors in lists.items():
        for param, tensor in zip(lists["param"], tensors, strict=True):
            if tensor.numel() != _wanted_size(rule, name, param):
                what = f"of {tensor.numel()} elements for a parameter of shape {tuple(param.shape)}"
                return f"the kernel for {rule.__name__} has no use for {name} {what}"
    return None


def _wanted_size(rule: Callable[..., Any], name: str, param: Tensor) -> int:
    """How many elements the tensor of this name must have."""
    count = param.numel()
    if rule is not emofact or name in ("param", "grad"):
        return count
    rows = len(param)
    lines = {"exp_avg_row": rows, "exp_avg_col": count // max(1, rows)}
    return lines[name] if name in lines else sample_size(count)
