"""Polynomial kernels of float64 rows far from 0, against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from pyflow import ops, stats, testing

from .dense import F64, draw

DEGREE = 3


def exact(x):
    """Return the kernel matrix of rows as fractions."""
    rows = [[Fraction(v) for v in row] for row in x.tolist()]
    return [[(sum(a * b for a, b in zip(p, q, strict=True)) / len(p) + 1) ** DEGREE for q in rows] for p in rows]


def centred(gram, unbiased):
    n = len(gram)
    if unbiased:
        gram = [[0 if i == j else gram[i][j] for j in range(n)] for i in range(n)]
    over, all_over = (n - 2, (n - 1) * (n - 2)) if unbiased else (n, n * n)
    sums = [sum(row) for row in gram]
    mean = Fraction(sum(sums)) / all_over
    return [
        [
            0 if unbiased and i == j else gram[i][j] - (sums[i] + sums[j]) / Fraction(over) + mean
            for j in range(n)
        ]
        for i in range(n)
    ]  # fmt: skip


def dot(k, m):
    return sum(a * b for p, q in zip(k, m, strict=True) for a, b in zip(p, q, strict=True))


def samples():
    x = draw((12, 2), F64)
    return x, x[:, :1] + 0.3 * draw((12, 1), F64, seed=1)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("offset", [0.0, 100.0, 150.0, 1e4, 1e6])
def test_an_offset_costs_no_digits(offset, estimator):
    unbiased = estimator == "unbiased"
    x, y = samples()
    over = 12 * 9 if unbiased else 11**2
    for a, b in [(x + offset, y), (x + offset, y + offset), (x, y - offset)]:
        k, m = (centred(exact(v), unbiased) for v in (a, b))
        xy, xx, yy = (float(dot(*pair)) for pair in ((k, m), (k, k), (m, m)))
        options = dict(kernel="polynomial", estimator=estimator)
        want = torch.tensor(xy / (xx * yy) ** 0.5, dtype=F64)
        # the sums of tiles lose half of the digits at most
        within = dict(rtol=1e-8, atol=0.0)
        torch.testing.assert_close(ops.cka(a, b, **options), want, **within)
        torch.testing.assert_close(ops.hsic(a, b, **options), torch.tensor(xy / over, dtype=F64), **within)
        assert stats.hsic(a, b, normalize=True, **options).value == pytest.approx(want.item(), rel=1e-8)
        matrix = ops.hsic_matrix([a, b], [b], normalize=True, **options)
        torch.testing.assert_close(matrix[:, 0], torch.stack((want, torch.ones_like(want))), **within)
    if not unbiased:
        assert stats.Hsic("poly", True).statistic(x, y - offset) == pytest.approx(want.item() ** 0.5, rel=1e-8)


@pytest.mark.parametrize("kernel_y", ["rbf", "laplacian", "linear", "delta", "precomputed"])
def test_an_offset_beside_other_kernels(kernel_y):
    x, y = samples()
    y = y.round() if kernel_y == "delta" else y @ y.T if kernel_y == "precomputed" else y
    for normalize in (False, True):
        options = dict(kernel="polynomial", kernel_y=kernel_y, bandwidth=1.5, normalize=normalize)
        got = ops.hsic(x + 1e4, y, **options).item()
        want = stats.hsic_test(x + 1e4, y, permutations=1, progress=False, **options).statistic
        assert got == pytest.approx(want, rel=1e-5)


def test_items_of_a_batch_do_not_depend_on_it_and_constant_rows_give_zero():
    x, y = samples()
    rows = torch.stack((x, x + 1e4, torch.full_like(x, 1e4), x - 1e6))
    together = ops.cka(rows, y, kernel="polynomial")
    alone = torch.stack([ops.cka(each, y, kernel="polynomial") for each in rows])
    testing.assert_same_bits(together, alone)
    assert together[2] == 0 and (together[[0, 1, 3]] > 0.4).all()


def test_gradients(monkeypatch):
    x, y = samples()
    offset = lambda x, y: ops.cka(x + 1e3, y, kernel="polynomial", kernel_y="rbf", bandwidth=1.0)
    leaves = [v[:6].clone().requires_grad_() for v in (x, y)]
    assert torch.autograd.gradcheck(offset, leaves, atol=1e-5)
    # several blocks
    want = torch.autograd.grad(offset(*leaves), leaves)
    monkeypatch.setattr("pyflow.hsic.offset.BLOCK", 20)
    torch.testing.assert_close(torch.autograd.grad(offset(*leaves), leaves), want)
