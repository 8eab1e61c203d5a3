"""Steps of a program of a flow on a tile of rows, which flow_program.py runs; gradients: _program_grad.py.

A step is a record of WORDS int64 in a table, whose fields are below. What a tile computes lies in scratch memory of the
GPU's program, a place of ROWS neighbours for every column of every step. Steps name places by lists in the table, so
that permutations, gathers and choices of units are lists too. A step reads places that earlier steps wrote and writes
others; a barrier after each of them orders them, and nothing stays in registers from one to the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._schemas import ACTIVATIONS, SCALE_MAPS
from ._math import constant, div, erf, exp, exp_less, floor, neg, sigmoid, sine_cosine, sqrt, tanh
from ._tiles import fold_rows
from .coupling import log_scale_slope
from .flow_head import GAUSSIAN, LOGISTIC, log_density

WORDS = tl.constexpr(32)  # of a step
ROWS = tl.constexpr(32)  # of a tile
TERMS = tl.constexpr(16)  # terms of its sums at once
COLS = tl.constexpr(8)  # columns of other steps at once
ACTIVE = tl.constexpr(32)  # of an activation
SPLINE_COLS = tl.constexpr(4)  # of a spline: an element for each of 128 threads

KINDS = (
    "dense", "couple", "activate", "spline", "wrap", "norm", "periodic", "prior", "uniform", "load", "store", "fill",
    "total", "dense_inputs", "dense_weights", "sum_rows", "couple_back", "activate_back", "spline_back", "norm_back",
    "periodic_back", "prior_back",
)  # fmt: skip
(
    DENSE, COUPLE, ACTIVATE, SPLINE, WRAP, NORM, PERIODIC, PRIOR, UNIFORM, LOAD, STORE, FILL,
    TOTAL, DENSE_INPUTS, DENSE_WEIGHTS, SUM_ROWS, COUPLE_BACK, ACTIVATE_BACK, SPLINE_BACK, NORM_BACK,
    PERIODIC_BACK, PRIOR_BACK,
) = map(tl.constexpr, range(len(KINDS)))  # fmt: skip

# n columns; lists of places that are read (a to g) and written, of rows and columns of a matrix (of a spline: bits of
# the ends of domains, and their kinds; of a wrap: bits of bounds and shifts; of a box: of low and high ends), by their
# first entry in the table; the place of the sum that joins logdet, or of the gradient of logdet; first entries among
# the weights; -1: absent. Then numbers, and bits of floats.
FIELDS = (
    "kind", "n", "a", "b", "c", "g", "out", "out_b", "out_c", "log", "rows", "cols", "weight", "bias", "mask", "more",
    "terms", "pitch", "form", "bins", "shift", "inverse", "inner", "clear", "tails", "f0", "f1", "f2", "f3", "f4",
)  # fmt: skip
ABSENT = FIELDS.index("terms")  # fields before it are -1 where absent
(
    KIND, N, A, B, C, G, OUT, OUT_B, OUT_C, LOG, ROW_LIST, COL_LIST, WEIGHT, BIAS, MASK, MORE,
    COUNT, PITCH, FORM, BINS, SHIFT, INVERSE, INNER, CLEAR, TAILS, F0, F1, F2, F3, F4,
) = map(tl.constexpr, range(len(FIELDS)))  # fmt: skip

X, CONTEXT, GRAD_Y, GRAD_LOGDET = map(tl.constexpr, range(4))  # forms of load steps; a store step knows the first two
IDENTITY, RELU, LEAKY_RELU, TANH, SILU, GELU, ELU, SIGMOID, CLAMP_EXP = map(tl.constexpr, range(len(ACTIVATIONS)))
# forms of a couple step: scale maps, those with eps, and the factor itself
MAPS = (*SCALE_MAPS, "sigmoid_eps", "softplus_eps")
FACTOR = tl.constexpr(len(MAPS))
SQRT_HALF = tl.constexpr(0.70710678118654752440)


class Machine(NamedTuple):
    """Pointers to the table, to the scratch of the tile, to all weights; and the tile's rows (1, ROWS)."""

    table: Any
    scratch: Any
    weights: Any
    r: Any  # in the tile
    row: Any  # in the batch
    rows: Any


