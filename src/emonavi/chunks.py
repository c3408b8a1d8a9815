"""Cache-sized pieces of tensor lists.

A sweep touches four or five tensors a parameter a dozen times. Cut into pieces whose working set fits a core's L2
cache, it pays for main memory once, and its temporaries stay small whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CHUNK", "Piece", "pieces"]

CHUNK = 32_768  # elements: five float32 streams and three temporaries of it fill 1 MiB


class Piece(NamedTuple):
    """Parallel lists of tensors (or parts of them) that are updated together."""

    owners: list[int]  # which tensor of the bucket each entry belongs to
    lists: dict[str, list[Tensor]]  # "params", "grads" and one list for each state key


def pieces(lists: dict[str, list[Tensor]], *, split: bool, foreach: bool, single: bool = False) -> Iterator[Piece]:
    """Cut parallel lists into pieces of about :data:`CHUNK` elements.

    Args:
        lists: parallel lists under their names; ``params`` gives the sizes.
        split: tensors may be flattened and cut (the rule is elementwise).
        foreach: small tensors share a piece; otherwise each piece holds one tensor.
        single: leave every tensor whole (the plain, slow path).
    """
    owners: list[int] = []
    columns: list[tuple[Tensor, ...]] = []
    filled = 0
    for owner, row in enumerate(zip(*lists.values(), strict=True)):
        size = row[0].numel()
        flat = None if single or not split else _flat(row)
        if flat is not None and size > CHUNK:
            for cut in zip(*(t.split(CHUNK) for t in flat), strict=True):
                yield Piece([owner], {name: [t] for name, t in zip(lists, cut, strict=True)})
            continue
        if columns and (not foreach or filled + size > CHUNK):
            yield _gathered(lists, owners, columns)
            owners, columns, filled = [], [], 0
        owners.append(owner)
        columns.append(flat or row)
        filled += size
    if columns:
        yield _gathered(lists, owners, columns)


def _gathered(lists: dict[str, list[Tensor]], owners: list[int], columns: Sequence[tuple[Tensor, ...]]) -> Piece:
    return Piece(owners, dict(zip(lists, map(list, zip(*columns, strict=True)), strict=True)))


def _flat(row: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """One-dimensional views of tensors in one common element order, or None where there is none."""
    if all(t.is_contiguous() for t in row):
        return tuple(t.view(-1) for t in row)
    strides = row[0].stride()
    if _dense(row[0]) and all(t.stride() == strides for t in row):
        return tuple(torch.as_strided(t, (t.numel(),), (1,), t.storage_offset()) for t in row)
    return None


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without holes or overlap (channels_last, transposed)."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
