"""Steps of the way back through a program of a flow, see _program.py: gradients of the steps there."""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import constant, div, erf, exp, exp_less, neg, sigmoid
from ._program import (
    ACTIVE,
    CLAMP_EXP,
    COL_LIST,
    COLS,
    COUNT,
    ELU,
    F0,
    F1,
    FACTOR,
    FORM,
    GELU,
    INNER,
    INVERSE,
    LEAKY_RELU,
    LOG,
    MASK,
    MORE,
    OUT,
    OUT_B,
    OUT_C,
    PITCH,
    RELU,
    ROW_LIST,
    ROWS,
    SIGMOID,
    SILU,
    SPLINE_COLS,
    SQRT_HALF,
    TAILS,
    TANH,
    TERMS,
    WEIGHT,
    A,
    B,
    G,
    N,
    columns_from,
    couple_operands,
    entry_of,
    listed,
    matrix,
    mean_and_rate,
    nothing,
    number,
    product,
    read,
    scale_of,
    units_of,
    wave_of,
    weight_at,
    word,
    write,
)
from ._program_spline import bin_of, domain_of, form_of, logit, number_at, outside_of, theta_of, used_of
from ._spline import ZUKO, place_at
from ._spline_grad import gradient_of, pulled
from ._tiles import fold, fold_rows
from .flow_head import GAUSSIAN, LOGISTIC, score

INV_SQRT_2PI = tl.constexpr(0.39894228040143267794)


@triton.jit
def dense_inputs_step(m, s):
    """out = (mask * weight)' g + b."""
    UNITS: tl.constexpr = units_of(m.scratch)
    n, count, rows, cols = word(s, N), word(s, COUNT), word(s, ROW_LIST), word(s, COL_LIST)
    for first in range(0, n, UNITS):
        i = columns_from(first, UNITS)
        # neighbours of a row are loaded by neighbouring threads
        across = first + tl.arange(0, UNITS)
        col = listed(m, cols, across, n)[None, :]
        acc = nothing(m, UNITS)
        for k in range(0, count, TERMS):
            j = columns_from(k, TERMS)
            w = matrix(m, s, listed(m, rows, j, count), col, (j < count) & (across < n)[None, :])
            acc = product(tl.trans(w), read(m, word(s, G), j, count), acc)
        write(m, word(s, OUT), i, n, acc + read(m, word(s, B), i, n))


@triton.jit
def dense_weights_step(m, s, grads):
    """grads += mask * g a', summed over the rows that exist."""
    UNITS: tl.constexpr = units_of(m.scratch)
    n, count, rows, cols = word(s, N), word(s, COUNT), word(s, ROW_LIST), word(s, COL_LIST)
    exists, mask = m.row < m.rows, word(s, MASK)
    for first in range(0, n, UNITS):
        i = columns_from(first, UNITS)
        unit = listed(m, rows, i, n)
        g = tl.where(exists, read(m, word(s, G), i, n), 0.0)
        for k in range(0, count, TERMS):
            j = k + tl.arange(0, TERMS)
            h = tl.where(exists, read(m, word(s, A), j[:, None], count), 0.0)
            terms = product(g, tl.trans(h), tl.full((UNITS, TERMS), 0.0, g.dtype))
            inside = (i < n) & (j < count)[None, :]
            at = unit * word(s, PITCH) + listed(m, cols, j, count)[None, :]
            if mask >= 0:
                terms *= tl.load(m.weights + mask + at, mask=inside, other=0.0)
            to = grads + word(s, WEIGHT) + at
            tl.store(to, tl.load(to, mask=inside, other=0.0) + terms, mask=inside)


@triton.jit
def sum_rows_step(m, s, grads):
    """grads += the sum of g over the rows that exist."""
    n, exists = word(s, N), m.row < m.rows
    for first in range(0, n, COLS):
        i = columns_from(first, COLS)
        sums = fold(tl.where(exists, read(m, word(s, G), i, n), 0.0))
        across = first + tl.arange(0, COLS)
        to = grads + word(s, WEIGHT) + entry_of(m, s, across, n)
        tl.store(to, tl.load(to, mask=across < n, other=0.0) + sums, mask=across < n)


@triton.jit
def logdet_gradient(m, s):
    """The gradient of the log-determinant (1, ROWS), 0 for a step that adds nothing to it."""
    at = word(s, LOG)
    return tl.load(m.scratch + at * ROWS + m.r, mask=(at >= 0) & (m.r >= 0), other=0.0)