@triton.constexpr_function
def units_of(values):
    """How many outputs of a matrix product are computed at once."""
    # Triton 3.7 does not compile 64 rows of float64 for sm_100
    return 32 if values.dtype.element_ty == tl.float64 else 64


@triton.constexpr_function
def name_of(form):
    return MAPS[form]


@triton.jit
def word(s, FIELD: tl.constexpr):
    return tl.load(s + FIELD).to(tl.int32)


@triton.jit
def as_number(v, dtype: tl.constexpr):
    """The float of which v are the bits."""
    if dtype == tl.float64:
        return v.to(tl.float64, bitcast=True)
    else:
        return v.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def number(m, s, FIELD: tl.constexpr):
    return as_number(tl.load(s + FIELD), m.scratch.dtype.element_ty)


@triton.jit
def listed(m, at, i, n):
    """Entries i < n of a list."""
    return tl.load(m.table + at + i, mask=(i < n) & (at >= 0), other=0).to(tl.int32)


@triton.jit
def read(m, at, i, n):
    """The places at entries i (I, 1) of a list, (I, ROWS); 0 if there are none."""
    return tl.load(m.scratch + listed(m, at, i, n) * ROWS + m.r, mask=(i < n) & (at >= 0), other=0.0)


@triton.jit
def write(m, at, i, n, v):
    tl.store(m.scratch + listed(m, at, i, n) * ROWS + m.r, v, mask=(i < n) & (at >= 0))


@triton.jit
def entry_of(m, s, i, n):
    """Which of a vector of weights are those of columns i."""
    rows = word(s, ROW_LIST)
    return tl.where(rows >= 0, listed(m, rows, i, n), i)


@triton.jit
def weight_at(m, s, i, n, FIELD: tl.constexpr):
    at = word(s, FIELD)
    return tl.load(m.weights + at + entry_of(m, s, i, n), mask=(i < n) & (at >= 0), other=0.0)


@triton.jit
def columns_from(first, COUNT: tl.constexpr):
    return first + tl.arange(0, COUNT)[:, None]


@triton.jit
def write_sum(m, s, sums):
    """Write the sum over columns (C, ROWS) where the log-determinant asks for it."""
    at = word(s, LOG)
    if at >= 0:
        tl.store(m.scratch + at * ROWS + tl.arange(0, ROWS), fold_rows(sums))


@triton.jit
def nothing(m, COUNT: tl.constexpr):
    return tl.full((COUNT, ROWS), 0.0, m.scratch.dtype.element_ty)


@triton.jit
def product(a, b, acc):
    if acc.dtype == tl.float64:
        return tl.dot(a, b, acc, out_dtype=tl.float64)
    else:
        return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def matrix(m, s, row, col, inside):
    """Elements of a weight, times its mask."""
    at = row * word(s, PITCH) + col
    w = tl.load(m.weights + word(s, WEIGHT) + at, mask=inside, other=0.0)
    mask = word(s, MASK)
    if mask >= 0:
        w *= tl.load(m.weights + mask + at, mask=inside, other=0.0)
    return w


@triton.jit
def activated(z, form, arg):
    h = z
    if form == RELU:
        h = tl.where(z < 0.0, 0.0, z)
    elif form == LEAKY_RELU:
        h = tl.where(z < 0.0, z * arg, z)
    elif form == TANH:
        h = tanh(z)
    elif form == SILU:
        h = z * sigmoid(z)
    elif form == GELU:
        h = 0.5 * z * (1.0 + erf(z * constant(SQRT_HALF, z)))
    elif form == ELU:
        h = tl.where(z > 0.0, z, arg * exp_less(tl.where(z > 0.0, 0.0, z), 1.0))
    elif form == SIGMOID:
        h = sigmoid(z)
    elif form == CLAMP_EXP:
        h = exp(tl.where(z > 0.0, 0.0, z))
    return h


