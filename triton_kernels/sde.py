"""SDE steps with noise drawn in the kernel, their gradients, the denoising loss and the norms of a corrector."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _random
from ._random import NORMAL, draw
from ._tiles import fold, load, place, scalar, store, width

SCALARS = [*_random.SCALARS, "a_at", "a_bits", "b_at", "b_bits", "c_at", "c_bits"]


@triton.jit
def coefficient(tensor, at, bits, r, inside, dtype: tl.constexpr):
    """Coefficient of rows r: loaded from the tensor, or passed by value as bits."""
    if tensor is None:
        return scalar(bits, dtype)
    else:
        return tl.load(tensor + r.to(tl.int64) * at, mask=inside, other=0.0).to(dtype)


@triton.jit
def noise_tile(
    noise, noise_at, seed, seed_at, seed_low, seed_high, step, step_low, step_high, purpose, sizes, r, c, first,
    inside, rows, cols, PER_ROW: tl.constexpr, ALIGNED: tl.constexpr, VEC: tl.constexpr, BLOCK_C: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Noise of a tile: loaded from `noise` if given, else drawn."""
    if noise is not None:
        return load(noise, noise_at, sizes, r, c, inside, VEC, dtype)
    else:
        return draw(
            seed, seed_at, seed_low, seed_high, step, step_low, step_high, purpose, r, first, rows, cols, NORMAL,
            PER_ROW, ALIGNED, BLOCK_C,
        ).to(dtype)  # fmt: skip


@triton.jit
def put(partial, which: tl.constexpr, rows, segments, row, segment, acc):
    """Store each row's sum over its segment in partial (which, rows, segments)."""
    at = (row.to(tl.int64) + which * rows.to(tl.int64)) * segments + segment
    tl.store(partial + at, fold(acc), mask=row < rows)


