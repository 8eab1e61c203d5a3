"""Rules for nflows and its copy in glasflow, and for what normflows has taken from it."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import program as p
from ..._schemas import PRIORS, SCALE_MAPS, SPLINE_VARIANTS, TAILS
from .._run import DoesNotFit, Tape, Write
from .._watch import Path
from .look import BASES, PARTS, RULES, STACKS, Layers, Look, NoInstruction, children, in_order, register
from .nets import activation

Transform = Callable[[p.Columns, bool], p.Instruction]


# stacks and flows


@register(
    STACKS, "nflows.flows.base.Flow", "nflows.flows.realnvp.SimpleRealNVP",
    "nflows.flows.autoregressive.MaskedAutoregressiveFlow", "glasflow.flows.realnvp.RealNVP",
    "glasflow.flows.nsf.CouplingNSF",
)  # fmt: skip
def _flow(look: Look, path: Path, flow: Any) -> Layers:
    look.base = (*path, "_distribution"), flow._distribution
    yield (*path, "_transform"), flow._transform


@register(STACKS, "nflows.transforms.base.CompositeTransform")
def _composite(look: Look, path: Path, layer: Any) -> Layers:
    return children(look, (*path, "_transforms"), layer._transforms)


@register(RULES, "nflows.transforms.base.InverseTransform")
def _inverse(look: Look, path: Path, layer: Any) -> Write:
    return look.inverted((*path, "_transform"), layer._transform)


# base distributions


def standard(look: Look, path: Path, base: Any, name: str) -> tuple[int, ...]:
    """Return the shape of a distribution of vectors."""
    shape = tuple(look.option(path, base, name))
    if len(shape) != 1:
        raise NoInstruction(path, base, f"its shape is {shape}")
    return shape


def gaussian(tape: Tape) -> None:
    tape.add(p.Prior(tape.order, PRIORS.index("gaussian")))


@register(BASES, "nflows.distributions.normal.StandardNormal")
def _standard_normal(look: Look, path: Path, base: Any) -> Write:
    shape = standard(look, path, base, "_shape")

    def write(tape: Tape) -> None:
        tape.fit(*shape)
        gaussian(tape)

    return write


@register(BASES, "nflows.distributions.normal.ConditionalDiagonalNormal")
def _conditional_normal(look: Look, path: Path, base: Any) -> Write:
    shape = standard(look, path, base, "_shape")
    encoder = look.conditioner((*path, "_context_encoder"), base._context_encoder)
    encoder = encoder._replace(given=encoder.alone, alone=None, joins=True, blind=True)

    def write(tape: Tape) -> None:
        tape.fit(*shape)
        tape.net((), encoder)
        # means first, then the logarithms of deviations
        tape.add(p.Affine(tape.order, SCALE_MAPS.index("exp"), p.PACKINGS.index("shift_scale"), 0.0, inverse=True))
        gaussian(tape)

    return write


# layers without a network


@register(RULES, "nflows.transforms.standard.IdentityTransform")
def _identity(look: Look, path: Path, layer: Any) -> Write:
    return lambda tape: None


@register(
    RULES, "nflows.transforms.permutations.Permutation", "nflows.transforms.permutations.RandomPermutation",
    "nflows.transforms.permutations.ReversePermutation", "normflows.flows.mixing._RandomPermutation",
)  # fmt: skip
def _permutation(look: Look, path: Path, layer: Any) -> Write:
    dim, order = look.option(path, layer, "_dim"), look.values(path, layer, "_permutation")
    if dim != 1:
        raise NoInstruction(path, layer, f"it permutes dim {dim}")
    back = sorted(range(len(order)), key=order.__getitem__)
    look.run.columns = len(order)
    return lambda tape: tape.permute(back if tape.inverse else order)


@register(
    RULES, "nflows.transforms.standard.PointwiseAffineTransform", "nflows.transforms.standard.AffineTransform"
)  # fmt: skip
def _pointwise(look: Look, path: Path, layer: Any) -> Write:
    return scaled(look, path, layer, ("_shift", "_scale"), _pointwise_numbers)


def _pointwise_numbers(layer: Any, inverse: bool, columns: int) -> tuple[Tensor, Tensor]:
    # z-scores lose fewer digits if the mean is taken off first
    return (layer._shift / layer._scale).expand(columns), torch.log(layer._scale).expand(columns)


def scaled(
    look: Look, path: Path, layer: Any, names: tuple[str, ...],
    compute: Callable[[Any, bool, int], tuple[Tensor, ...]], shift_first: bool = True,
) -> Write:  # fmt: skip
    """Return what writes (x + shift) exp(log_scale), or x exp(log_scale) + shift, with numbers that are computed."""
    place = look.computed(path, layer, names, compute, 2)
    return lambda tape: tape.add(p.Scale(tape.order, place, place + 1, shift_first, tape.inverse))


@register(RULES, "nflows.transforms.normalization.BatchNorm")
def _batch_norm(look: Look, path: Path, layer: Any) -> Write:
    if look.option(path, layer, "training"):
        raise NoInstruction(path, layer, "it normalises by the batch")
    return scaled(
        look, path, layer, ("unconstrained_weight", "bias", "running_mean", "running_var"), _batch_norm_numbers
    )


def _batch_norm_numbers(layer: Any, inverse: bool, columns: int) -> tuple[Tensor, Tensor]:
    weight, variance = layer.weight, layer.running_var + layer.eps
    return layer.bias * torch.sqrt(variance) / weight - layer.running_mean, torch.log(weight) - 0.5 * torch.log(
        variance
    )


@register(RULES, "nflows.transforms.normalization.ActNorm")
def _act_norm(look: Look, path: Path, layer: Any) -> Write:
    shift, log_scale = look.tensor(path, layer, "shift"), look.tensor(path, layer, "log_scale")
    look.starts(path, layer, lambda m, inverse: not inverse and m.training and not m._buffers["initialized"])
    return lambda tape: tape.add(p.Scale(tape.order, shift, log_scale, inverse=tape.inverse))


_LINEAR = {
    "nflows.transforms.linear.NaiveLinear": ("_weight",),
    "nflows.transforms.lu.LULinear": ("lower_entries", "upper_entries", "unconstrained_upper_diag"),
    "nflows.transforms.qr.QRLinear": ("upper_entries", "log_upper_diag"),
    "nflows.transforms.svd.SVDLinear": ("unconstrained_diagonal",),
    "normflows.flows.mixing._LULinear": ("lower_entries", "upper_entries", "unconstrained_upper_diag"),
}
_REFLECTIONS = ("orthogonal", "orthogonal_1", "orthogonal_2")


@register(RULES, *_LINEAR)
def _linear(look: Look, path: Path, layer: Any) -> Write:
    using_cache, features = look.options(path, layer, "using_cache", "features")
    if using_cache:
        raise NoInstruction(path, layer, "it keeps its weight in a cache")
    for name in _REFLECTIONS:
        if name in layer._modules:
            look.plain((*path, name), layer._modules[name])
            look.tensor((*path, name), layer._modules[name], "q_vectors", given=False)
    names = next(names for kind, names in _LINEAR.items() if kind.endswith(f".{type(layer).__name__}"))
    place = look.computed(path, layer, ("bias", *names), _linear_numbers, 3)
    look.run.columns = features
    return lambda tape: tape.add(p.Linear(tape.order, place, place + 1, place + 2))


def _linear_numbers(layer: Any, inverse: bool, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    if hasattr(layer, "lower_entries"):
        weight, logdet = _product_of_triangles(layer)
    else:
        weight, logdet = layer.weight(), layer.logabsdet()
    if not inverse:
        return weight, layer.bias, logdet
    weight = torch.linalg.inv(weight)
    return weight, -(weight @ layer.bias), -logdet


def _product_of_triangles(layer: Any) -> tuple[Tensor, Tensor]:
    """Return what `weight` and `logabsdet` of LULinear do, in half of the time."""
    diagonal = F.softplus(layer.unconstrained_upper_diag) + layer.eps
    entries = torch.cat((layer.lower_entries, layer.upper_entries, diagonal))
    # behind them a 0 and a 1
    entries = F.pad(F.pad(entries, (0, 1)), (0, 1), value=1.0)
    lower, upper = entries[_triangles(layer.features, entries.device)]
    return lower @ upper, torch.log(diagonal).sum()


@functools.lru_cache(maxsize=64)
def _triangles(n: int, device: torch.device) -> Tensor:
    """Return where the entries of a lower and an upper triangle are, (2, n, n)."""
    count = n * (n - 1) // 2
    place = torch.full((2, n, n), 2 * count + n)
    for triangle, (rows, columns), first in (
        (place[0], torch.tril_indices(n, n, -1), 0), (place[1], torch.triu_indices(n, n, 1), count)
    ):  # fmt: skip
        triangle[rows, columns] = torch.arange(first, first + count)
    place[0].fill_diagonal_(2 * count + n + 1)
    place[1].diagonal().copy_(torch.arange(2 * count, 2 * count + n))
    return place.to(device)


# couplings


def coupling(look: Look, path: Path, layer: Any, transform: Transform) -> Write:
    """Return what writes a coupling of the features that it names, with its transform of the others, if it has one."""
    features = look.option(path, layer, "features")
    kept, changed = (look.values(path, layer, f"{name}_features") for name in ("identity", "transform"))
    net = look.conditional((*path, "transform_net"), layer.transform_net)
    other: Write | None = None
    if layer.unconditional_transform is not None:
        other = look.layer((*path, "unconditional_transform"), layer.unconditional_transform)
    look.run.columns = features

    def conditional(tape: Tape) -> None:
        tape.net(tape.at(kept), net)
        tape.add(transform(tape.at(changed), tape.inverse))

    def unconditional(tape: Tape) -> None:
        if other is not None:
            tape.within(tape.at(kept), other)

    both = in_order([conditional, unconditional])

    def write(tape: Tape) -> None:
        tape.fit(features)
        both(tape)

    return write


_AFFINE_COUPLINGS = (
    "nflows.transforms.coupling.AffineCouplingTransform", "glasflow.transforms.coupling.AffineCouplingTransform"
)  # fmt: skip


@register(RULES, *_AFFINE_COUPLINGS)
def _affine(look: Look, path: Path, layer: Any) -> Write:
    function = look.watch.option(path, layer, lambda m: getattr(m, "scale_activation", None))
    scale_map = _scale_map(type(layer), function)
    if scale_map is None:
        raise NoInstruction(path, layer, f"its scale_activation {function!r} has no instruction")
    return coupling(look, path, layer, affine(*scale_map, "shift_scale"))


def affine(scale_map: str, arg: float, packing: str) -> Transform:
    number, packed = SCALE_MAPS.index(scale_map), p.PACKINGS.index(packing)
    return lambda columns, inverse: p.Affine(columns, number, packed, arg, inverse=inverse)


def _scale_map(kind: type, function: Any) -> tuple[str, float] | None:
    """Return scale map and constant of a coupling's scale activation, None if it is another; nflows 0.14 has one."""
    table = getattr(sys.modules.get("glasflow.transforms.utils"), "SCALE_ACTIVATIONS", {})
    default = [None, getattr(kind, "DEFAULT_SCALE_ACTIVATION", None), table.get("nflows")]
    general = [getattr(kind, "GENERAL_SCALE_ACTIVATION", None), table.get("nflows_general"), table.get("wide")]
    if any(function is each for each in default):
        return "sigmoid", 1e-3
    if any(function is each for each in general):
        return "softplus_clamp", 0.0
    # exp(4 (sigmoid(x) - 1/2)) = exp(2 tanh(x / 2))
    return ("tanh", 2.0) if function is table.get("log2") else None


