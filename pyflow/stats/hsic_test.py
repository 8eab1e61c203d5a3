"""Tests of independence by the Hilbert-Schmidt independence criterion."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from .._schemas import HSIC_KERNELS, PURPOSES
from ..hsic.estimators import ESTIMATORS, Pairs, chain, divisor, estimates, ratio, values, whole
from ..hsic.kernels import UNIT_DIAGONAL, Bandwidth, Variable, kernel_of, kernel_specs
from ..ops import noise
from ..ops.hsic import permuted, sums
from ..reference.noise import MASK
from ._grams import CentredGram, blocks
from ._inputs import bar, check_kernels, same, samples
from .hsic import pair_of

METHODS = ("permutation", "gamma")
# the variance formula of the gamma method fails for fewer rows: p <= 0.01 in 12 % of independent samples of 6 rows and
# 3 % of 15 rows; in 1.6 to 2.4 % of 30 to 100 rows
GAMMA_ROWS = 20
# up to this many rows both Gram matrices are stored, 4 n^2 or 8 n^2 bytes each
GRAM_ROWS = 8192
# up to this many rows permutations may tie that no property of the data tells of
FEW_ROWS = 256
# with more rows, permutations per pass: a tile of x's matrix serves all of them
TOGETHER = 4


class Gamma(NamedTuple):
    """The null distribution of the statistic as a gamma distribution."""

    shape: float
    scale: float


@dataclass(frozen=True, eq=False)
class HSICTest:
    """The result of `hsic_test`.

    Attributes:
        statistic: HSIC of x and y by the chosen estimator.
        pvalue: probability of a statistic at least as large if x and y are independent.
        null: (permutations,) float64 statistics of permuted data, or a `Gamma`.
        method: "permutation" or "gamma".
    """

    statistic: float
    pvalue: float
    null: np.ndarray | Gamma = field(repr=False)
    method: str

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HSICTest):
            return NotImplemented
        return all(same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __hash__(self) -> int:
        return hash((self.statistic, self.pvalue, self.method))


def hsic_test(
    x: object,
    y: object,
    *,
    method: str = "permutation",
    permutations: int = 1000,
    seed: int = 0,
    kernel: str = "rbf",
    bandwidth: Bandwidth = "median",
    kernel_y: str | None = None,
    bandwidth_y: Bandwidth | None = None,
    estimator: str = "biased",
    normalize: bool = False,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    progress: bool = True,
) -> HSICTest:
    """Test of independence of x and y: HSIC compared with its distribution under independence.

    p = (1 + #{null >= statistic}) / (1 + permutations), where the null values are HSIC of x and permuted rows of y.

    Args:
        x: (n, d_x) or (n,) array, list, tensor or pandas table; (n, n) for the kernel "precomputed"; labels of any type
            for "delta". Rows of tables are paired by position.
        y: (n, d_y) or (n,) likewise.
        method: "permutation", exact at any n; or "gamma", which fits a gamma distribution to the mean and variance of
            the null, without permutations: for the biased estimators, kernels with k(x, x) = 1, and large n. It is
            good at p = 0.05; from n = 30 to 100 p below 0.01 is about twice too frequent, p below 0.001 two to six
            times, and both more often for rare labels: take permutations where small p count.
        permutations: number of permutations, at least 1.
        seed: 64-bit seed of the permutations.
        kernel, bandwidth, kernel_y, bandwidth_y, estimator, degree, gamma, coef0: as for `pyflow.ops.hsic`.
        normalize: divide the statistic and its null by sqrt(HSIC(x, x) HSIC(y, y)); p is the same.
        progress: show a bar for calls longer than a second, where tqdm is installed.

    Returns:
        `HSICTest` with statistic, pvalue, null and method. If all rows of x or of y are equal: statistic 0, p 1.

    Raises:
        TypeError: not numbers, or a seed or a count that is not an integer.
        ValueError: different n, too few rows (2; unbiased 4; gamma 20), values that are not finite, a bandwidth that
            is not positive, a precomputed matrix that is not square or not symmetric, permutations below 1, an
            estimator or a kernel that the gamma method does not support, a statistic beyond float64.

    Notes:
        Permutation r is the stable argsort of n Philox words (purpose "permutation", step r): the same on every
        backend, device and thread count. A null value counts as reaching the statistic if it is lower by no more than
        the rounding of such sums in float64, so that rounding does not decide ties of repeated data. Up to n = 8,192,
        Gram matrices are stored: in float32 (0.5 GiB for both), or in float64 where permutations may tie, which is up
        to n = 256, and where each of x and y has a linear kernel, a given matrix or rows that repeat. Above, every
        permutation is a pass over tiles of the same dtype with memory O(n). The gamma method works on blocks of rows at
        any n.

    Source:
        Gretton et al. 2007, A Kernel Statistical Test of Independence; Phipson and Smyth 2010 for the 1 in p.

    Example:
        >>> import numpy as np
        >>> x = np.linspace(-1, 1, 50)
        >>> result = hsic_test(x, x**2, permutations=200)
        >>> round(result.statistic, 4), round(result.pvalue, 4)
        (0.0329, 0.005)
    """
    op = "hsic_test"
    check.choice(op, "method", method, METHODS)
    check.choice(op, "estimator", estimator, ESTIMATORS)
    permutations = check.at_least(op, "permutations", permutations, 1)
    normalize = check.flag(op, "normalize", normalize)
    specs = of_x, of_y = kernel_specs(kernel, bandwidth, kernel_y, bandwidth_y, degree, gamma, coef0)
    check_kernels(op, specs)
    x, y = samples(op, "x", x, of_x.name), samples(op, "y", y, of_y.name)
    pair = pair_of(op, x, y, specs, estimator)
    n = len(pair[0].z)
    key = _key(op, seed, pair[0].z.device)
    if method == "gamma":
        return _gamma_test(op, pair, estimator, normalize, progress)
    held = n <= GRAM_ROWS or any(HSIC_KERNELS[v.kernel] == "precomputed" for v in pair)
    statistics, own, added = (_of_grams if held else _of_tiles)(pair, permutations, key, estimator, progress)
    tolerance = chain(n) * added.sqrt().prod()
    if normalize:
        statistics, tolerance = ratio(statistics, *own), ratio(tolerance, *own)
    exceeding = int((statistics[1:] >= statistics[0] - tolerance).sum())
    statistic, *null = (statistics if normalize else whole(statistics, *pair)).tolist()
    _finite(op, [statistic, *null])
    return HSICTest(statistic, (1 + exceeding) / (1 + permutations), np.array(null), method)


def _finite(op: str, values: list[float]) -> None:
    wrong = [value for value in values if not math.isfinite(value)]
    if wrong:
        raise ValueError(
            f"{op}: the statistic and its null must be finite, got {wrong[0]}: scale x and y, or normalize"
        )


def _key(op: str, seed: int, device: torch.device) -> Tensor:
    """Return the (2,) words of the seed."""
    if isinstance(seed, Tensor) or seed is None:
        raise TypeError(f"{op}: seed must be an integer, got {type(seed).__name__}")
    word = noise.seed_tensor(op, seed, None, None, device)
    return torch.stack((word & MASK, word >> 32 & MASK))


def draw(key: Tensor, first: int, count: int, n: int) -> Tensor:
    """Return (count, n) int32 permutations, starting at number `first`, of the seed with the words `key`."""
    device = key.device
    block = torch.arange(-(-n // 4), device=device).expand(count, -1)
    step = torch.arange(first, first + count, device=device).unsqueeze(1).expand_as(block)
    high = torch.full_like(block, PURPOSES.index("permutation") << 24)
    counter = torch.stack((block, torch.zeros_like(block), step, high), -1)
    drawn = noise.words("philox", counter, key.expand(*block.shape, 2))
    # the index in the low bits makes every key unique: any sort gives the stable order
    bits = max(n - 1, 1).bit_length()
    keys = (drawn.flatten(1)[:, :n] - 2**31 << bits) | torch.arange(n, device=device)
    # NumPy's sort is three times as fast as torch's on a CPU
    keys = torch.from_numpy(np.sort(keys.numpy(), axis=1)) if keys.is_cpu else keys.sort(1).values
    return (keys & (1 << bits) - 1).int()


def _of_grams(
    pair: list[Variable], count: int, key: Tensor, estimator: str, progress: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the statistic and its null (1 + count,) float64, computed from both Gram matrices.

    Also return HSIC of each variable with itself (2,), and the sums of absolute values (2,) that it consists of. With
    both matrices centred, only one of the three sums of HSIC is not 0.
    """
    n = len(pair[0].z)
    # rounding to float32 would break ties
    dtype = torch.float64 if n <= FEW_ROWS or all(map(_may_tie, pair)) else torch.float32
    (k, k_scale), (m, m_scale) = (CentredGram(v, estimator == "unbiased").matrix(dtype) for v in pair)
    diagonals = k.diagonal().double(), m.diagonal().double()
    over = divisor(n, estimator)
    # a part takes about a second, and at most 16 MiB of words
    part = max(1, min(2**21 // n, max(32, 2**28 // n**2)))
    statistics, identity = [], torch.arange(n, dtype=torch.int32, device=key.device).unsqueeze(0)
    with bar(count, "permutation", progress) as done:
        for first in range(0, count, part):
            index = draw(key, first, min(part, count - first), n)
            new = len(index)
            if first == 0:
                index = torch.cat((identity, index))
            statistics.append(permuted(k, m, index) + diagonals[1][index.long()] @ diagonals[0])
            done(new)
    own = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in (k, m)])
    scales = torch.stack((k_scale, m_scale))
    own = own * scales.square() / over
    return torch.cat(statistics) * scales.prod() / over, own, own


def _of_tiles(
    pair: list[Variable], count: int, key: Tensor, estimator: str, progress: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as `_of_grams`, from tiles instead of stored matrices."""
    op = "hsic_test"
    # float32 rounding of means and products would break ties
    if all(map(_may_tie, pair)):
        pair = [v._replace(z=v.z.double(), scale=v.scale.double()) for v in pair]
    x, y = pair
    n = len(x.z)
    own = values(Pairs(op, pair, [(0, 0), (1, 1)], estimator, False, sums))
    added = torch.stack([_added(op, v, estimator) for v in pair])
    statistics, identity = [], torch.arange(n, device=key.device).unsqueeze(0)
    with bar(count, "permutation", progress) as done:
        for start in range(0, count, TOGETHER):
            index = draw(key, start, min(TOGETHER, count - start), n).long()
            new = len(index)
            if start == 0:
                index = torch.cat((identity, index))
            others = [y._replace(z=y.z[row], diagonal=y.diagonal[row]) for row in index]
            pairs = [(0, 1 + m) for m in range(len(others))]
            statistics.append(values(Pairs(op, [x, *others], pairs, estimator, False, sums)))
            done(new)
    return torch.cat(statistics), own, added


def _may_tie(v: Variable) -> bool:
    """Whether permutations of many rows may have the same HSIC, if those of the other variable may too."""
    return v.linear or HSIC_KERNELS[v.kernel] == "precomputed" or len(v.z.unique(dim=0)) < len(v.z)


def _added(op: str, v: Variable, estimator: str) -> Tensor:
    """Return the sum of absolute values in HSIC of v with itself."""
    if v.linear:
        # the squared covariances
        return v.diagonal.sum().square() / divisor(len(v.z), estimator)
    of = Pairs(op, [v], [(0, 0)], estimator, False, sums)
    return cast(Tensor, estimates(of, with_added=True).added[0])


def _gamma_test(op: str, pair: list[Variable], estimator: str, normalize: bool, progress: bool) -> HSICTest:
    if estimator == "unbiased":
        raise ValueError(f"{op}: the gamma method must have a biased estimator, got unbiased")
    for v in pair:
        if HSIC_KERNELS[v.kernel] not in UNIT_DIAGONAL:
            raise ValueError(f"{op}: the gamma method must have kernels rbf, laplacian or delta, got {kernel_of(v)}")
    n = len(pair[0].z)
    if n < GAMMA_ROWS:
        raise ValueError(f"{op}: the gamma method needs at least {GAMMA_ROWS} rows, got {n}")
    x, y = (CentredGram(v, False) for v in pair)
    parts = [torch.zeros(4, dtype=torch.float64, device=pair[0].z.device)]
    with bar(n, "row", progress) as done:
        for start, k, m in blocks(x, y):
            product = k * m
            total = product.sum()
            variance = product.square().sum() - product.diagonal(start).square().sum()
            parts.append(torch.stack((total, k.square().sum(), m.square().sum(), variance)))
            done(len(k))
    xy, xx, yy, squares = torch.stack(parts).sum(0)
    # mean over all permutations: tr(H K H) tr(H L H) / (n^2 (n - 1))
    mean = (x.mean_distance() * y.mean_distance() * (n - 1) / n**2).item()
    factor = 72 * (n - 4) * (n - 5) / (n * (n - 1) * (n - 2) * (n - 3))
    variance = factor * squares.item() / 36 / (n * (n - 1))
    # mean and variance describe the sum divided by n^2; unit converts them to the statistic
    over = divisor(n, estimator)
    if normalize:
        unit, statistic = (ratio(v, xx, yy) for v in (torch.full_like(xy, n**2), xy))
    else:
        unit, statistic = (whole(v / over, *pair) for v in (torch.full_like(xy, n**2), xy))
    if not (mean > 0 and variance > 0) or x.constant or y.constant:
        return HSICTest(statistic.item(), 1.0, Gamma(math.nan, math.nan), "gamma")
    # p is computed before the conversion, whose unit may leave float64's range
    shape, scale = mean**2 / variance, variance / mean
    null = Gamma(shape, scale * unit.item())
    _finite(op, [statistic.item(), *null])
    at = (xy / n**2).clamp(min=0).item() / scale
    given = [torch.tensor(v, dtype=torch.float64, device="cpu") for v in (shape, at)]
    return HSICTest(statistic.item(), torch.special.gammaincc(*given).item(), null, "gamma")