@triton.jit
def couple_back_step(m, s):
    """out, out_b and out_c: gradients of a, of the shift and of the number behind the factor."""
    n, arg, gl, inner = word(s, N), number(m, s, F0), logdet_gradient(m, s), word(s, INNER) != 0
    sign = tl.where(word(s, INVERSE) != 0, -1.0, 1.0).to(gl.dtype)
    for first in range(0, n, COLS):
        i = columns_from(first, COLS)
        x, shift, raw = couple_operands(m, s, i, n)
        e, _, slope = scale_of(s, raw, arg)
        g = read(m, word(s, G), i, n)
        gx = g * e
        write(m, word(s, OUT), i, n, gx)
        write(m, word(s, OUT_B), i, n, tl.where(inner, gx, g) * sign)
        moved = tl.where(inner, x + shift, x)
        # of a factor itself, or of its logarithm
        of_raw = tl.where(word(s, FORM) == FACTOR, g * moved, tl.fma(gx, moved, gl + gx * 0.0) * slope)
        write(m, word(s, OUT_C), i, n, of_raw)


@triton.jit
def activation_gradient(g, z, form, arg):
    """The gradient by z from that of the activation; z may be the result for relu and leaky_relu."""
    out = g
    if form == RELU:
        out = tl.where(z <= 0.0, 0.0, g)
    elif form == LEAKY_RELU:
        out = tl.where(z > 0.0, g, g * arg)
    elif form == TANH:
        # z is the result
        out = g * tl.fma(neg(z), z, constant(1.0, z))
    elif form == SILU:
        p = sigmoid(z)
        out = g * tl.fma(z * p, 1.0 - p, p)
    elif form == GELU:
        density = constant(INV_SQRT_2PI, z) * exp(-0.5 * z * z)
        out = g * tl.fma(z, density, 0.5 * (1.0 + erf(z * constant(SQRT_HALF, z))))
    elif form == ELU:
        out = tl.where(z <= 0.0, g * (arg * exp_less(tl.where(z > 0.0, 0.0, z), 0.0)), g)
    elif form == SIGMOID:
        out = g * (sigmoid(z) * sigmoid(neg(z)))
    elif form == CLAMP_EXP:
        out = tl.where(z > 0.0, 0.0, g * exp(tl.where(z > 0.0, 0.0, z)))
    return out


@triton.jit
def activate_back_step(m, s):
    n = word(s, N)
    for first in range(0, n, ACTIVE):
        i = columns_from(first, ACTIVE)
        g, z = read(m, word(s, G), i, n), read(m, word(s, A), i, n)
        write(m, word(s, OUT), i, n, activation_gradient(g, z, word(s, FORM), number(m, s, F0)))


@triton.jit
def norm_back_step(m, s):
    n = word(s, N)
    mean, rate = mean_and_rate(m, s, n)
    along, sums = nothing(m, COLS), nothing(m, COLS)
    for first in range(0, n, COLS):
        i = columns_from(first, COLS)
        g = read(m, word(s, G), i, n)
        sums += g
        along += g * tl.where(i < n, (read(m, word(s, A), i, n) - mean) * rate, 0.0)
    mean_g = div(fold_rows(sums), fold_rows(sums) * 0.0 + n.to(sums.dtype))[None, :]
    part = div(fold_rows(along), fold_rows(along) * 0.0 + number(m, s, F1))[None, :]
    for first in range(0, n, COLS):
        i = columns_from(first, COLS)
        normal = (read(m, word(s, A), i, n) - mean) * rate
        write(m, word(s, OUT), i, n, (read(m, word(s, G), i, n) - mean_g - normal * part) * rate)


@triton.jit
def periodic_back_step(m, s):
    """out: gradient of a; out_b and out_c: products of g with sine and cosine."""
    n = word(s, N)
    for first in range(0, n, COLS):
        i = columns_from(first, COLS)
        sine, cosine = wave_of(m, s, i, n)
        g = read(m, word(s, G), i, n)
        slope = cosine * weight_at(m, s, i, n, MASK) - sine * weight_at(m, s, i, n, MORE)
        write(m, word(s, OUT), i, n, g * slope * weight_at(m, s, i, n, WEIGHT))
        write(m, word(s, OUT_B), i, n, g * sine)
        write(m, word(s, OUT_C), i, n, g * cosine)


