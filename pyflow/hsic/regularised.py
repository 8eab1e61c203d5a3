"""The regularised kernel matrix of normalised HSIC, Kc (Kc + epsilon n I)^-1.

Plain torch, forward and backward: the inverse needs the whole matrix, and most of the time goes into the Cholesky
factorisation by LAPACK or cuSOLVER, so that tiles or fused kernels would gain nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks as check
from .._schemas import HSIC_KERNELS
from ..reference import hsic as ref
from ..reference.center import center_gram
from .kernels import UNIT_DIAGONAL, Variable
from .powers import times_two_to


def regularised(op: str, name: str, v: Variable, epsilon: float) -> Tensor:
    """Return Kc (Kc + epsilon n I)^-1.

    Raise, or give NaN if values may not be read, where epsilon is not above the rounding error of Kc or Kc is
    indefinite.
    """
    n = v.z.shape[-2]
    entries, shift = ref.entries(v.z.double(), v.scale.double(), HSIC_KERNELS[v.kernel], v.degree)
    gram = torch.diagonal_scatter(entries, v.diagonal - shift.unsqueeze(-1), dim1=-2, dim2=-1)
    centred = center_gram(gram)
    if v.exponent is not None:
        centred = times_two_to(centred, v.exponent[..., None, None])
    if v.constant is not None:
        centred = torch.where(v.constant[..., None, None], 0.0, centred)
    centred = _above_rounding(op, v, gram, centred, epsilon)
    lifted = centred.diagonal(dim1=-2, dim2=-1) + epsilon * n
    factor, info = torch.linalg.cholesky_ex(torch.diagonal_scatter(centred, lifted, dim1=-2, dim2=-1))
    # epsilon is above the rounding, which therefore makes no kernel of rows indefinite
    if HSIC_KERNELS[v.kernel] == "precomputed":
        indefinite = info != 0
        if not check.values_are_checked(centred):
            factor = torch.where(indefinite[..., None, None], math.nan, factor)
        elif bool(indefinite.any()):
            raise ValueError(
                f"{op}: {name} must be positive semi-definite with a precomputed kernel, got negative eigenvalues"
            )
    return torch.cholesky_solve(centred, factor)


def _above_rounding(op: str, v: Variable, gram: Tensor, centred: Tensor, epsilon: float) -> Tensor:
    """Return Kc, with NaN where epsilon is not above its rounding error; raise if values may be read."""
    # rounding error of an entry; n of them are the error of an eigenvalue, which is compared with epsilon n
    unit = 4 * torch.finfo(torch.float64).eps
    if HSIC_KERNELS[v.kernel] in UNIT_DIAGONAL and unit < epsilon:
        # no entry exceeds 1, not even before it is multiplied by a power of two
        return centred
    rounding = unit * gram.detach().abs().amax((-2, -1))
    if v.exponent is not None:
        rounding = times_two_to(rounding, v.exponent)
    if v.constant is not None:
        rounding = torch.where(v.constant, 0.0, rounding)
    lost = ~(rounding < epsilon)
    if not check.values_are_checked(rounding):
        return torch.where(lost[..., None, None], math.nan, centred)
    if bool(lost.any()):
        least = f"{rounding.amax().item():.3g}"
        raise ValueError(f"{op}: epsilon must be above the rounding of the kernel matrix, {least}, got {epsilon}")
    return centred