@triton.jit
def dense_step(m, s):
    """out = (mask * weight) a + bias + b."""
    UNITS: tl.constexpr = units_of(m.scratch)
    n, count, rows, cols, inputs = word(s, N), word(s, COUNT), word(s, ROW_LIST), word(s, COL_LIST), word(s, A)
    for first in range(0, n, UNITS):
        i = columns_from(first, UNITS)
        unit = listed(m, rows, i, n)
        acc = nothing(m, UNITS)
        for k in range(0, count, TERMS):
            j = k + tl.arange(0, TERMS)
            col = listed(m, cols, j, count)[None, :]
            w = matrix(m, s, unit, col, (i < n) & (j < count)[None, :])
            acc = product(w, read(m, inputs, j[:, None], count), acc)
        bias = word(s, BIAS)
        acc += tl.load(m.weights + bias + unit, mask=(i < n) & (bias >= 0), other=0.0)
        write(m, word(s, OUT), i, n, acc + read(m, word(s, B), i, n))


@triton.jit
def activate_step(m, s):
    n = word(s, N)
    for first in range(0, n, ACTIVE):
        i = columns_from(first, ACTIVE)
        write(m, word(s, OUT), i, n, activated(read(m, word(s, A), i, n), word(s, FORM), number(m, s, F0)))


@triton.jit
def scale_of(s, raw, arg):
    """The factor of a couple step, its logarithm (not of a given factor), and the derivative of that by raw."""
    form = word(s, FORM)
    g, slope = raw, tl.full(raw.shape, 1.0, raw.dtype)
    for k in tl.static_range(1, FACTOR):
        if form == k:
            g, slope = log_scale_slope(raw, arg, name_of(k))
    sign = tl.where(word(s, INVERSE) != 0, -1.0, 1.0).to(raw.dtype)
    g, slope = g * sign, slope * sign
    return tl.where(form == FACTOR, raw, exp(g)), g, slope


@triton.jit
def couple_operands(m, s, i, n):
    """x, what is added to it, and the number behind its factor; the last two of a step before, a weight or absent."""
    shift = read(m, word(s, B), i, n) + weight_at(m, s, i, n, BIAS)
    raw = read(m, word(s, C), i, n) + weight_at(m, s, i, n, WEIGHT)
    return read(m, word(s, A), i, n), tl.where(word(s, INVERSE) != 0, neg(shift), shift), raw


@triton.jit
def couple_step(m, s):
    """out = a e^g + shift, or (a + shift) e^g if `inner`; inverse: -g and -shift."""
    n, arg = word(s, N), number(m, s, F0)
    total = nothing(m, COLS)
    for first in range(0, n, COLS):
        i = columns_from(first, COLS)
        x, shift, raw = couple_operands(m, s, i, n)
        e, g, _ = scale_of(s, raw, arg)
        write(m, word(s, OUT), i, n, tl.where(word(s, INNER) != 0, (x + shift) * e, tl.fma(x, e, shift)))
        total += tl.where(i < n, g, 0.0)
    write_sum(m, s, total)


@triton.jit
def numbers_listed(m, at, i, inside):
    """Floats of a list of their bits, 1 where not inside."""
    v = as_number(tl.load(m.table + at + i, mask=inside, other=0), m.scratch.dtype.element_ty)
    return tl.where(inside, v, 1.0)


@triton.jit
def wrap_step(m, s):
    """out = a mod 2 bound - bound, or (a + shift + bound) mod 2 bound - bound if `inner`."""
    n, inner = word(s, N), word(s, INNER) != 0
    for first in range(0, n, COLS):
        i = columns_from(first, COLS)
        bound = numbers_listed(m, word(s, ROW_LIST), i, i < n)
        shift = numbers_listed(m, word(s, COL_LIST), i, (i < n) & inner)
        x = read(m, word(s, A), i, n)
        x = tl.where(inner, x + shift + bound, x)
        period = bound * 2.0 + x * 0.0
        turns = floor(div(x, period))
        rest = tl.fma(neg(turns), period, x)
        # a quotient just below a whole number is rounded to it
        rest = tl.where(rest < 0.0, tl.fma(1.0 - turns, period, x), rest)
        write(m, word(s, OUT), i, n, rest - bound)


