"""Programs of flows in plain torch: one instruction after another, and back; twice differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._schemas import PRIORS, SCALE_MAPS, SPLINE_VARIANTS
from ..program import (
    PACKINGS,
    Activation,
    Additive,
    Affine,
    Autoregressive,
    Context,
    Dense,
    Elementwise,
    Instruction,
    Linear,
    Multiplicative,
    Net,
    Norm,
    Part,
    Periodic,
    Prior,
    Program,
    Residual,
    Scale,
    Spline,
    Transform,
    Uniform,
    Wrap,
    columns_of_numbers,
    runs_of,
    some_columns,
)  # fmt: skip
from . import matmul
from .coupling import additive_coupling, affine_coupling_packed, affine_coupling_packed_backward
from .flow_head import flow_log_prob, flow_log_prob_backward
from .spline import rq_spline, rq_spline_backward

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
    lambda h, _: torch.exp(h.clamp(max=0)),
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
    lambda g, h, _: torch.where(h > 0, 0.0, g * torch.exp(h.clamp(max=0))),
)


def flow_program(
    x: Tensor, context: Tensor | None, repeats: int, weights: Sequence[Tensor], code: str, keep: int = 0
) -> tuple[Tensor, Tensor, None]:
    """Return y and logdet; nothing else is kept."""
    program = Program.decode(code)
    context = None if context is None else of_rows(context, x.shape[0], repeats)
    h, logdet, params = x, x.new_zeros(x.shape[0]), x
    for instruction in program.instructions:
        h, params, more = _step(instruction, h, params, context, weights)
        logdet = logdet + more
    return h.index_select(1, _at(program.outputs, x)), logdet, None


def flow_program_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    context: Tensor | None,
    repeats: int,
    weights: Sequence[Tensor],
    code: str,
    kept: Tensor | None,
    need_x: bool,
    need_context: bool,
    need_weights: bool,
) -> list[Tensor | None]:
    """Return the gradients of x, context and each of the weights in one list, None where not needed."""
    program, given = Program.decode(code), context
    context = None if given is None else of_rows(given, x.shape[0], repeats)
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
        None if not need_context or given is None or back.context is None else of_given(back.context, given, repeats),
        *(grad if need_weights else None for grad in back.grads),
    ]


def of_rows(context: Tensor, rows: int, repeats: int) -> Tensor:
    """Return a row of the context (R, C) for every row: for row r the row r // repeats % R."""
    count, columns = context.shape
    if count == rows:
        return context
    return context[None, :, None].expand(rows // (count * repeats), -1, repeats, -1).reshape(rows, columns)


def of_given(grad: Tensor, context: Tensor, repeats: int) -> Tensor:
    """Return the gradient of the context from that of what `of_rows` makes of it."""
    if grad.shape[0] == context.shape[0]:
        return grad
    rows, columns = context.shape
    return grad.reshape(grad.shape[0] // (rows * repeats), rows, repeats, columns).sum((0, 2))


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
    if isinstance(instruction, Net):
        return h, net_output(instruction, x, context, weights), none
    if isinstance(instruction, Autoregressive):
        y, more = _solved(instruction, h, context, weights)
        return y, params, more
    if isinstance(instruction, Prior):
        return h, params, flow_log_prob(x, prior=PRIORS[instruction.prior])
    if isinstance(instruction, Uniform):
        return h, params, _uniform(instruction, x)
    if isinstance(instruction, Scale):
        y, more = _scale(instruction, x, weights)
    elif isinstance(instruction, Wrap):
        sign = -1 if instruction.inverse else 1
        shift, bound = (_constants(values, x) for values in (instruction.shift, instruction.bound))
        y, more = _wrapped(x + sign * shift + bound, bound), none
    elif isinstance(instruction, Linear):
        bias, logdet = instruction.bias, instruction.logdet
        y = matmul(x, weights[instruction.weight].mT)
        y, more = y if bias < 0 else y + weights[bias], none if logdet < 0 else weights[logdet]
    else:
        y, more = _transformed(instruction, x, _numbers(instruction, x, params, weights))
    return h.index_copy(1, at, y), params, more


def _numbers(
    transform: Additive | Multiplicative | Transform, x: Tensor, params: Tensor, weights: Sequence[Tensor]
) -> Tensor:  # fmt: skip
    """Return what a transform takes: the last conditioner's numbers, or in every row those of a weight."""
    if isinstance(transform, Spline) and transform.params >= 0:
        return weights[transform.params].reshape(-1).expand(x.shape[0], -1)
    return params


def _transformed(transform: Additive | Multiplicative | Transform, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(transform, Additive):
        return additive_coupling(x, params, inverse=transform.inverse), x.new_zeros(())
    if isinstance(transform, Multiplicative):
        log_scale = -params if transform.inverse else params
        return x * torch.exp(log_scale), log_scale.sum(1)
    if isinstance(transform, Spline):
        before, after = transform.turned and not transform.inverse, transform.turned and transform.inverse
        x = _turned(transform, x) if before else x
        y, more = rq_spline(x, *_spline_inputs(transform, x, params), **_spline_options(transform))
        y = _where_inside(transform, x, y)
        return _turned(transform, y) if after else y, more
    return affine_coupling_packed(x, _paired(transform, params), **_options(transform), mask=None)


def _paired(affine: Affine, numbers: Tensor) -> Tensor:
    """Swap the numbers of pairs with the scale first, or their gradients."""
    if PACKINGS[affine.packing] != "interleaved_scale_shift":
        return numbers
    return numbers.reshape(numbers.shape[0], numbers.shape[1] // 2, 2).flip(2).reshape(numbers.shape)


def _pulled(
    transform: Additive | Multiplicative | Transform, grad: Tensor, logdet: Tensor, x: Tensor, params: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of a transform's columns and of the numbers that it takes."""
    if isinstance(transform, Additive):
        return grad, -grad if transform.inverse else grad
    if isinstance(transform, Multiplicative):
        sign = -1 if transform.inverse else 1
        scaled = grad * torch.exp(sign * params)
        return scaled, sign * (scaled * x + logdet[:, None])
    if isinstance(transform, Spline):
        x = _turned(transform, x) if transform.turned and not transform.inverse else x
        inputs, grad = _spline_inputs(transform, x, params), _where_inside(transform, x, grad)
        grad, of_params = rq_spline_backward(grad, logdet, x, *inputs, **_spline_options(transform))
        return grad, of_params.reshape(params.shape)
    grad, of_params = affine_coupling_packed_backward(
        grad, logdet, x, _paired(transform, params), **_options(transform), mask=None
    )
    return grad, _paired(transform, of_params)


def _solved(
    inverse: Autoregressive, h: Tensor, context: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the state after an autoregressive inverse, and what it adds: a pass of the net for each generation."""
    y, logdet = h, h.new_zeros(h.shape[0])
    # nothing that is not known yet is in reach of the net, infinities neither
    h = h.index_fill(1, _at(inverse.columns, h), 0.0)
    for transform, places in _generations(inverse):
        at = _at(transform.columns, h)
        params = _conditioned(inverse.net, h, context, weights).index_select(1, _at(places, h))
        x, more = _transformed(transform, y.index_select(1, at), params)
        h, logdet = h.index_copy(1, at, x), logdet + more
    return h, logdet


def _generations(inverse: Autoregressive) -> list[tuple[Transform, list[int]]]:
    """Return for each generation the transform of its columns, and the places of their numbers."""
    of_numbers, found = columns_of_numbers(inverse.transform), []
    for generation in sorted(set(inverse.generations)):
        some = [i for i, of in enumerate(inverse.generations) if of == generation]
        places = [j for j, i in enumerate(of_numbers) if i in some]
        found.append((some_columns(inverse.transform, some), places))
    return found


def _conditioned(net: Net, h: Tensor, context: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
    return net_output(net, h.index_select(1, _at(net.columns, h)), context, weights)


def _options(affine: Affine) -> dict:
    return {
        "packing": PACKINGS[affine.packing].removesuffix("_scale_shift"), "dim": 1,
        "scale_map": SCALE_MAPS[affine.scale_map],
        "map_arg": affine.map_arg, "shift_first": affine.shift_first, "inverse": affine.inverse, "event_dims": 1,
    }  # fmt: skip


def _spline_options(spline: Spline) -> dict:
    same = set(spline.bound) if spline.tails else {1.0}
    return {
        "bound": same.pop(), "bins": spline.bins, "tails": spline.tails, "form": SPLINE_VARIANTS[spline.variant],
        "param_scale": spline.param_scale, "min_bin": spline.min_bin, "min_slope": spline.min_slope,
        "inverse": spline.inverse, "event_dims": 1,
    }  # fmt: skip


def _spline_inputs(spline: Spline, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor | None, None]:
    """Return the numbers of every row and column, bounds that differ, and no mask."""
    differ = spline.tails and len({*spline.bound}) > 1
    bounds = torch.tensor(spline.bound, dtype=x.dtype, device=x.device) if differ else None
    count = len(spline.columns)
    return params.reshape(params.shape[0], count, params.shape[1] // count), bounds, None


def _where_inside(spline: Spline, x: Tensor, y: Tensor) -> Tensor:
    """Return y, or 0 where x is out of the bound if the spline says so."""
    if not spline.zero_outside:
        return y
    return torch.where(x.abs() <= torch.tensor(spline.bound, dtype=x.dtype, device=x.device), y, 0.0)


def _turned(spline: Spline, x: Tensor) -> Tensor:
    return _wrapped(x, _constants(spline.bound, x))


def _constants(values: tuple[float, ...], x: Tensor) -> Any:
    return values[0] if len({*values}) == 1 else torch.tensor(values, dtype=x.dtype, device=x.device)


def _wrapped(x: Tensor, bound: Any) -> Tensor:
    return torch.remainder(x, 2 * bound) - bound


def _uniform(uniform: Uniform, x: Tensor) -> Tensor:
    low, high = (_constants(ends, x) for ends in (uniform.low, uniform.high))
    outside = (x < low) | (x > high) if uniform.closed else ~((x >= low) & (x < high))
    return x.new_full((x.shape[0],), uniform.log_density).masked_fill(outside.any(1), -math.inf)


def _scale(scale: Scale, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    zero = x.new_zeros(())
    shift = zero if scale.shift < 0 else weights[scale.shift]
    log_scale = zero if scale.log_scale < 0 else weights[scale.log_scale]
    if scale.inverse:
        e = torch.exp(-log_scale)
        return (x * e - shift if scale.shift_first else (x - shift) * e), -log_scale.sum()
    e = torch.exp(log_scale)
    return ((x + shift) * e if scale.shift_first else x * e + shift), log_scale.sum()


def net_output(net: Net, x: Tensor, context: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
    return _parts(net.parts, _inputs(net, x, context), context, weights)[-1]


def _inputs(net: Net, x: Tensor, context: Tensor | None) -> Tensor:
    if not net.context:
        return x
    assert context is not None
    return torch.cat((x, context), 1)


def _parts(parts: Sequence[Part], h: Tensor, context: Tensor | None, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return what goes into each part, and what comes out of the last."""
    values = [h]
    for part in parts:
        h = values[-1]
        if isinstance(part, Dense):
            h = ACTIVATE[part.activation](_before(part, h, weights), part.arg)
        elif isinstance(part, Activation):
            h = ACTIVATE[part.activation](h, part.arg)
        elif isinstance(part, Residual):
            h = h + _parts(part.parts, h, context, weights)[-1]
        elif isinstance(part, Context):
            assert context is not None
            more = ACTIVATE[part.dense.activation](_before(part.dense, context, weights), part.dense.arg)
            h = h * more if part.gate else h + more
        elif isinstance(part, Norm):
            h = _normalized(part, h)[0]
            h = _plus(h if part.weight < 0 else h * weights[part.weight], part.bias, weights)
        elif isinstance(part, Elementwise):
            h = _plus(h if part.factor < 0 else h * weights[part.factor], part.shift, weights)
        else:
            at = _at(part.columns, h)
            sine, cosine = _waves(part, h.index_select(1, at), weights)
            wave = _plus(sine * weights[part.sine] + cosine * weights[part.cosine], part.bias, weights)
            h = h.index_copy(1, at, wave)
        values.append(h)
    return values


def _plus(h: Tensor, place: int, weights: Sequence[Tensor]) -> Tensor:
    return h if place < 0 else h + weights[place]


def _matrix(dense: Dense, weights: Sequence[Tensor]) -> Tensor:
    weight = weights[dense.weight]
    return weight if dense.mask < 0 else weight * weights[dense.mask].detach()


def _before(dense: Dense, h: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return a layer's numbers before its activation."""
    return _plus(matmul(h, _matrix(dense, weights).mT), dense.bias, weights)


def _normalized(norm: Norm, h: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return h with mean 0 and variance 1, the reciprocal of its deviation, and what the variance divides by."""
    over = h.shape[1] - norm.unbiased
    centered = h - h.mean(1, keepdim=True)
    rate = (centered.square().sum(1, keepdim=True) / over + norm.eps).rsqrt()
    return centered * rate, rate, over


def _waves(periodic: Periodic, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    angle = x * weights[periodic.scale].detach()
    return torch.sin(angle), torch.cos(angle)


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
        if isinstance(instruction, Net):
            self.net(instruction, h, self.params)
            return
        if isinstance(instruction, (Wrap, Uniform)):
            return
        if isinstance(instruction, Autoregressive):
            self.autoregressive(instruction, h)
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
            numbers = _numbers(instruction, x, params, self.weights)
            grad, of_numbers = _pulled(instruction, grad, self.logdet, x, numbers)
            if isinstance(instruction, Spline) and instruction.params >= 0:
                self.add(instruction.params, of_numbers.sum(0).view(self.weights[instruction.params].shape))
            else:
                self.params = of_numbers
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

    def autoregressive(self, inverse: Autoregressive, y: Tensor) -> None:
        """The last generation first: those before it are what its numbers depend on."""
        h, _ = _solved(inverse, y, self.given, self.weights)
        params = _conditioned(inverse.net, h, self.given, self.weights)
        for transform, places in reversed(_generations(inverse)):
            at, of_numbers = _at(transform.columns, h), _at(places, h)
            grad, of_params = _pulled(
                transform, self.h.index_select(1, at), self.logdet, y.index_select(1, at),
                params.index_select(1, of_numbers),
            )  # fmt: skip
            self.h = self.h.index_copy(1, at, grad)
            self.net(inverse.net, h, torch.zeros_like(params).index_copy(1, of_numbers, of_params))

    def net(self, net: Net, h: Tensor, grad: Tensor) -> None:
        at = _at(net.columns, h)
        x = h.index_select(1, at)
        grad = self.parts(net.parts, _inputs(net, x, self.given), grad)
        count = x.shape[1]
        # the vmap of is_grads_batched has no rule for a slice of the whole
        self.h = self.h.index_add(1, at, grad[:, :count] if net.context else grad)
        if net.context and self.context is not None:
            self.context = self.context + grad[:, count:]

    def parts(self, parts: Sequence[Part], h: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of h from that of what the parts make of it."""
        values = _parts(parts, h, self.given, self.weights)
        for part, value in zip(parts[::-1], values[-2::-1], strict=True):
            if isinstance(part, Dense):
                grad = self.dense(part, value, grad)
            elif isinstance(part, Activation):
                grad = PULL[part.activation](grad, value, part.arg)
            elif isinstance(part, Residual):
                grad = grad + self.parts(part.parts, value, grad)
            elif isinstance(part, Context):
                grad = self.context_part(part, value, grad)
            elif isinstance(part, Norm):
                grad = self.norm(part, value, grad)
            elif isinstance(part, Elementwise):
                self.add(part.factor, (grad * value).sum(0))
                self.add(part.shift, grad.sum(0))
                grad = grad if part.factor < 0 else grad * self.weights[part.factor]
            else:
                grad = self.periodic(part, value, grad)
        return grad

    def dense(self, dense: Dense, h: Tensor, grad: Tensor) -> Tensor:
        grad = PULL[dense.activation](grad, _before(dense, h, self.weights), dense.arg)
        of_weight = matmul(grad.mT, h)
        self.add(dense.weight, of_weight if dense.mask < 0 else of_weight * self.weights[dense.mask].detach())
        self.add(dense.bias, grad.sum(0))
        return matmul(grad, _matrix(dense, self.weights))

    def context_part(self, part: Context, h: Tensor, grad: Tensor) -> Tensor:
        assert self.given is not None and self.context is not None
        dense, of_more = part.dense, grad
        if part.gate:
            more = ACTIVATE[dense.activation](_before(dense, self.given, self.weights), dense.arg)
            grad, of_more = grad * more, grad * h
        self.context = self.context + self.dense(dense, self.given, of_more)
        return grad

    def norm(self, norm: Norm, h: Tensor, grad: Tensor) -> Tensor:
        normal, rate, over = _normalized(norm, h)
        self.add(norm.weight, (grad * normal).sum(0))
        self.add(norm.bias, grad.sum(0))
        grad = grad if norm.weight < 0 else grad * self.weights[norm.weight]
        along = (grad * normal).sum(1, keepdim=True) / over
        return (grad - grad.mean(1, keepdim=True) - normal * along) * rate

    def periodic(self, periodic: Periodic, h: Tensor, grad: Tensor) -> Tensor:
        at = _at(periodic.columns, h)
        (sine, cosine), some = _waves(periodic, h.index_select(1, at), self.weights), grad.index_select(1, at)
        self.add(periodic.sine, (some * sine).sum(0))
        self.add(periodic.cosine, (some * cosine).sum(0))
        self.add(periodic.bias, some.sum(0))
        slope = self.weights[periodic.sine] * cosine - self.weights[periodic.cosine] * sine
        return grad.index_copy(1, at, some * slope * self.weights[periodic.scale].detach())
