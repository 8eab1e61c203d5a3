"""Rules for normflows, whose flows run from z to x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import program as p
from ..._classes import named
from ..._schemas import PRIORS
from .._run import Conditioner, DoesNotFit, Write, Writer
from .._watch import Path
from .autoregressive import autoregressive
from .couplings import Transform, affine
from .look import BASES, PARTS, RULES, STACKS, Layers, Look, NoInstruction, children, in_order, register
from .nets import Parts
from .nflows import box, scaled, scaled_gaussian, standard

# stacks and flows


@register(STACKS, "normflows.core.NormalizingFlow", "normflows.core.ConditionalNormalizingFlow")
def _flow(look: Look, path: Path, flow: Any) -> Layers:
    look.base = (*path, "q0"), flow.q0, True
    return children(look, (*path, "flows"), flow.flows)


@register(STACKS, "normflows.flows.base.Composite")
def _composite(look: Look, path: Path, layer: Any) -> Layers:
    return children(look, (*path, "_flows"), layer._flows)


@register(RULES, "normflows.flows.base.Reverse")
def _reverse(look: Look, path: Path, layer: Any) -> Write:
    return look.inverted((*path, "flow"), layer.flow)


# base distributions


@register(BASES, "normflows.distributions.base.DiagGaussian")
def _diag_gaussian(look: Look, path: Path, base: Any) -> Write:
    (size,), temperature = standard(look, path, base, "shape"), look.option(path, base, "temperature")
    if temperature is not None:
        raise NoInstruction(path, base, f"its temperature is {temperature}")
    return scaled_gaussian(look, path, base, ("loc", "log_scale"), size)


@register(BASES, "normflows.distributions.base.Uniform")
def _uniform(look: Look, path: Path, base: Any) -> Write:
    (size,) = standard(look, path, base, "shape")
    if not all(getattr(each, "shape", None) == () for each in (base.low, base.high)):
        raise NoInstruction(path, base, "its low and high are not one number each")
    return box(look, path, base, ("low", "high"), size, "log_prob_val", closed=True)


@register(BASES, "normflows.distributions.base.UniformGaussian")
def _uniform_gaussian(look: Look, path: Path, base: Any) -> Write:
    size, normal = look.option(path, base, "ndim"), look.values(path, base, "ind_")
    place = look.computed(path, base, ("scale",), lambda m, *_: (torch.log(m.scale),), 1)

    def write(writer: Writer) -> None:
        writer.fit(size)
        writer.add(p.Scale(writer.order, -1, place, inverse=True))
        writer.add(p.Prior(writer.at(normal), PRIORS.index("gaussian")))

    return write


# layers without a network


@register(RULES, "normflows.flows.affine.coupling.AffineConstFlow")
def _affine_const(look: Look, path: Path, layer: Any) -> Write:
    return scaled(look, path, layer, ("s", "t"), _rows, shift_first=False)


def _rows(layer: Any, inverse: bool, columns: int) -> tuple[Tensor, Tensor]:
    return layer.t.reshape(-1), layer.s.reshape(-1)


@register(RULES, "normflows.flows.normalization.ActNorm")
def _act_norm(look: Look, path: Path, layer: Any) -> Write:
    look.starts(path, layer, lambda m, inverse: not m._buffers["data_dep_init_done"] > 0)
    return _affine_const(look, path, layer)


@register(RULES, "normflows.flows.mixing.Permute")
def _permute(look: Look, path: Path, layer: Any) -> Write:
    mode, size = look.options(path, layer, "mode", "num_channels")
    look.run.columns = size
    if mode == "shuffle":
        order, back = look.values(path, layer, "perm"), look.values(path, layer, "inv_perm")
    elif mode == "swap":
        order, back = ([*range(first, size), *range(first)] for first in (size // 2, (size + 1) // 2))
    else:
        raise NoInstruction(path, layer, f"its mode is {mode!r}")
    return lambda writer: writer.permute(back if writer.inverse else order)


@register(RULES, "normflows.flows.mixing.InvertibleAffine")
def _invertible_affine(look: Look, path: Path, layer: Any) -> Write:
    use_lu, look.run.columns = look.options(path, layer, "use_lu", "num_channels")
    names = ("P", "L", "sign_S", "log_S", "U", "eye") if use_lu else ("W",)
    place = look.computed(path, layer, names, _matrix_and_logdet, 2)
    return lambda writer: writer.add(p.Linear(writer.order, place, logdet=place + 1))


def _matrix_and_logdet(layer: Any, inverse: bool, columns: int) -> tuple[Tensor, Tensor]:
    # the layer is x = z W^-1, its inverse z = x W
    if layer.use_lu:
        weight, logdet = layer._assemble_W(inverse=not inverse), layer.log_S.sum()
    else:
        # inverted in float64, as normflows does
        weight = layer.W if inverse else torch.linalg.inv(layer.W.double()).to(layer.W.dtype)
        logdet = torch.linalg.slogdet(layer.W)[1]
    return weight.mT, logdet if inverse else -logdet


@register(RULES, "normflows.flows.mixing.LULinearPermute")
def _lu_linear_permute(look: Look, path: Path, layer: Any) -> Write:
    both = [look.inverted((*path, name), layer._modules[name]) for name in ("linear", "permutation")]
    return in_order(both)


@register(RULES, "normflows.flows.periodic.PeriodicWrap")
def _periodic_wrap(look: Look, path: Path, layer: Any) -> Write:
    wrap = _circle(look, path, layer, (0.0,))
    # the other way it does nothing
    return lambda writer: wrap(writer) if writer.inverse else None


@register(RULES, "normflows.flows.periodic.PeriodicShift")
def _periodic_shift(look: Look, path: Path, layer: Any) -> Write:
    return _circle(look, path, layer, _constant(look, path, layer, "shift"))


def _circle(look: Look, path: Path, layer: Any, shift: tuple[float, ...]) -> Write:
    places, bound = look.watch.option(path, layer, _places), _constant(look, path, layer, "bound")
    if not places:
        raise NoInstruction(path, layer, "its ind is no list of integers from 0 on")
    if len({*places}) < len(places) or not {len(bound), len(shift)} <= {1, len(places)} or not min(bound) > 0:
        raise NoInstruction(path, layer, f"its ind is {places}, its bound {bound} and its shift {shift}")
    look.run.columns = max(look.run.columns, 1 + max(places))

    def write(writer: Writer) -> None:
        if max(places) >= len(writer.order):
            raise DoesNotFit
        writer.add(p.Wrap(writer.at(places), bound, shift, writer.inverse))

    return write


def _places(layer: Any) -> p.Columns:
    places = [layer.ind] if type(layer.ind) is int else layer.ind
    fits = type(places) in (list, tuple) and all(type(place) is int and place >= 0 for place in places)
    return tuple(places) if fits else ()


def _constant(look: Look, path: Path, layer: Any, name: str) -> tuple[float, ...]:
    """Return a number, or those of a buffer."""
    if name in layer._buffers and not layer._buffers[name].requires_grad:
        return tuple(look.values(path, layer, name))
    value = look.watch.option(path, layer, lambda m: _number(getattr(m, name)))
    if value is None:
        raise NoInstruction(path, layer, f"its {name} is neither a number nor a constant buffer")
    return (value,)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


# couplings


@register(RULES, "normflows.flows.affine.coupling.AffineCouplingBlock")
def _coupling_block(look: Look, path: Path, block: Any) -> Write:
    flows = list(children(look, (*path, "flows"), block.flows))
    names = [named(type(each)).removeprefix("normflows.flows.") for _, each in flows]
    if names != ["reshape.Split", "affine.coupling.AffineCoupling", "reshape.Merge"]:
        raise NoInstruction(path, block, f"its flows are {', '.join(names)}")
    for each in flows:
        look.plain(*each)
    mode, merged = (look.option(*flows[i], "mode") for i in (0, 2))
    if mode not in ("channel", "channel_inv") or merged != mode:
        raise NoInstruction(path, block, f"its split mode is {mode!r}")
    at, layer = flows[1]  # type: Path, Any
    scale, scale_map = look.options(at, layer, "scale", "scale_map")
    if scale and scale_map not in SCALE_MAPS:
        raise NoInstruction(at, layer, f"its scale_map is {scale_map!r}")
    transform: Transform = affine(SCALE_MAPS[scale_map], 0.0, "interleaved") if scale else p.Additive
    net = look.conditioner((*at, "param_map"), layer._modules.get("param_map", layer.param_map))

    def write(writer: Writer) -> None:
        first, second = writer.split("half")
        kept, changed = (first, second) if mode == "channel" else (second, first)
        alone(writer, kept, net)
        writer.add(transform(changed, writer.inverse))

    return write


# normflows divides by the sigmoid, and multiplies by it in "sigmoid_inv"
SCALE_MAPS = {"exp": "exp", "sigmoid": "sigmoid_inv", "sigmoid_inv": "sigmoid"}


def alone(writer: Writer, columns: p.Columns, net: Conditioner, around: tuple[Parts, Parts] = ([], [])) -> None:
    """Write a network of a layer that takes no context."""
    if writer.context:
        raise DoesNotFit
    writer.net(columns, net, *around)


@register(RULES, "normflows.flows.affine.coupling.MaskedAffineFlow")
def _masked_affine(look: Look, path: Path, layer: Any) -> Write:
    kept = look.values(path, layer, "b")
    if layer.b.dim() != 2 or not {*kept} <= {0.0, 1.0}:
        raise NoInstruction(path, layer, "its mask is not a row of zeros and ones")
    # a mask of integers gets the dtype of the networks; without one nothing reads it
    read = ("b",) if look.watch.option(path, layer, lambda m: m.b.is_floating_point()) else ()
    place = look.computed(path, layer, read, _masks, 2) if layer._modules else 0
    masks: tuple[Parts, Parts] = [p.Elementwise(place, -1)], [p.Elementwise(place + 1, -1)]
    steps = [_step(look, path, layer, "s", p.Multiplicative, masks), _step(look, path, layer, "t", p.Additive, masks)]
    look.run.columns = len(kept)
    return in_order(steps)


def _masks(layer: Any, inverse: bool, columns: int) -> tuple[Tensor, Tensor]:
    mask = layer.b[0]
    if not mask.is_floating_point():
        mask = mask.to(next(layer.parameters()).dtype)
    return mask, 1 - mask


def _step(look: Look, path: Path, layer: Any, name: str, kind: Any, masks: tuple[Parts, Parts]) -> Write:
    """Return what writes one of the two transforms: of all columns, by numbers that are 0 for those that are kept."""
    net = look.watch.option(path, layer, lambda m: getattr(m, name) if name not in m._modules else None)
    if net is torch.zeros_like:
        return lambda writer: None
    conditioner = look.conditioner((*path, name), layer._modules.get(name, net))

    def write(writer: Writer) -> None:
        alone(writer, writer.order, conditioner, masks)
        writer.add(kind(writer.order, writer.inverse))

    return write


_WRAPPED = {
    "CoupledRationalQuadraticSpline": "prqct", "CircularCoupledRationalQuadraticSpline": "prqct",
    "AutoregressiveRationalQuadraticSpline": "mprqat", "CircularAutoregressiveRationalQuadraticSpline": "mprqat",
}  # fmt: skip


@register(RULES, *[f"normflows.flows.neural_spline.wrapper.{name}" for name in _WRAPPED])
def _spline(look: Look, path: Path, layer: Any) -> Write:
    name = _WRAPPED[type(layer).__name__]
    return look.inverted((*path, name), layer._modules[name])


@register(RULES, "normflows.flows.affine.autoregressive.MaskedAffineAutoregressive")
def _affine_autoregressive(look: Look, path: Path, layer: Any) -> Write:
    return autoregressive(look, path, layer, affine("sigmoid", 1e-3, "interleaved_scale_shift"))


# parts of networks


@register(PARTS, "normflows.nets.mlp.MLP")
def _mlp(look: Look, path: Path, module: Any, parts: Parts) -> None:
    look.part((*path, "net"), module.net, parts)


@register(PARTS, "normflows.utils.nn.ConstScaleLayer")
def _const_scale(look: Look, path: Path, module: Any, parts: Parts) -> None:
    sizes = [part.size for part in parts if isinstance(part, p.Dense)]
    if not sizes:
        raise NoInstruction(path, module, "no linear layer is before it")
    parts.append(
        p.Elementwise(look.computed(path, module, ("scale",), lambda m, *_: (m.scale.expand(sizes[-1]),), 1), -1)
    )


@register(PARTS, "normflows.utils.nn.PeriodicFeaturesElementwise")
def _periodic(look: Look, path: Path, module: Any, parts: Parts) -> None:
    columns = look.values(path, module, "ind")
    after: Parts = []
    look.part((*path, "activation"), module.activation, after)
    if after:
        raise NoInstruction((*path, "activation"), module.activation, "it is an activation of some features")
    if not columns:
        return
    names = ("weights", *(["scale"] if "scale" in module._buffers else []))
    place = look.computed(path, module, names, _waves, 3)
    bias = look.tensor(path, module, "bias") if look.option(path, module, "apply_bias") else -1
    parts.append(p.Periodic(tuple(columns), place, place + 1, place + 2, bias))


def _waves(module: Any, inverse: bool, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    weights = module.weights
    return torch.as_tensor(module.scale, dtype=weights.dtype).expand(len(weights)), weights[:, 0], weights[:, 1]
