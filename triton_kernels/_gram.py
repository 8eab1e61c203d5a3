"""Tiles of kernel matrices: the rows a variable is prepared to, and the entries K - shift computed from them.

Dot products of float32 rows run on tensor cores, whose operands have 11 bits (TF32). A row is stored as the sum of two
such numbers, high and low (rounded to nearest, so that low parts have no common sign); the product of the low parts, at
most 2^-22 of the rows' lengths, is left out.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schemas import HSIC_KERNELS
from ..reference.hsic import WIDE_VARIANCE, centred, shift_of
from . import _launch
from ._math import bits, exp_less, from_bits
from ._tiles import fold, fold_rows

RBF = tl.constexpr(HSIC_KERNELS.index("rbf"))
LAPLACIAN = tl.constexpr(HSIC_KERNELS.index("laplacian"))
POLYNOMIAL = tl.constexpr(HSIC_KERNELS.index("polynomial"))
DELTA = tl.constexpr(HSIC_KERNELS.index("delta"))
PRECOMPUTED = tl.constexpr(HSIC_KERNELS.index("precomputed"))

SQUARES_UP_TO = tl.constexpr(8)  # features: see csrc/ops/hsic.h
MOST_VARIANCE = tl.constexpr(WIDE_VARIANCE)
HIGH_BITS, HALF_BITS = -(1 << 13), 1 << 12  # bits of a float32 that TF32 keeps, and half of the last one
HIGH, HALF = tl.constexpr(HIGH_BITS), tl.constexpr(HALF_BITS)
DEPTH = tl.constexpr(32)  # features per product
ROWS, FEATURES = 32, 64  # tile of `prepare_kernel`


class Variable(NamedTuple):
    """A variable as kernels read it, see `Gram`; after `item_of` one item of the batch, and its shift as a number."""

    z: Any
    low: Any  # z if there are no low parts
    halves: Any
    shift: Any
    dim: Any


class Kind(NamedTuple):
    kernel: int
    degree: int
    squares: bool
    split: bool  # the rows have low parts


@functools.lru_cache(maxsize=256)
def kind(kernel: int, degree: int, squares: bool, split: bool) -> Kind:
    """Return one object for each value, as launch plans know constants by identity."""
    return Kind(kernel, degree, squares, split)


@triton.jit
def item_of(x, item, n, dtype: tl.constexpr):
    """One item of a batch."""
    start = item * n * x.dim
    return Variable(x.z + start, x.low + start, x.halves + item * n, tl.load(x.shift + item).to(dtype), x.dim)


@triton.jit
def power(x, DEGREE: tl.constexpr):
    y = x
    for _ in tl.static_range(DEGREE - 1):
        y = y * x
    return y


@triton.jit
def load_rows(z, i, n, dim, k0, COUNT: tl.constexpr):
    k = k0 + tl.arange(0, COUNT)
    at = i.to(tl.int64)[:, None] * dim + k[None, :]
    return tl.load(z + at, mask=(i < n)[:, None] & (k < dim)[None, :], other=0.0)


@triton.jit
def products(x, i, j, n, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Dot products of rows i and j."""
    total = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for k0 in range(0, x.dim, DEPTH):
        a = load_rows(x.z, i, n, x.dim, k0, DEPTH)
        b = tl.trans(load_rows(x.z, j, n, x.dim, k0, DEPTH))
        if SPLIT:
            # small terms first
            total = tl.dot(load_rows(x.low, i, n, x.dim, k0, DEPTH), b, total, input_precision=PRECISION)
            b_low = tl.trans(load_rows(x.low, j, n, x.dim, k0, DEPTH))
            total = tl.dot(a, b_low, total, input_precision=PRECISION)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def raw_tile(x, i, j, n, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """Argument of the kernel function: dot product, sum of squared or absolute differences, or number of mismatches."""
    dtype: tl.constexpr = x.z.dtype.element_ty
    if (KIND.kernel == POLYNOMIAL or (KIND.kernel == RBF and not KIND.squares)) and dtype == tl.float32:
        total = products(x, i, j, n, KIND.split, PRECISION)
    else:
        rows, columns = x.z + i.to(tl.int64) * x.dim, x.z + j.to(tl.int64) * x.dim
        total = tl.zeros((i.shape[0], j.shape[0]), dtype)
        for k in range(x.dim):
            a = tl.load(rows + k, mask=i < n, other=0.0)[:, None]
            b = tl.load(columns + k, mask=j < n, other=0.0)[None, :]
            if KIND.kernel == RBF and KIND.squares:
                total = tl.fma(a - b, a - b, total)
            elif KIND.kernel == LAPLACIAN:
                total += tl.abs(a - b)
            elif KIND.kernel == DELTA:
                total += tl.where(a != b, 1.0, 0.0)
            else:
                total = tl.fma(a, b, total)
    return total


@triton.jit
def gram_tile(x, i, j, n, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """K - shift and the slope: dK / d(dot product), or K itself for kernels of distances."""
    if KIND.kernel == PRECOMPUTED:
        inside = (i < n)[:, None] & (j < n)[None, :]
        value = tl.load(x.z + i.to(tl.int64)[:, None] * n + j[None, :], mask=inside, other=0.0)
        slope = value
    else:
        raw = raw_tile(x, i, j, n, KIND, PRECISION)
        if KIND.kernel == POLYNOMIAL:
            value = power(raw, KIND.degree) - x.shift
            if KIND.degree == 1:
                slope = tl.full(raw.shape, 1.0, raw.dtype)
            else:
                slope = power(raw, KIND.degree - 1) * KIND.degree
        elif KIND.kernel == DELTA:
            value = tl.where(raw == 0.0, 1.0, 0.0).to(raw.dtype)
            slope = value
        else:
            if KIND.kernel == LAPLACIAN:
                exponent = raw * -1.0
            elif KIND.squares:
                exponent = raw * -0.5
            else:
                at_i = tl.load(x.halves + i, mask=i < n, other=0.0)[:, None]
                exponent = raw - (at_i + tl.load(x.halves + j, mask=j < n, other=0.0))
                # rounding may make a distance negative
                exponent = tl.where(exponent > 0.0, 0.0, exponent)
            value = exp_less(exponent, x.shift)
            slope = value + x.shift
    return value, slope


@triton.jit
def counted(i, j, n):
    """Mask of the summed entries: inside the matrix, off the diagonal."""
    return (i < n)[:, None] & (j < n)[None, :] & (i[:, None] != j[None, :])


@triton.jit
def median_of_five(z, k, n, dim):
    """Medians of the features k of five rows, as reference.hsic.centred."""
    a = tl.load(z + k, mask=k < dim, other=0.0)
    b = tl.load(z + ((n - 1) // 4).to(tl.int64) * dim + k, mask=k < dim, other=0.0)
    c = tl.load(z + (2 * (n - 1) // 4).to(tl.int64) * dim + k, mask=k < dim, other=0.0)
    d = tl.load(z + (3 * (n - 1) // 4).to(tl.int64) * dim + k, mask=k < dim, other=0.0)
    e = tl.load(z + (n - 1).to(tl.int64) * dim + k, mask=k < dim, other=0.0)
    # drop the least of two minima and the largest of two maxima: the median of the three that are left
    f = tl.maximum(tl.minimum(a, b), tl.minimum(c, d))
    g = tl.minimum(tl.maximum(a, b), tl.maximum(c, d))
    return tl.maximum(tl.minimum(f, g), tl.minimum(tl.maximum(f, g), e))


@triton.jit(do_not_specialize=["n", "blocks"])
def prepare_kernel(
    z, scale, scale_at, high, low, halves, moments, n, blocks, dim,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Centred and scaled rows, half their squared norms, and their block's sums and sums of squares per feature."""
    item = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    i = block * ROWS + tl.arange(0, ROWS)
    by = tl.load(scale + item * scale_at)
    z += item * n * dim
    norm = tl.zeros((ROWS,), tl.float64)
    for k0 in range(0, dim, FEATURES):
        k = k0 + tl.arange(0, FEATURES)
        inside = (i < n)[:, None] & (k < dim)[None, :]
        at = item * n * dim + i.to(tl.int64)[:, None] * dim + k[None, :]
        value = (load_rows(z, i, n, dim, k0, FEATURES) - median_of_five(z, k, n, dim)[None, :]) * by
        value = tl.where(inside, value, 0.0)
        if SPLIT:
            top = from_bits((bits(value) + HALF) & HIGH)
            tl.store(high + at, top, mask=inside)
            tl.store(low + at, value - top, mask=inside)
        else:
            tl.store(high + at, value, mask=inside)
        exact = value.to(tl.float64)
        norm += fold(exact * exact)
        to = moments + (item * blocks + block) * 2 * dim + k
        tl.store(to, fold_rows(exact), mask=k < dim)
        tl.store(to + dim, fold_rows(exact * exact), mask=k < dim)
    tl.store(halves + item * n + i, (norm * 0.5).to(tl.float32), mask=i < n)


@triton.jit(do_not_specialize=["n", "blocks"])
def wide_kernel(moments, shift, n, blocks, dim, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """Shift of an item: 1 if the sum of its variances says that the bandwidth is wide, else 0."""
    item = tl.program_id(0).to(tl.int64)
    moments += item * blocks * 2 * dim
    total = tl.zeros((FEATURES,), tl.float64)
    for k0 in range(0, dim, FEATURES):
        k = k0 + tl.arange(0, FEATURES)
        first = tl.zeros((ROWS, FEATURES), tl.float64)
        second = tl.zeros((ROWS, FEATURES), tl.float64)
        for b0 in range(0, blocks, ROWS):
            b = b0 + tl.arange(0, ROWS)
            inside = (b < blocks)[:, None] & (k < dim)[None, :]
            at = moments + b.to(tl.int64)[:, None] * (2 * dim) + k[None, :]
            first += tl.load(at, mask=inside, other=0.0)
            second += tl.load(at + dim, mask=inside, other=0.0)
        mean = fold_rows(first) / n
        total += fold_rows(second) - mean * mean * n
    variance = tl.sum(total, 0) / tl.maximum(n - 1, 1)
    tl.store(shift + item, tl.where(variance <= MOST_VARIANCE, 1.0, 0.0).to(tl.float64))


class Gram(NamedTuple):
    """What the kernels read of one variable.

    Attributes:
        z: rows, centred and scaled for kernels of distances; the high parts of the rows if `low` is given.
        low: low parts of the rows of float32 products; None if TF32 is enough or there are no products.
        halves: half the squared norms of the rows for rbf, else `z`.
        shift: (B,) float64, what is subtracted from K.
    """

    z: Tensor
    low: Tensor | None
    halves: Tensor
    shift: Tensor
    kernel: int
    degree: int

    @property
    def dim(self) -> int:
        return self.z.shape[-1]

    @property
    def squares(self) -> bool:
        return self.kernel == RBF.value and self.dim <= SQUARES_UP_TO.value

    @property
    def multiplies(self) -> bool:
        """Whether entries are computed from products of float32 rows, on tensor cores."""
        kernels = (RBF.value, POLYNOMIAL.value)
        return self.kernel in kernels and not self.squares and self.z.dtype == torch.float32

    @property
    def variable(self) -> Variable:
        return Variable(self.z, self.z if self.low is None else self.low, self.halves, self.shift, self.dim)

    @property
    def kind(self) -> Kind:
        return kind(self.kernel, self.degree, self.squares, self.low is not None)


def split(z: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 rows into high parts, rounded to TF32, and the rest."""
    high = ((z.view(torch.int32) + HALF_BITS) & HIGH_BITS).view(torch.float32)
    return high, z - high


def grams_of(z: Any, scale: Tensor, kernels: Any, degrees: Any, allow_tf32: bool) -> tuple[list[Gram], Tensor]:
    """Return what the kernels read of every variable, and the shifts (M, B)."""
    shifts = scale.new_empty((len(z), len(scale)), dtype=torch.float64)
    each = zip(z, scale.unbind(1), shifts.unbind(0), kernels, degrees, strict=True)
    return [_gram(*one, allow_tf32) for one in each], shifts


def _gram(z: Tensor, scale: Tensor, shift: Tensor, kernel: int, degree: int, allow_tf32: bool) -> Gram:
    name, low = HSIC_KERNELS[kernel], None
    if name == "rbf" and z.dtype == torch.float32 and z.numel():
        return _prepared(z.contiguous(), scale, shift, degree, allow_tf32)
    shift.copy_(shift_of(z, scale, name))
    if name in ("rbf", "laplacian"):
        z = centred(z) * scale[:, None, None]
    z = z.contiguous()
    # in float64: the rounding of a norm shifts every entry of its row alike
    halves = (z.double().square().sum(-1) / 2).to(z.dtype) if name == "rbf" else z
    if name == "polynomial" and z.dtype == torch.float32 and not allow_tf32:
        z, low = split(z)
    return Gram(z, low, halves, shift, kernel, degree)


def _prepared(z: Tensor, scale: Tensor, shift: Tensor, degree: int, allow_tf32: bool) -> Gram:
    batch, n, dim = z.shape
    splits = dim > SQUARES_UP_TO.value and not allow_tf32
    high, low = torch.empty_like(z), torch.empty_like(z) if splits else None
    halves = z.new_empty((batch, n))
    blocks, features = -(-n // ROWS), min(FEATURES, max(16, _launch.power_of_two(dim)))
    moments = z.new_empty((batch, blocks, 2, dim), dtype=torch.float64)
    _launch.launch(
        prepare_kernel, batch * blocks, z.device, z, scale, scale.stride(0), high, low, halves, moments, n, blocks, dim,
        SPLIT=splits, ROWS=ROWS, FEATURES=features, num_warps=8,
    )  # fmt: skip
    _launch.launch(wide_kernel, batch, z.device, moments, shift, n, blocks, dim, ROWS=16, FEATURES=features)
    return Gram(high, low, halves, shift, RBF.value, degree)
