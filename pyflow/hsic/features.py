"""Approximate HSIC by feature maps (random Fourier features, Nystrom), in time linear in n."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._schemas import HSIC_KERNELS
from ..ops.noise import normal, seed_number, seed_tensor, uniform
from ..reference import matmul
from .estimators import divisor, ratio, whole
from .kernels import Variable, between, kernel_of, points

APPROXIMATIONS = ("rff", "nystrom")
# number of feature elements per chunk of rows
HELD = 2**22


class Features(NamedTuple):
    """A feature map: the kernel of two rows is the mean over `groups` of dot products of `width` features.

    Groups are independent random draws; there is one group if the map is not random.
    """

    of: Callable[[Tensor], Tensor]  # (..., m, d) of `points` -> (..., m, groups * width)
    groups: int
    width: int


class Sums(NamedTuple):
    """Sums over the centred features of one pair of variables, float64; gx and gy are the numbers of groups."""

    products: Tensor  # (..., gx, gy) squared covariances, summed over the features of a group
    norms: Tensor | None  # (..., gx, gy) products of squared feature norms, summed over rows
    x: Tensor | None  # (..., gx) squared feature norms, summed over rows
    y: Tensor | None  # (..., gy) likewise


def check_options(op: str, approximate: str | None, n_features: int, seed: int | Tensor | None) -> None:
    """Check the options of an approximation, also where there is none."""
    if approximate is not None:
        check.choice(op, "approximate", approximate, APPROXIMATIONS)
    check.at_least(op, "n_features", n_features, 2)
    if isinstance(seed, Tensor):
        check.int64_tensor(op, "seed", seed)
    elif seed is not None:
        seed_number(op, seed)


def approximation(
    op: str,
    every: Sequence[Variable],
    *,
    estimator: str,
    normalize: bool,
    approximate: str,
    n_features: int,
    seed: int,
    with_error: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return HSIC of the two variables and its error (None without `with_error`), (...) float64.

    "rff": the error is the standard error over the draw of frequencies. "nystrom": the exact biased value is at most
    `error` above the approximation; for the unbiased estimator this is an estimate. With `normalize`, the error covers
    the numerator only. The options are checked.
    """
    if with_error and approximate == "rff" and n_features < 4:
        raise ValueError(f"{op}: n_features must be at least 4 for the error of 'rff', got {n_features}")
    for v in every:
        _check_kernel(op, approximate, v)
    x, y = every
    # one seed for all draws, so that both variables use the same rows as landmarks
    drawn = seed_tensor(op, seed, None, x.z.device)
    rows = [points(v) for v in every]
    if approximate == "rff":
        # hsic(x, x) needs two independent draws of frequencies for x
        features = [_fourier(v, n_features, drawn, step) for step, v in enumerate((x, y) * (1 + normalize))]
        own = [(0, 2), (1, 3)]
    else:
        features = [_landmarks(v, of, n_features, drawn) for v, of in zip(every, rows, strict=True)]
        own = [(0, 0), (1, 1)]
    n = x.z.shape[-2]
    bounded = with_error and approximate == "nystrom"
    pairs = [(0, 1), *(own if normalize else ())]
    rows = [rows[m % 2] for m in range(len(features))]
    sums, spectra = _sums(rows, features, pairs, estimator == "unbiased", bounded)
    tables = [_table(one, n, estimator) for one in sums]
    value, *others = (table.mean((-2, -1)) for table in tables)
    constant = [v.constant for v in every if v.constant is not None]
    if constant:
        value = torch.where(torch.stack(constant).any(0), 0.0, value)
    error = None
    if bounded:
        error = _bound(every, spectra) / ((n - 1) ** 2 if estimator != "biased_n2" else n**2)
    elif with_error:
        error = _standard_error(tables[0])
    if normalize:
        others = [_above_rounding(own, v, n) for own, v in zip(others, every, strict=True)]
        error = None if error is None else ratio(error, *others)
        value = ratio(value, *others)
    else:
        error = None if error is None else whole(error, *every)
        value = whole(value, *every)
    return value, error


def _above_rounding(own: Tensor, v: Variable, n: int) -> Tensor:
    """Return HSIC of a variable with itself, set to 0 where it does not exceed the rounding of the features."""
    size = v.diagonal.sum(-1) / n
    if v.constant is not None:
        own = torch.where(v.constant, 0.0, own)
    return torch.where(own <= (torch.finfo(v.z.dtype).eps * size).square(), 0.0, own)


def _check_kernel(op: str, approximate: str, v: Variable) -> None:
    name = kernel_of(v)
    if approximate == "rff" and name not in ("rbf", "laplacian"):
        raise ValueError(f"{op}: approximate 'rff' must have kernels rbf or laplacian, got {name}")
    if approximate == "nystrom" and name == "precomputed":
        raise ValueError(f"{op}: approximate 'nystrom' must have rows to choose from, got a precomputed matrix")


