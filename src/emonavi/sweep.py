"""The one pass over the tensors: move them by the rule, gather the sums for reflection.

A bucket is a list of tensors that share a group, a device, a dtype and a state layout. It is swept in cache-sized
pieces. What is stored in fewer bits is computed in float32 and rounded when written back (``lowbit.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from emonavi import lowbit
from emonavi.kernels import Kernel, squares
from emonavi.machine import Sums
from emonavi.pieces import Piece, pieces
from emonavi.scalars import Number, like, widest

__all__ = ["Bucket", "Reflected", "Rule", "all_norms", "dot", "gather", "integers", "no_sums", "to_home", "wide"]

T = TypeVar("T")

# <g, u>, <g, g> and <u, u> in the rule's metric, each of shape (n,). A rule returns None if not asked for them.
Reflected = tuple[Tensor, Tensor, Tensor]
Rule = Callable[..., Reflected | None]


class Bucket(NamedTuple):
    """Parallel lists of tensors, and how to sweep them."""

    rule: Rule
    group: dict[str, Any]  # whose options hold
    layout: tuple[str, ...]  # names of the state tensors, in the order that the rule takes them
    places: list[int]  # indices in the step's vectors,
    at: Tensor  # and as a tensor on their device
    lists: dict[str, list[Tensor]]  # "param", "grad" and one list for each state name
    cut: bool  # tensors may be cut: the rule is elementwise
    kernel: Kernel | None = None  # moves the whole bucket instead of the rule

    def with_grads(self, grads: list[Tensor]) -> Bucket:
        """The same bucket with other gradients."""
        return self._replace(lists=self.lists | {"grad": grads})

    def move(self, scalars: dict[str, Any], grad_scale: Number, acts: Number, seeds: Tensor | None) -> Reflected | None:
        """Apply the rule. Returns the sums of reflection, in the order of the tensors, if the rule gives any.

        ``seeds`` are for the random rounding of each tensor (``lowbit.py``); None rounds to the nearest.
        """
        if self.kernel is not None:
            return self.kernel(self.lists, scalars, grad_scale, acts, seeds)
        scales = isinstance(grad_scale, Tensor) or grad_scale != 1
        scalars = {k: v.to(wide(self.lists["param"][0])) if isinstance(v, Tensor) else v for k, v in scalars.items()}
        singles = {k: v.unbind() for k, v in scalars.items() if isinstance(v, Tensor) and v.dim()}
        # One tensor for all sums: small ones, kept from piece to piece, would fragment the allocator's memory, and a
        # step could take several times the memory of the parameters.
        device, reflects = self.lists["param"][0].device, False
        sums = torch.zeros((3, len(self.places)), dtype=widest(device), device=device)
        foreach = self.group["foreach"] is not False
        for piece in pieces(self.lists, cut=self.cut and foreach, stack=foreach):
            index: slice | Tensor
            if len(piece.owners) == 1:
                at = piece.owners[0]
                index, own = slice(at, at + 1), {k: v[at] for k, v in singles.items()}
            else:
                index = integers(tuple(piece.owners), device)  # a list would wait for the device
                shape = (-1, *(1 for _ in piece.batch["param"].shape[1:]))
                own = {k: scalars[k][index].view(shape) for k in singles}
            own_seeds = None if seeds is None else seeds[index]
            reflected = self._apply(piece, scalars | own, grad_scale if scales else None, acts, own_seeds)
            if reflected is not None:
                reflects, added = True, torch.stack(reflected).to(sums.dtype)
                if isinstance(index, slice):
                    sums[:, index] += added
                else:
                    sums.index_add_(1, index, added)  # one pass; sums[:, index] += would be two
        return (sums[0], sums[1], sums[2]) if reflects else None

    def _apply(
        self, piece: Piece, scalars: dict[str, Any], grad_scale: Number, acts: Number, seeds: Tensor | None
    ) -> Reflected | None:
        written = [name for name in piece.batch if name != "grad"]
        before = {name: piece.batch[name].clone() for name in written} if isinstance(acts, Tensor) else {}
        batch = lowbit.unpack(piece.batch)
        if grad_scale is not None:
            batch["grad"] = batch["grad"] * like(batch["grad"], grad_scale)
        reflected = self.rule(*batch.values(), **scalars)
        random = None if seeds is None else lowbit.noise(seeds, piece.start, batch["param"][0].numel())
        lowbit.pack(batch, piece.batch, random)
        # If the gradient was not finite, undo what the rule wrote, without waiting for the device.
        for name, old in before.items():
            piece.batch[name].copy_(torch.where(acts, piece.batch[name], old))
        piece.write_back(written)
        return reflected


def wide(tensor: Tensor) -> Tensor:
    """The tensor itself, or in float32 if its dtype has fewer bits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of two batches of shape (n, ...), of shape (n,).

    Not ``torch.dot``: its last bits depend on a tensor's address, so that two runs would differ.
    """
    product = a * b
    return product.flatten(1).sum(1) if product.dim() > 1 else product


def no_sums(weight: Tensor) -> Sums:
    """Sums of nothing: zeros."""
    return Sums(weight.new_zeros((3, len(weight))), weight)


def gather(parts: Sequence[tuple[Tensor, Reflected]], weight: Tensor) -> Sums:
    """Put together the sums of all buckets, from their ``at`` and what they gave.

    ``weight`` is 1-D, one entry for each tensor; it sets device and dtype.
    """
    if len(parts) == 1 and len(parts[0][0]) == len(weight):  # one bucket holds all, in order
        return Sums(to_home(torch.stack(parts[0][1]), weight), weight)
    sums = weight.new_zeros((3, len(weight)))
    for some in _by_kind(parts, lambda part: part[1][0]).values():
        places = torch.cat([at for at, _ in some])
        values = torch.stack([torch.cat(column) for column in zip(*(three for _, three in some), strict=True)])
        sums = sums.index_add(1, places, to_home(values, weight))
    return Sums(sums, weight)


def _by_kind(items: Sequence[T], tensor: Callable[[T], Tensor]) -> dict[tuple[torch.device, torch.dtype], list[T]]:
    """The items, grouped by device and dtype of their tensors."""
    kinds: dict[tuple[torch.device, torch.dtype], list[T]] = {}
    for item in items:
        kinds.setdefault((tensor(item).device, tensor(item).dtype), []).append(item)
    return kinds


def to_home(value: Tensor, home: Tensor) -> Tensor:
    """The value on the device and in the dtype of ``home``."""
    return value.to(home.device, home.dtype)


def all_norms(tensors: Sequence[Tensor], home: Tensor, fused: bool = False, by_rows: bool = False) -> Tensor:
    """Norm of each tensor. ``fused`` uses a kernel if there is one; with ``by_rows`` it adds up matrices row by row."""
    norms, places = [], []
    for (_, dtype), items in _by_kind(list(enumerate(tensors)), lambda item: item[1]).items():
        some = [t for _, t in items]
        sums = squares(some, by_rows) if fused else None
        if sums is None:
            # Sums of squares of 16-bit numbers overflow in 16 bits.
            at_least = torch.promote_types(dtype, torch.float32)
            found = torch.stack(torch._foreach_norm(some, 2, dtype=at_least))
        else:
            found = sums.sqrt()
        norms.append(to_home(found, home))
        places += [place for place, _ in items]
    if len(norms) == 1:
        return norms[0]
    order = tuple(sorted(range(len(places)), key=places.__getitem__))
    return torch.cat(norms)[integers(order, home.device)]


def integers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Integers as an int64 vector, copied to the device without a wait. Do not write to it: it may be cached.

    Example:
        >>> integers((3, 1), torch.device("cpu"))
        tensor([3, 1])
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
    return _by_value(numbers, device) if torch.cuda.is_current_stream_capturing() else _copied(numbers, device)


def _by_value(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Passed by value to kernels: a captured copy would read the host's memory again at each replay of the graph."""
    made = torch.zeros(len(numbers), dtype=torch.int64, device=device)
    torch._foreach_add_(list(made.unbind()), list(numbers))
    return made


@lru_cache(maxsize=256)  # from step to step the numbers mostly stay the same
def _copied(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    pinned = torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=True)
    return pinned.to(device, non_blocking=True)