@triton.jit(do_not_specialize=SCALARS)
def step_kernel(
    x, x_at, score, score_at, noise, noise_at, y, y_at, mean, mean_at, a, a_at, a_bits, b, b_at, b_bits, c, c_at,
    c_bits, seed, seed_at, seed_low, seed_high, step, step_low, step_high, purpose, sizes, rows, cols, segments,
    PER_ROW: tl.constexpr, ALIGNED: tl.constexpr, INDEX: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    row, segment = place(segments, INDEX, BLOCK_R)
    r = row[:, None]
    of_x = coefficient(a, a_at, a_bits, r, r < rows, dtype)
    of_z = coefficient(c, c_at, c_bits, r, r < rows, dtype)
    for c0 in range(0, SEGMENT, BLOCK_C):
        first = segment * SEGMENT + c0
        col = (first + tl.arange(0, BLOCK_C))[None, :]
        inside = (r < rows) & (col < width(cols, col, VEC))
        m = of_x * load(x, x_at, sizes, r, col, inside, VEC, dtype)
        if score is not None:
            of_score = coefficient(b, b_at, b_bits, r, r < rows, dtype)
            m = m + of_score * load(score, score_at, sizes, r, col, inside, VEC, dtype)
        z = noise_tile(
            noise, noise_at, seed, seed_at, seed_low, seed_high, step, step_low, step_high, purpose, sizes, r, col,
            first, inside, rows, width(cols, first, VEC), PER_ROW, ALIGNED, VEC, BLOCK_C, dtype,
        )  # fmt: skip
        if mean is not None:
            store(mean, mean_at, sizes, r, col, inside, VEC, m)
        # + 0.0 turns -0 into +0, so that for c = 0 the sign of the noise does not change the bits
        store(y, y_at, sizes, r, col, inside, VEC, m + (of_z * z + 0.0))


@triton.jit(do_not_specialize=SCALARS)
def step_backward_kernel(
    gy, gy_at, gmean, gmean_at, x, x_at, score, score_at, noise, noise_at, gx, gx_at, gscore,
    gscore_at, gnoise, gnoise_at, partial, a, a_at, a_bits, b, b_at, b_bits, c, c_at, c_bits, seed, seed_at,
    seed_low, seed_high, step, step_low, step_high, purpose, sizes, rows, cols, segments,
    F64: tl.constexpr, PER_ROW: tl.constexpr, ALIGNED: tl.constexpr, INDEX: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if F64 else tl.float32
    row, segment = place(segments, INDEX, BLOCK_R)
    r = row[:, None]
    of_a = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    of_b = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    of_c = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    for c0 in range(0, SEGMENT, BLOCK_C):
        first = segment * SEGMENT + c0
        col = (first + tl.arange(0, BLOCK_C))[None, :]
        inside = (r < rows) & (col < width(cols, col, VEC))
        total = tl.zeros((BLOCK_R, BLOCK_C), dtype)
        dy = tl.zeros((BLOCK_R, BLOCK_C), dtype)
        if gy is not None:
            dy = load(gy, gy_at, sizes, r, col, inside, VEC, dtype)
            total += dy
        if gmean is not None:
            total += load(gmean, gmean_at, sizes, r, col, inside, VEC, dtype)
        if gx is not None:
            store(gx, gx_at, sizes, r, col, inside, VEC, coefficient(a, a_at, a_bits, r, r < rows, dtype) * total)
        if gscore is not None:
            by = coefficient(b, b_at, b_bits, r, r < rows, dtype)
            store(gscore, gscore_at, sizes, r, col, inside, VEC, by * total)
        if gnoise is not None:
            store(gnoise, gnoise_at, sizes, r, col, inside, VEC, coefficient(c, c_at, c_bits, r, r < rows, dtype) * dy)
        if partial is not None:
            term = total * load(x, x_at, sizes, r, col, inside, VEC, dtype)
            of_a += tl.where(inside, term, 0.0)
            if score is not None:
                term = total * load(score, score_at, sizes, r, col, inside, VEC, dtype)
                of_b += tl.where(inside, term, 0.0)
            if gy is not None:
                z = noise_tile(
                    noise, noise_at, seed, seed_at, seed_low, seed_high, step, step_low, step_high, purpose, sizes,
                    r, col, first, inside, rows, width(cols, first, VEC), PER_ROW, ALIGNED, VEC, BLOCK_C, dtype,
                )  # fmt: skip
                of_c += tl.where(inside, dy * z, 0.0)
    if partial is not None:
        put(partial, 0, rows, segments, row, segment, of_a)
        put(partial, 1, rows, segments, row, segment, of_b)
        put(partial, 2, rows, segments, row, segment, of_c)


@triton.jit(do_not_specialize=SCALARS)
def loss_kernel(
    pred, pred_at, gpred, gpred_at, partial, a, a_at, a_bits, c, c_at, c_bits, seed, seed_at, seed_low, seed_high,
    step, step_low, step_high, purpose, sizes, rows, cols, segments,
    SCORE: tl.constexpr, PER_ROW: tl.constexpr, ALIGNED: tl.constexpr, INDEX: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Loss; with gpred its backward: a is the gradient of the loss, and the sums are the gradient of std (c)."""
    dtype: tl.constexpr = tl.float64 if pred.dtype.element_ty == tl.float64 else tl.float32
    row, segment = place(segments, INDEX, BLOCK_R)
    r = row[:, None]
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    for c0 in range(0, SEGMENT, BLOCK_C):
        first = segment * SEGMENT + c0
        col = (first + tl.arange(0, BLOCK_C))[None, :]
        inside = (r < rows) & (col < width(cols, col, VEC))
        p = load(pred, pred_at, sizes, r, col, inside, VEC, dtype)
        z = draw(
            seed, seed_at, seed_low, seed_high, step, step_low, step_high, purpose, r, first, rows,
            width(cols, first, VEC), NORMAL, PER_ROW, ALIGNED, BLOCK_C,
        ).to(dtype)  # fmt: skip
        if SCORE:
            std = coefficient(c, c_at, c_bits, r, r < rows, dtype)
            residual = std * p + z
        else:
            residual = p - z
        if gpred is not None:
            grad = coefficient(a, a_at, a_bits, r, r < rows, dtype)
            slope = grad * std if SCORE else grad
            store(gpred, gpred_at, sizes, r, col, inside, VEC, slope * residual)
            acc += tl.where(inside, grad * (p * residual), 0.0)
        else:
            acc += tl.where(inside, 0.5 * (residual * residual), 0.0)
    put(partial, 0, rows, segments, row, segment, acc)


@triton.jit(do_not_specialize=SCALARS)
def squares_kernel(
    score, score_at, noise, noise_at, partial, seed, seed_at, seed_low, seed_high, step, step_low, step_high, purpose,
    sizes, rows, cols, segments,
    PER_ROW: tl.constexpr, ALIGNED: tl.constexpr, INDEX: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if score.dtype.element_ty == tl.float64 else tl.float32
    row, segment = place(segments, INDEX, BLOCK_R)
    r = row[:, None]
    of_score = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    of_noise = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    for c0 in range(0, SEGMENT, BLOCK_C):
        first = segment * SEGMENT + c0
        col = (first + tl.arange(0, BLOCK_C))[None, :]
        inside = (r < rows) & (col < width(cols, col, VEC))
        s = load(score, score_at, sizes, r, col, inside, VEC, dtype)
        z = noise_tile(
            noise, noise_at, seed, seed_at, seed_low, seed_high, step, step_low, step_high, purpose, sizes, r, col,
            first, inside, rows, width(cols, first, VEC), PER_ROW, ALIGNED, VEC, BLOCK_C, dtype,
        )  # fmt: skip
        of_score += tl.where(inside, s * s, 0.0)
        of_noise += tl.where(inside, z * z, 0.0)
    put(partial, 0, rows, segments, row, segment, of_score)
    put(partial, 1, rows, segments, row, segment, of_noise)


def _coefficient(name: str, value: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of `coefficient` by name."""
    if value is None:
        return {name: None, f"{name}_at": 0, f"{name}_bits": 0}
    if _random.by_value(value):
        return {name: None, f"{name}_at": 0, f"{name}_bits": _launch.bits(value.item(), dtype)}
    return {name: value, f"{name}_at": value.stride(0) if value.dim() else 0, f"{name}_bits": 0}


def _coefficients(dtype: torch.dtype, **values: Tensor | None) -> dict[str, Any]:
    return {key: v for name, value in values.items() for key, v in _coefficient(name, value, dtype).items()}


def _stream(seed: Tensor | None, step: Any, purpose: int, space: _launch.Space) -> dict[str, Any]:
    """Return the keyword arguments that select the noise; unused zeros if the noise is given (seed None)."""
    if seed is None:
        seed = step = torch.zeros((), dtype=torch.int64)
    aligned = _random.aligned(seed, space.rows, space.cols, space.blocks.cols)
    return {**_random.stream(seed, step, purpose), "ALIGNED": aligned}


def _space(tensors: list[Tensor | None]) -> _launch.Space:
    """Return a space whose rows are samples, with elements in C order, the order of the noise."""
    lead = next(t for t in tensors if t is not None)
    return _launch.collapse(max(0, lead.dim() - 1), tensors, c_order=True)


def _partial(space: _launch.Space, count: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty((count, space.rows, space.blocks.segments), dtype=dtype)


def _total(partial: Tensor) -> Tensor:
    """Sum (count, rows, segments) to (count, rows)."""
    if partial.shape[2] == 1:
        return partial[:, :, 0]
    out = partial.new_empty(partial.shape[:2])
    _launch.sum_segments(partial.flatten(0, 1), out.view(-1))
    return out


def _rows(x: Tensor) -> int:
    return x.shape[0] if x.dim() else 1


def _output(like: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return like.new_empty(0)
    return torch.empty_like(like) if dtype == like.dtype else like.new_empty(like.shape, dtype=dtype)


def sde_step(
    x: Tensor,
    score: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    c: Tensor,
    seed: Tensor | None,
    step: Tensor | None,
    noise: Tensor | None,
    purpose: int,
    return_mean: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    mean = torch.empty_like(x) if return_mean else x.new_empty(0)
    if x.numel() == 0:
        return y, mean
    tensors = [x, score, noise, y, mean if return_mean else None]
    space = _space(tensors)
    _launch.over_space(
        step_kernel, space, x, *_launch.with_strides(tensors, space.at),
        **_coefficients(_launch.compute_dtype(x), a=a, b=b, c=c), **_stream(seed, step, purpose, space),
    )  # fmt: skip
    return y, mean


def sde_step_backward(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    x: Tensor | None,
    score: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    c: Tensor,
    seed: Tensor | None,
    step: Tensor | None,
    noise: Tensor | None,
    purpose: int,
    x_dtype: torch.dtype | None,
    score_dtype: torch.dtype | None,
    noise_dtype: torch.dtype | None,
    f64: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lead: Any = grad if grad is not None else grad_mean
    dtype = torch.float64 if f64 else torch.float32
    dtypes = (x_dtype, score_dtype, noise_dtype)
    gx, gscore, gnoise = (_output(lead, d) for d in dtypes)
    if lead.numel() == 0:
        return gx, gscore, gnoise, lead.new_zeros((3, _rows(lead)) if x is not None else 0, dtype=dtype)
    if x is None:
        score = noise = None
    outputs = (g if d else None for g, d in zip((gx, gscore, gnoise), dtypes, strict=True))
    tensors = [grad, grad_mean, x, score, noise, *outputs]
    space = _space(tensors)
    partial: Any = None if x is None else _partial(space, 3, lead, dtype)
    _launch.over_space(
        step_backward_kernel, space, lead.new_empty(0, dtype=dtype), *_launch.with_strides(tensors, space.at),
        partial, **_coefficients(dtype, a=a, b=b, c=c), **_stream(seed, step, purpose, space), F64=f64,
    )  # fmt: skip
    return gx, gscore, gnoise, lead.new_empty(0, dtype=dtype) if x is None else _total(partial)


def _loss(
    pred: Tensor, std: Tensor | None, seed: Tensor, step: Tensor, gpred: Tensor | None, grad: Tensor | None
) -> Tensor:
    dtype = _launch.compute_dtype(pred)
    if pred.numel() == 0:
        return pred.new_zeros(_rows(pred), dtype=dtype)
    tensors = [pred, gpred]
    space = _space(tensors)
    partial = _partial(space, 1, pred, dtype)
    _launch.over_space(
        loss_kernel, space, pred, *_launch.with_strides(tensors, space.at), partial,
        **_coefficients(dtype, a=grad, c=std), **_stream(seed, step, 0, space), SCORE=std is not None,
    )  # fmt: skip
    return _total(partial)[0]


def denoising_loss(pred: Tensor, std: Tensor | None, seed: Tensor, step: Tensor) -> Tensor:
    return _loss(pred, std, seed, step, None, None)


def denoising_loss_backward(
    grad: Tensor, pred: Tensor, std: Tensor | None, seed: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    gpred = torch.empty_like(pred)
    return gpred, _loss(pred, std, seed, step, gpred, grad)


def langevin_squares(
    score: Tensor, seed: Tensor | None, step: Tensor | None, noise: Tensor | None, purpose: int
) -> Tensor:
    dtype = _launch.compute_dtype(score)
    if score.numel() == 0:
        return score.new_zeros((2, _rows(score)), dtype=dtype)
    tensors = [score, noise]
    space = _space(tensors)
    partial = _partial(space, 2, score, dtype)
    _launch.over_space(
        squares_kernel, space, score, *_launch.with_strides(tensors, space.at), partial,
        **_stream(seed, step, purpose, space),
    )  # fmt: skip
    return _total(partial)