def _fourier(v: Variable, n_features: int, seed: Tensor, step: int) -> Features:
    """Random Fourier features: cos and sin of n_features / 2 random frequencies."""
    shape = (v.z.shape[-1], n_features // 2)
    draw: dict[str, Any] = {
        "seed": seed,
        "step": step,
        "purpose": "monte_carlo",
        "device": v.z.device,
        "dtype": v.z.dtype,
    }
    if HSIC_KERNELS[v.kernel] == "rbf":
        frequencies = normal(shape, **draw)
    else:
        # Cauchy frequencies; a uniform value is the lower end of an interval, 2**-25 moves it to the middle
        frequencies = ((uniform(shape, **draw) + 2.0**-25 - 0.5) * math.pi).tan()

    def of(z: Tensor) -> Tensor:
        angle = matmul(z, frequencies)
        return torch.stack((angle.cos(), angle.sin()), -1).flatten(-2)

    return Features(of, shape[1], 2)


def _landmarks(v: Variable, rows: Tensor, n_features: int, seed: Tensor) -> Features:
    """Nystrom features: K(., landmarks) K(landmarks, landmarks)^(-1/2), in float64."""
    n = rows.shape[-2]
    count = min(n_features, n)
    which = uniform((n,), seed=seed, purpose="monte_carlo", device=rows.device).topk(count).indices
    chosen = rows.index_select(-2, which)
    gram = between(v, chosen, chosen)
    # jitter: gram is singular if landmarks are equal or outnumber the dimensions of the feature space
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(gram.dtype).tiny)[..., None, None]
    factor = torch.linalg.cholesky(gram + 1e-8 * scale * torch.eye(count, dtype=gram.dtype, device=gram.device))

    def of(z: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, between(v, chosen, z), upper=False).mT

    return Features(of, 1, count)


def _sums(
    zs: Sequence[Tensor],
    features: Sequence[Features],
    pairs: Sequence[tuple[int, int]],
    unbiased: bool,
    spectra: bool,
) -> tuple[list[Sums], list[tuple[Tensor, Tensor]]]:
    """Return the sums of every pair, in two passes over the rows.

    With `spectra`, also the feature covariance and n |mean|^2 of every variable, else an empty list.
    """
    n = zs[0].shape[-2]
    rows = max(1, HELD // max(f.groups * f.width for f in features))

    def chunks():
        for start in range(0, n, rows):
            yield [f.of(z[..., start : start + rows, :]) for f, z in zip(features, zs, strict=True)]

    totals: list[Any] = [0.0] * len(features)
    for chunk in chunks():
        totals = [total + phi.double().sum(-2, keepdim=True) for total, phi in zip(totals, chunk, strict=True)]
    means = [total / n for total in totals]
    covariances: list[Any] = [0.0] * len(pairs)
    norms: list[Any] = [0.0] * len(pairs)
    lengths: list[Any] = [0.0] * len(features)
    own: list[Any] = [0.0] * len(features)
    for chunk in chunks():
        centred = [phi - mean.to(phi.dtype) for phi, mean in zip(chunk, means, strict=True)]
        covariances = [
            c + matmul(centred[a].mT, centred[b]).double() for c, (a, b) in zip(covariances, pairs, strict=True)
        ]
        if spectra:
            own = [c + matmul(phi.mT, phi).double() for c, phi in zip(own, centred, strict=True)]
        if unbiased:
            squares = [
                phi.double().square().unflatten(-1, (f.groups, f.width)).sum(-1)
                for phi, f in zip(centred, features, strict=True)
            ]
            norms = [c + squares[a].mT @ squares[b] for c, (a, b) in zip(norms, pairs, strict=True)]
            lengths = [total + s.sum(-2) for total, s in zip(lengths, squares, strict=True)]
    if spectra:
        # covariance and mean give the trace of the uncentred features, which `_bound` compares with v.diagonal
        own = [(c, n * mean.square().sum((-2, -1))) for c, mean in zip(own, means, strict=True)]
    result = []
    for (a, b), covariance, norm in zip(pairs, covariances, norms, strict=True):
        f, g = features[a], features[b]
        squared = covariance.square().unflatten(-1, (g.groups, g.width)).unflatten(-3, (f.groups, f.width))
        rest = (norm, lengths[a], lengths[b]) if unbiased else (None, None, None)
        result.append(Sums(squared.sum((-3, -1)), *rest))
    return result, own if spectra else []


def _table(s: Sums, n: int, estimator: str) -> Tensor:
    """(..., gx, gy) HSIC for every pair of feature groups of x and y."""
    if estimator != "unbiased":
        return s.products / divisor(n, estimator)
    assert s.norms is not None and s.x is not None and s.y is not None
    means = s.x.unsqueeze(-1) * s.y.unsqueeze(-2) / ((n - 1) * (n - 2))
    return (s.products - s.norms + means - 2 / (n - 2) * s.norms) / divisor(n, estimator)


def _standard_error(table: Tensor) -> Tensor:
    """Return the standard error of the table's mean. Rows and columns are independent draws."""
    parts = [table.mean(dim).var(-1) / table.mean(dim).shape[-1] for dim in (-1, -2)]
    return (parts[0] + parts[1]).sqrt()


def _bound(every: Sequence[Variable], spectra: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return an upper bound on tr(K H L H) minus its Nystrom approximation.

    The residual E of K is positive semi-definite, so that tr(E H L H) <= tr(E) * largest eigenvalue of H L H.
    """
    missing, largest = [], []
    for v, (covariance, mean_part) in zip(every, spectra, strict=True):
        missing.append((v.diagonal.sum(-1) - covariance.diagonal(dim1=-2, dim2=-1).sum(-1) - mean_part).clamp(min=0))
        largest.append(torch.linalg.eigvalsh(covariance)[..., -1])
    return missing[0] * (largest[1] + missing[1]) + missing[1] * largest[0]
