"""Ranks that feel the same: what is added up over processes, and when.

A replica (DDP) has all of the gradient but a loss of its own; a rank that shards (FSDP2, tensor parallel) has a part of
each tensor. A rule works on the part that lies here. What the emotion is told is the whole: the mean of the losses, and
for each tensor the sum over its parts, where a part that lies on several ranks counts once. So every rank computes the
same emotion, to the last bit. In numbers of the emotion's dtype, with n tensors, a step makes

    replicas    one collective, before the update: loss, how many have one, the window, a flag for the gradient (5)
    shards      the same one, with the squared norm of the gradient in it, and where the emotion reflects a second one
                after the update: the three sums of reflection (3 n). Once in a run the weights' own norms (n)
    alone       none
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch import distributed as dist

from emonavi.intake import Loss
from emonavi.machine import KEPT

__all__ = [
    "Ranks",
    "add_parts",
    "agreed",
    "default_group",
    "hand_on",
    "is_piece",
    "is_sharded",
    "local",
    "local_grad",
    "placed",
    "start",
    "unless_alone",
]


class Ranks(NamedTuple):
    """The process groups of one optimizer; None where this rank need not ask another."""

    loss: Any = None  # over these losses are averaged
    shards: Any = None  # these hold the parts of the parameters; None: each tensor is whole here

    @classmethod
    def of(cls, params: Iterable[Tensor], process_group: Any) -> Ranks:
        """For these parameters; ``process_group`` is ``"auto"``, None (never), or a group.

        The parts of one tensor must feel one loss: None is for whole tensors only. By default it is averaged over the
        mesh that theirs was cut from, so that the dimensions along which they are only replicated take part.

        Raises:
            ValueError: no mesh of the parameters holds all others.
        """
        world = default_group()
        if world is None:
            return cls()
        params = list(params)
        meshes = {p.device_mesh for p in params if is_sharded(p)}  # type: ignore[attr-defined]
        if not meshes:
            pieces = any(is_piece(p) for p in params)
            own = process_group in ("auto", None) if pieces else process_group == "auto"
            group = unless_alone(world if own else process_group)
            return cls(group, group if pieces else None)
        widest = max(meshes, key=lambda mesh: mesh.size())
        for mesh in meshes:
            if not set(_members(mesh)) <= set(_members(widest)):
                raise ValueError(
                    f"parameters are sharded over the ranks {_members(mesh)} and over {_members(widest)}, and neither "
                    "holds the other: shard all over one mesh, or give each part an optimizer of its own"
                )
        shards = unless_alone(_group(widest))
        loss = unless_alone(_group(widest._get_root_mesh()) if process_group in ("auto", None) else process_group)
        same = None not in (loss, shards) and set(_ranks(loss)) == set(_ranks(shards))
        return cls(loss, loss if same else shards)

    def share(self, sums: Tensor, params: Sequence[Tensor]) -> Tensor:
        """What this rank adds to the sums over the whole of each parameter (last dimension: one for each)."""
        if self.shards is None:
            return sums
        size = dist.get_world_size(self.shards)
        counts = [1 if is_piece(p) else size // _parts(p) for p in params]
        copies = torch.tensor(counts, dtype=sums.dtype, device="cpu")
        return sums / copies.to(sums.device, non_blocking=True)

    def whole(self, sums: Tensor, params: Sequence[Tensor]) -> Tensor:
        """Sums over the parts that lie here (last dimension: one for each parameter) as sums over the whole."""
        total = self.share(sums, params)
        if self.shards is not None:
            dist.all_reduce(total, group=self.shards)
        return total


def hand_on(params: Sequence[Tensor], states: Sequence[dict[str, Tensor]], ranks: Ranks) -> None:
    """Give the scalars of loaded pieces to the ranks where nothing of them lies, which FSDP1 leaves out."""
    if ranks.shards is None or not any(is_piece(p) for p in params):
        return
    values = torch.stack([torch.stack([s[name] for s in states]) for name in KEPT])
    away = torch.tensor([not p.numel() for p in params], device=values.device)
    values = torch.where(away, -torch.inf, values)  # the others all have the same
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=ranks.shards)
    for name, row in zip(KEPT, values, strict=True):
        for p, s, value in zip(params, states, row, strict=True):
            if not p.numel():
                s[name].copy_(value)


def agreed(heard: Loss | None, norms: Tensor, params: Sequence[Tensor], ranks: Ranks) -> tuple[Loss | None, Tensor]:
    """The mean of the finite losses of all ranks and the norm of the whole gradient, the same on each.

    Steered by its own loss alone, replicas would drift apart. A rank without a loss, or with one that is not finite,
    takes part with nothing: a collective that one rank leaves out hangs the others. A gradient that is not finite on
    one rank is not on any.

    Args:
        heard: this rank's loss, or None.
        norms: of what lies here of each gradient, of shape (n,). Gives device and dtype of the collective.
        params: the n parameters.
        ranks: whom to ask.
    """
    if heard is not None and isinstance(heard.value, Tensor) and is_sharded(heard.value):
        heard = heard._replace(value=cast(Any, heard.value).full_tensor())
    norm = torch.linalg.vector_norm(norms)
    joint = ranks.shards is not None and ranks.shards is ranks.loss
    if ranks.shards is not None:
        squares = ranks.share(norms * norms, params).sum()
        if not joint:
            dist.all_reduce(squares, group=ranks.shards)
            norm = squares.sqrt()
    if ranks.loss is None:
        return heard, norm
    value, window = norms.new_full((), torch.nan), 0.0
    if heard is not None:
        value = heard.value.to(value) if isinstance(heard.value, Tensor) else norms.new_full((), heard.value)
        window = float(heard.window)
    finite = torch.isfinite(value)
    heard_here = value.new_full((), float(heard is not None))
    # The norm times 0 is a flag: NaN where the norm is not finite.
    last = squares if joint else 0 * norm
    mine = [torch.where(finite, value, 0.0), finite.to(value), heard_here, value.new_full((), window), last]
    total = torch.stack(mine)
    dist.all_reduce(total, group=ranks.loss)
    norm = total[4].sqrt() if joint else norm + total[4]
    if norms.device.type == "cpu" and not total[2]:
        return None, norm  # no rank has a loss: nothing is missing that could be counted as ignored
    # The mean window of those that have a loss: where one rank's is partial, the mean loss is on another scale for all.
    return Loss(total[0] / total[1], total[3] / total[2].clamp(min=1)), norm


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which a part lies here."""
    return _is_sharded(type(tensor))


