"""Launches of rational-quadratic splines."""

from __future__ import annotations

import torch

from pyflow._schemas import SPLINE_VARIANTS
from pyflow.triton_kernels import spline

from . import BF16, F16, F32, F64, SHAPE, TARGETS, recorded

SLOPES = {"linear": -1, "circular": 0, "none": 1, "mixed": 1}
INDICES = {"linear": [0], "circular": [1], "none": []}


def splines(
    x, params, bins, tails="linear", variant=0, inverse=False, bounds=None, mask=None, event_dims=None, parts=(0, 1, 2)
):
    """Launches of forward and backward, with both gradients and with one."""
    event_dims = x.dim() - 1 if event_dims is None else event_dims
    indices = INDICES.get(tails) or [f % 2 for f in range(x.shape[-1] if tails == "mixed" else 0)]
    options = (bounds, mask, 3.0, bins, indices, variant, 0.5, 1e-3, 1e-3, inverse, event_dims)
    grad_logdet = torch.empty(x.shape[: x.dim() - event_dims], dtype=F64 if x.dtype == F64 else F32)
    grads = ((), (torch.empty_like(x), grad_logdet), (None, grad_logdet))
    with recorded() as launches:
        for i in parts:
            (spline.rq_spline_backward if i else spline.rq_spline)(*grads[i], x, params, *options)
    return launches


def dense(shape, bins, tails="linear", dtype=F32, param_dtype=None):
    """x and params."""
    return torch.empty(shape, dtype=dtype), torch.empty(*shape, 3 * bins + SLOPES[tails], dtype=param_dtype or dtype)
