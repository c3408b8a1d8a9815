"""The tensors that one step moves, and vectors of the numbers that differ from tensor to tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from emonavi import checks, kernels
from emonavi.distributed import is_piece, is_sharded, local
from emonavi.lowbit import scale_of
from emonavi.machine import KEPT, Mood, Options
from emonavi.scalars import Number, clamp, like, where
from emonavi.shadow import lean
from emonavi.sweep import to_home

if TYPE_CHECKING:
    from emonavi.kernels.cpu import Numbers

__all__ = ["Active", "Found", "Roster", "bounded", "highest", "note_peaks", "per_tensor"]


class Found(NamedTuple):
    """Parameters that are to move, in the order of the groups: parallel lists."""

    params: list[Tensor]
    groups: list[int]  # index of each one's group
    grads: list[Tensor]  # as they lie in ``.grad``

    @classmethod
    def of(cls, param_groups: Sequence[dict[str, Any]]) -> Found:
        """Those that have a gradient."""
        params: list[Any] = [p for g in param_groups for p in g["params"]]
        groups = [i for i, g in enumerate(param_groups) for _ in g["params"]]
        found = cls(params, groups, [p.grad for p in params])
        if any([g is None for g in found.grads]):
            # FSDP1: a parameter without an element here has no gradient, but it moves elsewhere: all ranks count it.
            away = [is_piece(p) and p.requires_grad and not p.numel() for p in params]
            found = found.where([g is not None or a for g, a in zip(found.grads, away, strict=True)])
        checks.gradients(found.grads)
        return found

    def moves(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Whether any of them has an lr other than 0. An lr on a device is never read and counts as not 0."""
        moving = []
        for group in param_groups:
            checks.left(group)
            lr = group["lr"]
            moving.append((isinstance(lr, Tensor) and lr.device.type != "cpu") or bool(lr != 0))
        return any(moving[i] and (p.numel() or is_piece(p)) for p, i in zip(self.params, self.groups, strict=True))

    def where(self, keeps: Sequence[bool]) -> Found:
        """Those for which ``keeps`` is True."""
        params, groups, grads = self
        return Found(list(compress(params, keeps)), list(compress(groups, keeps)), list(compress(grads, keeps)))


class Roster(NamedTuple):
    """All tensors that a step moves, in the order of the groups, and what does not change from step to step.

    For a sharded tensor the lists hold the local part, which may be empty.
    """

    whole: list[Tensor]  # the parameters themselves
    params: list[Tensor]
    states: list[dict[str, Any]]
    groups: list[int]
    counts: list[int]  # of tensors in each group
    numbers: Numbers | None  # the scalars of each tensor's state, if a kernel reads and writes them

    @classmethod
    def of(cls, found: Found, states: Mapping[Tensor, dict[str, Any]], groups: int, fused: bool) -> Roster:
        """From parameters that have state; ``groups`` is the number of groups."""
        own = [{k: local(v) for k, v in states[p].items()} if is_sharded(p) else states[p] for p in found.params]
        numbers = kernels.numbers([s[k] for k in KEPT for s in own]) if fused else None
        counts = [found.groups.count(i) for i in range(groups)]
        return cls(found.params, [local(p) for p in found.params], own, found.groups, counts, numbers)

    def kept(self, home: Tensor) -> Sequence[Tensor]:
        """The scalars of every tensor's state, one vector for each name in :data:`KEPT`."""
        if self.numbers is None:
            return [to_home(_stack([s[k] for s in self.states]), home) for k in KEPT]
        return to_home(self.numbers.read(), home).view(len(KEPT), -1).unbind()


