"""Programs of flows in plain torch: one instruction after another, and back; twice differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .._schemas import PACKINGS, PRIORS, SCALE_MAPS
from ..program import MLP, Additive, Affine, Instruction, Linear, Prior, Program, Scale, runs_of
from . import matmul
from .coupling import additive_coupling, affine_coupling_packed, affine_coupling_packed_backward
from .flow_head import flow_log_prob, flow_log_prob_backward

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
# a gradient times the slope at h
PULL: tuple[Callable[[Tensor, Tensor, float], Tensor], ...] = (
    lambda g, h, _: g,
    lambda g, h, _: torch.where(h <= 0, 0.0, g),
    lambda g, h, arg: torch.where(h > 0, g, g * arg),
    lambda g, h, _: g * (1 - torch.tanh(h) ** 2),
    lambda g, h, _: g * torch.sigmoid(h) * (1 + h * torch.sigmoid(-h)),
    lambda g, h, _: g * (torch.special.ndtr(h) + h * torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)),
    lambda g, h, arg: torch.where(h <= 0, g * arg * torch.exp(h.clamp(max=0)), g),
    lambda g, h, _: g * torch.sigmoid(h) * torch.sigmoid(-h),
)


def flow_program(x: Tensor, context: Tensor | None, weights: Sequence[Tensor], code: str) -> tuple[Tensor, Tensor]:
    program = Program.decode(code)
    h, logdet, params = x, x.new_zeros(x.shape[0]), x
    for instruction in program.instructions:
        h, params, more = _step(instruction, h, params, context, weights)
        logdet = logdet + more
    return h.index_select(1, _at(program.outputs, x)), logdet


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
    program = Program.decode(code)
    states, h, params = [], x, x
    for instruction in program.instructions:
        states.append((h, params))
        h, params, _ = _step(instruction, h, params, context, weights)
    back = _Back(x.new_zeros(x.shape[0]) if grad_logdet is None else grad_logdet, x, context, weights)
    if grad_y is not None:
        back.h = back.h.index_add(1, _at(program.outputs, x), grad_y)
    for instruction, (h, params) in zip(reversed(program.instructions), reversed(states), strict=True):
        back.through(instruction, h, params)
    return [
        back.h if need_x else None,
        back.context if need_context else None,
        *(grad if need_weights else None for grad in back.grads),
    ]


def _at(columns: Sequence[int], x: Tensor) -> Tensor:
    runs = runs_of(columns)
    if len(runs) == 1 and runs[0][1] != 0:
        # made on the device: a copy from the host waits, and a CUDA graph cannot capture it
        first, step, count = runs[0]
        return torch.arange(first, first + step * count, step, device=x.device)
    return torch.tensor(columns, device=x.device, dtype=torch.int64)


def _step(
    instruction: Instruction, h: Tensor, params: Tensor, context: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the state and the conditioner's numbers after an instruction, and what it adds to the log-determinant."""
    at = _at(instruction.columns, h)
    x, none = h.index_select(1, at), h.new_zeros(())
    if isinstance(instruction, MLP):
        return h, _layers(instruction, x, context, weights)[-1][1], none
    if isinstance(instruction, Prior):
        return h, params, flow_log_prob(x, prior=PRIORS[instruction.prior])
    if isinstance(instruction, Scale):
        y, more = _scale(instruction, x, weights)
    elif isinstance(instruction, Linear):
        bias, logdet = instruction.bias, instruction.logdet
        y = matmul(x, weights[instruction.weight].mT)
        y, more = y if bias < 0 else y + weights[bias], none if logdet < 0 else weights[logdet]
    elif isinstance(instruction, Additive):
        y, more = additive_coupling(x, params, inverse=instruction.inverse), none
    else:
        y, more = affine_coupling_packed(x, params, **_options(instruction), mask=None)
    return h.index_copy(1, at, y), params, more


def _options(affine: Affine) -> dict:
    return {
        "packing": PACKINGS[affine.packing], "dim": 1, "scale_map": SCALE_MAPS[affine.scale_map],
        "map_arg": affine.map_arg, "shift_first": affine.shift_first, "inverse": affine.inverse, "event_dims": 1,
    }  # fmt: skip


