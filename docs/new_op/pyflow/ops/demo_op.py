"""A softplus times a number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._operators import register
from .._vmap import leading
from ..reference import demo_op as ref


def demo_op(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """Softplus times a number, in one pass.

    y = scale * log(1 + exp(x)).

    Args:
        x: any shape; float32, float64, bfloat16 or float16, any strides.
        scale: > 0.

    Returns:
        y with x's shape and dtype.

    Raises:
        TypeError: x is not a tensor or has an unsupported dtype; scale is not a number.
        ValueError: scale is not positive, or out of range for float32.

    Notes:
        Computed in float32 (float64 for float64 x) and rounded once; the same bits on every compiled backend. Double
        backward works.

    Example:
        >>> demo_op(torch.tensor([0.0, 100.0]), scale=2.0)
        tensor([  1.3863, 200.0000])
    """
    op = "demo_op"
    check.float_tensor(op, "x", x)
    scale = check.positive(op, "scale", scale)
    check.moderate(op, "scale", scale, x.dtype)
    return _operator.pick(op, x)(x, scale)


# registration with torch

_backward = register(
    "demo_op_backward",
    "demo_op",
    reference=ref.demo_op_backward,
    vmap=leading,
    fake=lambda grad, x, scale: torch.empty_like(x),
)
_operator = register(
    "demo_op",
    "demo_op",
    reference=ref.demo_op,
    vmap=leading,
    backward=_backward,
    fake=lambda x, scale: torch.empty_like(x),
)


def warmup(x: Tensor, **other: Any) -> list[Tensor]:
    return [demo_op(x)]