class Active(NamedTuple):
    """The roster of one step, its gradients, and one vector for each number that differs from tensor to tensor.

    Each vector has one entry for each tensor, the same on all ranks.
    """

    roster: Roster
    grads: list[Tensor]  # local parts
    lr: Tensor
    floor: Tensor  # the effective lr does not fall below this, or below lr where that is lower,
    ceiling: Tensor  # nor rise above this
    decay: Tensor  # weight decay for each unit of effective lr
    steps: Tensor  # of each tensor, this one included
    drive: Tensor
    trust: Tensor

    @classmethod
    def of(
        cls,
        roster: Roster,
        grads: list[Tensor],
        groups: Sequence[dict[str, Any]],
        decay_rate: Callable[[dict[str, Any]], float],
        home: Tensor,
        kept: Sequence[Tensor] | None = None,
    ) -> Active:
        """From a roster and its gradients; ``home`` is the emotion's vector, ``kept`` as :meth:`Roster.kept` has it."""
        step, drive, trust = roster.kept(home) if kept is None else kept
        of_groups = [[g[name] for g in groups] for name in ("lr", "lr_floor", "lr_ceiling")]
        of_groups.append([decay_rate(g) for g in groups])
        lr, floor, ceiling, decay = (per_tensor(values, roster.counts, home) for values in of_groups)
        return cls(roster, grads, lr, floor, ceiling, decay, step + 1, drive, trust)

    def options(
        self, groups: Sequence[dict[str, Any]], target: tuple[float, float], fall: float, fades: bool, plain: bool
    ) -> Options:
        """Build the emotion's ``Options``, as Python numbers if ``plain``, after :func:`note_peaks`."""
        numbers = [g[name] for g in groups for name in ("lr", "lr_peak", "lr_floor", "lr_ceiling")]
        kind = 0.0 if plain or not any(isinstance(n, Tensor) for n in numbers) else self.lr.new_zeros(())
        floors, ceilings, decayed, lrs = [], [], [], []
        for group, count in zip(groups, self.roster.counts, strict=True):
            lr, peak = like(kind, group["lr"]), like(kind, group["lr_peak"])
            if count:  # the lr of a group in which nothing moves says nothing
                lrs.append(lr)
                # Not 0.5: a cosine is at half in its middle, and its last bit would decide. A peak of 0 does not count.
                decayed.append((lr < 0.4999 * peak) | (peak == 0))
            # But its bounds count: a step without it must not move the drive beyond them.
            if count or any(p.requires_grad for p in group["params"]):
                # Relative to the highest lr, not today's: a dip must not move the drive.
                floor, ceiling = group["lr_floor"], group["lr_ceiling"]
                floor, ceiling = like(kind, floor), like(kind, math.inf if ceiling is None else ceiling)
                some = where(peak > 0, peak, 1.0)
                floors.append(where(peak > 0, clamp(floor, high=peak) / some, 1.0))
                ceilings.append(where(peak > 0, ceiling / some, 0.0))
        return Options(
            use_trust=bool(groups[0]["use_trust"]),
            max_norm=groups[0]["max_norm"],
            lowest_drive=_fold(floors, torch.amin, min),
            highest_drive=_fold(ceilings, torch.amax, max),
            target=target[bool(groups[0]["use_shadow"])],
            fall=fall,
            fades=fades,
            decayed=_fold(decayed, torch.all, all),
            lr=_fold(lrs, torch.amax, max),
        )

    def rates(self, mood: Mood, least_decay: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """For each tensor: its effective lr, its step size, and the factor of its weight decay."""
        effective = bounded(self.lr, mood.drive, self.floor, self.ceiling)
        own = bounded(effective, self.drive, torch.minimum(self.lr, self.floor), self.ceiling)
        return own, own * mood.scale, torch.clamp(1 - effective * self.decay, min=least_decay)

    def buckets(
        self, layout: Callable[[Tensor], tuple[str, ...]], alone: Callable[[Tensor], bool]
    ) -> dict[tuple[Any, ...], list[int]]:
        """Places of the tensors that share a group, a device, dtypes and a layout; those to be ``alone`` do not."""
        buckets: dict[tuple[Any, ...], list[int]] = {}
        whole, params, states, groups, *_ = self.roster
        for place, (p, group) in enumerate(zip(params, groups, strict=True)):
            names = layout(p)
            dtypes = (p.dtype, *[states[place][name].dtype for name in names])
            own = place if alone(whole[place]) else None
            buckets.setdefault((group, p.device, dtypes, own, names), []).append(place)
        return buckets

    def lists(self, places: list[int], layout: tuple[str, ...]) -> dict[str, list[Tensor]]:
        """Parallel lists of the tensors at these places, their state tensors and the scales of those."""
        params, states = self.roster.params, self.roster.states
        lists = {"param": [params[i] for i in places], "grad": [self.grads[i] for i in places]}
        names = [k for name in layout for k in (name, scale_of(name)) if k in states[places[0]]]
        return lists | {name: [states[i][name] for i in places] for name in names}

    def lean(self, mood: Mood, fused: bool) -> None:
        """Move tensors and their shadows towards each other, as the mood says; at lr 0 only the shadows move."""
        _, params, states, groups, *_ = self.roster
        of_groups: dict[int, list[int]] = {}
        for place, state in enumerate(states):
            if "shadow" in state:
                of_groups.setdefault(groups[place], []).append(place)
        for places in of_groups.values():
            pull = where(like(mood.pull, self.lr[places[0]]) > 0, mood.pull, 0.0)
            lean([(params[i], states[i]["shadow"]) for i in places], pull, mood.follow, fused)

    def scale_memories(self, factor: Number, layout: Callable[[Tensor], tuple[str, ...]]) -> None:
        """Before a tensor's second step, scale by a factor what its memories hold: its first gradient.

        Memories of squares (with ``_sq`` in their names) by its square. Of 8-bit memories the scales are multiplied.
        """
        factors = torch.where(self.steps == 2, factor, 1.0).unbind()
        for p, state, own in zip(self.roster.params, self.roster.states, factors, strict=True):
            for name in [n for kind in layout(p) for n in (kind, scale_of(kind))]:
                if name in state and state[name].is_floating_point():
                    state[name].mul_((own.square() if "_sq" in name else own).to(state[name]))

    def keep(self, acts: Number, drive: Tensor, trust: Tensor) -> None:
        """Write the scalars of each tensor's state, unless the update was skipped."""
        new = ((self.steps, self.steps - 1), (drive, self.drive), (trust, self.trust))
        values = [where(acts, after, before) for after, before in new]
        if self.roster.numbers is not None:
            self.roster.numbers.write(torch.cat(values))
            return
        for name, column in zip(KEPT, values, strict=True):
            torch._foreach_copy_([s[name] for s in self.roster.states], list(column.to(torch.float32).unbind()))


def note_peaks(groups: Sequence[dict[str, Any]]) -> None:
    """Update each group's highest lr so far."""
    for group in groups:
        group["lr_peak"] = highest(group["lr"], group["lr_peak"])


def highest(a: float | Tensor, b: float | Tensor) -> float | Tensor:
    """The higher of two lrs; a tensor if one of them is."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return max(a, b)
    device = (a if isinstance(a, Tensor) else b).device  # type: ignore[union-attr]
    return torch.maximum(torch.as_tensor(a, device=device), torch.as_tensor(b, device=device))


def _fold(numbers: Sequence[Number], tensors: Callable[[Tensor], Tensor], plain: Callable[[Any], Any]) -> Number:
    """Reduce several numbers of one kind to one."""
    return tensors(torch.stack(list(numbers))) if isinstance(numbers[0], Tensor) else plain(numbers)


def _stack(scalars: Sequence[Tensor]) -> Tensor:
    """One vector, even if the scalars are on several devices."""
    device = scalars[0].device
    same = all([s.device == device for s in scalars])
    return torch.stack(list(scalars) if same else [s.to(device) for s in scalars])


def bounded(lr: Tensor, drive: Number, floor: Tensor, ceiling: Tensor) -> Tensor:
    """The effective lr: lr times drive, at least ``floor`` (or lr, if lower), at most ``ceiling``."""
    return torch.clamp(lr * drive, torch.minimum(lr, floor), ceiling)


def per_tensor(values: Sequence[float | Tensor | None], counts: Sequence[int], home: Tensor) -> Tensor:
    """Each group's value, once for each of its tensors, without a copy that waits for the device; None is no bound."""
    spread = [
        to_home(v, home).expand(n) if isinstance(v, Tensor) else home.new_full((n,), torch.inf if v is None else v)
        for v, n in zip(values, counts, strict=True)
    ]
    return torch.cat(spread)
