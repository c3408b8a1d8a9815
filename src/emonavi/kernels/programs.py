"""The Triton programs: the rules, chunk by chunk, on a GPU. ``cuda.py`` launches them.

One launch sweeps all tensors of a bucket. A table of int64 has their sizes and addresses, for n tensors in k columns::

    first[n + 1]    number of chunks before each tensor, and in total
    size[n]         elements of each
    where[k, n]     address of each: parameters, gradients, then each state in turn

A program takes one chunk. Its operations are those of the functional form, in the same order, in float32, with exactly
rounded quotients and roots; the compiler may fuse a product and a sum into one rounding. Each chunk stores its sums,
and a second launch adds them in a fixed order, in float64, so that two runs are equal bit by bit.

A scalar is a number, or is read from the device without waiting. Numbers that differ between tensors are vectors. If
``acts`` is 0, only sums of 0 are written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from emonavi import lowbit

__all__ = [
    "add_up",
    "address",
    "emolynx",
    "emonavi",
    "find",
    "get",
    "keep",
    "number",
    "own",
    "put",
    "rounded",
    "squares",
]

ODD = tl.constexpr(lowbit.GOLDEN)
OF_PARAM = tl.constexpr(pow(lowbit.GOLDEN, 2, 1 << 32))  # for what a rule writes first, as in lowbit.pack


@triton.jit
def number(value):
    """A scalar of a launch as float32; None is 1."""
    if value is None:
        value = 1.0
    value = tl.to_tensor(value)
    if value.dtype.is_ptr():
        value = tl.load(value)
    return value.to(tl.float32)


@triton.jit
def own(vector, tensor):
    """A tensor's entry of a vector, as float32; None is 1 for all."""
    return 1.0 if vector is None else tl.load(vector + tensor).to(tl.float32)


@triton.jit
def find(first, count):
    """The tensor of this program's chunk, and how many of its chunks come before."""
    chunk = tl.program_id(0)
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        begun = tl.load(first + middle) <= chunk
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low, chunk - tl.load(first + low)


@triton.jit
def _chunk(table, count, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The chunk of this program: its tensor, its start, the end of its last whole block, and its end."""
    tensor, place = find(table, count)
    start = place * CHUNK
    end = tl.minimum(start + CHUNK, tl.load(table + count + 1 + tensor))
    return tensor, start, start + (end - start) // BLOCK * BLOCK, end


@triton.jit
def address(where, tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to a tensor."""
    pointer = tl.cast(tl.load(where + tensor), tl.pointer_type(DTYPE))
    if ALIGNED:  # without this, and whole blocks, elements are loaded one by one
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def get(pointer, mask, other: tl.constexpr):
    """Load elements as float32; ``other`` where the mask is False."""
    values = tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=other)
    return values.to(tl.float32)