@register(RULES, "nflows.transforms.coupling.AdditiveCouplingTransform")
def _additive(look: Look, path: Path, layer: Any) -> Write:
    return coupling(look, path, layer, p.Additive)


@register(
    RULES, "nflows.transforms.coupling.PiecewiseRationalQuadraticCouplingTransform",
    "normflows.flows.neural_spline.coupling.PiecewiseRationalQuadraticCoupling",
)  # fmt: skip
def _spline_coupling(look: Look, path: Path, layer: Any) -> Write:
    bins = look.option(path, layer, "num_bins")
    width = look.watch.option((*path, "transform_net"), layer.transform_net, _width)
    return coupling(look, path, layer, spline(look, path, layer, bins, 1 / math.sqrt(width)))


def _width(net: Any) -> float:
    """Return what the widths and heights of bins are divided by, squared."""
    return getattr(net, "hidden_features", getattr(net, "hidden_channels", 1))


@register(
    RULES, "nflows.transforms.nonlinearities.PiecewiseRationalQuadraticCDF",
    "normflows.flows.neural_spline.coupling.PiecewiseRationalQuadraticCDF",
)  # fmt: skip
def _spline_of_columns(look: Look, path: Path, layer: Any) -> Write:
    names = ("unnormalized_widths", "unnormalized_heights", "unnormalized_derivatives")
    if layer.unnormalized_widths.dim() != 2:
        raise NoInstruction(path, layer, "it is no transform of vectors")
    place = look.computed(path, layer, names, lambda m, *_: (torch.cat([getattr(m, name) for name in names], 1),), 1)
    transform = spline(look, path, layer, layer.unnormalized_widths.shape[1], 1.0, place)
    return lambda tape: tape.add(transform(tape.order, tape.inverse))


