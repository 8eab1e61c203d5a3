"""Counter-based noise under the interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from pyflow import ops, testing
from pyflow.reference import noise as reference
from pyflow.triton_kernels._random import box_muller

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


@triton.jit
def pair_kernel(even, odd, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = box_muller(tl.load(even + i).to(tl.uint32), tl.load(odd + i).to(tl.uint32))
    tl.store(out + 2 * i, a)
    tl.store(out + 2 * i + 1, b)


def test_normals_of_the_words_at_the_edges():
    powers = 2 ** torch.arange(33)
    edges = torch.cat([powers + d for d in (-256, -129, -128, -127, -1, 0, 1, 255)] + [powers * 3 - 1]) % 2**32
    even, odd = (v.flatten() for v in torch.meshgrid(edges, edges, indexing="ij"))
    size = 2 ** (len(even) - 1).bit_length()
    even, odd = (torch.cat((v, torch.randint(2**32, (size - len(v),)))) for v in (even, odd))
    out = torch.empty(2 * size)
    pair_kernel[(1,)](even, odd, out, N=size)
    want = reference.normal(torch.stack((even, odd), -1).flatten())
    testing.assert_same_bits(out, want)
    # the largest words give a radius of -0.0, whose sign the product keeps
    assert (want == 0).sum() > 100 and torch.signbit(want[want == 0]).any()
