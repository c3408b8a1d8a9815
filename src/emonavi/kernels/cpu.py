"""The kernels for the CPU: passes buckets to the C code."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emonavi.fact import SAMPLE_RATE, emofact
from emonavi.kernels import Kernel
from emonavi.kernels.build import library
from emonavi.kernels.tensors import in_one_order, in_order, misfit, plain
from emonavi.lynx import emolynx
from emonavi.memories import sample_size, sample_stride
from emonavi.navi import emonavi

__all__ = ["Numbers", "Sweep", "address", "follow", "function_of", "kernel", "squares"]

# Dtype of parameters and gradients: dtype of their state.
DTYPES = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
VECTORS = ("step_size", "decay", "root", "last_root", "bias", "seeds")  # others are one number


class _Bucket(ctypes.Structure):
    """The ``bucket`` of sweep.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "threads")),
        *((name, ctypes.c_void_p) for name in ("size", "rows", "samples", "stride", "tensors")),
        *((name, ctypes.c_void_p) for name in ("step_size", "decay", "root", "last_root", "bias")),
        *((name, ctypes.c_double) for name in ("grad_scale", "beta1", "beta2", "eps", "floor")),
        *((name, ctypes.c_double) for name in ("grad_trust", "square_trust", "sample_rate", "follow")),
        ("reflect", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("seeds", "sums", "scratch", "place")),
    )


def kernel(rule: Callable[..., Any], lists: Mapping[str, list[Tensor]], predicated: bool) -> Kernel | str:
    """The kernel for a bucket, or the reason why there is none."""
    if rule not in (emonavi, emolynx, emofact):
        return f"there is no kernel for {rule.__name__}"
    if predicated:
        return "a kernel for the CPU branches on values, which capturable=True forbids"
    dtype = lists["param"][0].dtype
    for name, tensors in lists.items():
        wanted = dtype if name in ("param", "grad") else DTYPES[dtype]
        if not plain(tensors, wanted):
            return f"the kernel for {rule.__name__} and {dtype} wants {name} as plain tensors of {wanted} on the CPU"
    sweep, squares = function_of(rule.__name__, dtype), function_of("gather" if rule is emofact else "squares", dtype)
    if isinstance(sweep, str):
        return sweep
    return misfit(rule, lists) or Sweep(sweep, squares, lists, matrices=rule is emofact)


