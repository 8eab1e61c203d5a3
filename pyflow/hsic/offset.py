"""HSIC of polynomial kernels whose rows lie far from 0, in plain torch and float64.

The entries of such a kernel matrix hardly differ, and sums of their products cancel. HSIC does not depend on terms
f(i) + f(j) of an entry. Without K(x_i, m) + K(m, x_j) - K(m, m), where m is the mean row, entries are as small as what
HSIC is made of.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import _checks as check
from .._schemas import HSIC_KERNELS
from ..reference import hsic as ref
from .kernels import Variable, between, points

# rows are far from 0 where the squared length of their mean is more than this many variances: half the digits of
# float64 are then lost
FAR = 2.0**14
# number of elements in a block of a matrix
BLOCK = 2**22


def far_from_zero(v: Variable) -> Tensor | None:
    """Return (*batch) whether the rows of a polynomial kernel are far from 0; None: they are not, or are unreadable."""
    if HSIC_KERNELS[v.kernel] != "polynomial" or v.linear or v.z.dtype != torch.float64:
        return None
    if not v.z.numel() or not check.values_are_checked(v.z):
        return None
    # the last column is constant, and the shift of the kernel takes care of it
    rows = v.z.detach()[..., :-1]
    mean = rows.mean(-2, keepdim=True)
    far = mean.square().sum((-2, -1)) > FAR * (rows - mean).square().sum(-1).mean(-1)
    return far if bool(far.any()) else None


def item(v: Variable, number: int) -> Variable:
    """Return one item of a variable's batch."""
    flat = v.z.reshape(-1, *v.z.shape[-2:])
    scale = v.scale.expand(v.z.shape[:-2]).reshape(-1)
    return v._replace(z=flat[number], scale=scale[number], diagonal=v.diagonal.reshape(len(flat), -1)[number])


def terms(v: Variable, w: Variable, unbiased: bool, far: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """Return (more, less) as `reference.hsic.hsic_terms`, for two variables without a batch."""
    n = len(v.z)
    parts, size = [], max(1, BLOCK // n)
    for start in range(0, n, size):
        arguments = (v, w, far, start, min(start + size, n))
        # the backward computes the blocks again, so that one at a time is stored
        parts.append(checkpoint(_block_sums, *arguments, use_reentrant=False, preserve_rng_state=False))
    rows = torch.cat([part[0] for part in parts], -1)
    cross = torch.stack([part[1] for part in parts]).sum(0)
    diagonals = torch.cat([part[2] for part in parts], -1)
    # the diagonals are less the shift already
    more, less, _ = ref.hsic_terms(
        rows[None], cross[None, None], torch.zeros_like(rows[None, :, 0]), diagonals[None], (0, 1), unbiased
    )
    return more[0, 0], less[0, 0]


def _block_sums(
    v: Variable, w: Variable, far: tuple[bool, bool], start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row sums (2, m) off the diagonal, the sum of products, and diagonals (2, m), for some rows."""
    own = torch.arange(stop - start, device=v.z.device)[:, None] + start == torch.arange(len(v.z), device=v.z.device)
    both = [
        _block(each, start, stop) if is_far else _plain_block(each, start, stop)
        for each, is_far in zip((v, w), far, strict=True)
    ]
    diagonals = torch.stack([block.diagonal(start) for block in both])
    off = [block.masked_fill(own, 0) for block in both]
    return torch.stack([block.sum(1) for block in off]), (off[0] * off[1]).sum(), diagonals


def _block(v: Variable, start: int, stop: int) -> Tensor:
    """Return K(x_i, x_j) - K(x_i, m) - K(m, x_j) + K(m, m), without the cancellation of these terms."""
    mean = v.z.detach().mean(0)
    a = v.z - mean
    length, along = mean.square().sum(), a @ mean
    # x_i.x_j = length + s + t + g
    s, t, g = along[start:stop, None], along, a[start:stop] @ a.T
    u = s + t + g
    # u^k - s^k - t^k
    power, total = g, v.degree * length ** (v.degree - 1) * g
    for k in range(1, v.degree):
        power = u * power + s**k * (t + g) + t**k * (s + g)
        total = total + math.comb(v.degree, k + 1) * length ** (v.degree - k - 1) * power
    return total


def _plain_block(v: Variable, start: int, stop: int) -> Tensor:
    """Return K - shift."""
    if HSIC_KERNELS[v.kernel] == "precomputed":
        return v.z[start:stop]
    every = points(v)
    shift = ref.shift_of(v.z, v.scale, HSIC_KERNELS[v.kernel])
    block = between(v, every[start:stop], every, shift)
    return block.diagonal_scatter(v.diagonal[start:stop] - shift, start)
