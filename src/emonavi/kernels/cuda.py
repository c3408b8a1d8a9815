"""The kernels for CUDA devices: buckets as the Triton programs take them. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emonavi.kernels import Kernel
from emonavi.kernels.cpu import OWN
from emonavi.lynx import emolynx
from emonavi.navi import emonavi
from emonavi.pieces import in_order
from emonavi.scalars import integers

try:
    import triton.language as tl

    from emonavi.kernels import programs
except ImportError as error:
    MISSING = f"Triton cannot be imported ({error}): install the triton that this build of torch wants"
    DTYPES = {}
else:
    MISSING = ""
    DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

__all__ = ["kernel", "squares"]

CHUNK = 1 << 14  # elements of a program: enough to hide what it looks up first, few enough to fill a GPU
BLOCK = 1 << 10  # elements that it moves at once, eight for each of its 128 threads


class _Table(NamedTuple):
    """Where the tensors of a bucket lie, as the programs read it."""

    numbers: Tensor
    tensors: int
    chunks: int
    aligned: bool  # each begins at a multiple of 16 bytes

    @classmethod
    def of(cls, columns: Sequence[Sequence[Tensor]]) -> _Table:
        sizes = [t.numel() for t in columns[0]]
        first = [0, *accumulate(-(-size // CHUNK) for size in sizes)]
        addresses = [t.data_ptr() for column in columns for t in column]
        aligned = not any([address % 16 for address in addresses])
        return cls(integers((*first, *sizes, *addresses), columns[0][0].device), len(sizes), first[-1], aligned)

    def sweep(self, program: Any, kinds: int, **arguments: Any) -> Tensor:
        """Launch a program for each chunk; returns its sums, float64, of shape (kinds, tensors)."""
        device = self.numbers.device
        partial = torch.empty((kinds, self.chunks), dtype=torch.float32, device=device) if kinds else None
        sums = torch.empty((kinds, self.tensors), dtype=torch.float64, device=device)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if self.chunks:
                program[(self.chunks,)](
                    self.numbers, self.tensors, self.chunks, partial, **arguments,
                    ALIGNED=self.aligned, CHUNK=CHUNK, BLOCK=BLOCK,
                )  # fmt: skip
            if kinds:
                programs.add_up[(self.tensors, kinds)](self.numbers, partial, sums, self.tensors, self.chunks, BLOCK=256)
        return sums


def kernel(rule: Callable[..., Any], lists: Mapping[str, list[Tensor]]) -> Kernel | str:
    """The kernel for a bucket, or why there is none. It branches on no value."""
    launch = {emonavi: _navi, emolynx: _lynx}.get(rule)
    if launch is None:
        return f"there is no kernel for {rule.__name__} on CUDA"
    if MISSING:
        return MISSING
    device, dtype = lists["param"][0].device, lists["param"][0].dtype
    for name, tensors in lists.items():
        wanted = dtype if name in ("param", "grad") else torch.float32
        if dtype not in DTYPES or not _plain(tensors, wanted, device):
            return f"the kernel for {rule.__name__} and {dtype} wants {name} as plain tensors of {wanted} on {device}"

    def run(
        lists: Mapping[str, list[Tensor]], scalars: dict[str, Any], grad_scale: Any, acts: Any, seeds: Tensor | None
    ) -> Any:
        # Random bits belong to elements in the order of the shape.
        columns, home = in_order(list(lists.values()), row_major=seeds is not None)
        given = {k: _on(v, device) for k, v in scalars.items()}
        shared = {"acts": _on(acts, device), "grad_scale": _on(grad_scale, device), "decay": given["decay"]}
        shared["seeds"] = seeds
        shared |= {"step_size": given["step_size"], "REFLECT": scalars["reflect"], "DTYPE": DTYPES[dtype]}
        sums = launch(_Table.of(columns), given, shared)
        for tensor, copy in home:
            tensor.copy_(copy)
        torch.autograd.graph.increment_version(lists["param"])  # autograd must see that they are not what they were
        return sums if scalars["reflect"] else None

    return run


def _navi(table: _Table, given: dict[str, Any], shared: dict[str, Any]) -> tuple[Tensor, ...]:
    sums = table.sweep(
        programs.emonavi, 3 * shared["REFLECT"], **shared, root=given["root"], last_root=given["last_root"],
        rest1=1 - given["beta1"], beta2=given["beta2"], rest2=1 - given["beta2"], eps=given["eps"],
        grad_trust=given.get("grad_trust"), square_trust=given.get("square_trust"),
    )  # fmt: skip
    return sums.unbind()


def _lynx(table: _Table, given: dict[str, Any], shared: dict[str, Any]) -> tuple[Tensor, ...]:
    sums = table.sweep(
        programs.emolynx, 2 * shared["REFLECT"], **shared,
        beta1=given["beta1"], rest2=1 - given["beta2"], trust=given.get("trust"),
    )  # fmt: skip
    return (sums[0], sums[1], sums[1]) if shared["REFLECT"] else ()


def squares(tensors: Sequence[Tensor]) -> Tensor | None:
    """Sum of the squares of each tensor; None where there is no kernel for them."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES or not _plain(tensors, dtype, tensors[0].device):
        return None
    # In which order the elements lie does not matter, but each must lie there once.
    held = [t if t.is_contiguous() else t.contiguous() for t in (t.resolve_neg() for t in tensors)]
    return _Table.of([held]).sweep(programs.squares, 1, DTYPE=DTYPES[dtype])[0]


def _plain(tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether all are torch's own tensors of this dtype on this device: a subclass may have no memory of its own."""
    return all([t.dtype is dtype and type(t) in OWN and t.device == device for t in tensors])


def _on(value: Any, device: torch.device) -> Any:
    """A scalar as a program takes it: on the device, as a number, or None."""
    if isinstance(value, Tensor) and (value.dim() or value.device.type == device.type):
        return value.to(device, non_blocking=True).contiguous()
    return None if value is None else float(value)
