"""The kernels for CUDA devices: passes buckets to the Triton programs. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from emonavi.fact import SAMPLE_RATE, emofact
from emonavi.kernels import Kernel
from emonavi.kernels.tensors import PLAIN_TYPES, in_order, misfit
from emonavi.lynx import emolynx
from emonavi.memories import sample_stride
from emonavi.navi import emonavi
from emonavi.sweep import integers

try:
    import triton.language as tl

    from emonavi.kernels import matrices, programs
except ImportError as error:
    MISSING = f"Triton cannot be imported ({error}): install the triton that this build of torch wants"
    DTYPES = {}
else:
    MISSING = ""
    DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

__all__ = ["kernel", "squares"]

Columns: TypeAlias = Sequence[Sequence[Tensor]]

CHUNK = 1 << 14  # elements of a program: enough to hide its first look-ups, few enough to fill a GPU
BLOCK = 1 << 10  # elements that it moves at once: eight for each of its 128 threads
BAND, WIDTH = 64, 256  # rows and columns of a matrix in a tile; the sums of a tile are a fiftieth of it
LINES = 256  # rows, columns or samples in a program


class _Table(NamedTuple):
    """Sizes and addresses of a bucket's tensors, as the programs read them."""

    numbers: Tensor
    tensors: int
    chunks: int
    aligned: bool  # each address is a multiple of 16

    @classmethod
    def of(cls, columns: Sequence[Sequence[Tensor]]) -> _Table:
        sizes = [t.numel() for t in columns[0]]
        first = _first(_parts(size, CHUNK) for size in sizes)
        addresses = [t.data_ptr() for column in columns for t in column]
        numbers = integers((*first, *sizes, *addresses), columns[0][0].device)
        return cls(numbers, len(sizes), first[-1], _aligned(addresses))

    def sweep(self, program: Any, kinds: int, **arguments: Any) -> Tensor:
        """Launch a program for each chunk; returns its sums, float64, of shape (kinds, tensors)."""
        sums = _Sums(self.numbers, self.tensors, self.chunks, kinds)
        fixed = {"ALIGNED": self.aligned, "CHUNK": CHUNK, "BLOCK": BLOCK}
        _launch(program, (self.chunks, 1), self.numbers, self.tensors, self.chunks, sums.partial, **fixed, **arguments)
        return sums.total()


class _Sums:
    """The sums of each chunk of a bucket, which are then added up for each tensor."""

    def __init__(self, first: Tensor, tensors: int, chunks: int, kinds: int) -> None:
        self.first, self.tensors, self.chunks, self.kinds = first, tensors, chunks, kinds
        self.partial = torch.empty((kinds, chunks), dtype=torch.float32, device=first.device) if kinds else None

    def total(self) -> Tensor:
        """The sums of each tensor, float64, of shape (kinds, tensors)."""
        sums = torch.empty((self.kinds, self.tensors), dtype=torch.float64, device=self.first.device)
        if self.kinds:
            grid = (self.tensors, self.kinds)
            _launch(programs.add_up, grid, self.first, self.partial, sums, self.tensors, self.chunks, BLOCK=256)
        return sums


def _launch(program: Any, grid: tuple[int, int], table: Tensor, *given: Any, **named: Any) -> None:
    """Launch a program on the table's device, unless its grid is empty."""
    with torch.cuda.device(table.device) if table.is_cuda else nullcontext():
        if 0 not in grid:
            program[grid](table, *given, **named)


def _first(parts: Iterable[int]) -> list[int]:
    """How many parts come before each tensor, and their number."""
    return [0, *accumulate(parts)]