@triton.jit
def mean_and_rate(m, s, n):
    """The mean of the columns a, and the reciprocal of their deviation, (1, ROWS)."""
    sums, squares = nothing(m, COLS), nothing(m, COLS)
    for first in range(0, n, COLS):
        sums += read(m, word(s, A), columns_from(first, COLS), n)
    mean = div(fold_rows(sums), n.to(sums.dtype) + fold_rows(squares))[None, :]
    for first in range(0, n, COLS):
        i = columns_from(first, COLS)
        away = tl.where(i < n, read(m, word(s, A), i, n) - mean, 0.0)
        squares += away * away
    variance = div(fold_rows(squares), number(m, s, F1) + fold_rows(squares) * 0.0)
    deviation = sqrt(variance + number(m, s, F0))
    return mean, div(1.0 + deviation * 0.0, deviation)[None, :]


@triton.jit
def norm_step(m, s):
    n = word(s, N)
    mean, rate = mean_and_rate(m, s, n)
    for first in range(0, n, COLS):
        i = columns_from(first, COLS)
        write(m, word(s, OUT), i, n, (read(m, word(s, A), i, n) - mean) * rate)


@triton.jit
def wave_of(m, s, i, n):
    return sine_cosine(read(m, word(s, A), i, n) * weight_at(m, s, i, n, WEIGHT))


@triton.jit
def periodic_step(m, s):
    n = word(s, N)
    for first in range(0, n, COLS):
        i = columns_from(first, COLS)
        sine, cosine = wave_of(m, s, i, n)
        wave = sine * weight_at(m, s, i, n, MASK) + cosine * weight_at(m, s, i, n, MORE)
        write(m, word(s, OUT), i, n, wave + weight_at(m, s, i, n, BIAS))


@triton.jit
def prior_step(m, s):
    n = word(s, N)
    total = nothing(m, COLS)
    for first in range(0, n, COLS):
        i = columns_from(first, COLS)
        z = read(m, word(s, A), i, n)
        density = log_density(z, GAUSSIAN) + number(m, s, F0)
        if word(s, FORM) == LOGISTIC:
            density = log_density(z, LOGISTIC)
        total += tl.where(i < n, density, 0.0)
    write_sum(m, s, total)


@triton.jit
def uniform_step(m, s):
    """Log-density in a box, see `Uniform`; `inner`: a closed one."""
    n, closed = word(s, N), word(s, INNER) != 0
    total = tl.where(columns_from(0, COLS) == 0, number(m, s, F0), nothing(m, COLS))
    for first in range(0, n, COLS):
        i = columns_from(first, COLS)
        low = numbers_listed(m, word(s, ROW_LIST), i, i < n)
        high = numbers_listed(m, word(s, COL_LIST), i, i < n)
        z = read(m, word(s, A), i, n)
        at_end = ((z == high) | (z != z)) & (closed == 0)
        outside = (z < low) | (z > high) | at_end
        total = tl.where((i < n) & outside, float("-inf"), total)
    write_sum(m, s, total)


@triton.jit
def load_step(m, s, source):
    """Read columns b of a matrix, whose rows are `pitch` apart, or 0 in rows behind its last."""
    n = word(s, N)
    for first in range(0, n, COLS):
        i = columns_from(first, COLS)
        at = source + m.row * word(s, PITCH) + listed(m, word(s, COL_LIST), i, n)
        write(m, word(s, OUT), i, n, tl.load(at, mask=(i < n) & (m.row < m.rows), other=0.0))


@triton.jit
def store_step(m, s, target):
    n = word(s, N)
    for first in range(0, n, COLS):
        i = columns_from(first, COLS)
        tl.store(target + m.row * n + i, read(m, word(s, A), i, n), mask=(i < n) & (m.row < m.rows))


@triton.jit
def fill_step(m, s):
    n = word(s, N)
    for first in range(0, n, COLS):
        write(m, word(s, OUT), columns_from(first, COLS), n, nothing(m, COLS) + number(m, s, F0))


@triton.jit
def total_step(m, s, target):
    """Sum places to the log-determinant, with the rounding errors of the sums added at the end."""
    n = word(s, N)
    sums, errors = nothing(m, 1), nothing(m, 1)
    for k in range(0, n):
        v = read(m, word(s, A), k + tl.arange(0, 1)[:, None], n)
        new = sums + v
        part = new - sums
        error = (sums - (new - part)) + (v - part)
        # no error of an infinite sum
        errors += tl.where(error == error, error, 0.0)
        sums = new
    tl.store(target + m.row, sums + errors, mask=m.row < m.rows)