def _scale(scale: Scale, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    zero = x.new_zeros(())
    shift = zero if scale.shift < 0 else weights[scale.shift]
    log_scale = zero if scale.log_scale < 0 else weights[scale.log_scale]
    if scale.inverse:
        e = torch.exp(-log_scale)
        return (x * e - shift if scale.shift_first else (x - shift) * e), -log_scale.sum()
    e = torch.exp(log_scale)
    return ((x + shift) * e if scale.shift_first else x * e + shift), log_scale.sum()


def _layers(mlp: MLP, x: Tensor, context: Tensor | None, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return what goes into every layer's activation and what comes out, after a first pair with its inputs."""
    if mlp.context:
        assert context is not None
        x = torch.cat((x, context), 1)
    pairs = [(x, x)]
    for dense in mlp.layers:
        before = matmul(pairs[-1][1], weights[dense.weight].mT)
        if dense.bias >= 0:
            before = before + weights[dense.bias]
        pairs.append((before, ACTIVATE[dense.activation](before, dense.arg)))
    return pairs


class _Back:
    """The gradients on the way back: of the state, of the last conditioner's numbers, of context and weights."""

    def __init__(self, logdet: Tensor, x: Tensor, context: Tensor | None, weights: Sequence[Tensor]) -> None:
        self.logdet, self.h = logdet, torch.zeros_like(x)
        self.params = x
        self.given, self.weights = context, weights
        self.context = None if context is None else torch.zeros_like(context)
        self.grads = [torch.zeros_like(weight) for weight in weights]

    def add(self, place: int, grad: Tensor) -> None:
        if place >= 0:
            self.grads[place] = self.grads[place] + grad

    def through(self, instruction: Instruction, h: Tensor, params: Tensor) -> None:
        """Go back through an instruction that met the state h and these numbers of a conditioner."""
        at = _at(instruction.columns, h)
        x, grad = h.index_select(1, at), self.h.index_select(1, at)
        if isinstance(instruction, MLP):
            self.mlp(instruction, x, at)
            return
        if isinstance(instruction, Prior):
            grad = grad + flow_log_prob_backward(self.logdet, x, None, prior=PRIORS[instruction.prior])[0]
        elif isinstance(instruction, Scale):
            grad = self.scale(instruction, x, grad)
        elif isinstance(instruction, Linear):
            self.add(instruction.weight, matmul(grad.mT, x))
            self.add(instruction.bias, grad.sum(0))
            self.add(instruction.logdet, self.logdet.sum())
            grad = matmul(grad, self.weights[instruction.weight])
        else:
            if isinstance(instruction, Additive):
                self.params = -grad if instruction.inverse else grad
            else:
                grad, self.params = affine_coupling_packed_backward(
                    grad, self.logdet, x, params, **_options(instruction), mask=None
                )
        self.h = self.h.index_copy(1, at, grad)

    def scale(self, scale: Scale, x: Tensor, grad: Tensor) -> Tensor:
        sign = -1 if scale.inverse else 1
        y = _scale(scale, x, self.weights)[0]
        scaled = grad if scale.log_scale < 0 else grad * torch.exp(sign * self.weights[scale.log_scale])
        # whether the shift is outside of the product with exp(log_scale)
        outside = scale.inverse == scale.shift_first
        if outside and scale.shift >= 0:
            y = y - sign * self.weights[scale.shift]
        self.add(scale.shift, sign * (grad if outside else scaled).sum(0))
        self.add(scale.log_scale, sign * ((grad * y).sum(0) + self.logdet.sum()))
        return scaled

    def mlp(self, mlp: MLP, x: Tensor, at: Tensor) -> None:
        grad = self.params
        pairs = _layers(mlp, x, self.given, self.weights)
        for dense, (_, inputs), (before, _) in zip(mlp.layers[::-1], pairs[-2::-1], pairs[:0:-1], strict=True):
            grad = PULL[dense.activation](grad, before, dense.arg)
            self.add(dense.weight, matmul(grad.mT, inputs))
            self.add(dense.bias, grad.sum(0))
            grad = matmul(grad, self.weights[dense.weight])
        count = x.shape[1]
        # the vmap of is_grads_batched has no rule for a slice of the whole
        self.h = self.h.index_add(1, at, grad[:, :count] if mlp.context else grad)
        if mlp.context and self.context is not None:
            self.context = self.context + grad[:, count:]
