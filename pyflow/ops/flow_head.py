"""The head of a flow: log-likelihood from the last hidden values, without storing z."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._backend import call, register, runs_reference
from .._schemas import PRIORS
from ..reference import compute_dtype
from ..reference import flow_head as ref
from ._transforms import one_by_one, vector_jacobian


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
    if h.dim() == 0:
        raise ValueError(f"{op}: h must have at least one dim, the batch, got a scalar")
    if log_scale is not None:
        check.like(op, "log_scale", log_scale, "h without its batch dim", h.shape[1:], h.device)
    index = check.choice(op, "prior", prior, PRIORS)
    if runs_reference(op, h):
        return ref.flow_log_prob(h, log_scale, prior=prior)
    return call("flow_log_prob", h, log_scale, index)


# registration with torch: arguments follow the order of each operator's schema


def _reference(h, log_scale, prior):
    return ref.flow_log_prob(h, log_scale, prior=PRIORS[prior]).contiguous()


def _fake(h, log_scale, prior):
    return h.new_empty(h.shape[:1], dtype=compute_dtype(h.dtype))


def _setup(ctx, inputs, output):
    h, log_scale, ctx.prior = inputs
    ctx.save_for_backward(h, log_scale)


def _backward(ctx, grad):
    h, log_scale = ctx.saved_tensors
    grad_h, grad_log_scale = call("flow_log_prob_backward", grad, h, log_scale, ctx.prior)
    return grad_h, None if log_scale is None else grad_log_scale, None


def _vmap(info, in_dims, h, log_scale, prior):
    single = lambda *args: (torch.ops.pyflow.flow_log_prob(*args),)
    return one_by_one(info, in_dims, single, (h, log_scale), prior)[0], 0


def _backward_reference(grad, h, log_scale, prior):
    grad_h, grad_log_scale = ref.flow_log_prob_backward(grad, h, log_scale, prior=PRIORS[prior])
    grad_h = torch.empty_like(h).copy_(grad_h)
    return grad_h, h.new_empty(0) if grad_log_scale is None else torch.empty_like(log_scale).copy_(grad_log_scale)


def _backward_fake(grad, h, log_scale, prior):
    return torch.empty_like(h), h.new_empty(0) if log_scale is None else torch.empty_like(log_scale)


def _backward_setup(ctx, inputs, output):
    *tensors, ctx.prior = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward_backward(ctx, *grads):
    def formula(grad, h, log_scale):
        out = ref.flow_log_prob_backward(grad, h, log_scale, prior=PRIORS[ctx.prior])
        return out[:1] if log_scale is None else out

    return (*vector_jacobian(formula, ctx.saved_tensors, grads), None)


def _backward_vmap(info, in_dims, grad, h, log_scale, prior):
    return one_by_one(info, in_dims, torch.ops.pyflow.flow_log_prob_backward, (grad, h, log_scale), prior), (0, 0)


register(
    "flow_log_prob", "flow_head", reference=_reference, fake=_fake, vmap=_vmap,
    setup_context=_setup, backward=_backward,
)  # fmt: skip
register(
    "flow_log_prob_backward", "flow_head", reference=_backward_reference, fake=_backward_fake,
    vmap=_backward_vmap, setup_context=_backward_setup, backward=_backward_backward,
)  # fmt: skip
