"""A softplus times a number: a map onto the positive numbers, with its log-determinant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._operators import register
from .._vmap import leading
from ..reference import compute_dtype
from ..reference import demo_op as ref


def demo_op(x: Tensor, *, scale: float = 1.0, event_dims: int | None = None) -> tuple[Tensor, Tensor]:
    """Softplus times a number and its log-determinant, in one pass.

    y = scale * log(1 + exp(x)), logdet = sum log(scale * sigmoid(x)).

    Args:
        x: (B, ...); float32, float64, bfloat16 or float16, any strides.
        scale: > 0.
        event_dims: how many trailing dims one logdet sums over; default all but the first.

    Returns:
        (y, logdet): y with x's shape and dtype; logdet of shape x.shape[:-event_dims] in float32
        (float64 for float64 x).

    Raises:
        TypeError: x is not a tensor or has an unsupported dtype; scale is not a number, event_dims not an integer.
        ValueError: scale is not positive, or out of range for float32; event_dims is not between 0 and x.dim().

    Notes:
        Computed in float32 (float64 for float64 x) and rounded once: y has the same bits on every compiled backend,
        and logdet on a CPU for every thread count, instruction set and batch. Double backward works.

    Example:
        >>> y, logdet = demo_op(torch.tensor([[0.0, 100.0]]), scale=2.0)
        >>> y, logdet
        (tensor([[  1.3863, 200.0000]]), tensor([0.6931]))
    """
    op = "demo_op"
    check.float_tensor(op, "x", x)
    scale = check.positive(op, "scale", scale)
    check.moderate(op, "scale", scale, x.dtype)
    event_dims = check.event_dims(op, x, event_dims)
    return _operator.pick(op, x)(x, scale, event_dims)


# registration with torch


def _fake(x, scale, event_dims):
    return torch.empty_like(x), x.new_empty(x.shape[: x.dim() - event_dims], dtype=compute_dtype(x.dtype))


_backward = register(
    "demo_op_backward",
    "demo_op",
    reference=ref.demo_op_backward,
    vmap=leading,
    fake=lambda grad_y, grad_logdet, x, scale, event_dims: torch.empty_like(x),
)
_operator = register("demo_op", "demo_op", reference=ref.demo_op, vmap=leading, backward=_backward, fake=_fake)


def warmup(x: Tensor, **other: Any) -> list[Tensor]:
    return [*demo_op(x)]