class Sweep:
    """A kernel for one bucket. It may be called again as long as no tensor but the gradients has moved in memory."""

    def __init__(self, sweep: Any, squares: Any, lists: Mapping[str, list[Tensor]], matrices: bool) -> None:
        self._sweep, self._squares, self.matrices = sweep, squares, matrices
        grads = lists.get("grad", [])
        self.in_order = in_one_order([t for name, column in lists.items() if name != "grad" for t in column], grads)
        self._arrays: _Arrays | None = None
        self._pointed = False  # whether the arrays are those of the gradients to move

    def squares(self, lists: Mapping[str, list[Tensor]]) -> Tensor:
        """Sum of squares of each gradient, for a bucket that is in order and is moved next with these gradients."""
        self._pointed = False
        sums = _squares(self._squares, self._where(lists), first=1)
        self._pointed = True
        return sums

    def _where(self, lists: Mapping[str, list[Tensor]]) -> _Arrays:
        if self._arrays is None:
            self._arrays = _Arrays(list(lists.values()), self.matrices)
        elif not self._pointed:
            self._arrays.point(1, lists["grad"])
        self._pointed = False
        return self._arrays

    def __call__(
        self, lists: Mapping[str, list[Tensor]], scalars: dict[str, Any], grad_scale: float, acts: Any, seeds: Any
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        home: list[tuple[Tensor, Tensor]] = []
        if self.in_order:
            arrays = self._where(lists)
        else:
            columns, home = in_order(list(lists.values()), row_major=self.matrices or seeds is not None)
            arrays = _Arrays(columns, self.matrices)
        if self.matrices and arrays.gathered is None:
            _squares(self._squares, arrays, first=1)
        if seeds is not None:
            scalars = scalars | {"seeds": seeds}
        scalars = {k: float(v) if isinstance(v, Tensor) and k not in VECTORS else v for k, v in scalars.items()}
        vectors = {k: v.contiguous() for k, v in scalars.items() if isinstance(v, Tensor)}
        fields = {k: v for k, v in scalars.items() if v is not None} | {k: v.data_ptr() for k, v in vectors.items()}
        # Lion and Adafactor have one trust, Adam has one for each memory.
        fields = {"grad_trust": fields.pop("trust", 1.0), "square_trust": 1.0} | fields
        sums = _call(self._sweep, arrays, grad_scale=grad_scale, **fields)
        arrays.gathered = None
        for tensor, copy in home:
            tensor.copy_(copy)
        torch.autograd.graph.increment_version(lists["param"])  # tells autograd that they have changed
        return (sums[:, 0], sums[:, 1], sums[:, 2]) if scalars["reflect"] else None


class _Arrays:
    """Columns of tensors as the C code takes them. The tensors must stay alive during the call."""

    def __init__(self, columns: Sequence[Sequence[Tensor]], matrices: bool = False) -> None:
        self.count = len(columns[0])
        self.size = array("q", [t.numel() for t in columns[0]])
        self.tensors = array("Q", [t.data_ptr() for column in columns for t in column])
        self.dtype = DTYPES[columns[0][0].dtype]
        self.gathered: Tensor | None = None  # rows and columns of the gradients, until they are used
        self.rows = self.samples = self.stride = self.place = array("q")
        if matrices:
            self.rows = array("q", [len(t) for t in columns[0]])
            self.stride = array("q", [sample_stride(n) for n in self.size])
            self.samples = array("q", [sample_size(n) for n in self.size])
            self.place = array("q", [0]) * (self.count + 1)
            pointers = map(address, (self.size, self.rows, self.place))
            loaded: Any = library()
            loaded.places(ctypes.c_int64(self.count), *pointers)

    def point(self, column: int, tensors: Sequence[Tensor]) -> None:
        """Replace a column by other tensors of the same sizes."""
        self.tensors[column * self.count : (column + 1) * self.count] = array("Q", [t.data_ptr() for t in tensors])


def squares(tensors: Sequence[Tensor], by_rows: bool = False) -> Tensor | None:
    """Sum of squares of each tensor, in float64; None if there is no kernel for them.

    With ``by_rows`` matrices are added up in the order in which EmoFact's kernel gathers them.
    """
    dtype = tensors[0].dtype
    functions = [function_of(name, dtype) for name in ("squares", "gather")]
    if any(isinstance(function, str) for function in functions) or not plain(tensors, dtype):
        return None
    sums = torch.empty(len(tensors), dtype=torch.float64, device="cpu")
    matrices = [by_rows and t.dim() > 1 and t.numel() > 0 for t in tensors]
    for kind, function in enumerate(functions):
        # For other tensors the order of elements does not matter, but each must be in memory once.
        places = [i for i, matrix in enumerate(matrices) if matrix == kind]
        held = [t if t.is_contiguous() else t.contiguous() for t in (tensors[i].resolve_neg() for i in places)]
        if held:
            sums[torch.tensor(places, device="cpu")] = _squares(function, _Arrays([held], matrices=bool(kind)))
    return sums


def follow(params: Sequence[Tensor], shadows: Sequence[Tensor], rate: float) -> bool:
    """Move each shadow by ``rate`` towards its parameter. Returns False, and moves nothing, if there is no kernel."""
    dtype = params[0].dtype
    function = function_of("follow", dtype)
    if isinstance(function, str) or not plain(params, dtype) or not plain(shadows, DTYPES[dtype]):
        return False
    if [p.shape for p in params] != [s.shape for s in shadows] or not in_one_order([*params, *shadows], params):
        return False
    _call(function, _Arrays([params, shadows]), follow=rate)
    return True


class Numbers:
    """Many 0-d float32 tensors, read and written together."""

    def __init__(self, library: ctypes.CDLL, tensors: Sequence[Tensor]) -> None:
        self._library = library
        self._tensors = tensors  # keeps them alive
        self._pointers = array("Q", [t.data_ptr() for t in tensors])

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Numbers | None:
        """From 0-d tensors; None without the library, or if they are not plain."""
        loaded = library()
        return None if isinstance(loaded, str) or not plain(tensors, torch.float32) else cls(loaded, tensors)

    def read(self) -> Tensor:
        """All in order, as a float64 vector."""
        values = torch.empty(len(self._tensors), dtype=torch.float64, device="cpu")
        self._pass(self._library.read_numbers, values)
        return values

    def write(self, values: Tensor) -> None:
        """Set all in order from a float64 vector."""
        self._pass(self._library.write_numbers, values.contiguous())

    def _pass(self, function: Any, values: Tensor) -> None:
        function(ctypes.c_int64(len(self._pointers)), address(self._pointers), ctypes.c_void_p(values.data_ptr()))


def address(numbers: array[int]) -> ctypes.c_void_p:
    """Address of an array, which must stay alive while it is used."""
    return ctypes.c_void_p(numbers.buffer_info()[0])


def function_of(name: str, dtype: torch.dtype) -> Any:
    """A function of the C library, or the reason why there is none."""
    loaded = library()
    if isinstance(loaded, str):
        return loaded
    suffix = str(dtype).removeprefix("torch.")
    return getattr(loaded, f"{name}_{suffix}", None) or f"this compiler, or the kernels, have no {suffix}"


def _squares(function: Any, arrays: _Arrays, first: int = 0) -> Tensor:
    """Sums of squares of a column. For matrices it also leaves the gathered rows and columns in ``arrays``."""
    if arrays.place:
        arrays.gathered = torch.empty(arrays.place[-1], dtype=arrays.dtype, device="cpu")
    return _call(function, arrays, first).unbind(1)[0]


def _call(function: Any, arrays: _Arrays, first: int = 0, **fields: Any) -> Tensor:
    """Call a C function on the columns from index ``first`` on; returns its sums, of shape (count, 3)."""
    sums = torch.zeros(arrays.count, 3, dtype=torch.float64, device="cpu")
    lines = arrays.size, arrays.rows, arrays.samples, arrays.stride, arrays.tensors, arrays.place
    size, rows, samples, stride, tensors, place = (a.buffer_info()[0] for a in lines)
    scratch = None if arrays.gathered is None else arrays.gathered.data_ptr()
    bucket = _Bucket(
        count=arrays.count, threads=torch.get_num_threads(), size=size, rows=rows, samples=samples, stride=stride,
        tensors=tensors + first * arrays.count * arrays.tensors.itemsize, sums=sums.data_ptr(),
        scratch=scratch, place=place, sample_rate=SAMPLE_RATE, **fields,
    )  # fmt: skip
    if function(ctypes.byref(bucket)):
        raise MemoryError("no memory for the sums of a step: not all of it was done")
    return sums
