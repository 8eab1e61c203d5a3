"""Sums over Gram matrices that are computed tile by tile and never stored; permuted sums; centring.

A program owns a block of rows and loops over all blocks of columns. This keeps a row's sum in one program without
atomics, but computes each tile twice. There is no CUDA C++ version, because the tiles are matrix products, which Triton
schedules; a GPU without Triton runs the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schemas import HSIC_KERNELS
from ..reference.hsic import centred, wide
from . import _launch
from ._math import exp_less
from .center import center_into

RBF = tl.constexpr(HSIC_KERNELS.index("rbf"))
LAPLACIAN = tl.constexpr(HSIC_KERNELS.index("laplacian"))
POLYNOMIAL = tl.constexpr(HSIC_KERNELS.index("polynomial"))
DELTA = tl.constexpr(HSIC_KERNELS.index("delta"))
PRECOMPUTED = tl.constexpr(HSIC_KERNELS.index("precomputed"))

SQUARES_UP_TO = tl.constexpr(8)  # features: see csrc/ops/hsic.h
# rows and columns of a tile, features per product; larger tiles run out of registers (sm_80 to sm_100)
BLOCK, DEPTH, WARPS = 32, 16, 8


@triton.jit
def power(x, DEGREE: tl.constexpr):
    y = x
    for _ in tl.static_range(DEGREE - 1):
        y = y * x
    return y


@triton.jit
def raw_tile(
    z, i, j, n, dim, KERNEL: tl.constexpr, SQUARES: tl.constexpr, PRECISION: tl.constexpr, DEPTH: tl.constexpr
):
    """Argument of the kernel function: dot product, sum of squared or absolute differences, or number of mismatches."""
    dtype: tl.constexpr = z.dtype.element_ty
    rows, columns = z + i.to(tl.int64) * dim, z + j.to(tl.int64) * dim
    total = tl.zeros((i.shape[0], j.shape[0]), dtype)
    if (KERNEL == POLYNOMIAL or (KERNEL == RBF and not SQUARES)) and dtype == tl.float32:
        for k0 in range(0, dim, DEPTH):
            k = k0 + tl.arange(0, DEPTH)
            a = tl.load(rows[:, None] + k[None, :], mask=(i < n)[:, None] & (k < dim)[None, :], other=0.0)
            b = tl.load(columns[None, :] + k[:, None], mask=(j < n)[None, :] & (k < dim)[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
    else:
        for k in range(dim):
            a = tl.load(rows + k, mask=i < n, other=0.0)[:, None]
            b = tl.load(columns + k, mask=j < n, other=0.0)[None, :]
            if KERNEL == RBF and SQUARES:
                total = tl.fma(a - b, a - b, total)
            elif KERNEL == LAPLACIAN:
                total += tl.abs(a - b)
            elif KERNEL == DELTA:
                total += tl.where(a != b, 1.0, 0.0)
            else:
                total = tl.fma(a, b, total)
    return total


@triton.jit
def gram_tile(
    z, halves, shift, i, j, n, dim,
    KERNEL: tl.constexpr, DEGREE: tl.constexpr, SQUARES: tl.constexpr, PRECISION: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """K - shift and the slope: dK / d(dot product), or K itself for kernels of distances."""
    if KERNEL == PRECOMPUTED:
        inside = (i < n)[:, None] & (j < n)[None, :]
        value = tl.load(z + i.to(tl.int64)[:, None] * n + j[None, :], mask=inside, other=0.0)
        slope = value
    else:
        raw = raw_tile(z, i, j, n, dim, KERNEL, SQUARES, PRECISION, DEPTH)
        if KERNEL == POLYNOMIAL:
            value = power(raw, DEGREE)
            if DEGREE == 1:
                slope = tl.full(raw.shape, 1.0, raw.dtype)
            else:
                slope = power(raw, DEGREE - 1) * DEGREE
        elif KERNEL == DELTA:
            value = tl.where(raw == 0.0, 1.0, 0.0).to(raw.dtype)
            slope = value
        else:
            if KERNEL == LAPLACIAN:
                exponent = raw * -1.0
            elif SQUARES:
                exponent = raw * -0.5
            else:
                both = tl.load(halves + i, mask=i < n, other=0.0)[:, None] + tl.load(halves + j, mask=j < n, other=0.0)
                exponent = raw - both
                # rounding may make a distance negative
                exponent = tl.where(exponent > 0.0, 0.0, exponent)
            value = exp_less(exponent, shift)
            slope = value + shift
    return value, slope


@triton.jit
def counted(i, j, n):
    """Mask of the summed entries: inside the matrix, off the diagonal."""
    return (i < n)[:, None] & (j < n)[None, :] & (i[:, None] != j[None, :])


@triton.jit(do_not_specialize=["n", "blocks", "part", "parts"])
def sums_kernel(
    x, x_halves, x_shift, x_dim, y, y_halves, y_shift, y_dim, x_rows, y_rows, cross, n, blocks, part, parts,
    X: tl.constexpr, X_DEGREE: tl.constexpr, X_SQUARES: tl.constexpr,
    Y: tl.constexpr, Y_DEGREE: tl.constexpr, Y_SQUARES: tl.constexpr,
    SAME: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One block of rows of a pair: its row sums if requested, and cross (batch, blocks).

    A launch covers blocks part, part + parts, part + 2 parts, ...
    """
    item = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    i = (block * parts + part) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = x.dtype.element_ty
    x += item * n * x_dim
    y += item * n * y_dim
    sx, sy = tl.load(x_shift + item).to(dtype), tl.load(y_shift + item).to(dtype)
    sum_x, sum_y = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    products = tl.zeros((BLOCK,), tl.float64)
    for j0 in range(0, n, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        inside = counted(i, j, n)
        k, _ = gram_tile(x, x_halves + item * n, sx, i, j, n, x_dim, X, X_DEGREE, X_SQUARES, PRECISION, DEPTH)
        k = tl.where(inside, k, 0.0).to(tl.float64)
        if SAME:
            m = k
        else:
            m, _ = gram_tile(y, y_halves + item * n, sy, i, j, n, y_dim, Y, Y_DEGREE, Y_SQUARES, PRECISION, DEPTH)
            m = tl.where(inside, m, 0.0).to(tl.float64)
        sum_x += tl.sum(k, 1)
        sum_y += tl.sum(m, 1)
        products += tl.sum(k * m, 1)
    if x_rows is not None:
        tl.store(x_rows + item * n + i, sum_x, mask=i < n)
    if y_rows is not None:
        tl.store(y_rows + item * n + i, sum_y, mask=i < n)
    tl.store(cross + item * blocks + block, tl.sum(products, 0))


@triton.jit
def weight_tile(inside, i, j, n, rows, factor, other, slope):
    """dL/dK of an unordered pair of rows times the slope of the kernel; zero outside."""
    w = other * (factor * 2.0)
    if rows is not None:
        at_i = tl.load(rows + i, mask=i < n, other=0.0)[:, None]
        w += (at_i + tl.load(rows + j, mask=j < n, other=0.0)[None, :]).to(w.dtype)
    return tl.where(inside, w * slope, 0.0)


@triton.jit(do_not_specialize=["n", "blocks", "chunks"])
def backward_kernel(
    x, x_halves, x_shift, x_dim, y, y_halves, y_shift, y_dim, rows, factor, grad, n, blocks, chunks,
    X: tl.constexpr, X_DEGREE: tl.constexpr, X_SQUARES: tl.constexpr,
    Y: tl.constexpr, Y_DEGREE: tl.constexpr, Y_SQUARES: tl.constexpr,
    SAME: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Gradient of x from one pair of variables: a block of rows x FEATURES features."""
    program = tl.program_id(0)
    item = (program // (blocks * chunks)).to(tl.int64)
    i = program // chunks % blocks * BLOCK + tl.arange(0, BLOCK)
    f = program % chunks * FEATURES + tl.arange(0, FEATURES)
    dtype: tl.constexpr = x.dtype.element_ty
    x += item * n * x_dim
    y += item * n * y_dim
    sx, sy = tl.load(x_shift + item).to(dtype), tl.load(y_shift + item).to(dtype)
    if rows is not None:
        rows += item * n
    by = tl.load(factor + item).to(dtype)
    own = (i < n)[:, None] & (f < x_dim)[None, :]
    at = i.to(tl.int64)[:, None] * x_dim + f[None, :]
    zi = tl.load(x + at, mask=own, other=0.0)
    total = tl.zeros((BLOCK, FEATURES), dtype)
    weights = tl.zeros((BLOCK,), dtype)
    for j0 in range(0, n, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        inside = counted(i, j, n)
        k, slope = gram_tile(x, x_halves + item * n, sx, i, j, n, x_dim, X, X_DEGREE, X_SQUARES, PRECISION, DEPTH)
        if SAME:
            other = k
        else:
            other, _ = gram_tile(y, y_halves + item * n, sy, i, j, n, y_dim, Y, Y_DEGREE, Y_SQUARES, PRECISION, DEPTH)
        w = weight_tile(inside, i, j, n, rows, by, other, slope)
        there = (j < n)[:, None] & (f < x_dim)[None, :]
        zj = tl.load(x + j.to(tl.int64)[:, None] * x_dim + f[None, :], mask=there, other=0.0)
        if X == LAPLACIAN:
            more = zi[:, None, :] - zj[None, :, :]
            sign = tl.where(more > 0.0, 1.0, tl.where(more < 0.0, -1.0, 0.0)).to(dtype)
            total -= tl.sum(w[:, :, None] * sign, 1)
        elif dtype == tl.float32:
            total = tl.dot(w, zj, total, input_precision=PRECISION)
        else:
            total += tl.sum(w[:, :, None] * zj[None, :, :], 1)
        weights += tl.sum(w, 1)
    if X == RBF:
        # sum over j of w_ij (z_j - z_i)
        total -= weights[:, None] * zi
    grad += item * n * x_dim
    if ADD:
        total += tl.load(grad + at, mask=own, other=0.0)
    tl.store(grad + at, total, mask=own)


@triton.jit(do_not_specialize=["n", "blocks"])
def matrix_kernel(
    y, y_halves, y_shift, y_dim, rows, factor, grad, n, blocks,
    Y: tl.constexpr, Y_DEGREE: tl.constexpr, Y_SQUARES: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradient of a precomputed matrix from one pair of variables: one tile."""
    program = tl.program_id(0)
    item = (program // (blocks * blocks)).to(tl.int64)
    i = program // blocks % blocks * BLOCK + tl.arange(0, BLOCK)
    j = program % blocks * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = y.dtype.element_ty
    shift, by = tl.load(y_shift + item).to(dtype), tl.load(factor + item).to(dtype)
    value, _ = gram_tile(
        y + item * n * y_dim, y_halves + item * n, shift, i, j, n, y_dim, Y, Y_DEGREE, Y_SQUARES, PRECISION, DEPTH
    )
    total = value * by
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


class Gram:
    """Kernel inputs of one variable: centred and scaled rows, half their squared norms, the shift of K."""

    def __init__(self, z: Tensor, scale: Tensor, kernel: int, degree: int) -> None:
        name = HSIC_KERNELS[kernel]
        self.kernel, self.degree, self.dim = kernel, degree, z.shape[-1]
        self.shift = wide(z, scale, name).double()
        if name in ("rbf", "laplacian"):
            z = centred(z) * scale[:, None, None]
        self.z = z.contiguous()
        self.squares = name == "rbf" and self.dim <= SQUARES_UP_TO.value
        # in float64: the rounding of a norm shifts every entry of its row alike
        self.halves = (self.z.double().square().sum(-1) / 2).to(z.dtype) if name == "rbf" else self.z

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int]:
        return self.z, self.halves, self.shift, self.dim

    def constants(self, name: str) -> dict[str, Any]:
        return {name: self.kernel, f"{name}_DEGREE": self.degree, f"{name}_SQUARES": self.squares}


def grams_of(z: Sequence[Tensor], scale: Tensor, kernels: Sequence[int], degrees: Sequence[int]) -> list[Gram]:
    return [Gram(variable, scale[:, m], kernels[m], degrees[m]) for m, variable in enumerate(z)]


def tile_of(allow_tf32: bool) -> dict[str, Any]:
    return {"PRECISION": "tf32" if allow_tf32 else "ieee", "DEPTH": DEPTH, "BLOCK": BLOCK, "num_warps": WARPS}


def hsic_sums(
    z: Sequence[Tensor], scale: Tensor, kernels: Sequence[int], degrees: Sequence[int], pairs: Sequence[int],
    allow_tf32: bool, part: int, parts: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, n, _ = z[0].shape
    grams, tile = grams_of(z, scale, kernels, degrees), tile_of(allow_tf32)
    rows = scale.new_zeros((len(z), batch, n), dtype=torch.float64)
    cross = scale.new_zeros((len(pairs) // 2, batch), dtype=torch.float64)
    shift = torch.stack([gram.shift for gram in grams], 1)
    blocks = len(range(part, -(-n // BLOCK), parts))
    # a variable in no pair needs its row sums too
    asked = [*zip(pairs[::2], pairs[1::2], strict=True)] + [(m, m) for m in range(len(z)) if m not in pairs]
    left = set(range(len(z)))
    for p, (a, b) in enumerate(asked):
        if batch * blocks == 0:
            continue
        partial = scale.new_empty((batch, blocks), dtype=torch.float64)
        x_rows, y_rows = (rows[m] if m in left else None for m in (a, b))
        left -= {a, b}
        _launch.launch(
            sums_kernel, batch * blocks, scale.device, *grams[a].arguments, *grams[b].arguments, x_rows, y_rows,
            partial, n, blocks, part, parts, SAME=a == b, **grams[a].constants("X"), **grams[b].constants("Y"), **tile,
        )  # fmt: skip
        if p < len(cross):
            _launch.sum_segments(partial, cross[p])
    return rows.transpose(0, 1).contiguous(), cross.mT.contiguous(), shift


def hsic_sums_backward(
    grad_rows: Tensor, grad_cross: Tensor, z: Sequence[Tensor], scale: Tensor, kernels: Sequence[int],
    degrees: Sequence[int], pairs: Sequence[int], allow_tf32: bool,
) -> list[Tensor]:  # fmt: skip
    batch, n, _ = z[0].shape
    grams, tile = grams_of(z, scale, kernels, degrees), tile_of(allow_tf32)
    grads = []
    for m, gram in enumerate(grams):
        grad = torch.zeros_like(gram.z)
        grads.append(grad)
        if kernels[m] == DELTA.value or batch * n == 0:
            continue
        # a pair of a variable with itself appears twice; a variable in no pair has only the gradient of its row sums
        sides = [(pairs[k ^ 1], grad_cross[:, k // 2]) for k in range(len(pairs)) if pairs[k] == m]
        rows = grad_rows[:, m].contiguous()
        for index, (other, factor) in enumerate(sides or [(m, grad_rows.new_zeros(batch))]):
            y, given = grams[other], rows if index == 0 else None
            if kernels[m] == PRECOMPUTED.value:
                blocks = -(-n // BLOCK)
                _launch.launch(
                    matrix_kernel, batch * blocks * blocks, scale.device, *y.arguments, given, factor.contiguous(),
                    grad, n, blocks, ADD=index > 0, **y.constants("Y"), **tile,
                )  # fmt: skip
                continue
            # 3-D sums need small tiles
            small = kernels[m] == LAPLACIAN.value or gram.z.dtype == torch.float64
            size = {**tile, "BLOCK": 16 if small else BLOCK}
            features = 16 if small else min(64, max(16, _launch.power_of_two(gram.dim)))
            blocks, chunks = -(-n // size["BLOCK"]), -(-gram.dim // features)
            _launch.launch(
                backward_kernel, batch * blocks * chunks, scale.device, *gram.arguments, *y.arguments, given,
                factor.contiguous(), grad, n, blocks, chunks, SAME=other == m, ADD=index > 0, FEATURES=features,
                **gram.constants("X"), **y.constants("Y"), **size,
            )  # fmt: skip
        if kernels[m] in (RBF.value, LAPLACIAN.value):
            grad *= scale[:, m, None, None]
    return grads


def hsic_permuted(gram_x: Tensor, gram_y: Tensor, permutations: Tensor) -> Tensor:
    out = gram_x.new_zeros(permutations.shape[:1], dtype=torch.float64)
    if permutations.numel():
        arguments = (t.contiguous() for t in (gram_x, gram_y, permutations))
        _launch.launch(permuted_kernel, len(out), gram_x.device, *arguments, out, len(gram_x), BLOCK=32)
    return out


def center_gram(gram: Tensor) -> Tensor:
    out = torch.empty_like(gram, memory_format=torch.contiguous_format)
    center_into(gram, out)
    return out


def center_gram_(gram: Tensor) -> None:
    center_into(gram, gram)
