"""Rows of kernels of dot products (linear, polynomial): scaling so that products stay in range.

The factors of the kernel are multiplied into z, so that autograd computes their gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._schemas import HSIC_KERNELS
from .kernels import KernelSpec, Variable, all_rows_equal
from .powers import ORDINARY, exponent_of, reduced, times_two_to


def product_variable(x: Tensor, sizes: tuple[float, float] | None, spec: KernelSpec) -> Variable:
    """Variable of a linear or polynomial kernel."""
    linear = spec.name == "linear"
    if linear:
        degree, gamma, coef0 = 1, 1.0, 0.0
    else:
        gamma = 1 / x.shape[-1] if spec.gamma is None else float(spec.gamma)
        degree, coef0 = int(spec.degree), float(spec.coef0)
    constant, exponent = all_rows_equal(x, sizes is not None), None
    if sizes is None or not _ordinary_products(sizes, x.shape[-1], degree, gamma, coef0):
        x, exponent = reduced(x)
    if linear:
        # the bits of a mean and of torch's products depend on the layout
        x = x.contiguous()
        z, at_zero = x - x.mean(-2, keepdim=True), x.new_zeros(())
    else:
        factor, more = math.sqrt(gamma), math.sqrt(coef0)
        if exponent is None:
            rows, root = x * factor, x.new_full((1, 1), more)
        else:
            factors, exponent = _together_reduced(exponent, factor, more, x)
            rows, root = x * factors[0], factors[1]
        # an extra column of sqrt(coef0) adds coef0 to every dot product
        z = torch.cat((rows, root.expand(*x.shape[:-1], 1)), -1)
        at_zero = (root[..., 0, 0].double().square() ** degree).to(x.dtype)
    if exponent is not None:
        exponent = 2 * degree * exponent
    diagonal = z.double().square().sum(-1)
    diagonal = diagonal if degree == 1 else diagonal**degree
    return Variable(z, at_zero, HSIC_KERNELS.index("polynomial"), degree, diagonal, linear, exponent, constant)


def _ordinary_products(sizes: tuple[float, float], d: int, degree: int, gamma: float, coef0: float) -> bool:
    """Whether kernel values of the largest rows are in range."""
    limit = 2.0 ** (ORDINARY / degree)
    return 1 / limit <= gamma * sizes[0] * sizes[0] + coef0 and gamma * d * sizes[1] * sizes[1] + coef0 <= limit


def _together_reduced(exponent: Tensor, factor: float, column: float, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Rescale factor and column of a polynomial kernel so that no row is longer than 1.

    `exponent` is the exponent that the rows were reduced by. Return the factor of the reduced rows and the value of the
    extra column, and the total exponent that both are divided by.
    """
    given = [torch.full((), v, dtype=torch.float64, device=x.device) for v in (factor, column, x.shape[-1] + 1)]
    factor_exponent, column_exponent, width_exponent = (exponent_of(v) + 1 for v in given)
    total = torch.maximum(exponent + 1 + factor_exponent, column_exponent) + (width_exponent + 1) // 2
    factors = [
        times_two_to(v, e).to(x.dtype)[..., None, None] for v, e in zip(given, (exponent - total, -total), strict=False)
    ]
    return factors, total
