"""Launches of sums over Gram matrices."""

from __future__ import annotations

import contextlib

import pytest
import torch

from pyflow._schemas import HSIC_KERNELS
from pyflow.triton_kernels import hsic

from . import F32, F64, TARGETS, recorded

BOUNDED = {
    "_hsic.sums_kernel": "n: its n x n pairs take years", "_hsic.backward_kernel": "n: likewise",
    "_hsic.pair_backward_kernel": "n: likewise",
    "_hsic.accumulate_kernel": "no products: pointers advance by the count",
    "_gram.prepare_kernel": "n: as in the sums", "_gram.wide_kernel": "n: likewise",
    "_hsic.terms_kernel": "n: n x n pairs come before it", "_hsic.terms_backward_kernel": "n: likewise",
    "_hsic.matrix_kernel": "n: an n x n matrix is among the inputs", "_hsic.permuted_kernel": "n: likewise",
}  # fmt: skip
# matrices have the compute dtype
KERNELS = ("sums_kernel", "backward_kernel", "matrix_kernel", "permuted_kernel", "accumulate_kernel")
DTYPES = {f"_hsic.{kernel}": {F32, F64} for kernel in KERNELS}
DTYPES |= {"_gram.prepare_kernel": {F32}, "_gram.wide_kernel": {F64}}
DTYPES |= {"_hsic.pair_backward_kernel": {F32}}
DTYPES |= {"_hsic.terms_kernel": {F64}, "_hsic.terms_backward_kernel": {F64}}
# two tiles of products fill the registers; a few loop constants may be on the stack
PRODUCTS = ("_hsic.sums_kernel", "_hsic.backward_kernel", "_hsic.pair_backward_kernel")


@contextlib.contextmanager
def launched_for(target):
    """Make the launchers choose tiles and precisions for the target."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hsic, "_generation", lambda device: {"sm_90": 9, "sm_100": 10}.get(target, 8))
        patch.setattr(torch.version, "hip", "6" if target.startswith("gfx") else None)
        yield


def grams(target, dtype, kernels, dims, degree=1, n=200, pairs=(0, 1, 0, 0)):
    """Launches of the sums over two Gram matrices and over one with itself, or of `pairs`, forward and backward."""
    numbers = [HSIC_KERNELS.index(kernel) for kernel in kernels]
    dims = [n if kernel == "precomputed" else dim for kernel, dim in zip(kernels, dims, strict=True)]
    z, scale = [torch.zeros(2, n, dim, dtype=dtype) for dim in dims], torch.ones(2, len(dims), dtype=dtype)
    arguments = (scale, numbers, [degree] * len(dims), list(pairs), False)
    sums = torch.empty(2, len(dims), n, dtype=F64), torch.empty(2, len(pairs) // 2, dtype=F64)
    with launched_for(target), recorded() as launches:
        hsic.hsic_sums(z, *arguments, 0, 1)
        hsic.hsic_sums_backward(*sums, z, *arguments)
    return launches


def permuted(dtype, n=200):
    gram = torch.empty(n, n, dtype=dtype)
    with recorded() as launches:
        hsic.hsic_permuted(gram, gram, torch.zeros(3, n, dtype=torch.int32))
    return launches


def terms(unbiased, n=200):
    rows, sums, shift = torch.empty(2, 3, n, dtype=F64), torch.empty(2, 2, dtype=F64), torch.empty(2, 3, dtype=F64)
    more = (shift, rows[:, :, :1].expand(rows.shape))
    with recorded() as launches:
        hsic.hsic_terms(rows, sums, *more, [0, 1, 1, 2], unbiased)
        hsic.hsic_terms_backward(sums, None, rows, *more, shift, [0, 1, 1, 2], unbiased)
    return launches


def cases():
    table = {}
    for target in TARGETS:
        for dtype in (F32, F64):
            name = f"{target}-{str(dtype)[6:]}-hsic"
            table[f"{name}-rbf"] = grams(target, dtype, ("rbf", "rbf"), (64, 3))
            table[f"{name}-rbf-wide"] = grams(target, dtype, ("rbf", "rbf"), (64, 100))
            table[f"{name}-permuted"] = permuted(dtype)
        table[f"{target}-hsic-pair"] = grams(target, F32, ("rbf", "polynomial"), (64, 100), 3, pairs=(0, 1))
        table[f"{target}-hsic-terms"] = terms(target in ("sm_80", "sm_90"))
    for dtype in (F32, F64):
        name = f"sm_90-{str(dtype)[6:]}-hsic"
        table[f"{name}-laplacian"] = grams("sm_90", dtype, ("laplacian", "polynomial"), (10, 20), degree=3)
        table[f"{name}-linear"] = grams("sm_90", dtype, ("polynomial", "delta"), (64, 1))
        table[f"{name}-precomputed"] = grams("sm_90", dtype, ("precomputed", "rbf"), (0, 64))
    return table
