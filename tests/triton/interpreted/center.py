"""Centred Gram matrices under the interpreter."""

from __future__ import annotations

import pytest
import torch

from pyflow import ops, testing

from .common import compare, draw

F32, F64 = torch.float32, torch.float64


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (70, 70), (2, 3, 33, 33), (0, 5, 5)])
def test_center_gram(dtype, shape):
    gram = draw(shape, dtype, spread=3.0)
    compare(ops.center_gram, [gram], sums=(0, 1), error={F32: 1e-5, F64: 1e-5}.get(dtype, 2e-2))
    for one in (gram.clone(), torch.cat((gram, gram), -1)[..., : shape[-1]]):
        want = ops.center_gram(one)
        assert ops.center_gram(one, inplace=True) is one
        testing.assert_same_bits(one, want)
