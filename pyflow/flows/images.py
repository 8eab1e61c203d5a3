"""Dequantisation of integer pixels, and bits per dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks as check


def dequantize(
    x: Tensor, levels: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Add uniform noise to integer pixels and scale them to [0, 1).

    (x + u) / levels with u ~ U[0, 1), less a last step of rounding that would reach the next integer.

    Args:
        x: any shape, integers 0 ... levels - 1 in any real dtype.
        levels: number of grey levels, 256 for bytes.
        generator: draws the noise, on x's device; default torch's default generator.
        dtype: dtype of the result.

    Returns:
        x's shape, in `dtype`.

    Raises:
        TypeError: x is complex, `dtype` is not a float dtype, or levels is not an integer.
        ValueError: levels < 1, or so many that `dtype` leaves fewer than 8 bits for the noise; values of x that are not
            integers in [0, levels) (checked on a CPU, elsewhere with PYFLOW_CHECK=1).

    Source:
        Theis et al. 2016, arXiv:1511.01844, section 3.1: the expected log-density of y bounds the discrete
        log-likelihood from below.

    Example:
        >>> y = dequantize(torch.tensor([0, 255]), 256)
        >>> (y * 256).floor().tolist()
        [0.0, 255.0]
    """
    op = "dequantize"
    levels = check.at_least(op, "levels", levels, 1)
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    if x.is_complex():
        raise TypeError(f"{op}: x must be integers, got {check.short(x.dtype)}")
    check.float_dtype(op, dtype)
    most = int(2**-7 / torch.finfo(dtype).eps)
    if levels > most:
        raise ValueError(f"{op}: levels must be at most {most} for {check.short(dtype)}, got {levels}")
    if x.numel() and check.values_are_checked(x):
        # torch compares uint8 with 256 modulo 256, and does not compare uint16 and wider unsigned integers
        pixels = x if x.is_floating_point() else x.long()
        wrong = (pixels < 0) | (pixels >= levels)
        if pixels.is_floating_point():
            wrong |= pixels != pixels.floor()
        if bool(wrong.any()):
            raise ValueError(f"{op}: x must be integers in [0, {levels}), got {pixels[wrong][0].item():g}")
    # below 1 by the spacing of floats below `levels`, so that no sum is rounded up to the next integer
    end = 1 - torch.finfo(dtype).eps * 2.0 ** ((levels - 1).bit_length() - 1)
    noise = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    noise.uniform_(0, end, generator=generator)
    return noise.add_(x).div_(levels)


def bits_per_dim(log_prob: Tensor, dim: int, levels: int = 1) -> Tensor:
    """Return the negative log-likelihood of dequantised data in bits per dimension.

    -log_prob / (dim * log 2) + log2(levels)

    Args:
        log_prob: nats of x in [0, 1]^dim, any shape.
        dim: number of elements of one sample.
        levels: number of levels of the integer data that x was made from; 1 drops the term log2(levels).

    Returns:
        log_prob's shape; smaller is better.

    Raises:
        TypeError, ValueError: dim or levels is not an integer, or < 1.

    Example:
        >>> bits_per_dim(torch.zeros(1), 784, 256)
        tensor([8.])
    """
    op = "bits_per_dim"
    dim, levels = check.at_least(op, "dim", dim, 1), check.at_least(op, "levels", levels, 1)
    return -log_prob / (dim * math.log(2)) + math.log2(levels)
