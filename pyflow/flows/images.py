"""Between integer pixels and densities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks as check


def dequantize(
    x: Tensor, levels: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Integer pixels with uniform noise, in [0, 1].

    (x + u) / levels with u ~ U[0, 1).

    Args:
        x: any shape, integers 0 ... levels - 1 of any dtype.
        levels: number of grey levels, 256 for bytes.
        generator: of the noise, on x's device; default torch's own.
        dtype: of the result.

    Returns:
        x's shape, in `dtype`.

    Raises:
        TypeError: x of complex numbers, a dtype that is not a float, levels that are not an integer.
        ValueError: levels < 1, or more than `dtype` has room for beside 8 bits of noise; x that are not integers in
            [0, levels) (of a tensor on a CPU, or with PYFLOW_CHECK=1).

    Source:
        Theis et al. 2016, arXiv:1511.01844, section 3.1: the density of this bounds the discrete log-likelihood.

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
        # torch compares bytes with 256 modulo 256, and the wide unsigned ones not at all
        pixels = x if x.is_floating_point() else x.long()
        wrong = (pixels < 0) | (pixels >= levels)
        if pixels.is_floating_point():
            wrong |= pixels != pixels.floor()
        if bool(wrong.any()):
            raise ValueError(f"{op}: x must be integers in [0, {levels}), got {pixels[wrong][0].item():g}")
    noise = torch.rand(x.shape, generator=generator, dtype=dtype, device=x.device)
    return noise.add_(x).div_(levels)


def bits_per_dim(log_prob: Tensor, dim: int, levels: int = 1) -> Tensor:
    """Log-likelihood of dequantised data as bits per dimension.

    -log_prob / (dim * log 2) + log2(levels)

    Args:
        log_prob: nats of x in [0, 1]^dim, any shape.
        dim: elements of one sample.
        levels: of the integer data x was made from; 1 leaves out the term.

    Returns:
        log_prob's shape; smaller is better.

    Raises:
        TypeError, ValueError: dim or levels that are not integers or < 1.

    Example:
        >>> bits_per_dim(torch.zeros(1), 784, 256)
        tensor([8.])
    """
    op = "bits_per_dim"
    dim, levels = check.at_least(op, "dim", dim, 1), check.at_least(op, "levels", levels, 1)
    return -log_prob / (dim * math.log(2)) + math.log2(levels)
