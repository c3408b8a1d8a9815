"""Samples by the C code: what ``displacement.py`` does, without several torch calls for each tensor."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from emonavi.displacement import RATE, ROWS, places
from emonavi.kernels.cpu import DTYPES, address, function_of
from emonavi.kernels.tensors import in_one_order, plain

__all__ = ["compared", "samples"]


class _Sampling(ctypes.Structure):
    """The ``sampling`` of sweep.c."""

    _fields_ = (("count", ctypes.c_int64), *((name, ctypes.c_void_p) for name in ("blocks", "length", "apart")))


class _Places:
    """Positions of the samples of tensors of given sizes."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        found = list(map(places, sizes))
        self._columns = [array("q", column) for column in zip(*found, strict=True)]
        self.c = ctypes.byref(_Sampling(len(sizes), *map(address, self._columns)))
        self.sizes = [blocks * length for blocks, length, _ in found]


_places = lru_cache(maxsize=16)(_Places)  # the sizes stay from step to step


def samples(tensors: Sequence[Tensor]) -> Tensor | None:
    """The samples of all tensors, concatenated; None if there is no kernel for them."""
    dtype = tensors[0].dtype
    function = function_of("gather_samples", dtype)
    if isinstance(function, str) or not plain(tensors, dtype) or not in_one_order(tensors, tensors):
        return None
    found = _places(tuple(map(Tensor.numel, tensors)))
    gathered = torch.empty(sum(found.sizes), dtype=DTYPES[dtype], device="cpu")
    where = _pointers(tensors)
    function(found.c, address(where), ctypes.c_void_p(gathered.data_ptr()))
    return gathered


def compared(
    kept: Sequence[Tensor], params: Sequence[Tensor], before: Tensor, grads: Tensor, per_rate: Tensor
) -> Tensor | None:
    """The sums over each tensor's sample, shape (3, tensors), in float64; None if there is no kernel for it.

    As in :func:`emonavi.displacement.compared`; ``per_rate`` is one over each effective lr.
    """
    function, wide = function_of("compare_samples", params[0].dtype), DTYPES.get(params[0].dtype)
    same = (before.dtype, grads.dtype, per_rate.dtype) == (wide, wide, wide)
    if isinstance(function, str) or not same or not plain(params, params[0].dtype) or not plain(kept, wide):
        return None
    if not in_one_order([*params, *kept], params):
        return None
    found = _places(tuple(map(Tensor.numel, params)))
    total = sum(found.sizes)
    fits = [tuple(m.shape) for m in kept] == [(ROWS, n) for n in found.sizes] and len(per_rate) == len(params)
    if not fits or len(before) != total or len(grads) != total:
        return None  # state of another model, say: the kernel would read and write past its end
    sums = torch.empty(ROWS, len(params), dtype=torch.float64, device="cpu")
    moved, memories = _pointers(params), _pointers(kept)
    before_at, grads_at, per_rate_at, sums_at = (ctypes.c_void_p(t.data_ptr()) for t in (before, grads, per_rate, sums))
    function(
        found.c, address(moved), address(memories), before_at, grads_at, per_rate_at, ctypes.c_double(RATE), sums_at
    )
    return sums


def _pointers(tensors: Sequence[Tensor]) -> array[int]:
    return array("Q", list(map(Tensor.data_ptr, tensors)))
