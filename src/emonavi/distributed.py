"""The same emotion on all ranks: what is reduced over processes, and when.

A replica (DDP) has the whole gradient but its own loss; a rank with shards (FSDP2, tensor parallel) has a part of each
tensor. A rule works on the local part. The emotion is told about the whole: the mean of the losses, and for each tensor
the sum over its parts, where a part that is on several ranks counts once. So every rank computes the same emotion, to
the last bit. A step makes these collectives; in brackets how many numbers of the emotion's dtype, for n tensors:

    replicas    one before the update: loss, how many ranks have one, window, a flag for the gradient (5)
    shards      the same, with the squared norm of the gradient in it, and if the emotion reflects a second one after
                the update: the three sums of reflection (3 n). Once in a run norms and sizes of the weights (2 n)
    alone       none
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from emonavi.machine import KEPT, Loss

__all__ = [
    "Ranks",
    "add_parts",
    "agreed",
    "default_group",
    "hand_on",
    "is_part",
    "is_piece",
    "is_sharded",
    "local",
    "local_grad",
    "other_parts",
    "placed",
    "reshard",
    "start",
    "unless_alone",
]


class Ranks(NamedTuple):
    """The process groups of one optimizer; None where nothing has to be reduced."""

    loss: Any = None  # losses are averaged over this group
    shards: Any = None  # this group holds the parts of the parameters; None: all tensors are whole here

    @classmethod
    def of(cls, params: Iterable[Tensor], process_group: Any) -> Ranks:
        """For these parameters; ``process_group`` is ``"auto"``, None (never), or a group.

        All shards of a tensor need the same loss, so that with ``process_group=None`` it is averaged over the mesh that
        shards it. The default averages over the mesh that this one was cut from, replicated dimensions included.

        Raises:
            ValueError: no mesh of the parameters holds all others, or the group does not hold that mesh.
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
        if process_group not in ("auto", None) and not set(_members(widest)) <= set(_ranks(process_group)):
            raise ValueError(
                f"process_group holds the ranks {_ranks(process_group)}, and the parameters are sharded over "
                f"{_members(widest)}: parts of one tensor that feel different losses drift apart; give a group of all "
                "these ranks, or leave process_group at 'auto' (all that train together) or None (these ranks)"
            )
        shards = loss = unless_alone(_group(widest))
        if process_group is not None:
            loss = unless_alone(_group(widest._get_root_mesh()) if process_group == "auto" else process_group)
        same = None not in (loss, shards) and set(_ranks(loss)) == set(_ranks(shards))
        return cls(loss, loss if same else shards)

    def share(self, sums: Tensor, params: Sequence[Tensor]) -> Tensor:
        """This rank's share of the sums over each whole parameter (last dimension: one for each parameter)."""
        if self.shards is None:
            return sums
        size = dist.get_world_size(self.shards)
        counts = [1 if is_piece(p) else size // _parts(p) for p in params]
        copies = torch.tensor(counts, dtype=sums.dtype, device="cpu")
        return sums / copies.to(sums.device, non_blocking=True)

    def whole(self, sums: Tensor, params: Sequence[Tensor]) -> Tensor:
        """Reduce sums over local parts to sums over whole parameters (last dimension: one for each parameter)."""
        total = self.share(sums, params)
        if self.shards is not None:
            dist.all_reduce(total, group=self.shards)
        return total


def hand_on(params: Sequence[Tensor], states: Sequence[dict[str, Tensor]], ranks: Ranks) -> None:
    """FSDP1 drops scalar state on ranks that hold no element of a parameter; copy it there from the other ranks."""
    if ranks.shards is None or not any(is_piece(p) for p in params):
        return
    values = torch.stack([torch.stack([s[name] for s in states]) for name in KEPT])
    away = torch.tensor([not p.numel() for p in params], device=values.device)
    values = torch.where(away, -torch.inf, values)  # all others agree
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=ranks.shards)
    for name, row in zip(KEPT, values, strict=True):
        for p, s, value in zip(params, states, row, strict=True):
            if not p.numel():
                s[name].copy_(value)


