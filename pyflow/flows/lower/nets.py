"""Rules for what conditioners are made of: torch's layers, and what nflows and normflows build alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import program as p
from .._run import Conditioner
from .._watch import Path
from .look import NETS, PARTS, Look, NoInstruction, children, register, without_context

Parts = list[p.Part]


@register(PARTS, nn.Sequential)
def sequential(look: Look, path: Path, module: Any, parts: Parts) -> None:
    for name, part in module._modules.items():
        look.part((*path, name), part, parts)


@register(PARTS, nn.Linear)
def _linear(look: Look, path: Path, module: Any, parts: Parts) -> None:
    parts.append(dense(look, path, module))


@register(PARTS, "nflows.transforms.made.MaskedLinear", "normflows.nets.made.MaskedLinear")
def _masked_linear(look: Look, path: Path, module: Any, parts: Parts) -> None:
    linear = dense(look, path, module)._replace(mask=look.tensor(path, module, "mask"))
    # what its numbers depend on decides in which order an inverse finds columns
    look.run.masks[linear.mask] = look.buffer(path, module, "mask")
    parts.append(linear)


def dense(look: Look, path: Path, module: Any) -> p.Dense:
    weight = look.tensor(path, module, "weight")
    if weight < 0:
        raise NoInstruction(path, module, "its weight is None")
    size = look.watch.shapes[-1][0]
    return p.Dense(weight, look.tensor(path, module, "bias"), size)


@register(PARTS, nn.Identity)
def _identity(look: Look, path: Path, module: Any, parts: Parts) -> None:
    pass


@register(PARTS, nn.Dropout)
def _dropout(look: Look, path: Path, module: Any, parts: Parts) -> None:
    rate, training = look.options(path, module, "p", "training")
    if training and rate != 0:
        raise NoInstruction(path, module, f"it drops with p={rate}")


@register(PARTS, nn.BatchNorm1d)
def _batch_norm(look: Look, path: Path, module: Any, parts: Parts) -> None:
    training, tracks = look.options(path, module, "training", "track_running_stats")
    if training or not tracks:
        raise NoInstruction(path, module, "it normalises by the batch")
    if look.tensor(path, module, "running_mean", given=False) < 0:
        raise NoInstruction(path, module, "it has no running statistics")
    place = look.computed(path, module, ("weight", "bias", "running_mean", "running_var"), _factor_and_shift, 2)
    parts.append(p.Elementwise(place, place + 1))


def _factor_and_shift(module: nn.BatchNorm1d, inverse: bool, columns: int) -> tuple[Tensor, Tensor]:
    mean, variance = module.running_mean, module.running_var
    assert mean is not None and variance is not None
    factor = torch.rsqrt(variance + module.eps)
    if module.weight is None:
        return factor, -mean * factor
    factor = factor * module.weight
    return factor, module.bias - mean * factor


@register(PARTS, nn.LayerNorm)
def _layer_norm(look: Look, path: Path, module: Any, parts: Parts) -> None:
    shape, eps = look.options(path, module, "normalized_shape", "eps")
    if len(shape) != 1:
        raise NoInstruction(path, module, f"normalized_shape is {tuple(shape)}")
    parts.append(p.Norm(look.tensor(path, module, "weight"), look.tensor(path, module, "bias"), float(eps)))


# activations


def activate(parts: Parts, name: str, arg: float = 0.0) -> None:
    """Add an activation: to a linear layer without one, or as a part of its own."""
    index = p.ACTIVATIONS.index(name)
    if parts and isinstance(parts[-1], p.Dense) and not parts[-1].activation:
        parts[-1] = parts[-1]._replace(activation=index, arg=arg)
    elif name != "identity":
        parts.append(p.Activation(index, arg))


_NAMES: dict[Any, str] = {
    nn.ReLU: "relu", nn.Tanh: "tanh", nn.SiLU: "silu", nn.Sigmoid: "sigmoid",
    "normflows.utils.nn.ClampExp": "clamp_exp",
}  # fmt: skip
_FUNCTIONS: tuple[tuple[Callable[..., Tensor], str, float], ...] = (
    (F.relu, "relu", 0.0), (torch.relu, "relu", 0.0), (F.leaky_relu, "leaky_relu", 0.01), (F.tanh, "tanh", 0.0),
    (torch.tanh, "tanh", 0.0), (F.silu, "silu", 0.0), (F.gelu, "gelu", 0.0), (F.elu, "elu", 1.0),
    (F.sigmoid, "sigmoid", 0.0), (torch.sigmoid, "sigmoid", 0.0),
)  # fmt: skip


def _named_activation(name: str) -> Callable[[Look, Path, Any, Parts], None]:
    def add(look: Look, path: Path, module: Any, parts: Parts) -> None:
        _in_place(look, path, module, parts)
        activate(parts, name)

    return add


def _in_place(look: Look, path: Path, module: Any, parts: Parts) -> None:
    # a residual block adds its input, and a coupling keeps its own, as they are then
    if hasattr(module, "inplace") and look.option(path, module, "inplace") and not parts:
        raise NoInstruction(path, module, "it changes the input of its network or block in place")


PARTS.update({kind: _named_activation(name) for kind, name in _NAMES.items()})


@register(PARTS, nn.LeakyReLU)
def _leaky_relu(look: Look, path: Path, module: Any, parts: Parts) -> None:
    _in_place(look, path, module, parts)
    activate(parts, "leaky_relu", _at_least_0(look, path, module, "negative_slope"))


@register(PARTS, nn.ELU)
def _elu(look: Look, path: Path, module: Any, parts: Parts) -> None:
    _in_place(look, path, module, parts)
    activate(parts, "elu", _at_least_0(look, path, module, "alpha"))


def _at_least_0(look: Look, path: Path, module: Any, name: str) -> float:
    numbers = look.numbers(path, module, name)
    if len(numbers) != 1 or not 0 <= numbers[0] < float("inf"):
        raise NoInstruction(path, module, f"its {name} is {', '.join(map(str, numbers))}")
    return numbers[0]


@register(PARTS, nn.GELU)
def _gelu(look: Look, path: Path, module: Any, parts: Parts) -> None:
    if look.option(path, module, "approximate") != "none":
        raise NoInstruction(path, module, f"approximate={module.approximate!r}")
    activate(parts, "gelu")


def activation(look: Look, path: Path, module: Any, parts: Parts, name: str = "activation") -> None:
    """Add the activation that a module has as an attribute, a function or a module."""
    if name in module._modules:
        look.part((*path, name), module._modules[name], parts)
        return
    value = look.option(path, module, name)
    known = [(kind, arg) for function, kind, arg in _FUNCTIONS if function is value]
    if not known:
        raise NoInstruction(path, module, f"its {name} {getattr(value, '__qualname__', value)!s} has no instruction")
    activate(parts, *known[0])


# residual networks and MADE


def context_of(look: Look, path: Path, module: Any, parts: Parts, gate: bool = False) -> p.Context:
    """Return the product with the context that a module adds, or gates by its sigmoid; `parts` holds its activation."""
    dense: Parts = []
    look.part((*path, "context_layer"), module.context_layer, dense)
    for part in [p.Activation(p.ACTIVATIONS.index("sigmoid"))] if gate else parts:
        if isinstance(part, p.Activation):
            activate(dense, p.ACTIVATIONS[part.activation], part.arg)
        else:
            dense.append(part)
    if len(dense) != 1 or not isinstance(dense[0], p.Dense):
        raise NoInstruction((*path, "context_layer"), module.context_layer, "it is more than a linear layer")
    return p.Context(dense[0], gate)


def has_context(module: Any) -> bool:
    return "context_layer" in module._modules


def _block(look: Look, path: Path, module: Any, parts: Parts, norms: str | None, gate: bool) -> None:
    """Add a residual block: twice a norm, an activation and a linear layer; the context gates it or joins after one."""
    inner: Parts = []
    linears = list(children(look, (*path, "linear_layers"), module.linear_layers))
    normed = [] if norms is None else list(children(look, (*path, norms), getattr(module, norms)))
    look.part((*path, "dropout"), module.dropout, inner)
    for i, linear in enumerate(linears):
        if normed:
            look.part(*normed[i], inner)
        activation(look, path, module, inner)
        look.part(*linear, inner)
        if has_context(module) and i == (1 if gate else 0):
            inner.append(context_of(look, path, module, [], gate))
    parts.append(p.Residual(tuple(inner)))


@register(
    PARTS, "nflows.nn.nets.resnet.ResidualBlock", "normflows.nets.resnet.ResidualBlock",
    "normflows.nets.made.MaskedResidualBlock",
)  # fmt: skip
def _gated_block(look: Look, path: Path, module: Any, parts: Parts) -> None:
    norms = "batch_norm_layers" if look.option(path, module, "use_batch_norm") else None
    _block(look, path, module, parts, norms, gate=True)


@register(PARTS, "nflows.transforms.made.MaskedResidualBlock")
def _added_block(look: Look, path: Path, module: Any, parts: Parts) -> None:
    norms = "batch_norm_layers" if look.option(path, module, "use_batch_norm") else None
    _block(look, path, module, parts, norms, gate=False)


@register(PARTS, "dingo.core.nn.resnet.MyResidualBlock")
def _dingo_block(look: Look, path: Path, module: Any, parts: Parts) -> None:
    norms = {"BatchNorm": "batch_norm_layers", "LayerNorm": "layer_norm_layers"}
    _block(look, path, module, parts, norms.get(look.option(path, module, "norm")), gate=True)


@register(
    PARTS, "nflows.transforms.made.MaskedFeedforwardBlock", "normflows.nets.made.MaskedFeedforwardBlock"
)  # fmt: skip
def _feedforward_block(look: Look, path: Path, module: Any, parts: Parts) -> None:
    if module.batch_norm is not None:
        look.part((*path, "batch_norm"), module.batch_norm, parts)
    look.part((*path, "linear"), module.linear, parts)
    activation(look, path, module, parts)
    look.part((*path, "dropout"), module.dropout, parts)


@register(NETS, "nflows.nn.nets.resnet.ResidualNet", "normflows.nets.resnet.ResidualNet")
def _residual_net(look: Look, path: Path, module: Any) -> Conditioner:
    parts: Parts = []
    if getattr(module, "preprocessing", None) is not None:
        look.part((*path, "preprocessing"), module.preprocessing, parts)
    look.part((*path, "initial_layer"), module.initial_layer, parts)
    for block in children(look, (*path, "blocks"), module.blocks):
        look.part(*block, parts)
    look.part((*path, "final_layer"), module.final_layer, parts)
    return Conditioner(tuple(parts), without_context(parts), joins=True)


@register(NETS, "nflows.transforms.made.MADE", "normflows.nets.made.MADE")
def _made(look: Look, path: Path, module: Any) -> Conditioner:
    parts: Parts = []
    # normflows has features before the first layer; nflows' activations, of the context and without residual blocks
    if "preprocessing" in module._modules:
        look.part((*path, "preprocessing"), module.preprocessing, parts)
    look.part((*path, "initial_layer"), module.initial_layer, parts)
    of_nflows, after = hasattr(module, "use_residual_blocks"), []  # type: bool, Parts
    if of_nflows:
        activation(look, path, module, after)
    if has_context(module):
        parts.append(context_of(look, path, module, after))
    if of_nflows and not look.option(path, module, "use_residual_blocks"):
        activation(look, path, module, parts)
    for block in children(look, (*path, "blocks"), module.blocks):
        look.part(*block, parts)
    look.part((*path, "final_layer"), module.final_layer, parts)
    return Conditioner(tuple(parts) if has_context(module) else None, without_context(parts))


@register(NETS, "dingo.core.nn.resnet.DenseResidualNet")
def _dense_residual_net(look: Look, path: Path, module: Any) -> Conditioner:
    parts: Parts = []
    look.part((*path, "initial_layer"), module.initial_layer, parts)
    resizes = children(look, (*path, "resize_layers"), module.resize_layers)
    for block, resize in zip(children(look, (*path, "blocks"), module.blocks), resizes, strict=True):
        look.part(*block, parts)
        look.part(*resize, parts)
    gated = all(has_context(block) for block in module.blocks)
    return Conditioner(tuple(parts) if gated else None, without_context(parts))


@register(NETS, "sbi.neural_nets.net_builders.flow.ContextSplineMap")
def _context_map(look: Look, path: Path, module: Any) -> Conditioner:
    parts: Parts = []
    look.part((*path, "spline_predictor"), module.spline_predictor, parts)
    return Conditioner(tuple(parts), None, joins=True, blind=True)