def spline(look: Look, path: Path, layer: Any, bins: int, param_scale: float, params: int = -1) -> Transform:
    """Return the spline of a layer; its parameters are weights or come from a network."""
    tails = look.watch.option(path, layer, lambda m: tuple(m.tails) if isinstance(m.tails, list) else m.tails)
    width, height, slope = look.options(path, layer, "min_bin_width", "min_bin_height", "min_derivative")
    each = tails if isinstance(tails, tuple) else () if tails is None else (tails,)
    if not {*each} <= {*TAILS}:
        raise NoInstruction(path, layer, f"its tails are {tails!r}")
    if width != height:
        raise NoInstruction(path, layer, "its min_bin_width and min_bin_height differ")
    if "tail_bound" in layer._buffers:
        bound = tuple(look.values(path, layer, "tail_bound"))
    else:
        bound = (float(look.option(path, layer, "tail_bound")),)
    # outside of their domain layers without tails raise errors, programs return nan
    look.run.checks |= tails is None
    slopes = bins + (-1 if tails == "linear" else 0 if tails == "circular" else 1)
    indices = tuple(map(TAILS.index, each))

    def transform(columns: p.Columns, inverse: bool) -> p.Spline:
        return p.Spline(
            columns, bins, slopes, indices, SPLINE_VARIANTS.index("nflows"), bound, param_scale, float(width),
            float(slope), params, inverse, zero_outside=isinstance(tails, tuple),
        )  # fmt: skip

    return transform


