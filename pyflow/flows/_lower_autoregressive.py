"""From autoregressive layers to instructions: one way a net and its transform, the other way what undoes both."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from .. import program as p
from .._schemas import PACKINGS, SCALE_MAPS, SPLINE_VARIANTS, TAILS
from ..nn import MaskedAutoregressive
from ..nn._made import MADE, MaskedLinear
from ._lower import RULES, Look, children, register
from ._run import DoesNotFit, Tape, Write
from ._schedule import autoregressive
from ._watch import Path

# the maps of `MaskedAutoregressive`
_SOFTSIGN, _INTERLEAVED, _LIMIT = SCALE_MAPS.index("softsign"), PACKINGS.index("interleaved"), -math.log(1e-3)
_LINEAR, _NFLOWS = (TAILS.index("linear"),), SPLINE_VARIANTS.index("nflows")
# the slopes that torch's activations have by themselves
_ARGS = {"leaky_relu": 0.01, "elu": 1.0}


@register(RULES, MaskedAutoregressive)
def _masked(look: Look, path: Path, layer: MaskedAutoregressive) -> Write:
    kind, count, given = look.watch.option(path, layer, lambda m: (m.transform, m.features, m.context_features > 0))
    bins, bound = look.watch.option(path, layer, lambda m: (m.bins, m.bound))
    first, parts = _made(look, (*path, "net"), layer.net)
    masks = [each.mask for each in layer.net.layers]

    def write(tape: Tape) -> None:
        if given != bool(tape.context):
            raise DoesNotFit
        transform: p.Transform = p.Spline(tape.order, bins, bins - 1, _LINEAR, _NFLOWS, (bound,), inverse=tape.inverse)
        if kind == "affine":
            transform = p.Affine(tape.order, _SOFTSIGN, _INTERLEAVED, _LIMIT, inverse=tape.inverse)
        of_first = tape.computed + first
        net = p.Net(tape.order, False, parts(of_first))
        if not tape.inverse:
            tape.add(net)
            tape.add(transform)
            return
        known = None
        if len(tape.order) == count:
            known = autoregressive(net, transform, 0, lambda dense: masks[dense.mask - of_first])
        # what has no schedule does not fit
        tape.add(known or p.Autoregressive(net, transform, (), ()))

    return write


def _made(look: Look, path: Path, net: MADE) -> tuple[int, Callable[[int], tuple[p.Part, ...]]]:
    """Return the place of the first mask among computed weights, and what returns the parts, given it in a program."""
    look.plain(path, net)
    # masks follow from the generations and the widths
    activation, _ = look.watch.option(path, net, lambda m: (m.activation, m.generations))
    act = p.Activation(p.ACTIVATIONS.index(activation), _ARGS.get(activation, 0.0))
    layers: list[tuple[bool, list[p.Part]]] = []
    for at, layer in children(look, (*path, "layers"), net.layers):
        assert isinstance(layer, MaskedLinear)
        layers.append((layer.skip, [*[act] * layer.active, *_linear(look, at, layer)]))
    look.run.conditioners += 1

    def parts(first: int) -> tuple[p.Part, ...]:
        places = iter(range(first, first + len(layers)))
        known: list[p.Part] = []
        last: list[p.Part] = []
        for skip, layer in layers:
            new = [part._replace(mask=next(places)) if isinstance(part, p.Dense) else part for part in layer]
            if skip:
                # a block is this layer and the one before
                last = [p.Residual(_joined(last + new))]
            else:
                known, last = known + last, new
        return _joined(known + last)

    return look.computed(path, net, _masks, len(layers)), parts


def _linear(look: Look, path: Path, layer: MaskedLinear) -> list[p.Part]:
    look.plain(path, layer)
    size = layer.out_features
    parts: list[p.Part] = [p.Dense(look.parameter(path, layer, "weight"), look.parameter(path, layer, "bias"), size)]
    if layer.context is not None:
        look.plain((*path, "context"), layer.context)
        parts.append(p.Context(p.Dense(look.parameter((*path, "context"), layer.context, "weight"), -1, size)))
    return parts


def _joined(parts: list[p.Part]) -> tuple[p.Part, ...]:
    """Return the parts with activations moved into the layers before them."""
    joined: list[p.Part] = []
    for part in parts:
        if isinstance(part, p.Activation) and joined and isinstance(joined[-1], p.Dense):
            joined[-1] = joined[-1]._replace(activation=part.activation, arg=part.arg)
        else:
            joined.append(part)
    return tuple(joined)


def _masks(net: MADE, inverse: bool) -> tuple[Tensor, ...]:
    return tuple([layer.mask.to(layer.weight) for layer in net.layers])
