"""demo_op in plain torch, twice differentiable."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import compute_dtype


def demo_op(x: Tensor, scale: float, event_dims: int) -> tuple[Tensor, Tensor]:
    v = x.to(compute_dtype(x.dtype))
    # torch's softplus returns x above 20, which is off by 2e-9
    y = (scale * -logsigmoid(-v)).to(x.dtype)
    terms = math.log(scale) + logsigmoid(v)
    return y, terms.sum(tuple(range(x.dim() - event_dims, x.dim()))) if event_dims else terms


def demo_op_backward(
    grad_y: Tensor | None, grad_logdet: Tensor | None, x: Tensor, scale: float, event_dims: int
) -> Tensor:
    v = x.to(compute_dtype(x.dtype))
    grad_x = torch.zeros_like(v) if grad_y is None else grad_y.to(v.dtype) * (scale * torch.sigmoid(v))
    if grad_logdet is not None:
        of_row = grad_logdet.reshape(*grad_logdet.shape, *(1,) * event_dims)
        grad_x = grad_x + of_row.to(v.dtype) * torch.sigmoid(-v)
    return grad_x.to(x.dtype)
