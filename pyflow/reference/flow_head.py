"""Flow log-probability in plain torch: prior log-density of z = h exp(log_scale), plus the log-determinant."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import compute_dtype


def _scaled(h: Tensor, log_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dtype = compute_dtype(h.dtype)
    if log_scale is None:
        return h.to(dtype), None
    return h.to(dtype) * torch.exp(log_scale.to(dtype)), log_scale.to(dtype)


def flow_log_prob(h: Tensor, log_scale: Tensor | None = None, *, prior: str = "gaussian") -> Tensor:
    z, log_scale = _scaled(h, log_scale)
    density = -0.5 * z * z - 0.5 * math.log(2 * math.pi) if prior == "gaussian" else logsigmoid(-z) + logsigmoid(z)
    total = density.flatten(1).sum(1) if h.dim() > 1 else density
    return total if log_scale is None else total + log_scale.sum()


def flow_log_prob_backward(
    grad: Tensor, h: Tensor, log_scale: Tensor | None, *, prior: str
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of (h, log_scale); the second is None without a log_scale."""
    z, _ = _scaled(h, log_scale)
    score = -z if prior == "gaussian" else -torch.tanh(0.5 * z)
    grad = grad.to(z.dtype).reshape(-1, *(1,) * (h.dim() - 1))
    if log_scale is None:
        return (grad * score).to(h.dtype), None
    grad_h = grad * torch.exp(log_scale.to(z.dtype)) * score
    return grad_h.to(h.dtype), (grad * (score * z + 1)).sum(0).to(log_scale.dtype)
