"""Launches of coupling layers."""

from __future__ import annotations

import torch

from pyflow._schemas import SCALE_MAPS
from pyflow.triton_kernels import coupling

from . import BF16, F16, F32, F64, SHAPE, TARGETS, dense, recorded

MAPS = [(i, 2.0) for i, name in enumerate(SCALE_MAPS)] + [(SCALE_MAPS.index(n), 0.0) for n in ("sigmoid", "softplus")]
TANH = (SCALE_MAPS.index("tanh"), 2.0)
BOUNDED = {"_tiles.sum_segments": "segments: of 4096 columns each"}
# sums over partial results read float32 or float64 for every input dtype
DTYPES = {"_tiles.sum_segments": {F32, F64}}


def affine(x, shift, scale, mask=None, scale_map=TANH, first=False, inverse=False, event_dims=None):
    """Launches of forward and backward, with all gradients."""
    event_dims = x.dim() - 1 if event_dims is None else event_dims
    options = (mask, *scale_map, first, inverse, event_dims)
    grad_logdet = torch.empty(x.shape[: x.dim() - event_dims], dtype=F64 if x.dtype == F64 else F32)
    with recorded() as launches:
        coupling.affine_coupling(x, shift, scale, *options)
        coupling.affine_coupling_backward(torch.empty_like(x), grad_logdet, x, shift, scale, *options, shift.dtype)
        coupling.affine_coupling_backward(None, grad_logdet, x, shift, scale, *options, None)
        coupling.additive_coupling(x, shift, mask, inverse)
    return launches


def packed(x, params, packing, dim):
    options = (None, packing, dim, *TANH, False, False, x.dim() - 1)
    with recorded() as launches:
        coupling.affine_coupling_packed(x, params, *options)
        coupling.affine_coupling_packed_backward(torch.empty_like(x), None, x, params, *options)
    return launches


def cases():
    table = {}
    for number, (scale_map, arg) in enumerate(MAPS):
        inverse, first = bool(number % 2), bool(number // 2 % 2)
        for target, dtypes in (("sm_90", (F32, F64, BF16, F16)), (("sm_80", "sm_100", "gfx942")[number % 3], (F32,))):
            for dtype in dtypes:
                name = f"{target}-{str(dtype)[6:]}-map{scale_map}{'eps' * (arg > 0)}"
                table[name] = affine(*dense(dtype, 3), scale_map=(scale_map, arg), inverse=inverse, first=first)
    for target in TARGETS:
        table[f"{target}-bfloat16-tanh"] = affine(*dense(BF16, 3))
        table[f"{target}-float64-tanh"] = affine(*dense(F64, 3))
        table[f"{target}-mixed-float32-bfloat16"] = affine(*dense(F32, 1), *dense(BF16, 2), first=True)
        table[f"{target}-mixed-bfloat16-float32"] = affine(*dense(BF16, 1), *dense(F32, 2), inverse=True)
        for dtype in (F32, F64):
            table[f"{target}-{str(dtype)[6:]}-long"] = affine(*dense(dtype, 3, (4, 20000)))
    mask = torch.empty(SHAPE, dtype=torch.bool)
    for inverse in (False, True):
        for first in (False, True):
            options = dict(inverse=inverse, first=first)
            table[f"sm_90-float32-mask-{inverse}-{first}"] = affine(*dense(F32, 3), mask.expand(SHAPE), **options)
    wide = lambda dtype=F32: torch.empty(64, 784, dtype=dtype)
    image = lambda c: torch.empty(8, c, 16, 16)
    table["sm_90-float32-halves"] = affine(wide()[:, 392:], wide()[:, :392], wide()[:, 392:])
    table["sm_90-float32-stepped"] = affine(wide()[:, ::2], wide()[:, ::2], wide()[:, 1::2])
    table["sm_90-float32-channels"] = affine(image(6), image(12)[:, ::2], image(12)[:, 1::2])
    corners = image(6)[..., ::2, 1::2], image(6)[..., ::2, ::2], image(6)[..., 1::2, ::2]
    table["sm_90-float32-checkerboard"] = affine(*corners)
    table["sm_90-float32-elements"] = affine(*dense(F32, 3), event_dims=0)
    table["sm_90-float32-odd"] = affine(*dense(F32, 3, (5, 37)))
    for packing in range(3):
        table[f"sm_90-float32-packed{packing}"] = packed(dense(F32, 1)[0], wide(), packing, 1)
        table[f"sm_90-bfloat16-packed{packing}"] = packed(dense(BF16, 1)[0], wide(BF16), packing, 1)
    return table


def large(shape):
    rows, cols = shape
    found = affine(*dense(F32, 3, shape)) + affine(*dense(F32, 3, shape), event_dims=0)
    found += affine(*(torch.empty(rows, 2 * cols)[:, i::2] for i in (0, 0, 1)))
    return found + packed(dense(BF16, 1, shape)[0], torch.empty(rows, 2 * cols, dtype=BF16), 0, 1)
