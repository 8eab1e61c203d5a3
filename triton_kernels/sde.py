"""SDE steps with noise drawn in the kernel, their gradients, the denoising loss and the norms of a corrector."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _random
from ._random import NORMAL, draw
from ._tiles import compute_type, fold, load, place, row_value, store, tile_at, zeros

ZERO = torch.zeros((), dtype=torch.int64, device="cpu")


@triton.jit
def noise_of(noise, stream, tile, rows, cols, ALIGNED: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr):
    """Noise of a tile: loaded from `noise` if given, else drawn."""
    if noise is not None:
        return load(noise, tile, TILE, dtype)
    else:
        return draw(stream, tile, rows, cols, NORMAL, ALIGNED, TILE).to(dtype)


@triton.jit
def put(partial, which: tl.constexpr, rows, segments, row, segment, acc):
    """Store each row's sum over its segment in partial (which, rows, segments)."""
    at = (row.to(tl.int64) + which * rows.to(tl.int64)) * segments + segment
    tl.store(partial + at, fold(acc), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def step_kernel(
    x, score, noise, y, mean, a, b, c, stream, sizes, rows, cols, segments,
    ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = compute_type(x[0])
    row, segment = place(segments, TILE)
    of_x = row_value(a, row[:, None], rows, dtype)
    of_z = row_value(c, row[:, None], rows, dtype)
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        m = of_x * load(x, tile, TILE, dtype)
        if score is not None:
            m = m + row_value(b, tile.r, rows, dtype) * load(score, tile, TILE, dtype)
        z = noise_of(noise, stream, tile, rows, cols, ALIGNED, TILE, dtype)
        if mean is not None:
            store(mean, tile, TILE, m)
        # + 0.0 turns -0 into +0, so that for c = 0 the sign of the noise does not change the bits
        store(y, tile, TILE, m + (of_z * z + 0.0))


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def step_backward_kernel(
    gy, gmean, x, score, noise, gx, gscore, gnoise, partial, a, b, c, stream, sizes, rows, cols, segments,
    ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = partial.dtype.element_ty
    row, segment = place(segments, TILE)
    of_a = zeros(TILE, dtype)
    of_b = zeros(TILE, dtype)
    of_c = zeros(TILE, dtype)
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        total = zeros(TILE, dtype)
        dy = zeros(TILE, dtype)
        if gy is not None:
            dy = load(gy, tile, TILE, dtype)
            total += dy
        if gmean is not None:
            total += load(gmean, tile, TILE, dtype)
        if gx is not None:
            store(gx, tile, TILE, row_value(a, tile.r, rows, dtype) * total)
        if gscore is not None:
            store(gscore, tile, TILE, row_value(b, tile.r, rows, dtype) * total)
        if gnoise is not None:
            store(gnoise, tile, TILE, row_value(c, tile.r, rows, dtype) * dy)
        if x is not None:
            of_a += tl.where(tile.inside, total * load(x, tile, TILE, dtype), 0.0)
            if score is not None:
                of_b += tl.where(tile.inside, total * load(score, tile, TILE, dtype), 0.0)
            if gy is not None:
                z = noise_of(noise, stream, tile, rows, cols, ALIGNED, TILE, dtype)
                of_c += tl.where(tile.inside, dy * z, 0.0)
    if x is not None:
        put(partial, 0, rows, segments, row, segment, of_a)
        put(partial, 1, rows, segments, row, segment, of_b)
        put(partial, 2, rows, segments, row, segment, of_c)


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def loss_kernel(
    pred, gpred, partial, grad, std, stream, sizes, rows, cols, segments, ALIGNED: tl.constexpr, TILE: tl.constexpr
):
    """Loss; with gpred its backward: grad is the gradient of the loss, and the sums are the gradient of std.

    Without std the prediction is of the noise, not of the score.
    """
    dtype: tl.constexpr = compute_type(pred[0])
    row, segment = place(segments, TILE)
    acc = zeros(TILE, dtype)
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        p = load(pred, tile, TILE, dtype)
        z = noise_of(None, stream, tile, rows, cols, ALIGNED, TILE, dtype)
        if std is not None:
            by = row_value(std, tile.r, rows, dtype)
            residual = by * p + z
        else:
            residual = p - z
        if gpred is not None:
            g = row_value(grad, tile.r, rows, dtype)
            slope = g * by if std is not None else g
            store(gpred, tile, TILE, slope * residual)
            acc += tl.where(tile.inside, g * (p * residual), 0.0)
        else:
            acc += tl.where(tile.inside, 0.5 * (residual * residual), 0.0)
    put(partial, 0, rows, segments, row, segment, acc)


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def squares_kernel(
    score, noise, partial, stream, sizes, rows, cols, segments, ALIGNED: tl.constexpr, TILE: tl.constexpr
):
    dtype: tl.constexpr = compute_type(score[0])
    row, segment = place(segments, TILE)
    of_score = zeros(TILE, dtype)
    of_noise = zeros(TILE, dtype)
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        s = load(score, tile, TILE, dtype)
        z = noise_of(noise, stream, tile, rows, cols, ALIGNED, TILE, dtype)
        of_score += tl.where(tile.inside, s * s, 0.0)
        of_noise += tl.where(tile.inside, z * z, 0.0)
    put(partial, 0, rows, segments, row, segment, of_score)
    put(partial, 1, rows, segments, row, segment, of_noise)


def _coefficients(dtype: torch.dtype, *values: Tensor | None) -> list[Any]:
    """Return the row views; None: absent."""
    return [None if value is None else _launch.row_view(value, dtype) for value in values]


def _stream(seed: Tensor | None, step: Any, purpose: int, space: _launch.Space) -> tuple[_random.Stream, bool]:
    """Return the stream and whether it is aligned with the tiles; unused zeros if the noise is given (seed None)."""
    if seed is None:
        seed = step = ZERO
    return _random.stream(seed, step, purpose), _random.aligned(seed, space.rows, space.cols, space.blocks.cols)


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
    stream, aligned = _stream(seed, step, purpose, space)
    _launch.over_space(
        step_kernel, space, x, *_launch.views(tensors, space.at),
        *_coefficients(_launch.compute_dtype(x), a, b, c), stream, ALIGNED=aligned,
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
    # without x there are no sums, and the partial sums are a dtype alone
    partial = lead.new_empty(0, dtype=dtype) if x is None else _partial(space, 3, lead, dtype)
    stream, aligned = _stream(seed, step, purpose, space)
    _launch.over_space(
        step_backward_kernel, space, partial, *_launch.views(tensors, space.at), partial,
        *_coefficients(dtype, a, b, c), stream, ALIGNED=aligned,
    )  # fmt: skip
    return gx, gscore, gnoise, partial if x is None else _total(partial)


def _loss(
    pred: Tensor, std: Tensor | None, seed: Tensor, step: Tensor, gpred: Tensor | None, grad: Tensor | None
) -> Tensor:
    dtype = _launch.compute_dtype(pred)
    if pred.numel() == 0:
        return pred.new_zeros(_rows(pred), dtype=dtype)
    tensors = [pred, gpred]
    space = _space(tensors)
    partial = _partial(space, 1, pred, dtype)
    stream, aligned = _stream(seed, step, 0, space)
    _launch.over_space(
        loss_kernel, space, pred, *_launch.views(tensors, space.at), partial, *_coefficients(dtype, grad, std),
        stream, ALIGNED=aligned,
        num_warps=2 if aligned and dtype == torch.float32 else 4,  # two take 0.96 times the time of four on an H200
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
    stream, aligned = _stream(seed, step, purpose, space)
    _launch.over_space(
        squares_kernel, space, score, *_launch.views(tensors, space.at), partial, stream, ALIGNED=aligned
    )
    return _total(partial)
