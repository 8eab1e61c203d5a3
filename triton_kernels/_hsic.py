"""Kernels of HSIC: sums over tiles of Gram matrices and their gradients, and HSIC from the sums; `hsic` launches them.

Forward, a program owns a block of rows I and a block of columns J: every unordered pair of blocks is computed once, for
J = I, I + 1, ... modulo the number of blocks, and gives row sums of I and of J. Backward, a program owns a block of
rows and a range of columns, and computes the tiles on both sides of the diagonal. There are no atomics: partial sums
are added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._gram import LAPLACIAN, POLYNOMIAL, PRECOMPUTED, RBF, counted, gram_tile, item_of
from ._tiles import fold, fold_rows

GRID = tl.constexpr(1.5 * 2.0**7)  # adding it rounds to a multiple of 2^-16
MOST_PAIRS = tl.constexpr(8)  # pairs of `terms_kernel`


@triton.jit(do_not_specialize=["count", "parts"])
def accumulate_kernel(partial, out, count, parts, ADD: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Write the sums of partial (parts, count) over parts to out (count,), or add them."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((PARTS, BLOCK), out.dtype.element_ty)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (i < count)[None, :]
        total += tl.load(partial + part.to(tl.int64)[:, None] * count + i[None, :], mask=inside, other=0.0)
    result = fold_rows(total)
    if ADD:
        result += tl.load(out + i, mask=i < count, other=0.0)
    tl.store(out + i, result, mask=i < count)


@triton.jit
def exact_sum(v, axis: tl.constexpr, BOUNDED: tl.constexpr):
    """Sum in float64. Entries of at most 1 are split: up to 128 multiples of 2^-16 add without rounding in float32."""
    if v.dtype == tl.float64:
        return tl.sum(v, axis)
    elif BOUNDED:
        high = (v + GRID) - GRID
        return tl.sum(high, axis).to(tl.float64) + tl.sum(v - high, axis).to(tl.float64)
    else:
        return tl.sum(v.to(tl.float64), axis)


@triton.jit
def add_tile(sums, columns, k, j, n, diagonal, BOUNDED: tl.constexpr):
    """Add the row sums of a tile to `sums` and store its column sums, if `columns` is not None."""
    if columns is not None:
        sums += exact_sum(k, 1, BOUNDED)
        # the diagonal block has both sides already
        tl.store(columns + j, tl.where(diagonal, 0.0, exact_sum(k, 0, BOUNDED)), mask=j < n)
    return sums


@triton.jit(do_not_specialize=["n", "blocks", "part", "parts", "own", "first", "offsets", "size"])
def sums_kernel(
    x, y, x_partial, y_partial, cross, n, blocks, part, parts, own, first, offsets, size,
    X: tl.constexpr, Y: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One pair of blocks of a pair of variables: cross (batch, own, offsets), and if requested partial row sums
    (2 offsets, batch n = size): of the rows, then of the columns.

    A launch covers `offsets` offsets from `first` on, of the row blocks part, part + parts, part + 2 parts, ...
    """
    program = tl.program_id(0)
    offset = program % offsets
    item = (program // offsets // own).to(tl.int64)
    row_block = (program // offsets % own) * parts + part
    distance = first + offset
    column_block = (row_block + distance) % blocks
    # half a turn: the pair of blocks is met from both sides
    met = (2 * distance == blocks) & (row_block > column_block)
    i = row_block * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = x.z.dtype.element_ty
    x, y = item_of(x, item, n, dtype), item_of(y, item, n, dtype)
    X_BOUNDED: tl.constexpr = X.kernel != POLYNOMIAL and X.kernel != PRECOMPUTED
    Y_BOUNDED: tl.constexpr = Y.kernel != POLYNOMIAL and Y.kernel != PRECOMPUTED
    sum_x, sum_y = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    products = tl.zeros((BLOCK,), tl.float64)
    at_rows = offset.to(tl.int64) * size + item * n
    at_columns = at_rows + offsets.to(tl.int64) * size
    x_columns, y_columns = x_partial, y_partial
    if x_partial is not None:
        x_columns += at_columns
    if y_partial is not None:
        y_columns += at_columns
    for step in range(0, BLOCK, STEP):
        j = column_block * BLOCK + step + tl.arange(0, STEP)
        inside = counted(i, j, n) & (met == 0)
        k, _ = gram_tile(x, i, j, n, X, PRECISION)
        k = tl.where(inside, k, 0.0)
        sum_x = add_tile(sum_x, x_columns, k, j, n, distance == 0, X_BOUNDED)
        if SAME:
            m = k
        else:
            m, _ = gram_tile(y, i, j, n, Y, PRECISION)
            m = tl.where(inside, m, 0.0)
        sum_y = add_tile(sum_y, y_columns, m, j, n, distance == 0, Y_BOUNDED)
        products += exact_sum(k * m, 1, X_BOUNDED and Y_BOUNDED)
    if x_partial is not None:
        tl.store(x_partial + at_rows + i, sum_x, mask=i < n)
    if y_partial is not None:
        tl.store(y_partial + at_rows + i, sum_y, mask=i < n)
    total = tl.sum(products, 0)
    tl.store(cross + program, tl.where(distance == 0, total, 2.0 * total))


@triton.jit
def weight_tile(inside, i, j, n, rows, factor, other, slope):
    """dL/dK of an unordered pair of rows times the slope of the kernel; zero outside."""
    w = other * (factor * 2.0)
    if rows is not None:
        at_i = tl.load(rows + i, mask=i < n, other=0.0)[:, None]
        w += (at_i + tl.load(rows + j, mask=j < n, other=0.0)[None, :]).to(w.dtype)
    return tl.where(inside, w * slope, 0.0)


@triton.jit
def own_features(x, i, f, n, SPLIT: tl.constexpr):
    """Features f of rows i."""
    inside = (i < n)[:, None] & (f < x.dim)[None, :]
    at = i.to(tl.int64)[:, None] * x.dim + f[None, :]
    value = tl.load(x.z + at, mask=inside, other=0.0)
    if SPLIT:
        value += tl.load(x.low + at, mask=inside, other=0.0)
    return value


@triton.jit
def features_times(weights, x, j, f, n, total, SPLIT: tl.constexpr, WEIGHTS: tl.constexpr):
    return tl.dot(weights, own_features(x, j, f, n, SPLIT), total, input_precision=WEIGHTS)


@triton.jit
def store_gradient(partial, x, total, weights, i, f, n, first, KERNEL: tl.constexpr, SPLIT: tl.constexpr):
    """Store the gradient of rows i from row `first` of partial on."""
    if KERNEL == RBF:
        # sum over j of w_ij (z_j - z_i)
        total -= weights[:, None] * own_features(x, i, f, n, SPLIT)
    at = (first + i)[:, None] * x.dim + f[None, :]
    tl.store(partial + at, total, mask=(i < n)[:, None] & (f < x.dim)[None, :])


@triton.jit
def part_of(blocks, chunks, splits, BLOCK: tl.constexpr, FEATURES: tl.constexpr):
    """A backward program's range of columns, the number of items and its item, rows and features."""
    program = tl.program_id(0)
    chunk = program % chunks
    split = program // chunks % splits
    item = (program // chunks // splits // blocks).to(tl.int64)
    i = program // chunks // splits % blocks * BLOCK + tl.arange(0, BLOCK)
    f = chunk * FEATURES + tl.arange(0, FEATURES)
    batch = (tl.num_programs(0) // chunks // splits // blocks).to(tl.int64)
    return split, batch, item, i, f


@triton.jit(do_not_specialize=["n", "blocks", "chunks", "splits", "steps"])
def backward_kernel(
    x, y, rows, factor, partial, n, blocks, chunks, splits, steps,
    X: tl.constexpr, Y: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr, WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Gradient of x from one pair of variables: a block of rows x FEATURES features, from `steps` steps of columns.

    partial is (splits, batch, n, x.dim).
    """
    split, batch, item, i, f = part_of(blocks, chunks, splits, BLOCK, FEATURES)
    dtype: tl.constexpr = x.z.dtype.element_ty
    x, y = item_of(x, item, n, dtype), item_of(y, item, n, dtype)
    if rows is not None:
        rows += item * n
    by = tl.load(factor + item).to(dtype)
    total = tl.zeros((BLOCK, FEATURES), dtype)
    weights = tl.zeros((BLOCK,), dtype)
    for step in range(split * steps, tl.minimum((split + 1) * steps, (n + STEP - 1) // STEP)):
        j = step * STEP + tl.arange(0, STEP)
        inside = counted(i, j, n)
        if SAME:
            k, slope = gram_tile(x, i, j, n, X, PRECISION)
            w = weight_tile(inside, i, j, n, rows, by, k, slope)
        else:
            # y first: fewer registers than with the slope of x beside it
            other, _ = gram_tile(y, i, j, n, Y, PRECISION)
            _, slope = gram_tile(x, i, j, n, X, PRECISION)
            w = weight_tile(inside, i, j, n, rows, by, other, slope)
        if X.kernel == LAPLACIAN:
            zj = own_features(x, j, f, n, X.split)
            more = own_features(x, i, f, n, X.split)[:, None, :] - zj[None, :, :]
            sign = tl.where(more > 0.0, 1.0, tl.where(more < 0.0, -1.0, 0.0)).to(dtype)
            total -= tl.sum(w[:, :, None] * sign, 1)
        elif dtype == tl.float32:
            total = features_times(w, x, j, f, n, total, X.split, WEIGHTS)
        else:
            total += tl.sum(w[:, :, None] * own_features(x, j, f, n, X.split)[None, :, :], 1)
        weights += tl.sum(w, 1)
    store_gradient(partial, x, total, weights, i, f, n, (split * batch + item) * n, X.kernel, X.split)


@triton.jit(do_not_specialize=["n", "blocks", "chunks", "splits", "steps"])
def pair_backward_kernel(
    x, y, rows, factor, x_partial, y_partial, n, blocks, chunks, splits, steps,
    X: tl.constexpr, Y: tl.constexpr, PRECISION: tl.constexpr, WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """`backward_kernel` for both variables of the only pair of a call, whose entries are computed once.

    rows are the gradients (x, y) of their row sums, (batch, 2, n).
    """
    split, batch, item, i, f = part_of(blocks, chunks, splits, BLOCK, FEATURES)
    x, y = item_of(x, item, n, tl.float32), item_of(y, item, n, tl.float32)
    rows += item * 2 * n
    by = tl.load(factor + item).to(tl.float32)
    x_total, y_total = tl.zeros((BLOCK, FEATURES), tl.float32), tl.zeros((BLOCK, FEATURES), tl.float32)
    x_weights, y_weights = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, (n + STEP - 1) // STEP)):
        j = step * STEP + tl.arange(0, STEP)
        inside = counted(i, j, n)
        k, x_slope = gram_tile(x, i, j, n, X, PRECISION)
        m, y_slope = gram_tile(y, i, j, n, Y, PRECISION)
        w = weight_tile(inside, i, j, n, rows, by, m, x_slope)
        x_total = features_times(w, x, j, f, n, x_total, X.split, WEIGHTS)
        x_weights += tl.sum(w, 1)
        w = weight_tile(inside, i, j, n, rows + n, by, k, y_slope)
        y_total = features_times(w, y, j, f, n, y_total, Y.split, WEIGHTS)
        y_weights += tl.sum(w, 1)
    first = (split * batch + item) * n
    store_gradient(x_partial, x, x_total, x_weights, i, f, n, first, X.kernel, X.split)
    store_gradient(y_partial, y, y_total, y_weights, i, f, n, first, Y.kernel, Y.split)


@triton.jit(do_not_specialize=["n", "blocks"])
def matrix_kernel(
    y, rows, factor, grad, n, blocks,
    Y: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a precomputed matrix from one pair of variables: one tile."""
    program = tl.program_id(0)
    item = (program // (blocks * blocks)).to(tl.int64)
    i = program // blocks % blocks * BLOCK + tl.arange(0, BLOCK)
    j = program % blocks * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = y.z.dtype.element_ty
    value, _ = gram_tile(item_of(y, item, n, dtype), i, j, n, Y, PRECISION)
    total = value * tl.load(factor + item).to(dtype)
    if rows is not None:
        total += tl.load(rows + item * n + i, mask=i < n, other=0.0)[:, None].to(dtype)
    total = tl.where(counted(i, j, n), total, 0.0)
    inside = (i < n)[:, None] & (j < n)[None, :]
    at = grad + item * n * n + i.to(tl.int64)[:, None] * n + j[None, :]
    if ADD:
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(at, total, mask=inside)


@triton.jit(do_not_specialize=["n"])
def permuted_kernel(x, y, permutations, out, n, BLOCK: tl.constexpr):
    """Sum of x[i, j] y[p[i], p[j]] over i != j, for one permutation p."""
    row = tl.program_id(0).to(tl.int64)
    permutations += row * n
    total = tl.zeros((BLOCK,), tl.float64)
    for i0 in range(0, n, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        p = tl.load(permutations + i, mask=i < n, other=0).to(tl.int64)
        for j0 in range(0, n, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            q = tl.load(permutations + j, mask=j < n, other=0)
            inside = counted(i, j, n)
            a = tl.load(x + i.to(tl.int64)[:, None] * n + j[None, :], mask=inside, other=0.0).to(tl.float64)
            b = tl.load(y + p[:, None] * n + q[None, :], mask=inside, other=0.0).to(tl.float64)
            total += tl.sum(a * b, 1)
    tl.store(out + row, tl.sum(total, 0))


@triton.jit
def variable_at(code, k):
    return (code.to(tl.int64) >> (4 * k)) & 15


@triton.jit
def own_rows(diagonals, shift, item, m, variables, i, inside):
    """Diagonal entries minus the shift."""
    at = diagonals[0] + item * diagonals[1][0] + m * diagonals[1][1] + i.to(tl.int64) * diagonals[1][2]
    return tl.where(inside, tl.load(at, mask=inside, other=0.0) - tl.load(shift + item * variables + m), 0.0)


@triton.jit
def sums_of(rows, item, m, variables, n, i, inside):
    return tl.load(rows + (item * variables + m) * n + i, mask=inside, other=0.0)


@triton.jit
def product_divisor(n, UNBIASED: tl.constexpr):
    wide = n.to(tl.float64)
    return (wide - 1.0) * (wide - 2.0) if UNBIASED else wide * wide


@triton.jit
def rows_factor(n, UNBIASED: tl.constexpr):
    wide = n.to(tl.float64)
    return 2.0 / (wide - 2.0) if UNBIASED else 2.0 / wide


@triton.jit
def total_of(v):
    return tl.sum(fold(v[None, :]), 0)


@triton.jit(do_not_specialize=["variables", "pairs", "code", "n"])
def terms_kernel(
    rows, cross, shift, diagonals, more, less, totals, variables, pairs, code, n,
    UNBIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pair of one item. Programs of pairs with a variable in common write the same total of its rows."""
    pair = tl.program_id(0) % pairs
    item = (tl.program_id(0) // pairs).to(tl.int64)
    a, b = variable_at(code, 2 * pair), variable_at(code, 2 * pair + 1)
    first, second = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    both, own = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < n
        k = sums_of(rows, item, a, variables, n, i, inside)
        m = sums_of(rows, item, b, variables, n, i, inside)
        if not UNBIASED:
            d = own_rows(diagonals, shift, item, a, variables, i, inside)
            e = own_rows(diagonals, shift, item, b, variables, i, inside)
            k, m, own = k + d, m + e, own + d * e
        first, second, both = first + k, second + m, both + k * m
    k, m = total_of(first), total_of(second)
    tl.store(totals + item * variables + a, k)
    tl.store(totals + item * variables + b, m)
    at = tl.program_id(0)
    tl.store(more + at, tl.load(cross + at) + total_of(own) + k * m / product_divisor(n, UNBIASED))
    tl.store(less + at, rows_factor(n, UNBIASED) * total_of(both))


@triton.jit(do_not_specialize=["variables", "pairs", "code", "n", "blocks"])
def terms_backward_kernel(
    grad_more, grad_less, rows, shift, diagonals, totals, grad_rows, grad_cross, grad_diagonals, variables, pairs, code,
    n, blocks, UNBIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of rows of one variable; the first program of an item also writes that of the products."""
    program = tl.program_id(0)
    block, m = program % blocks, program // blocks % variables
    item = (program // blocks // variables).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    grad, more = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for pair in range(pairs):
        of_more, of_less = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
        if grad_more is not None:
            of_more += tl.load(grad_more + item * pairs + pair)
        if grad_less is not None:
            of_less += tl.load(grad_less + item * pairs + pair)
        for side in tl.static_range(2):
            # a variable that is not of the pair gets zeros
            mine = variable_at(code, 2 * pair + side) == m
            other = variable_at(code, 2 * pair + 1 - side)
            by_more, by_less = tl.where(mine, of_more, 0.0), tl.where(mine, of_less, 0.0)
            total = tl.load(totals + item * variables + other)
            k = sums_of(rows, item, other, variables, n, i, inside)
            if not UNBIASED:
                d = own_rows(diagonals, shift, item, other, variables, i, inside)
                k, more = k + d, more + by_more * d
            grad += by_more * total / product_divisor(n, UNBIASED) + by_less * rows_factor(n, UNBIASED) * k
    at = (item * variables + m) * n + i
    tl.store(grad_rows + at, grad, mask=inside)
    tl.store(grad_diagonals + at, more * 0.0 if UNBIASED else grad + more, mask=inside)
    p = tl.arange(0, MOST_PAIRS)
    first = (p < pairs) & (block == 0) & (m == 0)
    value = tl.zeros((MOST_PAIRS,), tl.float64)
    if grad_more is not None:
        value += tl.load(grad_more + item * pairs + p, mask=first, other=0.0)
    tl.store(grad_cross + item * pairs + p, value, mask=first)
