"""Launches of rational-quadratic splines."""

from __future__ import annotations

import torch
import triton

from pyflow._schemas import SPLINE_VARIANTS
from pyflow.triton_kernels import spline

from . import BF16, F16, F32, F64, recorded

SLOPES = {"linear": -1, "circular": 0, "none": 1, "mixed": 1}
SHAPE = (512, 8)
ZUKO = SPLINE_VARIANTS.index("zuko")
FORWARD, BACKWARD = (0,), (1,)
# of a launch, where they are more than three blocks per multiprocessor leave
REGISTERS = {("sm_90-float64-8", "spline.backward_kernel"): 184} if triton.__version__.startswith("3.6.") else {}


def splines(x, params, bins, tails="linear", variant=0, *, inverse=False, bounds=None, mask=None, event_dims=None,
            parts=(0, 1)):  # fmt: skip
    """Launches of forward (0), backward (1), and backward of the log-determinant alone (2)."""
    event_dims = x.dim() - 1 if event_dims is None else event_dims
    mixed = [f % 2 for f in range(x.shape[-1])] if tails == "mixed" else []
    indices = {"linear": [0], "circular": [1], "none": [], "mixed": mixed}[tails]
    options = (bounds, mask, 3.0, bins, indices, variant, 0.5, 1e-3, 1e-3, inverse, event_dims)
    grad_logdet = torch.empty(x.shape[: x.dim() - event_dims], dtype=F64 if x.dtype == F64 else F32)
    grads = ((), (torch.empty_like(x), grad_logdet), (None, grad_logdet))
    with recorded() as launches:
        for i in parts:
            (spline.rq_spline_backward if i else spline.rq_spline)(*grads[i], x, params, *options)
    return launches


def of(bins, tails="linear", dtype=F32, param_dtype=None, shape=SHAPE):
    """x, params and the names of bins and tails, for `splines`."""
    x = torch.empty(shape, dtype=dtype)
    return x, torch.empty(*shape, 3 * bins + SLOPES[tails], dtype=param_dtype or dtype), bins, tails


def cases():
    table = {f"sm_90-{str(d)[6:]}-8": splines(*of(8, dtype=d), parts=(0, 1, 2)) for d in (F32, F64, BF16, F16)}
    for target, tails in (("sm_80", "circular"), ("sm_100", "none"), ("gfx942", "linear")):
        table[f"{target}-float32-8-{tails}"] = splines(*of(8, tails), inverse=True)
    mask, bounds = torch.empty(SHAPE, dtype=torch.bool), torch.empty(SHAPE[1:])
    table["sm_90-float32-8-mixed"] = splines(*of(8, "mixed"), mask=mask, bounds=bounds, parts=FORWARD)
    table["sm_90-float32-5-mixed-elements"] = splines(*of(5, "mixed"), bounds=bounds, event_dims=0, inverse=True)
    # loops over chunks of bins
    table["sm_90-float32-32-circular"] = splines(*of(32, "circular"))
    table["sm_90-float64-16-inverse"] = splines(*of(16, dtype=F64), inverse=True)
    table["sm_90-float32-10-zuko"] = splines(*of(10), ZUKO)
    table["sm_90-float64-8-zuko"] = splines(*of(8, dtype=F64), ZUKO, inverse=True)
    x, params, *rest = of(4, param_dtype=BF16)
    strided = params.transpose(0, 2).contiguous().transpose(0, 2)
    table["sm_90-float32-bfloat16-strided"] = splines(x, strided, *rest, mask=mask)
    table["sm_90-float32-2-long"] = splines(*of(2, shape=(4, 20000)))
    return table


def large(shape):
    rows, cols = shape
    found = splines(*of(2, shape=shape)) + splines(*of(2, shape=shape), event_dims=0)
    # the feature of an element is its column or its row
    for event_dims in (0, None):
        x, params, *rest = of(20, "mixed", shape=(rows, cols // 3, 3) if cols > 3 else shape)
        found += splines(x, params, *rest, inverse=True, event_dims=event_dims)
    return found