@lru_cache(maxsize=64)  # it is asked of every tensor, several times a step
def _is_sharded(kind: type) -> bool:
    return hasattr(kind, "device_mesh")  # the class itself would have to be imported, and takes a second to be


def is_piece(param: Tensor) -> bool:
    """Whether it is what lies here of FSDP1's flat parameter: a plain tensor, of another size on each rank."""
    return bool(getattr(param, "_fsdp_flattened", False))


def local(tensor: Tensor) -> Tensor:
    """What lies here of a tensor: a view of a DTensor's part, and any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_grad(param: Any) -> Tensor:
    """What lies here of a parameter's gradient, cut as the parameter is."""
    grad = param.grad
    if grad is None:
        return torch.zeros_like(param)  # a piece that has nothing here
    if is_sharded(param) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)  # partial sums, as of a norm's weight
    return local(grad)


def start(param: Any) -> tuple[int, ...]:
    """Where in a sharded parameter the part begins that lies here, in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)[1])


def placed(part: Tensor, param: Any, dims: Collection[int]) -> Tensor:
    """A memory of what lies here as one of the whole parameter: cut as that is along ``dims``, of size 1 elsewhere."""
    if not is_sharded(param):
        return part
    from torch.distributed.tensor import DTensor, Replicate

    cuts = _cuts(param, dims)
    placements = [p if dim in cuts else Replicate() for dim, p in enumerate(param.placements)]
    shape = torch.Size(n if dim in dims else 1 for dim, n in enumerate(param.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, param.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def add_parts(sums: Iterable[tuple[Tensor, Any, Collection[int]]]) -> None:
    """Add up, in place, sums over what lies here; each comes with its parameter and the dimensions that it is over.

    All go in one collective for each group of ranks: with parameters that are cut one way, as FSDP2 does it, in one.
    """
    batches: dict[tuple[Any, ...], list[Tensor]] = {}
    for part, param, dims in sums:
        for cut in _cuts(param, dims):
            batches.setdefault((param.device_mesh.get_group(cut), part.dtype, part.device), []).append(part)
    for (group, *_), some in batches.items():
        flat = torch.cat([part.flatten() for part in some])
        dist.all_reduce(flat, group=group)
        for part, total in zip(some, flat.split([part.numel() for part in some]), strict=True):
            part.copy_(total.view_as(part))


def _cuts(param: Any, dims: Collection[int]) -> list[int]:
    """Dimensions of the mesh along which a parameter is cut in one of the given dimensions."""
    found = enumerate(param.placements)
    return [cut for cut, p in found if not p.is_replicate() and p.dim % param.dim() in dims]


def _parts(param: Any) -> int:
    """Into how many parts, each on another rank, a parameter is cut."""
    every = range(param.dim())
    return math.prod(param.device_mesh.size(cut) for cut in _cuts(param, every)) if is_sharded(param) else 1


def _members(mesh: Any) -> list[int]:
    return list(mesh.mesh.flatten().tolist())


def _ranks(group: Any) -> list[int]:
    return list(dist.get_process_group_ranks(group))


def _group(mesh: Any) -> Any:
    """A process group of all ranks of a mesh, whose own groups have one dimension each."""
    members = _members(mesh)
    if len(members) == dist.get_world_size():
        return dist.group.WORLD
    return mesh.get_group() if mesh.ndim == 1 else dist.new_group(members, use_local_synchronization=True)


def default_group() -> Any:
    """The default process group as it is now, or None. It may be destroyed, and made anew."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def unless_alone(group: Any) -> Any:
    """A process group of several; None for none, or for one of this process alone."""
    return None if group is None or dist.get_world_size(group) == 1 else group
