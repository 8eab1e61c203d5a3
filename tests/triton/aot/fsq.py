"""Launches of finite scalar quantisation."""

from __future__ import annotations

import torch
import triton

from pyflow._schemas import FSQ_VARIANTS
from pyflow.triton_kernels import fsq

from . import BF16, F16, F32, F64, TARGETS, recorded

# bytes of stack: with Triton 3.6 ptxas puts a constant of the 39 float64 channels on the stack
STACK = {("sm_80-fsq-wide-float64", "_fsq.residual_kernel"): 8} if triton.__version__.startswith("3.6.") else {}


def quantizer(z, levels, variant, stages=2):
    """Launches of every FSQ operator; the channels of z are its first dim."""
    levels, active = list(levels), torch.empty((), dtype=torch.int64)
    variant, grad = FSQ_VARIANTS.index(variant), torch.empty_like(z)
    with recorded() as launches:
        _, indices = fsq.fsq(z, levels, variant, True)
        fsq.fsq(z, levels, variant, False)
        fsq.fsq_backward(grad, z, levels, variant)
        at = z.dim() - 1 if z.stride(0) == 1 else min(1, z.dim() - 1)
        fsq.fsq_decode(indices, levels, variant, at, z.dtype)
        fsq.fsq_decode(indices.long(), levels, variant, at, z.dtype)
        if variant in (FSQ_VARIANTS.index("symmetric"), FSQ_VARIANTS.index("symmetric_hard")):
            fsq.residual_fsq(z, levels, variant, stages, None)
            fsq.residual_fsq(z, levels, variant, stages, active)
            fsq.residual_fsq_backward(grad, z, levels, variant, stages, active)
    return launches


def positions(dtype, *shape, dim=-1):
    """A tensor of this shape with the channels moved to the first dim."""
    return torch.empty(shape, dtype=dtype).movedim(dim, 0)


def cases():
    table = {}
    for number, variant in enumerate(FSQ_VARIANTS):
        for target, dtypes in (("sm_90", (F32, F64, BF16, F16)), (("sm_80", "sm_100", "gfx942")[number % 3], (F32,))):
            for dtype in dtypes:
                name = f"{target}-{str(dtype)[6:]}-fsq-{variant}"
                table[name] = quantizer(positions(dtype, 40, 102, 5), (7, 5, 5, 5, 5), variant)
    for target in TARGETS:
        for name, z, levels in [
            ("first", positions(F32, 8, 4, 32, 32, dim=1), (8, 5, 5, 5)),
            ("first-bfloat16", positions(BF16, 8, 6, 32, 32, dim=1), (8, 8, 8, 5, 5, 5)),
            ("wide", positions(F32, 500, 21), (8,) * 21),
            ("wide-float64", positions(F64, 500, 39), (3,) * 39),
            ("most", positions(F32, 500, 63), (2,) * 63),
        ]:
            table[f"{target}-fsq-{name}"] = quantizer(z, levels, "symmetric")
    table["sm_90-float32-fsq-odd"] = quantizer(positions(F32, 333, 5), (7, 5, 5, 5, 5), "vqp")
    table["sm_90-float32-fsq-halves"] = quantizer(positions(F32, 100, 10)[:5], (7, 5, 5, 5, 5), "symmetric_hard")
    table["sm_90-float32-fsq-large"] = quantizer(torch.empty(1, 1).expand(4, 2**21), (8, 5, 5, 5), "paper")
    table["sm_90-float32-fsq-stages"] = quantizer(positions(F32, 500, 4), (8, 5, 5, 5), "symmetric", stages=8)
    return table


def large(shape):
    found = []
    for variant in ("vqp", "symmetric"):
        found += quantizer(torch.empty(*shape, 4).movedim(-1, 0), (8, 5, 5, 5), variant)
        found += quantizer(torch.empty(4, *shape), (8, 5, 5, 5), variant)
    return found
