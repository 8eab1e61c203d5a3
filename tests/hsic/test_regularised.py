"""The matrix of nHSIC is refused where it is rounding, or indefinite."""

from __future__ import annotations

import pytest
import torch

from pyflow import ops

from .dense import F64, dependent


def test_nhsic_refuses_an_epsilon_below_the_rounding_of_its_matrix():
    x, y = dependent(60, 2, F64)
    assert 0 < ops.nhsic(1e3 * x, y, kernel="linear") <= 2 + 1e-6
    with pytest.raises(
        ValueError, match=r"^nhsic: epsilon must be above the rounding of the kernel matrix, .*, got 1e-05$"
    ):
        ops.nhsic(1e8 * x, y, kernel="linear")
    compiled = torch.compile(lambda x: ops.nhsic(x, y, kernel="linear"), backend="eager", fullgraph=True)
    assert compiled(1e8 * x).isnan() and compiled(x) == ops.nhsic(x, y, kernel="linear")
    constant = torch.full((9, 2), 1e9)
    assert ops.nhsic(constant, y[:9], kernel="polynomial", kernel_y="rbf") == 0


def test_nhsic_refuses_indefinite_matrices():
    x, y = dependent(12, 2, F64)
    gram = x @ x.mT
    assert ops.nhsic(gram, y, kernel="precomputed", kernel_y="rbf") == pytest.approx(
        ops.nhsic(x, y, kernel="linear", kernel_y="rbf").item(), rel=1e-6
    )
    indefinite = gram - 2 * torch.eye(12, dtype=F64)
    with pytest.raises(ValueError, match=r"^nhsic: x must be positive semi-definite with a precomputed kernel, got"):
        ops.nhsic(indefinite, y, kernel="precomputed", kernel_y="rbf")
    with pytest.raises(ValueError, match=r"^nhsic: y must be positive semi-definite with a precomputed kernel, got"):
        ops.nhsic(y, indefinite, kernel_y="precomputed")
    compiled = torch.compile(lambda k: ops.nhsic(k, y, kernel="precomputed", kernel_y="rbf"), backend="eager")
    assert compiled(indefinite).isnan() and compiled(gram).isfinite()