def agreed(heard: Loss | None, norms: Tensor, params: Sequence[Tensor], ranks: Ranks) -> tuple[Loss | None, Tensor]:
    """The mean of the finite losses of all ranks and the norm of the whole gradient, the same on each rank.

    If each replica followed its own loss, they would drift apart. A rank without a finite loss still takes part, since
    otherwise the others would hang. If the gradient is not finite on one rank, the norm is not finite on any.

    Args:
        heard: this rank's loss, or None.
        norms: norms of the local parts of the gradients, of shape (n,), in the device and dtype of the collective.
        params: the n parameters.
        ranks: the process groups.
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
        return None, norm  # no rank has a loss: this is not an ignored loss
    # The mean window of ranks with a loss: if one rank's is partial, the mean loss is on another scale for all.
    return Loss(total[0] / total[1], total[3] / total[2].clamp(min=1)), norm


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return _is_sharded(type(tensor))


@lru_cache(maxsize=64)  # called for every tensor, several times a step
def _is_sharded(kind: type) -> bool:
    return hasattr(kind, "device_mesh")  # importing DTensor itself takes a second


def is_part(param: Any) -> bool:
    """Whether this rank may hold a part of a parameter only. Of a replicated DTensor each rank holds all."""
    return is_piece(param) or (is_sharded(param) and not all(p.is_replicate() for p in param.placements))


def is_piece(param: Tensor) -> bool:
    """Whether a parameter is the local part of FSDP1's flat one: a plain tensor, of another size on each rank."""
    return bool(getattr(param, "_fsdp_flattened", False))


def local(tensor: Tensor) -> Tensor:
    """The local part of a tensor: a view for a DTensor, any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_grad(param: Any) -> Tensor:
    """The local part of a parameter's gradient, sharded like the parameter."""
    grad = param.grad
    if grad is None:
        return torch.zeros_like(param)  # FSDP1: no element here
    if is_sharded(param) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)  # partial sums, for example of a norm's weight
    return local(grad)


def start(param: Any) -> tuple[int, ...]:
    """Offset of the local part in a sharded parameter, in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)[1])


def placed(part: Tensor, param: Any, dims: Collection[int]) -> Tensor:
    """Make a local memory a DTensor, sharded like the parameter along ``dims`` and of size 1 in other dimensions."""
    if not is_sharded(param):
        return part
    from torch.distributed.tensor import DTensor, Replicate

    cuts = _cuts(param, dims)
    placements = [p if dim in cuts else Replicate() for dim, p in enumerate(param.placements)]
    shape = torch.Size(n if dim in dims else 1 for dim, n in enumerate(param.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, param.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def other_parts(params: Iterable[Any], group: Any) -> list[int]:
    """Ranks of a group that may hold another part of a parameter than this one."""
    held = {rank for p in params if is_sharded(p) and is_part(p) for rank in _members(p.device_mesh)}
    return sorted(held.intersection(_ranks(group)) - {dist.get_rank()}) if held else []


def reshard(model: nn.Module | None) -> None:
    """Let FSDP2 gather a model's weights anew: after a forward without a backward it keeps those of the root."""
    if model is None or default_group() is None:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def add_parts(sums: Iterable[tuple[Tensor, Any, Collection[int]]]) -> None:
    """Reduce local sums in place; each comes with its parameter and the dimensions that it sums over.

    There is one collective for each group of ranks: a single one if all parameters are sharded alike, as by FSDP2.
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
    """Mesh dimensions that shard a parameter along one of the given dimensions."""
    found = enumerate(param.placements)
    return [cut for cut, p in found if not p.is_replicate() and p.dim % param.dim() in dims]


def _parts(param: Any) -> int:
    """Into how many parts a parameter is sharded."""
    every = range(param.dim())
    return math.prod(param.device_mesh.size(cut) for cut in _cuts(param, every)) if is_sharded(param) else 1


def _members(mesh: Any) -> list[int]:
    return list(mesh.mesh.flatten().tolist())


def _ranks(group: Any) -> list[int]:
    return list(dist.get_process_group_ranks(group))


def _group(mesh: Any) -> Any:
    """A process group of all ranks of a mesh. The mesh itself only has one for each dimension."""
    members = _members(mesh)
    if len(members) == dist.get_world_size():
        return dist.group.WORLD
    return mesh.get_group() if mesh.ndim == 1 else dist.new_group(members, use_local_synchronization=True)


def default_group() -> Any:
    """The current default process group, or None. It may be destroyed and created again."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def unless_alone(group: Any) -> Any:
    """The process group, or None if this process is alone in it."""
    return None if group is None or dist.get_world_size(group) == 1 else group
