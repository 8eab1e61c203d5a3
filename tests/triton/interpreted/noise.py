"""Counter-based noise under the interpreter."""

from __future__ import annotations

import pytest
import torch

from pyflow import ops

from .common import DTYPES, same_on_every_backend


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise(dtype, scalars):
    for shape in [(), (0,), (7,), (10, 33), (5, 3, 7), (300, 2), (3, 1027), (4, 4, 4)]:
        for seed in (3, 2**64 - 5, *(torch.arange(n) * 2**33 - 2 for n in shape[:1])):
            for draw in (ops.normal, ops.uniform):
                options = dict(seed=seed, step=2**40 + 3, dtype=dtype, purpose="prior")
                same_on_every_backend(lambda: (draw(shape, **options),))


def test_noise_words():
    counter, key = torch.randint(2**32, (3, 50, 4)), torch.randint(2**32, (50, 2))
    same_on_every_backend(lambda: (ops.philox(counter, key), ops.philox(counter[:0], key), ops.sample_seeds(5, 9)))
