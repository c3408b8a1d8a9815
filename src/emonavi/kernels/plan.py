"""A plan: what one step on the CPU found out, for the next steps.

With many small tensors, the arithmetic takes less time than finding out, tensor by tensor, which share a bucket,
whether there is a kernel for them and what their addresses are. A plan keeps this. Each step checks that everything it
depends on is unchanged: the parameters with a gradient and their groups, their states and every tensor in them, the
addresses, the groups' flags, and the kind of gradients. The check costs time as well, mostly for fetching each
tensor's header.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from emonavi.active import Found, Roster
from emonavi.kernels.cpu import Sweep
from emonavi.kernels.tensors import in_one_order, plain
from emonavi.sweep import Bucket

__all__ = ["Plan"]

# Used with map for every tensor in every step, in half the time of a loop.
_pointer, _size, _dtype, _shape = Tensor.data_ptr, Tensor.numel, attrgetter("dtype"), attrgetter("shape")
FLAGS = ("fused", "foreach", "capturable", "stochastic_rounding", "use_shadow", "state_dtype")


class Plan(NamedTuple):
    """The roster and the buckets of a step, without gradients, and what must be unchanged for them to be valid."""

    roster: Roster
    buckets: list[Bucket]
    groups: list[Mapping[str, Any]]
    flags: list[Any]  # the groups' flags
    states: dict[Tensor, dict[str, Any]]  # shallow copy of the optimizer's
    kept: list[Any]  # all values in the states
    storages: list[Any]  # of the tensors among them: kept alive so that no address is reused
    watched: list[Tensor]  # tensors whose address is checked each step
    pointers: list[int]  # their addresses
    dtypes: list[torch.dtype]  # of the parameters
    sizes: list[int]
    shapes: list[torch.Size]  # only if the rule has rows and columns: reading them is slow
    order: Tensor  # permutation from bucket order to roster order

    @classmethod
    def of(
        cls,
        roster: Roster,
        buckets: Sequence[Bucket],
        states: Mapping[Tensor, dict[str, Any]],
        groups: Sequence[Mapping[str, Any]],
    ) -> Plan | None:
        """None if a bucket has no kernel, or if its tensors have to be copied into one order first."""
        kernels = [bucket.kernel for bucket in buckets]
        whole = all(map(is_, roster.params, roster.whole))
        if not whole or not all(isinstance(kernel, Sweep) and kernel.in_order for kernel in kernels):
            return None
        kept = list(_values(roster.states))
        memories = [value for value in kept if isinstance(value, Tensor)]
        # Of several in one storage, as the scalars of a state are, one: nobody moves the others without it.
        storages = {t.untyped_storage().data_ptr(): t for t in memories}
        watched = [*roster.whole, *storages.values()]
        shaped = any(cast(Sweep, kernel).matrices for kernel in kernels)
        without = [bucket.with_grads([]) for bucket in buckets]
        return cls(
            roster, without, list(groups), _flags(groups), dict(states), kept,
            [t.untyped_storage() for t in memories], watched, list(map(_pointer, watched)),
            list(map(_dtype, roster.whole)), list(map(_size, roster.whole)),
            list(map(_shape, roster.whole)) if shaped else [], torch.cat([bucket.at for bucket in buckets]).argsort(),
        )  # fmt: skip

    def fits(self, found: Found, states: Mapping[Tensor, dict[str, Any]], groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the plan is valid for these parameters and gradients."""
        params, grads = found.params, found.grads
        return (
            _same(params, self.roster.whole)
            and found.groups == self.roster.groups
            and _same(groups, self.groups)
            and _flags(groups) == self.flags
            # Compared by identity: looking tensors up is slower.
            and _same(list(states), list(self.states))
            and _same(list(states.values()), list(self.states.values()))
            and sum(map(len, self.roster.states)) == len(self.kept)
            and all(map(is_, _values(self.roster.states), self.kept))
            and list(map(_pointer, self.watched)) == self.pointers
            and list(map(_dtype, params)) == self.dtypes
            and (list(map(_shape, params)) == self.shapes if self.shapes else list(map(_size, params)) == self.sizes)
            and plain(grads)
            and in_one_order(params, grads)
            and list(map(_size, grads)) == self.sizes
            and list(map(_dtype, grads)) == self.dtypes
        )

    def norms(self, buckets: Sequence[Bucket]) -> Tensor:
        """Norm of each gradient in filled buckets, in roster order."""
        sums = [cast(Sweep, bucket.kernel).squares(bucket.lists) for bucket in buckets]
        return (torch.cat(sums)[self.order] if len(sums) > 1 else sums[0]).sqrt()

    def filled(self, grads: Sequence[Tensor]) -> list[Bucket]:
        """The buckets with the gradients of a step."""
        return [bucket.with_grads([grads[i] for i in bucket.places]) for bucket in self.buckets]


def _values(states: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable([state.values() for state in states])


def _flags(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [[group[name] for name in FLAGS] for group in groups]


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether both hold the very same objects."""
    return len(some) == len(others) and all(map(is_, some, others))
