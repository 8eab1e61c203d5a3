"""Rules for masked autoregressive layers: one way a network and its transform, the other way what undoes both."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ... import program as p
from ..._schemas import SCALE_MAPS, SPLINE_VARIANTS, TAILS
from ...nn import MaskedAutoregressive
from ...nn._made import MADE, MaskedLinear
from .. import _schedule
from .._run import Conditioner, DoesNotFit, Write, Writer
from .._watch import Path
from .couplings import Transform, affine, spline_of_net
from .look import RULES, Look, NoInstruction, children, register
from .nets import Parts, activate

# the constant of the scale map of `MaskedAutoregressive`
_LIMIT = -math.log(1e-3)
# the slopes that torch's activations have by themselves
_ARGS = {"leaky_relu": 0.01, "elu": 1.0}


def solved(look: Look, net: Conditioner, transform: Transform) -> Write:
    """Return what writes an autoregressive layer; its masks are those that the look has found."""
    masks = look.run.masks

    def write(writer: Writer) -> None:
        of_columns, step = writer.net_of(writer.order, net), transform(writer.order, writer.inverse)
        if not writer.inverse:
            writer.add(of_columns)
            writer.add(step)
            return
        if not isinstance(step, (p.Affine, p.Spline)):
            raise DoesNotFit
        undo = _schedule.autoregressive(of_columns, step, writer.context, lambda dense: masks.get(dense.mask))
        if undo is None:
            raise DoesNotFit
        writer.add(undo)

    return write


def autoregressive(look: Look, path: Path, layer: Any, transform: Transform) -> Write:
    at, net = (*path, "autoregressive_net"), layer.autoregressive_net
    write = solved(look, look.conditional(at, net), transform)
    look.run.columns = features = look.watch.option(at, net, lambda m: m.initial_layer.in_features)
    return fitted(write, features)


def fitted(write: Write, features: int) -> Write:
    """Return what writes a layer that takes so many columns."""

    def fit(writer: Writer) -> None:
        writer.fit(features)
        write(writer)

    return fit


@register(RULES, "nflows.transforms.autoregressive.MaskedAffineAutoregressiveTransform")
def _affine_autoregressive(look: Look, path: Path, layer: Any) -> Write:
    eps, function = look.watch.option(path, layer, lambda m: [m._epsilon, getattr(m, "scale_activation", None)])
    name = f"{type(layer).__qualname__}.__init__.<locals>.<lambda>"
    # glasflow makes its default anew for each layer
    if function is not None and (function.__module__, function.__qualname__) != (type(layer).__module__, name):
        raise NoInstruction(path, layer, f"its scale_activation {function!r} has no instruction")
    return autoregressive(look, path, layer, affine("softplus", float(eps), "interleaved_scale_shift"))


@register(
    RULES, "nflows.transforms.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform",
    "normflows.flows.neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive",
)  # fmt: skip
def _spline_autoregressive(look: Look, path: Path, layer: Any) -> Write:
    return autoregressive(look, path, layer, spline_of_net(look, path, layer, "autoregressive_net"))


@register(RULES, MaskedAutoregressive)
def _masked(look: Look, path: Path, layer: Any) -> Write:
    kind, features, given, bins, bound = look.options(
        path, layer, "transform", "features", "context_features", "bins", "bound"
    )
    net = _made(look, (*path, "net"), layer.net)
    net = net._replace(alone=None) if given else net._replace(given=None)
    look.run.columns = features

    def transform(columns: p.Columns, inverse: bool) -> p.Instruction:
        if kind == "affine":
            softsign, interleaved = SCALE_MAPS.index("softsign"), p.PACKINGS.index("interleaved")
            return p.Affine(columns, softsign, interleaved, _LIMIT, inverse=inverse)
        variant = SPLINE_VARIANTS.index("nflows")
        return p.Spline(columns, bins, bins - 1, (TAILS.index("linear"),), variant, (bound,), inverse=inverse)

    return fitted(solved(look, net, transform), features)


def _made(look: Look, path: Path, net: MADE) -> Conditioner:
    look.plain(path, net)
    # masks follow from the generations and the widths
    activation, _ = look.options(path, net, "activation", "generations")
    mask = look.computed(path, net, (), _masks, len(net.layers))
    known: Parts = []
    last: Parts = []
    for i, (at, layer) in enumerate(children(look, (*path, "layers"), net.layers)):
        assert isinstance(layer, MaskedLinear)
        new: Parts = []
        # a block is this layer and the one before
        inner = last if layer.skip else new
        if layer.active:
            activate(inner, activation, _ARGS.get(activation, 0.0))
        inner += _linear(look, at, layer, mask + i)
        if layer.skip:
            last = [p.Residual(tuple(last))]
        else:
            known, last = [*known, *last], new
    look.run.conditioners += 1
    parts = _joined([*known, *last])
    return Conditioner(parts, parts)


def _linear(look: Look, path: Path, layer: MaskedLinear, mask: int) -> Parts:
    look.plain(path, layer)
    size = layer.out_features
    look.run.masks[mask] = layer.mask
    parts: Parts = [p.Dense(look.tensor(path, layer, "weight"), look.tensor(path, layer, "bias"), size, mask=mask)]
    if layer.context is not None:
        look.plain((*path, "context"), layer.context)
        parts.append(p.Context(p.Dense(look.tensor((*path, "context"), layer.context, "weight"), -1, size)))
    return parts


def _joined(parts: Parts) -> tuple[p.Part, ...]:
    """Return the parts with activations moved into the layers before them."""
    joined: Parts = []
    for part in parts:
        if isinstance(part, p.Activation):
            activate(joined, p.ACTIVATIONS[part.activation], part.arg)
        else:
            joined.append(part)
    return tuple(joined)


def _masks(net: MADE, inverse: bool, columns: int) -> tuple[Tensor, ...]:
    return tuple([layer.mask.to(layer.weight) for layer in net.layers])
