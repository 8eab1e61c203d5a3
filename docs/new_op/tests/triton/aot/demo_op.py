"""Launches of demo_op."""

from __future__ import annotations

import torch

from pyflow.triton_kernels import demo_op

from . import F32, SHAPE, TARGETS, dense, dtypes_of, recorded


def both(x):
    with recorded() as launches:
        demo_op.demo_op(x, 2.0, 1)
        demo_op.demo_op_backward(torch.empty_like(x), torch.empty(x.shape[0]), x, 2.0, 1)
    return launches


def cases():
    table = {}
    for target in TARGETS:
        for dtype in dtypes_of(target, 2):
            table[f"{target}-demo_op-{str(dtype)[6:]}"] = both(*dense(dtype, 1, SHAPE))
    table["sm_90-demo_op-odd"] = both(*dense(F32, 1, (5, 37)))
    table["sm_90-demo_op-strided"] = both(torch.empty(64, 784)[:, ::2])
    return table


def large(shape):
    return both(*dense(F32, 1, shape))
