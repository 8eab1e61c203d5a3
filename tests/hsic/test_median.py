"""The median distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from pyflow import ops
from pyflow.hsic.median import median_distance

from .dense import F64, draw


def test_median_distance_matches_numpy():
    for n, d in [(2, 1), (3, 2), (50, 3), (51, 3), (1000, 2)]:
        x = draw((n, d), F64)
        for p, metric in ((2.0, "euclidean"), (1.0, "cityblock")):
            assert median_distance(x, p).item() == pytest.approx(np.median(pdist(x.numpy(), metric)), rel=1e-12)
    # discrete data: first most distances are 0, then all
    x = torch.cat((torch.zeros(40, 1), torch.ones(3, 1))).double()
    assert median_distance(x).item() == pytest.approx(pdist(x.numpy()).mean())
    assert median_distance(torch.ones(9, 2)).item() == 1
    assert ops.hsic(torch.ones(9, 2), draw((9, 2))).item() == 0
    assert ops.hsic(torch.ones(9, 2), draw((9, 2)), normalize=True).item() == 0
