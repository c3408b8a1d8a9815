"""The one pass over the tensors: lean on the shadow, move by the rule, gather what reflection needs.

A bucket is a list of tensors that share a group, a device, a dtype and a state layout. Its tensors are swept in
cache-sized pieces; parameters of 16 bits are computed in float32 and written back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emonavi.chunks import Piece, pieces
from emonavi.emotion import Sums

__all__ = ["Bucket", "Reflected", "dot", "gather", "to_home", "total_norm", "wide"]

Reflected = tuple[Tensor, Tensor, Tensor]  # <g, u>, <g, g>, <u, u> of one tensor or a part of one, in the rule's metric


class Bucket(NamedTuple):
    """Parallel lists of one sweep, with the scalars of its tensors."""

    indices: list[int]  # places in the step's vectors
    lists: dict[str, list[Tensor]]  # "params", "grads" and one list for each state name
    split: bool  # the rule is elementwise: tensors may be cut
    foreach: bool
    predicated: bool  # never branch on a value

    @classmethod
    def of(
        cls, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], places: list[int],
        layout: tuple[str, ...], **how: bool,
    ) -> Bucket:  # fmt: skip
        """The bucket of the tensors at the given places, with the state tensors that their layout names."""
        lists = {"params": [params[i] for i in places], "grads": [grads[i] for i in places]}
        lists |= {name: [states[i][name] for i in places] for name in layout}
        return cls(places, lists, **how)

    def lean(self, shadows: list[Tensor], pull: Tensor, follow: Tensor, excess: bool) -> list[Tensor]:
        """Move the parameters by ``pull`` to the shadow, then the shadow by ``follow`` to the parameters.

        Returns:
            Parts of <g, p - shadow> as they were before, where ``excess`` asks for them.
        """
        lists = {"params": self.lists["params"], "grads": self.lists["grads"], "shadow": shadows}
        sums = []
        pulls, follows = (self.predicated or bool(rate) for rate in (pull, follow))
        for piece in self._pieces(lists, split=True):
            for p, g, s in zip(*piece.lists.values(), strict=True):
                wide_p = wide(p)
                if excess:
                    sums.append(dot(wide(g), wide_p - s))
                if pulls:
                    wide_p = torch.lerp(wide_p, s, pull.to(s.dtype))
                    p.copy_(wide_p)
                if follows:
                    s.lerp_(wide_p, follow.to(s.dtype))
        return sums

    def move(
        self, rule: Callable[..., list[Reflected]], scalars: dict[str, Any], grad_scale: Tensor, acts: Tensor
    ) -> Iterable[tuple[int, Reflected]]:
        """Apply the rule; yields what it reflects with the place of the tensor it belongs to."""
        scales = self.predicated or bool(grad_scale != 1)
        for piece in self._pieces(self.lists, self.split):
            given = list(piece.lists.values())
            before = [[t.clone() for t in column] for column in (given[0], *given[2:])] if self.predicated else []
            columns = [[wide(t) for t in column] for column in given]
            if scales:
                columns[1] = [g * grad_scale.to(g.dtype) for g in columns[1]]
            picked = {k: [v[i] for i in piece.owners] if isinstance(v, list) else v for k, v in scalars.items()}
            reflected = rule(*columns, foreach=self.foreach, **picked)
            for p, updated in zip(given[0], columns[0], strict=True):
                if p is not updated:
                    p.copy_(updated)
            # Where the gradient was not finite, whatever the rule wrote is taken back, without asking the device.
            for column, olds in zip((given[0], *given[2:]), before, strict=False):
                for t, old in zip(column, olds, strict=True):
                    t.copy_(torch.where(acts, t, old))
            yield from ((self.indices[owner], sums) for owner, sums in zip(piece.owners, reflected, strict=False))

    def _pieces(self, lists: dict[str, list[Tensor]], split: bool) -> Iterable[Piece]:
        return pieces(lists, split=split and self.foreach, foreach=self.foreach)


def wide(tensor: Tensor) -> Tensor:
    """The tensor itself, or in float32 where it has fewer bits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the products of two tensors of one shape."""
    return torch.dot(a.reshape(-1), b.reshape(-1))


def gather(parts: Iterable[tuple[int, Reflected]], excess: Sequence[Tensor], weight: Tensor) -> Sums:
    """Add up the parts of each tensor. ``weight`` is 1-D with one entry for each tensor and sets device and dtype."""
    parts = list(parts)
    sums = weight.new_zeros((3, len(weight)))
    if parts:
        places = torch.tensor([index for index, _ in parts], device="cpu")
        values = torch.stack([to_home(value, weight) for _, three in parts for value in three]).view(-1, 3).t()
        sums = sums.index_add(1, places.to(weight.device, non_blocking=True), values)
    difference = torch.stack([to_home(e, weight) for e in excess]).sum() / 2 if excess else weight.new_zeros(())
    return Sums(sums[0], sums[1], sums[2], weight, difference)


def to_home(value: Tensor, home: Tensor) -> Tensor:
    """The value on the device and in the dtype of the emotion."""
    return value.to(home.device, home.dtype)


def total_norm(grads: Sequence[Tensor], home: Tensor) -> Tensor:
    """Norm of all gradients together; not finite where one element is not."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for g in grads:
        by_kind.setdefault((g.device, g.dtype), []).append(g)
    norms = []
    for (_, dtype), some in by_kind.items():
        # Sums of squares of 16-bit numbers overflow in 16 bits.
        at_least = torch.promote_types(dtype, torch.float32)
        norms.append(to_home(torch.stack(torch._foreach_norm(some, 2, dtype=at_least)), home))
    total: Tensor = torch.linalg.vector_norm(torch.cat(norms))
    return total
