"""Centred Gram matrices in blocks of rows, in float64, for permutation tests and the gamma approximation.

Plain torch: one matrix serves thousands of permutations of its index, so its cost does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._schemas import HSIC_KERNELS
from ..hsic.kernels import Variable, between, points
from ..reference import hsic as ref

# number of elements in a block
BLOCK = 2**22
# distances come from differences up to this many columns, and where squared lengths (in units of the bandwidth) are
# so large that their rounding hides the distances of near rows
DIRECT_UP_TO, FAR = 8, 2.0**17


class CentredGram:
    """H K H of one variable (n, d), or with `unbiased` the U-centred matrix, whose diagonal is 0.

    K is the kernel matrix of the stored rows z, without the factor of `Variable.exponent`.

    Attributes:
        rows: (n,) sums of K - shift over the other samples, float64.
        largest: largest absolute value of K - shift.
        rounding: bound on the rounding error of an entry.
    """

    def __init__(self, v: Variable, unbiased: bool) -> None:
        self.v, self.unbiased = v, unbiased
        self.n = v.z.shape[-2]
        kernel = HSIC_KERNELS[v.kernel]
        if kernel in ("rbf", "laplacian"):
            v = v._replace(z=v.z.double(), scale=v.scale.double())
        self.points = points(v)
        # for few columns, differences cost no more than dot products
        self.direct = kernel == "rbf" and (
            self.points.shape[-1] <= DIRECT_UP_TO or bool(self.points.square().sum(-1).amax() > FAR)
        )
        self.shift = ref.shift_of(v.z, v.scale, kernel).double()
        self.diagonal = v.diagonal - self.shift
        # the centred matrix of a constant variable is rounding error only
        self.constant = bool((v.z == v.z[:1]).all())
        self.starts = range(0, self.n, max(1, BLOCK // self.n))
        self._only: Tensor | None = None
        self.rows = v.z.new_empty(self.n, dtype=torch.float64)
        largest = []
        for start in self.starts:
            block = self._raw(start)
            if len(self.starts) == 1:
                self._only = block
            stop = start + len(block)
            self.rows[start:stop] = block.sum(1) - self.diagonal[start:stop]
            largest.append(block.abs().amax())
        self.largest = torch.stack(largest).amax()
        # grows with n: the means subtracted are sums over n entries
        self.rounding = 4 * self.n * torch.finfo(torch.float64).eps * self.largest
        if unbiased:
            self._mean = self.rows / (self.n - 2)
            self._all = self.rows.sum() / ((self.n - 1) * (self.n - 2))
        else:
            self._mean = (self.rows + self.diagonal) / self.n
            self._all = self._mean.mean()

    def _raw(self, start: int) -> Tensor:
        """Return (m, n) rows of K - shift."""
        if self._only is not None:
            return self._only
        stop = min(start + self.starts.step, self.n)
        rows = self.points[start:stop]
        if HSIC_KERNELS[self.v.kernel] == "precomputed":
            return rows.double()
        block = between(self.v, rows, self.points, self.shift, self.direct)
        block.diagonal(start).copy_(self.diagonal[start:stop])
        return block

    def block(self, start: int) -> Tensor:
        """Return (m, n) rows of the centred matrix; `start` is one of `starts`."""
        block = self._raw(start)
        if self.constant:
            return torch.zeros_like(block)
        stop = start + len(block)
        block = block - self._mean[start:stop, None] - (self._mean - self._all)
        if self.unbiased:
            block.diagonal(start).zero_()
        return block

    def matrix(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return (centred matrix / scale, scale); scale keeps the values of every kernel in float32's range.

        The matrix is 0 if no entry exceeds the rounding error.
        """
        scale = torch.where(self.largest > 0, self.largest, torch.ones_like(self.largest))
        result = self.v.z.new_empty((self.n, self.n), dtype=dtype)
        for start in self.starts:
            block = self.block(start)
            result[start : start + len(block)] = block / scale
        return self.above_rounding(result, scale), scale

    def above_rounding(self, matrix: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Return the centred matrix / scale, or zeros if no entry exceeds the rounding error."""
        low, high = matrix.aminmax()
        if bool(torch.maximum(-low, high) * scale <= self.rounding):
            return torch.zeros_like(matrix)
        return matrix

    def mean_distance(self) -> Tensor:
        """Return the mean of 1 - K off the diagonal."""
        return (1 - self.shift) - self.rows.sum() / (self.n * (self.n - 1))


def blocks(x: CentredGram, y: CentredGram) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (index of the first row, rows of x, rows of y), both centred, block by block."""
    for start in x.starts:
        yield start, x.block(start), y.block(start)
