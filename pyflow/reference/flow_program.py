"""Programs of flows in plain torch: one instruction after another, twice differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .._schemas import PACKINGS, PRIORS, SCALE_MAPS
from ..program import MLP, Additive, Affine, Linear, Prior, Program, Scale
from .coupling import additive_coupling, affine_coupling_packed
from .flow_head import flow_log_prob

# in the order of ACTIVATIONS; the number is the slope of leaky_relu or alpha of elu
ACTIVATE: tuple[Callable[[Tensor, float], Tensor], ...] = (
    lambda h, _: h,
    lambda h, _: F.relu(h),
    lambda h, arg: F.leaky_relu(h, arg),
    lambda h, _: torch.tanh(h),
    lambda h, _: F.silu(h),
    lambda h, _: F.gelu(h),
    lambda h, arg: F.elu(h, arg),
    lambda h, _: torch.sigmoid(h),
)


def flow_program(x: Tensor, context: Tensor | None, weights: Sequence[Tensor], code: str) -> tuple[Tensor, Tensor]:
    program = Program.decode(code)
    h, logdet, params = x, x.new_zeros(x.shape[0]), x
    for instruction in program.instructions:
        if isinstance(instruction, MLP):
            params = _mlp(instruction, h, context, weights)
            continue
        at = torch.tensor(instruction.columns, device=x.device, dtype=torch.int64)
        new, more = _RULES[type(instruction)](instruction, h.index_select(1, at), params, weights)
        logdet = logdet + more
        if new is not None:
            h = h.index_copy(1, at, new)
    return h.index_select(1, torch.tensor(program.outputs, device=x.device, dtype=torch.int64)), logdet


def flow_program_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    context: Tensor | None,
    weights: Sequence[Tensor],
    code: str,
    need_x: bool,
    need_context: bool,
    need_weights: bool,
) -> list[Tensor | None]:
    """Return the gradients of x, context and each of the weights in one list, None where not needed."""
    needs = [need_x, need_context, *(need_weights for _ in weights)]
    every = [x, context, *weights]
    asked = [i for i, (need, value) in enumerate(zip(needs, every, strict=True)) if need and value is not None]

    def outputs(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = list(every)
        for i, value in zip(asked, tensors, strict=True):
            given[i] = value
        return flow_program(given[0], given[1], given[2:], code)  # type: ignore[arg-type]

    values, pull_back = torch.func.vjp(outputs, *(every[i] for i in asked))
    pairs = zip((grad_y, grad_logdet), values, strict=True)
    filled = tuple(torch.zeros_like(v) if grad is None else grad for grad, v in pairs)
    result: list[Tensor | None] = [None] * len(every)
    for i, grad in zip(asked, pull_back(filled), strict=True):
        result[i] = grad
    return result


def _mlp(mlp: MLP, h: Tensor, context: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
    params = h.index_select(1, torch.tensor(mlp.columns, device=h.device, dtype=torch.int64))
    if mlp.context:
        assert context is not None
        params = torch.cat((params, context), 1)
    for dense in mlp.layers:
        bias = None if dense.bias < 0 else weights[dense.bias]
        params = ACTIVATE[dense.activation](F.linear(params, weights[dense.weight], bias), dense.arg)
    return params


def _scale(scale: Scale, x: Tensor, params: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    zero = x.new_zeros(())
    shift = zero if scale.shift < 0 else weights[scale.shift]
    log_scale = zero if scale.log_scale < 0 else weights[scale.log_scale]
    if scale.inverse:
        e = torch.exp(-log_scale)
        return (x * e - shift if scale.shift_first else (x - shift) * e), -log_scale.sum()
    e = torch.exp(log_scale)
    return ((x + shift) * e if scale.shift_first else x * e + shift), log_scale.sum()


def _linear(linear: Linear, x: Tensor, params: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    y = F.linear(x, weights[linear.weight], None if linear.bias < 0 else weights[linear.bias])
    return y, x.new_zeros(()) if linear.logdet < 0 else weights[linear.logdet]


def _additive(additive: Additive, x: Tensor, params: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return additive_coupling(x, params, inverse=additive.inverse), x.new_zeros(())


def _affine(affine: Affine, x: Tensor, params: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return affine_coupling_packed(
        x, params, packing=PACKINGS[affine.packing], dim=1, scale_map=SCALE_MAPS[affine.scale_map],
        map_arg=affine.map_arg, shift_first=affine.shift_first, inverse=affine.inverse, event_dims=1,
        mask=None,
    )  # fmt: skip


def _prior(prior: Prior, x: Tensor, params: Tensor, weights: Sequence[Tensor]) -> tuple[None, Tensor]:
    return None, flow_log_prob(x, prior=PRIORS[prior.prior])


_RULES = {Scale: _scale, Linear: _linear, Additive: _additive, Affine: _affine, Prior: _prior}
