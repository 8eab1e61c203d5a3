"""The head of a flow: log-likelihood from the last hidden values, without storing z."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._operators import register
from .._schemas import PRIORS
from ..reference import compute_dtype
from ..reference import flow_head as ref


def flow_log_prob(h: Tensor, log_scale: Tensor | None = None, *, prior: str = "gaussian") -> Tensor:
    """Log-density of a factorised prior at z = h * exp(log_scale), plus sum(log_scale), in one pass.

    "gaussian": sum(-z**2 / 2 - log(2 pi) / 2); "logistic": sum(-softplus(z) - softplus(-z)).

    Args:
        h: (B, ...) output of the flow's last layer; float32, float64, bfloat16 or float16, any strides.
        log_scale: h.shape[1:], the scale layer's parameter, or None.
        prior: "gaussian" or "logistic".

    Returns:
        (B,) nats, float32 (float64 for float64 h). Add the log-determinants of the other layers.

    Raises:
        TypeError: not a tensor, or an unsupported dtype.
        ValueError: unknown prior; h without a batch dim; log_scale of another shape or device.

    Notes:
        Up to 512 terms are summed in float32, more in float64. On a CPU the bits do not depend on thread count,
        instruction set or batch. The gradient of log_scale is summed over fixed blocks of rows, so it does not
        depend on the thread count either. Double backward works.

    Source:
        Dinh et al. 2014, NICE, arXiv:1410.8516, sections 3.3 and 3.4.

    Example:
        >>> flow_log_prob(torch.zeros(2, 3), prior="logistic")
        tensor([-4.1589, -4.1589])
    """
    op = "flow_log_prob"
    check.float_tensor(op, "h", h)
    check.batch(op, "h", h)
    if log_scale is not None:
        check.like(op, "log_scale", log_scale, "h without its batch dim", h.shape[1:], h.device)
    index = check.choice(op, "prior", prior, PRIORS)
    return _log_prob.pick(op, h)(h, log_scale, index)


# registration with torch


def _backward_fake(grad, h, log_scale, prior):
    return torch.empty_like(h), h.new_empty(0) if log_scale is None else torch.empty_like(log_scale)


_backward = register(
    "flow_log_prob_backward", "flow_head", reference=ref.flow_log_prob_backward, fake=_backward_fake
)  # fmt: skip
_log_prob = register(
    "flow_log_prob", "flow_head", reference=ref.flow_log_prob, backward=_backward,
    fake=lambda h, log_scale, prior: h.new_empty(h.shape[:1], dtype=compute_dtype(h.dtype)),
)  # fmt: skip


def warmup(x: Tensor, **other: Any) -> list[Tensor]:
    return [flow_log_prob(x, x[0], prior=prior) for prior in PRIORS]
