"""Launches of the centring of matrices."""

from __future__ import annotations

import torch

from pyflow.triton_kernels import center

from . import F64, TARGETS, dtypes_of, recorded

BOUNDED = {
    f"center.{kernel}": "n: an n x n matrix is among the inputs"
    for kernel in ("sums_kernel", "means_kernel", "subtract_kernel")
}
DTYPES = {"center.means_kernel": {F64}}


def centred(dtype, shape=(2, 200, 200)):
    with recorded() as launches:
        center.center_gram(torch.empty(shape, dtype=dtype))
    return launches


def cases():
    return {f"{target}-{str(dtype)[6:]}-center": centred(dtype) for target in TARGETS for dtype in dtypes_of(target, 2)}
