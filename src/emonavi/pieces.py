"""Cache-sized pieces of tensor lists.

A sweep reads and writes four or five tensors per parameter a dozen times. In pieces that fit a core's L2 cache, main
memory is read once. Small tensors of one shape are stacked into one piece, so that one call serves all. A rule sees a
batch of n tensors of one shape in either case; n is often 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BLOCK", "CHUNK", "Piece", "pieces"]

CHUNK = 131_072  # elements, half a MiB of float32: less costs more calls, more costs more memory traffic (`make bench`)
BLOCK = 256  # elements that share an 8-bit scale: no cut goes through a block
CHUNK_ON_DEVICE = 1 << 24  # on a GPU each call is a launch, and the cache is shared


class Piece(NamedTuple):
    """The tensors of one call of a rule."""

    owners: list[int]  # indices in the bucket
    batch: dict[str, Tensor]  # for each name a tensor of shape (n, ...)
    home: dict[str, list[Tensor]] | None = None  # where to copy a stacked batch back to; None: it is a view
    start: int = 0  # row-major index of the first element in its tensor

    def write_back(self, names: Sequence[str]) -> None:
        """Copy the named parts of a stacked batch to the tensors that it was made of."""
        if self.home is not None:
            for name in names:
                torch._foreach_copy_(self.home[name], list(self.batch[name].unbind()))


def pieces(lists: dict[str, list[Tensor]], *, cut: bool, stack: bool) -> Iterator[Piece]:
    """Cut and stack parallel lists into pieces of about :data:`CHUNK` elements.

    Args:
        lists: parallel lists under their names, the first of which gives shapes and sizes.
        cut: large tensors may be cut (the rule is elementwise).
        stack: small tensors of one shape share a piece.

    Without both, each tensor is one piece: the plain way, which the others must equal.
    """
    small: dict[torch.Size, list[int]] = {}
    names, columns = list(lists), list(lists.values())
    first = columns[0]
    limit = CHUNK if not first or first[0].device.type == "cpu" else CHUNK_ON_DEVICE
    for owner, tensor in enumerate(first):
        size = tensor.numel()
        if stack and 2 * size <= limit:
            small.setdefault(tensor.shape, []).append(owner)
            continue
        row = [column[owner] for column in columns]
        for start, part in _cut(row, limit) if cut and size > limit else [(0, row)]:
            yield Piece([owner], {n: t.unsqueeze(0) for n, t in zip(names, part, strict=True)}, start=start)
    for shape, owners in small.items():
        most = max(1, limit // max(1, shape.numel()))
        for start in range(0, len(owners), most):
            yield _stacked(lists, owners[start : start + most])


def _stacked(lists: dict[str, list[Tensor]], owners: list[int]) -> Piece:
    if len(owners) == 1:
        return Piece(owners, {name: column[owners[0]].unsqueeze(0) for name, column in lists.items()})
    home = {name: [column[i] for i in owners] for name, column in lists.items()}
    return Piece(owners, {name: torch.stack(some) for name, some in home.items()}, home)


def _cut(row: Sequence[Tensor], limit: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Parts of parallel tensors, in row-major order, with the index of their first element.

    If there is no flat view (channels_last, transposed) they are cut by rows. A tensor that has another shape than the
    first holds one value for each block.
    """
    first = row[0]
    flat = all(t.is_contiguous() for t in row)
    width = 1 if flat else first[0].numel()
    unit = BLOCK // math.gcd(width, BLOCK)  # rows that end with a block
    rows = max(unit, limit // width // unit * unit)
    for at in range(0, first.numel() // width, rows):
        start, end = at * width, (at + rows) * width
        yield (
            start,
            [
                t[start // BLOCK : end // BLOCK]
                if t.shape != first.shape
                else (t.view(-1) if flat else t)[at : at + rows]
                for t in row
            ],
        )