# autoregressive layers


def autoregressive(look: Look, path: Path, layer: Any, transform: Transform) -> Write:
    net = look.conditional((*path, "autoregressive_net"), layer.autoregressive_net)

    def write(tape: Tape) -> None:
        if tape.inverse:
            raise DoesNotFit
        tape.net(tape.order, net)
        tape.add(transform(tape.order, False))

    return write


@register(RULES, "nflows.transforms.autoregressive.MaskedAffineAutoregressiveTransform")
def _affine_autoregressive(look: Look, path: Path, layer: Any) -> Write:
    eps, function = look.watch.option(path, layer, lambda m: [m._epsilon, getattr(m, "scale_activation", None)])
    name = f"{type(layer).__qualname__}.__init__.<locals>.<lambda>"
    # glasflow makes its default anew for each layer
    if function is not None and (function.__module__, function.__qualname__) != (type(layer).__module__, name):
        raise NoInstruction(path, layer, f"its scale_activation {function!r} has no instruction")
    look.run.columns = look.option(path, layer, "features")
    return autoregressive(look, path, layer, affine("softplus", float(eps), "interleaved_scale_shift"))


@register(
    RULES, "nflows.transforms.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform",
    "normflows.flows.neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive",
)  # fmt: skip
def _spline_autoregressive(look: Look, path: Path, layer: Any) -> Write:
    bins = look.option(path, layer, "num_bins")
    width = look.watch.option((*path, "autoregressive_net"), layer.autoregressive_net, _width)
    return autoregressive(look, path, layer, spline(look, path, layer, bins, 1 / math.sqrt(width)))


# a network of linear layers


@register(PARTS, "nflows.nn.nets.mlp.MLP")
def _mlp(look: Look, path: Path, module: Any, parts: list[p.Part]) -> None:
    shapes, last = look.options(path, module, "_in_shape", "_activate_output")
    if len(shapes) != 1:
        raise NoInstruction(path, module, f"it takes inputs of shape {tuple(shapes)}")
    hidden = children(look, (*path, "_hidden_layers"), module._hidden_layers)
    for layer in (((*path, "_input_layer"), module._input_layer), *hidden):
        look.part(*layer, parts)
        activation(look, path, module, parts, "_activation")
    look.part((*path, "_output_layer"), module._output_layer, parts)
    if last:
        activation(look, path, module, parts, "_activation")
