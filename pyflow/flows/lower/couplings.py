"""Rules for couplings of nflows, with affine transforms and splines.

normflows has taken most of them over.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch

from ... import program as p
from ..._schemas import SCALE_MAPS, SPLINE_VARIANTS, TAILS
from ...ops.spline import slopes_of
from .._run import Write, Writer
from .._watch import Path
from .look import RULES, Look, NoInstruction, in_order, register

Transform = Callable[[p.Columns, bool], p.Instruction]


def coupling(look: Look, path: Path, layer: Any, transform: Transform) -> Write:
    """Return what writes a coupling of the features that it names, with its transform of the others, if it has one."""
    features = look.option(path, layer, "features")
    kept, changed = (look.values(path, layer, f"{name}_features") for name in ("identity", "transform"))
    net = look.conditional((*path, "transform_net"), layer.transform_net)
    other: Write | None = None
    if layer.unconditional_transform is not None:
        other = look.layer((*path, "unconditional_transform"), layer.unconditional_transform)
    look.run.columns = features

    def conditional(writer: Writer) -> None:
        writer.net(writer.at(kept), net)
        writer.add(transform(writer.at(changed), writer.inverse))

    def unconditional(writer: Writer) -> None:
        if other is not None:
            writer.within(writer.at(kept), other)

    both = in_order([conditional, unconditional])

    def write(writer: Writer) -> None:
        writer.fit(features)
        both(writer)

    return write


_AFFINE_COUPLINGS = (
    "nflows.transforms.coupling.AffineCouplingTransform", "glasflow.transforms.coupling.AffineCouplingTransform"
)  # fmt: skip


@register(RULES, *_AFFINE_COUPLINGS)
def _affine(look: Look, path: Path, layer: Any) -> Write:
    # older versions have none
    function = look.option(path, layer, "scale_activation") if hasattr(layer, "scale_activation") else None
    scale_map = scale_map_of(type(layer), function)
    if scale_map is None:
        raise NoInstruction(path, layer, f"its scale_activation {function!r} has no instruction")
    return coupling(look, path, layer, affine(*scale_map, "shift_scale"))


def affine(scale_map: str, arg: float, packing: str) -> Transform:
    number, packed = SCALE_MAPS.index(scale_map), p.PACKINGS.index(packing)
    return lambda columns, inverse: p.Affine(columns, number, packed, arg, inverse=inverse)


def scale_map_of(kind: type, function: Any) -> tuple[str, float] | None:
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
    return coupling(look, path, layer, spline_of_net(look, path, layer, "transform_net"))


def spline_of_net(look: Look, path: Path, layer: Any, name: str) -> Transform:
    """Return the splines of a layer whose numbers its network of this name computes."""
    bins = look.option(path, layer, "num_bins")
    width = look.watch.option((*path, name), getattr(layer, name), _width)
    return spline(look, path, layer, bins, 1 / math.sqrt(width))


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
    return lambda writer: writer.add(transform(writer.order, writer.inverse))


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
        bound = look.numbers(path, layer, "tail_bound")
    # outside of their domain layers without tails raise errors, programs return nan
    look.run.checks |= tails is None
    slopes = slopes_of(bins, tails)
    indices = tuple(map(TAILS.index, each))

    def transform(columns: p.Columns, inverse: bool) -> p.Spline:
        return p.Spline(
            columns, bins, slopes, indices, SPLINE_VARIANTS.index("nflows"), bound, param_scale, float(width),
            float(slope), params, inverse, zero_outside=isinstance(tails, tuple),
        )  # fmt: skip

    return transform
