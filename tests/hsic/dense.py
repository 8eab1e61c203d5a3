"""Data for the tests of HSIC, and HSIC of whole kernel matrices by the textbook formulas."""

from __future__ import annotations

import torch

F32, F64 = torch.float32, torch.float64
KERNELS = ("rbf", "laplacian", "linear", "polynomial")
ESTIMATORS = ("biased", "biased_n2", "unbiased")


def draw(shape, dtype=F32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def dependent(n, d=3, dtype=F32, batch=(), seed=0):
    """Return x and y = |x| + 0.5 * noise."""
    x = draw((*batch, n, d), F64, seed)
    y = x.abs() + 0.5 * draw((*batch, n, d), F64, seed + 1)
    return x.to(dtype), y.to(dtype)


def matrix(x, kernel, bandwidth=1.0, degree=3, coef0=1.0):
    """Return the kernel matrix by its definition, in float64."""
    x = x.double()
    away = lambda p: torch.cdist(x, x, p, compute_mode="donot_use_mm_for_euclid_dist")
    return {
        "rbf": lambda: torch.exp(-away(2.0).square() / (2 * bandwidth**2)),
        "laplacian": lambda: torch.exp(-away(1.0) / bandwidth),
        "rbf less 1": lambda: torch.expm1(-away(2.0).square() / (2 * bandwidth**2)),
        "laplacian less 1": lambda: torch.expm1(-away(1.0) / bandwidth),
        "linear": lambda: x @ x.mT,
        "polynomial": lambda: (x @ x.mT / x.shape[-1] + coef0) ** degree,
    }[kernel]()


def definition(k, m, estimator):
    """Return HSIC of two kernel matrices by the textbook formulas."""
    n = k.shape[-1]
    if estimator == "unbiased":
        k, m = (g - g.diagonal(dim1=-2, dim2=-1).diag_embed() for g in (k, m))
        trace, rows = (k * m).sum((-2, -1)), (k.sum(-1) * m.sum(-1)).sum(-1)
        total = k.sum((-2, -1)) * m.sum((-2, -1)) / ((n - 1) * (n - 2))
        return (trace + total - 2 / (n - 2) * rows) / (n * (n - 3))
    h = torch.eye(n, dtype=F64) - 1 / n
    return torch.einsum("...ij,...ji->...", k @ h, m @ h) / (n**2 if estimator == "biased_n2" else (n - 1) ** 2)


def scale_of(k, m, estimator):
    """Return the scale of relative errors. It is not the value alone, because the unbiased value may be near 0."""
    own = [definition(g, g, estimator).clamp(min=0) for g in (k, m)]
    return torch.maximum(definition(k, m, estimator).abs(), 1e-2 * (own[0] * own[1]).sqrt())


def leaves_of(*tensors):
    return [t.detach().requires_grad_() for t in tensors]


def scattered(how, d):
    """Return rows with outliers or clusters so far apart that float32 dot products lose the distances of close rows."""
    x, y = dependent(150, d, seed=5)
    if how == "two clusters":
        x, y = x + 2.0**14 * (torch.arange(150)[:, None] % 2), y - 2.0**14 * (torch.arange(150)[:, None] % 2)
    elif how == "heavy tails":
        x = x / draw((150, 1), seed=6).abs().pow(4)
    else:
        x[0] = x[2] = how
        y[1] = -how
    return x, y