@triton.jit
def prior_back_step(m, s):
    n, gl = word(s, N), logdet_gradient(m, s)
    for first in range(0, n, COLS):
        i = columns_from(first, COLS)
        z = read(m, word(s, A), i, n)
        slope = score(z, GAUSSIAN)
        if word(s, FORM) == LOGISTIC:
            slope = score(z, LOGISTIC)
        write(m, word(s, OUT), i, n, gl * slope + read(m, word(s, G), i, n))


@triton.jit
def write_number(m, s, i, n, j, v):
    place = tl.load(m.table + word(s, OUT_B) + i * word(s, PITCH) + j, mask=i < n, other=0).to(tl.int32)
    tl.store(m.scratch + place * ROWS + m.r, v, mask=i < n)


@triton.jit
def kept(s, v, used):
    """By selection: no NaN of a value that is not transformed reaches a gradient."""
    return tl.where(used, v, tl.where(word(s, TAILS) != 0, 0.0, float("nan")).to(v.dtype))


@triton.jit
def logit_rate(raw, form):
    if form.variant == ZUKO:
        rest = 1.0 + div(tl.abs(raw), form.limit * 0.5)
        rate = div(constant(1.0, raw), rest * rest)
    else:
        rate = form.scale + raw * 0.0
    return rate


@triton.jit
def write_logits(m, s, i, n, first, form, axis, k, ends, length, used):
    """The gradients of widths or heights, from those of the ends of bin k."""
    # the outer knots are fixed
    right = tl.where(k < form.bins - 1, ends[1], 0.0)
    both = tl.where(k > 0, ends[0], 0.0) + right
    mean = tl.full(k.shape, 0.0, both.dtype)
    for j in range(0, form.bins):
        e = exp_less(logit(number_at(m, s, i, n, first + j), form) - axis[0], 0.0)
        mean = tl.fma(e, pulled(j, k, both, right, 0.0), mean)
    mean, factor = div(mean, axis[1]), div(form.rest * length + axis[1] * 0.0, axis[1])
    for j in range(0, form.bins):
        raw = number_at(m, s, i, n, first + j)
        e = exp_less(logit(raw, form) - axis[0], 0.0)
        grad = pulled(j, k, both - mean, right - mean, 0.0 - mean)
        write_number(m, s, i, n, first + j, kept(s, e * factor * grad * logit_rate(raw, form), used))


@triton.jit
def of_slope(g, raw, form):
    """The gradient of the number behind a slope."""
    if form.variant == ZUKO:
        rest = 1.0 + div(tl.abs(raw), form.limit)
        out = g * div(exp(div(raw, rest)), rest * rest)
    else:
        out = g * sigmoid(raw)
    return out


@triton.jit
def spline_back_step(m, s):
    """out, out_b: gradients of a and of the numbers of its columns."""
    n, form, gl = word(s, N), form_of(m, s), logdet_gradient(m, s)
    for first in range(0, n, SPLINE_COLS):
        i = columns_from(first, SPLINE_COLS)
        value, gy = read(m, word(s, A), i, n), read(m, word(s, G), i, n)
        low, high = domain_of(m, s, i, n)
        used = used_of(s, value, low, high, form)
        b, k, wide, tall, slopes = bin_of(m, s, i, n, value, low, high, form)
        theta, ratio = theta_of(s, value, b)
        p = place_at(theta, ratio, b)
        g = gradient_of(gy, gl + gy * 0.0, p, b, False)
        if word(s, INVERSE) != 0:
            g = gradient_of(gy, gl + gy * 0.0, p, b, True)
        write(m, word(s, OUT), i, n, tl.where(used, g.value, outside_of(s, gy)))
        write_logits(m, s, i, n, 0, form, wide, k, (g.x0, g.x1), high - low, used)
        write_logits(m, s, i, n, form.bins, form, tall, k, (g.y0, g.y1), high - low, used)
        at0, at1, raw0, raw1 = slopes
        g0, g1 = of_slope(g.d0, raw0, form), of_slope(g.d1, raw1, form)
        for j in range(0, word(s, PITCH) - 2 * form.bins):
            v = tl.where(at0 == j, g0, 0.0) + tl.where(at1 == j, g1, 0.0)
            write_number(m, s, i, n, 2 * form.bins + j, kept(s, v, used))
