"""flow_log_prob under the interpreter."""

from __future__ import annotations

import pytest
import torch

from pyflow import ops, testing
from pyflow._schemas import PRIORS

from .common import DTYPES, compare, draw


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [True, False])
def test_flow_head(prior, dtype, scaled):
    shapes = [(3, 1), (5, 2, 3, 7), (0, 4), (4, 0), (9,), (2, 600)]
    for shape in shapes + [(33, 63), (35, 513), (2, 9001)] * (dtype == torch.float32 and scaled):
        leaves = [draw(shape, dtype), 0.3 * draw(shape[1:], dtype, 1)][: 1 + scaled]
        function = lambda *v: ops.flow_log_prob(*v, prior=prior)
        got = compare(function, leaves, sums=(0, 2), error=2e-4)
        assert got[0].dtype == testing.compute_dtype(dtype)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_flow_head_layouts(layout):
    h, log_scale = draw((6, 5, 4, 10)), 0.3 * draw((5, 4, 10), seed=1)
    scale = log_scale.transpose(0, 2).contiguous().transpose(0, 2)
    compare(lambda h, s: ops.flow_log_prob(h, s), [testing.laid_out(h, layout), scale], sums=(0, 2))


def test_flow_head_many_rows():
    compare(lambda h, s: ops.flow_log_prob(h, s), [draw((1100, 20)), draw((20,), seed=1)], sums=(0, 2), error=2e-4)
