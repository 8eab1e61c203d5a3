"""Normalised HSIC of the HSIC bottleneck."""

from __future__ import annotations

from torch import Tensor

from .. import _checks as check
from ..hsic.estimators import rows_needed
from ..hsic.inputs import result_dtype, variables
from ..hsic.kernels import Bandwidth, kernel_specs
from ..hsic.regularised import regularised


def nhsic(
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float = 1e-5,
    kernel: str = "rbf",
    bandwidth: Bandwidth = "median",
    kernel_y: str | None = None,
    bandwidth_y: Bandwidth | None = None,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
) -> Tensor:
    """Normalised HSIC of x and y: tr(Rx Ry) with R = Kc (Kc + epsilon n I)^-1 and Kc = H K H.

    It counts the directions of feature space that x and y share.

    Args:
        x: (..., n, d_x) float32, float64, bfloat16 or float16; for the kernel "delta" labels (n,) of any dtype.
        y: (..., n, d_y) likewise.
        epsilon: positive; directions of Kc with eigenvalues far below epsilon n contribute nothing.
        kernel, bandwidth, kernel_y, bandwidth_y, degree, gamma, coef0: as for `hsic`.

    Returns:
        (...) float32 (float64 if an input is float64), in [0, n - 1].

    Raises:
        TypeError, ValueError: as for `hsic`; an epsilon that is not positive, or not above the rounding of Kc; a
            precomputed matrix that is not positive semi-definite.

    Notes:
        Time O(n^3), memory O(n^2): meant for minibatches. Computed in float64 for every dtype, because the condition
        number of Kc + epsilon n I is about 1 / epsilon. Differentiable any number of times.

    Source:
        Ma, Lewis and Kleijn 2019, The HSIC Bottleneck: Deep Learning without Back-Propagation, arXiv:1908.01580.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 20).unsqueeze(1)
        >>> round(nhsic(x, x**2).item(), 2), round(nhsic(x, x).item(), 2)
        (2.89, 5.79)
    """
    op = "nhsic"
    epsilon = check.positive(op, "epsilon", epsilon)
    pair = variables(op, x, y, kernel_specs(kernel, bandwidth, kernel_y, bandwidth_y, degree, gamma, coef0))
    rows_needed(op, pair[0].z.shape[-2], "biased")
    first, second = (regularised(op, name, v, epsilon) for name, v in zip("xy", pair, strict=True))
    return (first * second).sum((-2, -1)).to(result_dtype(x, y))