@triton.jit
def put(pointer, values, mask):
    """Store elements, rounded to the nearest in the dtype of the pointer."""
    tl.store(pointer, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def rounded(values, places, seeds, tensor, DTYPE: tl.constexpr):
    """Parameters rounded at random to their dtype, as in ``lowbit.pack``; unchanged without seeds."""
    if seeds is not None:
        dropped: tl.constexpr = 13 if tl.float16 == DTYPE else 16
        random = places.to(tl.uint32) * ODD + tl.load(seeds + tensor).to(tl.uint32)
        random = (random ^ (random >> 15)) * OF_PARAM
        bits = values.to(tl.uint32, bitcast=True) + (random >> (32 - dropped))
        values = (bits >> dropped << dropped).to(tl.float32, bitcast=True)
    return values


@triton.jit
def _sign(x):
    """1, -1 or 0; NaN stays NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def keep(partial, chunks, kind: tl.constexpr, lanes):
    """Store one of this chunk's sums."""
    tl.store(partial + kind * chunks + tl.program_id(0), tl.sum(lanes))


@triton.jit(do_not_specialize=["count", "chunks"])
def add_up(table, partial, sums, count, chunks, BLOCK: tl.constexpr):
    """Add the sums of each tensor's chunks: program (i, k) adds the k-th of tensor i. ``sums``: float64, (k, n)."""
    tensor, kind = tl.program_id(0), tl.program_id(1)
    last = tl.load(table + tensor + 1)
    lanes = tl.zeros((BLOCK,), tl.float64)
    for at in range(tl.load(table + tensor), last, BLOCK):
        places = at + tl.arange(0, BLOCK)
        lanes += tl.load(partial + kind * chunks + places, mask=places < last, other=0.0).to(tl.float64)
    tl.store(sums + kind * count + tensor, tl.sum(lanes))


# The guard: sums of squares ------------------------------------------------------------------------------------------


@triton.jit
def _square_some(grad, mask, lanes):
    g = get(grad, mask, 0.0)
    return lanes + g * g


@triton.jit(do_not_specialize=["count", "chunks"])
def squares(
    table, count, chunks, partial, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums of squares of one column."""
    tensor, start, whole, end = _chunk(table, count, CHUNK, BLOCK)
    grad = address(table + 2 * count + 1, tensor, DTYPE, ALIGNED)
    lanes = tl.zeros((BLOCK,), tl.float32)
    for at in range(start, whole, BLOCK):
        lanes = _square_some(grad + at + tl.arange(0, BLOCK), None, lanes)
    if whole < end:
        places = whole + tl.arange(0, BLOCK)
        lanes = _square_some(grad + places, places < end, lanes)
    keep(partial, chunks, 0, lanes)


# The Adam rule (navi.py) ---------------------------------------------------------------------------------------------


@triton.jit
def _navi_some(tensors, places, mask, scalars, sums, seeds, tensor, DTYPE: tl.constexpr, REFLECT: tl.constexpr):
    param, grad, exp_avg, exp_avg_sq = tensors
    scale, rest1, beta2, rest2, eps, grad_trust, square_trust, step_size, decay, root, last_root = scalars
    g = get(grad + places, mask, 0.0) * scale
    m = get(exp_avg + places, mask, 0.0)
    v = get(exp_avg_sq + places, mask, 1.0)  # masked elements add nothing, even with an eps of 0
    if REFLECT:
        grad_step, grad_grad, step_step = sums
        denom = tl.div_rn(tl.sqrt_rn(v), last_root) + eps
        step = tl.div_rn(m, denom)
        sums = (grad_step + g * step, grad_grad + g * tl.div_rn(g, denom), step_step + m * step)
    m = tl.fma(rest1, g * grad_trust - m, m)
    v = v * beta2 + rest2 * (g * square_trust) * g
    denom = tl.div_rn(tl.sqrt_rn(v), root) + eps
    p = get(param + places, mask, 0.0) * decay - step_size * tl.div_rn(m, denom)
    put(exp_avg + places, m, mask)
    put(exp_avg_sq + places, v, mask)
    put(param + places, rounded(p, places, seeds, tensor, DTYPE), mask)
    return sums


@triton.jit(do_not_specialize=["count", "chunks"])
def emonavi(
    table, count, chunks, partial, seeds, acts, grad_scale, step_size, decay, root, last_root,
    rest1, beta2, rest2, eps, grad_trust, square_trust,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, REFLECT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The Adam rule, for the columns param, grad, exp_avg and exp_avg_sq."""
    lanes = tl.zeros((BLOCK,), tl.float32)
    sums = (lanes, lanes, lanes)
    if number(acts) != 0:
        tensor, start, whole, end = _chunk(table, count, CHUNK, BLOCK)
        where = table + 2 * count + 1
        tensors = (
            address(where, tensor, DTYPE, ALIGNED), address(where + count, tensor, DTYPE, ALIGNED),
            address(where + 2 * count, tensor, tl.float32, ALIGNED),
            address(where + 3 * count, tensor, tl.float32, ALIGNED),
        )  # fmt: skip
        scalars = (
            number(grad_scale), number(rest1), number(beta2), number(rest2), number(eps), number(grad_trust),
            number(square_trust), own(step_size, tensor), own(decay, tensor), own(root, tensor),
            own(last_root, tensor),
        )  # fmt: skip
        for at in range(start, whole, BLOCK):
            places = at + tl.arange(0, BLOCK)
            sums = _navi_some(tensors, places, None, scalars, sums, seeds, tensor, DTYPE, REFLECT)
        if whole < end:
            places = whole + tl.arange(0, BLOCK)
            sums = _navi_some(tensors, places, places < end, scalars, sums, seeds, tensor, DTYPE, REFLECT)
    if REFLECT:
        grad_step, grad_grad, step_step = sums
        keep(partial, chunks, 0, grad_step)
        keep(partial, chunks, 1, grad_grad)
        keep(partial, chunks, 2, step_step)


# The Lion rule (lynx.py) ---------------------------------------------------------------------------------------------


@triton.jit
def _lynx_some(tensors, places, mask, scalars, sums, seeds, tensor, DTYPE: tl.constexpr, REFLECT: tl.constexpr):
    param, grad, exp_avg = tensors
    scale, beta1, rest2, trust, step_size, decay = scalars
    g = get(grad + places, mask, 0.0) * scale
    m = get(exp_avg + places, mask, 0.0)
    if REFLECT:
        grad_step, size = sums
        sums = (grad_step + g * _sign(m), size + tl.abs(g))
    memory = m * trust
    # As torch.lerp computes it, since a sign may depend on it.
    near = tl.fma(beta1, memory - g, g)
    blended = tl.where(beta1 < 0.5, near, tl.fma(beta1 - 1, memory - g, memory))
    p = get(param + places, mask, 0.0) * decay - step_size * _sign(blended)
    put(exp_avg + places, tl.fma(rest2, g - m, m), mask)
    put(param + places, rounded(p, places, seeds, tensor, DTYPE), mask)
    return sums


@triton.jit(do_not_specialize=["count", "chunks"])
def emolynx(
    table, count, chunks, partial, seeds, acts, grad_scale, step_size, decay, beta1, rest2, trust,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, REFLECT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The Lion rule, for the columns param, grad and exp_avg."""
    lanes = tl.zeros((BLOCK,), tl.float32)
    sums = (lanes, lanes)
    if number(acts) != 0:
        tensor, start, whole, end = _chunk(table, count, CHUNK, BLOCK)
        where = table + 2 * count + 1
        tensors = (
            address(where, tensor, DTYPE, ALIGNED), address(where + count, tensor, DTYPE, ALIGNED),
            address(where + 2 * count, tensor, tl.float32, ALIGNED),
        )  # fmt: skip
        scalars = (
            number(grad_scale), number(beta1), number(rest2), number(trust),
            own(step_size, tensor), own(decay, tensor),
        )  # fmt: skip
        for at in range(start, whole, BLOCK):
            places = at + tl.arange(0, BLOCK)
            sums = _lynx_some(tensors, places, None, scalars, sums, seeds, tensor, DTYPE, REFLECT)
        if whole < end:
            places = whole + tl.arange(0, BLOCK)
            sums = _lynx_some(tensors, places, places < end, scalars, sums, seeds, tensor, DTYPE, REFLECT)
    if REFLECT:
        grad_step, size = sums
        keep(partial, chunks, 0, grad_step)
        keep(partial, chunks, 1, size)
