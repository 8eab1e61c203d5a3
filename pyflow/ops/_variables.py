"""A variable of HSIC: data and kernel brought into the form that the operators take.

Kernels of distances are functions of z over a bandwidth; the factors of the others are multiplied into z, so that their
gradients come from torch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._schemas import HSIC_KERNELS
from ..reference import compute_dtype
from .noise import uniform

KERNELS = ("rbf", "laplacian", "linear", "polynomial", "delta", "precomputed")
MEDIAN_ROWS = 1000
ESTIMATORS = ("biased", "biased_n2", "unbiased")

Bandwidth = float | Tensor | str


class Variable(NamedTuple):
    """What `hsic_sums` is given for one variable; `batch` are leading dims."""

    z: Tensor  # (*batch, n, d)
    scale: Tensor  # (*batch) one over the bandwidth
    kernel: int  # of HSIC_KERNELS
    degree: int
    diagonal: Tensor  # (*batch, n) of K, float64
    linear: bool = False


def variable(
    op: str,
    name: str,
    x: Tensor,
    kernel: str,
    bandwidth: Bandwidth,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
) -> Variable:
    """Check one input and prepare it."""
    check.choice(op, "kernel" if name == "x" else "kernel_y", kernel, KERNELS)
    if kernel == "delta":
        return _labels(op, name, x)
    check.float_tensor(op, name, x)
    if x.dim() < 2:
        raise ValueError(f"{op}: {name} must be (..., n, d), got a tensor of shape {tuple(x.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must have at least one column, got shape {tuple(x.shape)}")
    if x.numel() and check.values_are_checked(x) and not all(math.isfinite(end.item()) for end in x.aminmax()):
        raise ValueError(f"{op}: {name} must be finite, got NaN or infinity")
    x = x.to(compute_dtype(x.dtype))
    if kernel == "precomputed":
        return _matrix(op, name, x)
    if kernel in ("linear", "polynomial"):
        return _products(op, x, kernel, degree, gamma, coef0)
    return _distances(op, name, x, kernel, bandwidth)


def variables(
    op: str,
    x: Tensor,
    y: Tensor,
    kernel: str,
    bandwidth: Bandwidth,
    kernel_y: str | None,
    bandwidth_y: Bandwidth | None,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
) -> list[Variable]:
    """x and y checked and prepared, of one dtype and with the same leading dims."""
    kernel_y = kernel if kernel_y is None else kernel_y
    bandwidth_y = bandwidth if bandwidth_y is None else bandwidth_y
    return together(
        op,
        [
            variable(op, "x", x, kernel, bandwidth, degree, gamma, coef0),
            variable(op, "y", y, kernel_y, bandwidth_y, degree, gamma, coef0),
        ],
    )


def together(op: str, every: list[Variable]) -> list[Variable]:
    """The variables with one dtype and the same leading dims."""
    first = every[0].z
    for other in every[1:]:
        if other.z.device != first.device:
            raise ValueError(f"{op}: all inputs must be on one device, got {first.device} and {other.z.device}")
        if other.z.shape[-2] != first.shape[-2]:
            raise ValueError(
                f"{op}: all inputs must have the same number of rows, got {first.shape[-2]} and {other.z.shape[-2]}"
            )
    try:
        batch = torch.broadcast_shapes(*(v.z.shape[:-2] for v in every))
    except RuntimeError:
        shapes = ", ".join(str(tuple(v.z.shape[:-2])) for v in every)
        raise ValueError(f"{op}: leading dims must broadcast, got {shapes}") from None
    dtype = torch.float64 if any(v.z.dtype == torch.float64 for v in every) else torch.float32
    return [
        v._replace(
            z=v.z.to(dtype).expand(*batch, *v.z.shape[-2:]),
            scale=v.scale.to(dtype).expand(batch),
            diagonal=v.diagonal.expand(*batch, -1),
        )
        for v in every
    ]


def rows_needed(op: str, n: int, estimator: str) -> None:
    check.choice(op, "estimator", estimator, ESTIMATORS)
    least = 4 if estimator == "unbiased" else 2
    if n < least:
        raise ValueError(f"{op}: the {estimator} estimator needs at least {least} rows, got {n}")


def _distances(op: str, name: str, x: Tensor, kernel: str, bandwidth: Bandwidth) -> Variable:
    if isinstance(bandwidth, str):
        if bandwidth != "median":
            raise ValueError(f"{op}: bandwidth must be a number, a tensor or 'median', got {bandwidth!r}")
        sigma = median_distance(x.detach(), 1.0 if kernel == "laplacian" else 2.0)
    else:
        sigma = _bandwidth(op, "bandwidth" if name == "x" else "bandwidth_y", bandwidth, x)
    return Variable(x, 1 / sigma, HSIC_KERNELS.index(kernel), 1, _ones(x))


def _ones(x: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.float64, device=x.device).expand(x.shape[:-1])


def _bandwidth(op: str, name: str, value: float | Tensor, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((), check.positive(op, name, value), dtype=x.dtype, device=x.device)
    check.float_tensor(op, name, value)
    batch = x.shape[:-2]
    fits = value.dim() <= len(batch) and all(m in (1, n) for m, n in zip(reversed(value.shape), reversed(batch)))
    if not fits:
        raise ValueError(
            f"{op}: {name} must broadcast to the batch dims {tuple(batch)}, got shape {tuple(value.shape)}"
        )
    if check.values_are_checked(value) and not bool(((value > 0) & value.isfinite()).all()):
        raise ValueError(f"{op}: {name} must be positive and finite, got other values")
    return value.to(x.device, x.dtype)


def _products(op: str, x: Tensor, kernel: str, degree: int, gamma: float | None, coef0: float) -> Variable:
    if kernel == "linear":
        z, degree = x - x.mean(-2, keepdim=True), 1
    else:
        degree = check.at_least(op, "degree", degree, 1)
        gamma = 1 / x.shape[-1] if gamma is None else check.positive(op, "gamma", gamma)
        coef0 = check.number(op, "coef0", coef0)
        if not 0 <= coef0 < math.inf:
            raise ValueError(f"{op}: coef0 must be at least 0 and finite, got {coef0}")
        # a column more: its products are coef0
        z = torch.cat((x * math.sqrt(gamma), x.new_full((*x.shape[:-1], 1), math.sqrt(coef0))), -1)
    diagonal = z.double().square().sum(-1) ** degree
    return Variable(z, z.new_ones(()), HSIC_KERNELS.index("polynomial"), degree, diagonal, kernel == "linear")


def _matrix(op: str, name: str, x: Tensor) -> Variable:
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{op}: {name} must be square with a precomputed kernel, got shape {tuple(x.shape)}")
    if check.values_are_checked(x):
        error = (x - x.mT).abs().amax() if x.numel() else x.new_zeros(())
        if bool(error > 1e-5 * x.abs().amax() if x.numel() else False):
            raise ValueError(f"{op}: {name} must be symmetric with a precomputed kernel, off by {error.item():.3g}")
    # HSIC does not change, and the sums are of smaller numbers
    z = x - x.detach().mean((-2, -1), keepdim=True)
    diagonal = z.diagonal(dim1=-2, dim2=-1).double()
    return Variable(z, z.new_ones(()), HSIC_KERNELS.index("precomputed"), 1, diagonal)


def _labels(op: str, name: str, x: object) -> Variable:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.is_complex():
        raise TypeError(f"{op}: {name} must not be complex, got {check.short(x.dtype)}")
    if x.dim() == 0:
        raise ValueError(f"{op}: {name} must be (n,) or (..., n, d), got a scalar")
    x = x.unsqueeze(-1) if x.dim() == 1 else x
    if x.is_floating_point():
        z = x.detach().to(compute_dtype(x.dtype))
    else:
        # float32 holds 24 bits exactly
        pieces = [x & 0xFFFFFF, x >> 24 & 0xFFFFFF, x >> 48] if x.dtype in (torch.int64, torch.int32) else [x]
        z = torch.cat([piece.float() for piece in pieces], -1)
    return Variable(z, z.new_ones(()), HSIC_KERNELS.index("delta"), 1, _ones(z))


def points(v: Variable) -> Tensor:
    """(..., n, d) rows that the kernel is a function of, in units of the bandwidth: `between` takes some of them."""
    if HSIC_KERNELS[v.kernel] not in ("rbf", "laplacian"):
        return v.z
    return (v.z - v.z.detach().mean(-2, keepdim=True)) * v.scale[..., None, None]


def between(v: Variable, a: Tensor, b: Tensor, shift: Tensor | None = None) -> Tensor:
    """(..., m, n) kernel between `points` a (..., m, d) and b (..., n, d), less shift (...) of 0 or 1, in float64.

    Not for precomputed kernels.
    """
    a, b = a.double(), b.double()
    name = HSIC_KERNELS[v.kernel]
    if name == "polynomial":
        return (a @ b.mT) ** v.degree
    if name == "delta":
        return (torch.cdist(a, b, p=0) == 0).double()
    if name == "laplacian":
        exponent = -torch.cdist(a, b, p=1)
    else:
        half = [t.square().sum(-1) / 2 for t in (a, b)]
        exponent = (a @ b.mT - (half[0].unsqueeze(-1) + half[1].unsqueeze(-2))).clamp(max=0)
    value = exponent.exp()
    return value if shift is None else torch.where(shift[..., None, None] != 0, exponent.expm1(), value)


def ratio(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """xy / sqrt(xx yy), 0 where one of them is not positive."""
    defined = (xx > 0) & (yy > 0)
    # selected before the division, so that no NaN reaches a gradient
    xx, yy = (torch.where(defined, v, torch.ones_like(v)) for v in (xx, yy))
    return torch.where(defined, xy / (xx.sqrt() * yy.sqrt()), torch.zeros_like(xy))


def median_distance(x: Tensor, p: float = 2.0) -> Tensor:
    """The median of the distances between rows, as NumPy's; their mean where it is 0, and 1 where that is 0 too.

    Args:
        x: (..., n, d); of more than 1,000 rows the same 1,000 are picked for every batch.
        p: 2 for Euclidean distances, 1 for sums of absolute differences.

    Returns:
        (...) of x's dtype.
    """
    n = x.shape[-2]
    if n < 2:
        return x.new_ones(x.shape[:-2])
    if n > MEDIAN_ROWS:
        rows = uniform((n,), seed=0, device=x.device).topk(MEDIAN_ROWS).indices
        x = x.index_select(-2, rows)
    flat = [_median_distance(one, p) for one in x.reshape(-1, *x.shape[-2:])]
    return torch.stack(flat).reshape(x.shape[:-2]) if flat else x.new_ones(x.shape[:-2])


def _median_distance(x: Tensor, p: float) -> Tensor:
    distances = torch.pdist(x, p)
    count = len(distances)
    upper = distances.kthvalue(count // 2 + 1).values
    if count % 2 == 0:
        below = distances < upper
        largest_below = torch.where(below, distances, 0.0).amax()
        lower = torch.where(below.sum() == count // 2, largest_below, upper)
        upper = (lower + upper) / 2
    mean = distances.mean()
    return torch.where(upper > 0, upper, torch.where(mean > 0, mean, torch.ones_like(mean)))
