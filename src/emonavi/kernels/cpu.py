"""The kernels for the CPU: buckets as the C code takes them."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from emonavi.fact import SAMPLE_RATE, emofact, sample_stride
from emonavi.kernels import Kernel
from emonavi.kernels.build import library
from emonavi.lynx import emolynx
from emonavi.navi import emonavi
from emonavi.pieces import in_order

__all__ = ["Numbers", "kernel", "squares"]

# Of parameters and gradients, with that of their states.
DTYPES = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
OWN = {Tensor, Parameter}
VECTORS = ("step_size", "decay", "root", "last_root", "bias")  # all else is one number, betas and eps too


class _Bucket(ctypes.Structure):
    """The ``bucket`` of sweep.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "threads")),
        *((name, ctypes.c_void_p) for name in ("size", "rows", "samples", "stride", "tensors")),
        *((name, ctypes.c_void_p) for name in ("step_size", "decay", "root", "last_root", "bias")),
        *((name, ctypes.c_double) for name in ("grad_scale", "beta1", "beta2", "eps", "floor")),
        *((name, ctypes.c_double) for name in ("grad_trust", "square_trust", "sample_rate")),
        ("reflect", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sums", "scratch", "place")),
    )


def kernel(rule: Callable[..., Any], lists: Mapping[str, list[Tensor]], predicated: bool) -> Kernel | str:
    """The kernel for a bucket, or why there is none."""
    if rule not in (emonavi, emolynx, emofact):
        return f"there is no kernel for {rule.__name__}"
    if predicated:
        return "a kernel for the CPU branches on values, which capturable=True forbids"
    dtype = lists["param"][0].dtype
    for name, tensors in lists.items():
        wanted = dtype if name in ("param", "grad") else DTYPES[dtype]
        if not _plain(tensors, wanted):
            return f"the kernel for {rule.__name__} and {dtype} wants {name} as plain tensors of {wanted} on the CPU"
    function = _function(rule.__name__, dtype)
    if isinstance(function, str):
        return function

    def run(lists: Mapping[str, list[Tensor]], scalars: dict[str, Any], grad_scale: Any, acts: Any, seeds: Any) -> Any:
        return _sweep(function, lists, scalars, grad_scale, rule is emofact)

    return run


def _sweep(
    function: Any, lists: Mapping[str, list[Tensor]], scalars: dict[str, Any], grad_scale: float, matrices: bool
) -> Any:
    columns, home = in_order(list(lists.values()), row_major=matrices)
    scalars = {k: float(v) if isinstance(v, Tensor) and k not in VECTORS else v for k, v in scalars.items()}
    vectors = {k: v.contiguous() for k, v in scalars.items() if isinstance(v, Tensor)}
    fields = {k: v for k, v in scalars.items() if v is not None} | {k: v.data_ptr() for k, v in vectors.items()}
    # Lion and Adafactor have one trust, Adam one for each memory.
    fields = {"grad_trust": fields.pop("trust", 1.0), "square_trust": 1.0} | fields
    held = _shapes(columns) if matrices else {}
    sums = _call(function, columns, grad_scale=grad_scale, **fields, **{k: v.buffer_info()[0] for k, v in held.items()})
    for tensor, copy in home:
        tensor.copy_(copy)
    torch.autograd.graph.increment_version(lists["param"])  # autograd must see that they are not what they were
    return sums.unbind(1) if scalars["reflect"] else None


def _shapes(columns: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
    """Rows of each matrix, and where the sample of it lies that the last column remembers."""
    sampled = [t.numel() for t in columns[-1]]
    stride = [sample_stride(t.numel()) for t in columns[0]]
    rows = [t.numel() for t in columns[2]]  # one number remembered for each
    return {"rows": array("q", rows), "samples": array("q", sampled), "stride": array("q", stride)}


def squares(tensors: Sequence[Tensor]) -> Tensor | None:
    """Sum of the squares of each tensor, taken in float64; None where there is no kernel for them."""
    function = _function("squares", tensors[0].dtype)
    if isinstance(function, str) or not _plain(tensors, tensors[0].dtype):
        return None
    # In which order the elements lie does not matter, but each must lie there once.
    held = [t if t.is_contiguous() else t.contiguous() for t in (t.resolve_neg() for t in tensors)]
    return _call(function, [held]).unbind(1)[0]


class Numbers:
    """Single float32 numbers that lie anywhere, read and written together. It lives no longer than one step."""

    def __init__(self, library: ctypes.CDLL, tensors: Sequence[Tensor]) -> None:
        self._library = library
        self._tensors = tensors  # their memory must not go
        self._pointers = array("Q", [t.data_ptr() for t in tensors])

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Numbers | None:
        """Those of 0-d tensors; None where they cannot be reached so."""
        loaded = library()
        return None if isinstance(loaded, str) or not _plain(tensors, torch.float32) else cls(loaded, tensors)

    def read(self) -> Tensor:
        """All in turn, as a float64 vector."""
        values = torch.empty(len(self._tensors), dtype=torch.float64)
        self._pass(self._library.read_numbers, values)
        return values

    def write(self, values: Tensor) -> None:
        """Set all in turn from a float64 vector."""
        self._pass(self._library.write_numbers, values.contiguous())

    def _pass(self, function: Any, values: Tensor) -> None:
        pointers = ctypes.c_void_p(self._pointers.buffer_info()[0])
        function(ctypes.c_int64(len(self._pointers)), pointers, ctypes.c_void_p(values.data_ptr()))


def _plain(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether all are torch's own tensors of this dtype in the CPU's memory: a subclass may have none of its own."""
    return all([t.is_cpu and t.dtype is dtype and type(t) in OWN for t in tensors])


def _function(name: str, dtype: torch.dtype) -> Any:
    """A function of the C library, or why there is none."""
    loaded = library()
    if isinstance(loaded, str):
        return loaded
    suffix = str(dtype).removeprefix("torch.")
    return getattr(loaded, f"{name}_{suffix}", None) or f"this compiler, or the kernels, have no {suffix}"


def _call(function: Any, columns: Sequence[Sequence[Tensor]], **fields: Any) -> Tensor:
    """Call a C function on the columns of a bucket; returns its sums, of shape (count, 3)."""
    sizes = array("q", [t.numel() for t in columns[0]])
    pointers = array("Q", [t.data_ptr() for column in columns for t in column])
    sums = torch.zeros(len(sizes), 3, dtype=torch.float64)
    bucket = _Bucket(
        count=len(sizes), threads=torch.get_num_threads(), size=sizes.buffer_info()[0],
        tensors=pointers.buffer_info()[0], sums=sums.data_ptr(), sample_rate=SAMPLE_RATE, **fields,
    )  # fmt: skip
    if function(ctypes.byref(bucket)):
        raise MemoryError("no memory for the sums of a step: not all of it was done")
    return sums
