"""The Triton programs of the Adafactor rule of matrices (``fact.py``): means, memories, sample and move in turn.

A matrix of r rows is cut into tiles of ``BAND`` rows and ``WIDTH`` columns. The sums of squares of each tile's rows and
columns are stored separately, and then added in the order of the tiles, in float64. The table, of int64, for n
matrices::

    first[4, n + 1]   number of tiles, of chunks of rows, of columns and of the sample before each matrix, and in total
    facts[6, n]       of each: rows, columns, size of the sample, its stride, and where in the scratch the sums of its
                      rows begin (all rows for each tile across) and of its columns (all columns for each tile down)
    where[k, n]       address of each: parameters, gradients, memories of rows and of columns, and samples
"""

from __future__ import annotations

import triton
import triton.language as tl

from emonavi.kernels.programs import address, find, get, keep, number, own, put, rounded

__all__ = ["gather", "move", "remember", "sample"]

# Indices in the table.
TILES, ROWS, COLUMNS, SAMPLES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
PARAM, GRAD, ROW, COLUMN, SAMPLE = (tl.constexpr(i) for i in range(5))


@triton.jit
def _fact(table, count, fact: tl.constexpr, tensor):
    return tl.load(table + 4 * (count + 1) + fact * count + tensor)


@triton.jit
def _where(table, count, column: tl.constexpr, tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    return address(table + 4 * (count + 1) + (6 + column) * count, tensor, DTYPE, ALIGNED)


@triton.jit
def _tile(table, count, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    """The tile of this program: matrix, its rows and columns, and how many tiles are above this one and left of it."""
    tensor, place = find(table, count)
    rows, width = _fact(table, count, 0, tensor), _fact(table, count, 1, tensor)
    if ALIGNED:  # the same number, but the compiler sees that 16 divides it
        width = width // 16 * 16
    across = tl.cdiv(width, WIDTH)
    return tensor, rows, width, place // across, place % across


@triton.jit(do_not_specialize=["count"])
def gather(
    table, count, scratch, acts, grad_scale,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BAND: tl.constexpr, WIDTH: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Sums of squares of a tile's rows and columns."""
    if number(acts) != 0:
        tensor, rows, width, above, beside = _tile(table, count, ALIGNED, WIDTH)
        columns = beside * WIDTH + tl.arange(0, WIDTH)
        end = tl.minimum((above + 1) * BAND, rows)
        grad = _where(table, count, GRAD, tensor, DTYPE, ALIGNED)
        scale = number(grad_scale)
        of_rows = scratch + _fact(table, count, 4, tensor) + beside * rows
        of_columns = scratch + _fact(table, count, 5, tensor) + above * width
        sums = tl.zeros((SOME, WIDTH), tl.float32)
        for at in range(above * BAND, end, SOME):
            some = at + tl.arange(0, SOME)
            mask = (some < end)[:, None] & (columns < width)[None, :]
            g = get(grad + some[:, None] * width + columns[None, :], mask, 0.0) * scale
            sums += g * g
            tl.store(of_rows + some, tl.sum(g * g, 1), mask=some < end)
        tl.store(of_columns + columns, tl.sum(sums, 0), mask=columns < width)


@triton.jit(do_not_specialize=["count"])
def remember(
    table, count, scratch, acts, rest1, floor, trust,
    LINES: tl.constexpr, ACROSS: tl.constexpr, BAND: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Update the memory of some rows (with ``ACROSS``, columns) by today's means of squares."""
    if number(acts) != 0:
        kind: tl.constexpr = COLUMNS if ACROSS else ROWS
        tensor, place = find(table + kind * (count + 1), count)
        rows, width = _fact(table, count, 0, tensor), _fact(table, count, 1, tensor)
        length, other = (width, rows) if ACROSS else (rows, width)
        parts = tl.cdiv(rows, BAND) if ACROSS else tl.cdiv(width, WIDTH)
        sums = scratch + _fact(table, count, 5 if ACROSS else 4, tensor)
        lines = place * LINES + tl.arange(0, LINES)
        mask = lines < length
        total = tl.zeros((LINES,), tl.float64)
        for part in range(0, parts):
            total += tl.load(sums + part * length + lines, mask=mask, other=0.0).to(tl.float64)
        today = tl.sqrt_rn((total / other).to(tl.float32) + number(floor)) * number(trust)
        memory = _where(table, count, COLUMN if ACROSS else ROW, tensor, tl.float32, False) + lines
        old = get(memory, mask, 0.0)
        put(memory, tl.fma(number(rest1), today - old, old), mask)


@triton.jit
def _root(table, count, column: tl.constexpr, tensor, places, mask):
    """Square roots of the memory of some rows or columns."""
    return tl.sqrt_rn(get(_where(table, count, column, tensor, tl.float32, False) + places, mask, 0.0))


@triton.jit(do_not_specialize=["count", "chunks"])
def sample(
    table, count, chunks, partial, acts, grad_scale, bias, eps, rate, DTYPE: tl.constexpr, LINES: tl.constexpr
):  # fmt: skip
    """Sums of reflection of some of a matrix's sample, scaled up to the whole; then update their memory."""
    grad_step = tl.zeros((LINES,), tl.float32)
    grad_grad = tl.zeros((LINES,), tl.float32)
    step_step = tl.zeros((LINES,), tl.float32)
    if number(acts) != 0:
        tensor, place = find(table + SAMPLES * (count + 1), count)
        rows, width, size = (
            _fact(table, count, 0, tensor),
            _fact(table, count, 1, tensor),
            _fact(table, count, 2, tensor),
        )
        lines = place * LINES + tl.arange(0, LINES)
        mask = lines < size
        at = lines * _fact(table, count, 3, tensor)
        g = get(_where(table, count, GRAD, tensor, DTYPE, False) + at, mask, 0.0) * number(grad_scale)
        memory = _where(table, count, SAMPLE, tensor, tl.float32, False) + lines
        m = get(memory, mask, 0.0)
        row = tl.div_rn(_root(table, count, ROW, tensor, at // width, mask), own(bias, tensor))
        denom = row * _root(table, count, COLUMN, tensor, at % width, mask) + number(eps)
        denom = tl.where(mask, denom, 1.0)
        scaled = tl.div_rn(g, denom)
        up = (rows * width).to(tl.float32) / size.to(tl.float32)
        grad_step, grad_grad, step_step = m * scaled * up, g * scaled * up, m * tl.div_rn(m, denom) * up
        put(memory, tl.fma(number(rate), g - m, m), mask)
    keep(partial, chunks, 0, grad_step)
    keep(partial, chunks, 1, grad_grad)
    keep(partial, chunks, 2, step_step)


@triton.jit(do_not_specialize=["count"])
def move(
    table, count, seeds, acts, grad_scale, step_size, decay, bias, eps,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BAND: tl.constexpr, WIDTH: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Move the parameters of a tile."""
    if number(acts) != 0:
        tensor, rows, width, above, beside = _tile(table, count, ALIGNED, WIDTH)
        columns = beside * WIDTH + tl.arange(0, WIDTH)
        end = tl.minimum((above + 1) * BAND, rows)
        param = _where(table, count, PARAM, tensor, DTYPE, ALIGNED)
        grad = _where(table, count, GRAD, tensor, DTYPE, ALIGNED)
        root = _root(table, count, COLUMN, tensor, columns, columns < width)
        scale, length, shrink = number(grad_scale), own(step_size, tensor), own(decay, tensor)
        for at in range(above * BAND, end, SOME):
            some = at + tl.arange(0, SOME)
            row = tl.div_rn(_root(table, count, ROW, tensor, some, some < end), own(bias, tensor))
            mask = (some < end)[:, None] & (columns < width)[None, :]
            places = some[:, None] * width + columns[None, :]
            denom = row[:, None] * root[None, :] + number(eps)
            step = tl.div_rn(get(grad + places, mask, 0.0) * scale, tl.where(mask, denom, 1.0))
            p = get(param + places, mask, 0.0) * shrink - length * step
            put(param + places, rounded(p, places, seeds, tensor, DTYPE), mask)
