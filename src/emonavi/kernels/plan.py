"""What one step on the CPU need not find out again after the one before: a plan.

Of many small tensors the arithmetic takes less time than finding out, tensor by tensor, which of them share a bucket,
whether a kernel takes them and where they lie. A plan holds what was found. It holds good as long as everything that
it hangs on is as it was, and that is looked at in every step: the parameters that have a gradient and their groups,
their states and every tensor in them, where parameters and memories lie, the groups' flags, and what kind of gradients
there are. To look takes time, too, most of it for fetching each tensor's header.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emonavi.active import Found, Roster
from emonavi.kernels.cpu import Sweep, in_one_order, plain

__all__ = ["Plan"]

# Read for every tensor in every step: by map, which takes half the time of a loop.
_pointer, _size, _dtype, _shape = Tensor.data_ptr, Tensor.numel, attrgetter("dtype"), attrgetter("shape")
FLAGS = ("fused", "foreach", "capturable", "stochastic_rounding", "use_shadow", "state_dtype")


class Plan(NamedTuple):
    """The roster and the buckets of a step, the latter without their gradients."""

    roster: Roster
    buckets: list[Any]  # as ``EmoOptimizer._buckets`` has them
    groups: list[Any]
    flags: list[Any]  # of them
    states: dict[Tensor, dict[str, Any]]  # the optimizer's, in a shallow copy
    kept: list[Any]  # all that they hold
    storages: list[Any]  # of the tensors there: held, so that nothing else can come to lie where one was,
    watched: list[Tensor]  # unless a storage itself moves, as into shared memory: the parameters and these tensors,
    pointers: list[int]  # and where they lie
    dtypes: list[torch.dtype]  # of the parameters
    sizes: list[int]
    shapes: list[torch.Size]  # where the rule has rows and columns; else none, which take twice as long to fetch
    order: Tensor  # where in the buckets' own order each of the roster is

    @classmethod
    def of(
        cls,
        roster: Roster,
        buckets: Sequence[Any],
        states: Mapping[Tensor, dict[str, Any]],
        groups: Sequence[Mapping[str, Any]],
    ) -> Plan | None:
        """None where a step has to look for itself: without kernels, or where tensors are first brought in order."""
        kernels = [bucket.kernel for *_, bucket in buckets]
        whole = all(map(is_, roster.params, roster.whole))
        if not whole or not all(isinstance(kernel, Sweep) and kernel.in_order for kernel in kernels):
            return None
        kept = _values(roster.states)
        memories = [value for value in kept if isinstance(value, Tensor)]
        watched = [*roster.whole, *memories]
        without = [(*rest, bucket._replace(lists=bucket.lists | {"grad": []})) for *rest, bucket in buckets]
        places = torch.tensor([i for *_, bucket in buckets for i in bucket.places], device="cpu")
        return cls(
            roster, without, list(groups), _flags(groups), dict(states), kept,
            [t.untyped_storage() for t in memories], watched, list(map(_pointer, watched)),
            list(map(_dtype, roster.whole)), list(map(_size, roster.whole)),
            list(map(_shape, roster.whole)) if any(kernel.matrices for kernel in kernels) else [], places.argsort(),
        )  # fmt: skip

    def fits(self, found: Found, states: Mapping[Tensor, dict[str, Any]], groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether it holds for these parameters with their gradients."""
        params, grads = found.params, found.grads
        return (
            _same(params, self.roster.whole)
            and found.groups == self.roster.groups
            and _same(groups, self.groups)
            and _flags(groups) == self.flags
            # Compared by what they are: to look a tensor up takes longer.
            and _same(list(states), list(self.states))
            and _same(list(states.values()), list(self.states.values()))
            and _same(_values(self.roster.states), self.kept)
            and list(map(_pointer, self.watched)) == self.pointers
            and list(map(_dtype, params)) == self.dtypes
            and list(map(_size, params)) == self.sizes
            and (not self.shapes or list(map(_shape, params)) == self.shapes)
            and plain(grads)
            and in_one_order(params, grads)
            and list(map(_size, grads)) == self.sizes
            and list(map(_dtype, grads)) == self.dtypes
        )

    def norms(self, buckets: Sequence[Any]) -> Tensor:
        """Norm of each gradient in the filled buckets, in the order of the roster."""
        sums = [bucket.kernel.squares(bucket.lists) for *_, bucket in buckets]
        return (torch.cat(sums)[self.order] if len(sums) > 1 else sums[0]).sqrt()

    def filled(self, grads: Sequence[Tensor]) -> list[Any]:
        """The buckets with the gradients of a step."""
        return [
            (*rest, bucket._replace(lists=bucket.lists | {"grad": [grads[i] for i in bucket.places]}))
            for *rest, bucket in self.buckets
        ]


def _values(states: Sequence[Mapping[str, Any]]) -> list[Any]:
    return list(chain.from_iterable([state.values() for state in states]))


def _flags(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [[group[name] for name in FLAGS] for group in groups]


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether they are the very same objects."""
    return len(some) == len(others) and all(map(is_, some, others))
