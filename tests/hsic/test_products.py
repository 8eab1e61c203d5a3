from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import pyflow
from pyflow.testing import UNIT


def exact(x, y, degree):
    """HSIC of polynomial kernels with gamma 1 / d and coef0 1, in rational numbers."""

    def centred(z):
        rows = [[Fraction(v) for v in row] for row in z.double().tolist()]
        n, d = len(rows), len(rows[0])
        k = [[(sum(p * q for p, q in zip(a, b, strict=True)) / d + 1) ** degree for b in rows] for a in rows]
        means = [sum(row) / n for row in k]
        return [[k[i][j] - means[i] - means[j] + sum(means) / n for j in range(n)] for i in range(n)]

    k, m, n = centred(x), centred(y), len(x)
    return float(sum(k[i][j] * m[i][j] for i in range(n) for j in range(n)) / (n - 1) ** 2)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float64, 1.0), (torch.float64, 1e-2), (torch.float64, 1e-4), (torch.float32, 1.0), (torch.float32, 1e-2)],
)
def test_polynomials_of_small_rows_keep_their_digits(dtype, size, degree, backend):
    source = torch.Generator().manual_seed(0)
    x, y = (size * torch.randn(9, d, generator=source, dtype=torch.float64) for d in (3, 2))
    x, y = x.to(dtype), y.to(dtype)
    with pyflow.backend(backend):
        got = float(pyflow.ops.hsic(x, y, kernel="polynomial", degree=degree))
    # entries are 1 + O(size^2), rounded
    assert abs(got / exact(x, y, degree) - 1) <= 10 * degree * UNIT[dtype] * max(1.0, size**-2)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_of_polynomials_of_small_rows(backend):
    source = torch.Generator().manual_seed(1)
    x, y = (1e-3 * torch.randn(9, d, generator=source, dtype=torch.float64) for d in (3, 2))
    x.requires_grad_()
    centre = torch.eye(9, dtype=torch.float64) - 1 / 9
    gram = lambda z: centre @ (z @ z.mT / z.shape[1] + 1) ** 3 @ centre
    want = torch.autograd.grad((gram(x) * gram(y)).sum() / 64, x)[0]
    with pyflow.backend(backend):
        got = torch.autograd.grad(pyflow.ops.hsic(x, y, kernel="polynomial"), x)[0]
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * float(want.abs().max()))
