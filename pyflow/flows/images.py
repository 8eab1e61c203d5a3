"""Between integer pixels and densities."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
        ValueError: levels < 1.

    Source:
        Theis et al. 2016, arXiv:1511.01844, section 3.1: the density of this bounds the discrete log-likelihood.

    Example:
        >>> y = dequantize(torch.tensor([0, 255]), 256)
        >>> (y * 256).floor().tolist()
        [0.0, 255.0]
    """
    _check_levels("dequantize", levels)
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
        ValueError: levels < 1.

    Example:
        >>> bits_per_dim(torch.zeros(1), 784, 256)
        tensor([8.])
    """
    _check_levels("bits_per_dim", levels)
    return -log_prob / (dim * math.log(2)) + math.log2(levels)


def _check_levels(op: str, levels: int) -> None:
    if levels < 1:
        raise ValueError(f"{op}: levels must be at least 1, got {levels}")