def _parts(size: int, part: int) -> int:
    return -(-size // part)


def _aligned(numbers: Sequence[int]) -> bool:
    return not any([number % 16 for number in numbers])


def kernel(rule: Callable[..., Any], lists: Mapping[str, list[Tensor]]) -> Kernel | str:
    """The kernel for a bucket, or the reason why there is none. It does not branch on values."""
    launch = {emonavi: _navi, emolynx: _lynx, emofact: _fact}.get(rule)
    if launch is None:
        return f"there is no kernel for {rule.__name__} on CUDA"
    if MISSING:
        return MISSING
    device, dtype = lists["param"][0].device, lists["param"][0].dtype
    if dtype not in DTYPES:
        return f"the kernels for CUDA take parameters of float32, bfloat16 and float16, and not of {dtype}"
    for name, tensors in lists.items():
        wanted = dtype if name in ("param", "grad") else torch.float32
        if not _plain(tensors, wanted, device):
            return f"the kernel for {rule.__name__} and {dtype} wants {name} as plain tensors of {wanted} on {device}"
    if unfit := misfit(rule, lists):
        return unfit

    def run(
        lists: Mapping[str, list[Tensor]], scalars: dict[str, Any], grad_scale: Any, acts: Any, seeds: Tensor | None
    ) -> Any:
        # Random bits belong to elements in row-major order.
        columns, home = in_order(list(lists.values()), row_major=seeds is not None or rule is emofact)
        given = {k: _on(v, device) for k, v in scalars.items()}
        shared = {"acts": _on(acts, device), "grad_scale": _on(grad_scale, device), "decay": given["decay"]}
        shared["seeds"] = seeds
        shared |= {"step_size": given["step_size"], "REFLECT": scalars["reflect"], "DTYPE": DTYPES[dtype]}
        sums = launch(columns, given, shared)
        for tensor, copy in home:
            tensor.copy_(copy)
        torch.autograd.graph.increment_version(lists["param"])  # tells autograd that they have changed
        return sums if scalars["reflect"] else None

    return run


def _navi(columns: Columns, given: dict[str, Any], shared: dict[str, Any]) -> tuple[Tensor, ...]:
    sums = _Table.of(columns).sweep(
        programs.emonavi, 3 * shared["REFLECT"], **shared, root=given["root"], last_root=given["last_root"],
        rest1=1 - given["beta1"], beta2=given["beta2"], rest2=1 - given["beta2"], eps=given["eps"],
        grad_trust=given.get("grad_trust"), square_trust=given.get("square_trust"),
    )  # fmt: skip
    return sums.unbind()


def _lynx(columns: Columns, given: dict[str, Any], shared: dict[str, Any]) -> tuple[Tensor, ...]:
    sums = _Table.of(columns).sweep(
        programs.emolynx, 2 * shared["REFLECT"], **shared,
        beta1=given["beta1"], rest2=1 - given["beta2"], trust=given.get("trust"),
    )  # fmt: skip
    return (sums[0], sums[1], sums[1]) if shared["REFLECT"] else ()


def _fact(columns: Columns, given: dict[str, Any], shared: dict[str, Any]) -> tuple[Tensor, ...]:
    rows = [t.numel() for t in columns[2]]  # the memory has one number for each row
    widths = [t.numel() for t in columns[3]]
    sampled = [t.numel() for t in columns[4]] if shared["REFLECT"] else [0 for _ in rows]
    strides = [sample_stride(t.numel()) for t in columns[0]]
    down, across = [_parts(r, BAND) for r in rows], [_parts(w, WIDTH) for w in widths]
    tiles = _first(map(mul, down, across))
    of_rows, of_columns, of_samples = (_first(_parts(n, LINES) for n in some) for some in (rows, widths, sampled))
    sums = _first([*map(mul, across, rows), *map(mul, down, widths)])  # where in the scratch each sum begins
    addresses = [t.data_ptr() for column in columns for t in column]
    n, device = len(rows), columns[0][0].device
    firsts, facts = (*tiles, *of_rows, *of_columns, *of_samples), (*rows, *widths, *sampled, *strides, *sums[:-1])
    table = integers((*firsts, *facts, *addresses), device)
    scratch = torch.empty(sums[-1], dtype=torch.float32, device=device)
    acts, scale, dtype = (shared[k] for k in ("acts", "grad_scale", "DTYPE"))
    tile = {"BAND": BAND, "WIDTH": WIDTH}
    swept = tile | {"DTYPE": dtype, "ALIGNED": _aligned(addresses[: 2 * n] + widths), "SOME": BLOCK // WIDTH}
    memory = {"rest1": 1 - given["beta1"], "floor": given["floor"], "trust": given.get("trust"), "LINES": LINES} | tile
    metric = {"bias": given["bias"], "eps": given["eps"]}
    _launch(matrices.gather, (tiles[-1], 1), table, n, scratch, acts, scale, **swept)
    _launch(matrices.remember, (of_rows[-1], 1), table, n, scratch, acts, ACROSS=False, **memory)
    _launch(matrices.remember, (of_columns[-1], 1), table, n, scratch, acts, ACROSS=True, **memory)
    moving = {k: shared[k] for k in ("step_size", "decay", "seeds")} | metric
    _launch(matrices.move, (tiles[-1], 1), table, n, acts=acts, grad_scale=scale, **moving, **swept)
    if not shared["REFLECT"]:
        return ()
    kept = _Sums(table[3 * (n + 1) :], n, of_samples[-1], 3)
    how = metric | {"rate": SAMPLE_RATE, "DTYPE": dtype, "LINES": LINES}
    _launch(matrices.sample, (kept.chunks, 1), table, n, kept.chunks, kept.partial, acts, scale, **how)
    return kept.total().unbind()


def squares(tensors: Sequence[Tensor]) -> Tensor | None:
    """Sum of squares of each tensor; None if there is no kernel for them."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES or not _plain(tensors, dtype, tensors[0].device):
        return None
    # The order of elements does not matter, but each must be in memory once.
    held = [t if t.is_contiguous() else t.contiguous() for t in (t.resolve_neg() for t in tensors)]
    return _Table.of([held]).sweep(programs.squares, 1, DTYPE=DTYPES[dtype])[0]


def _plain(tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether all are plain tensors of this dtype and device, no subclasses: those may have no memory of their own."""
    return all([t.dtype is dtype and type(t) in PLAIN_TYPES and t.device == device for t in tensors])


def _on(value: Any, device: torch.device) -> Any:
    """A scalar as a program takes it: a tensor on the device, a number, or None."""
    if isinstance(value, Tensor) and (value.dim() or value.device.type == device.type):
        return value.to(device, non_blocking=True).contiguous()
    return None if value is None else float(value)
