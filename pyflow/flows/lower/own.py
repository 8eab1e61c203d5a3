"""Rules for the layers of pyflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import program as p
from ..._schemas import PACKINGS, SPLINE_VARIANTS, TAILS
from ...nn import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Invertible1x1Conv,
    ReversibleSequential,
    Scale,
    SplineCoupling,
)  # fmt: skip
from ...ops.coupling import scale_map_constant
from ...ops.spline import MOST_BINS
from .._run import Conditioner, DoesNotFit, Write, Writer
from .._watch import Path
from ..nets import Conditional
from .look import NETS, RULES, STACKS, Layers, Look, NoInstruction, children, register
from .nets import sequential


@register(STACKS, ReversibleSequential)
def _stack(look: Look, path: Path, stack: Any) -> Layers:
    look.recomputing |= look.option(path, stack, "recompute")
    return children(look, (*path, "layers"), stack.layers)


@register(RULES, ActNorm, Scale)
def _elementwise(look: Look, path: Path, layer: Any) -> Write:
    shift, log_scale = look.tensor(path, layer, "shift"), look.tensor(path, layer, "log_scale")
    look.starts(path, layer, lambda m, inverse: not inverse and m.is_pending)
    return lambda writer: writer.add(p.Scale(writer.order, shift, log_scale, shift_first=True, inverse=writer.inverse))


@register(RULES, Invertible1x1Conv)
def _matrix(look: Look, path: Path, layer: Any) -> Write:
    place = look.computed(path, layer, ("lower", "upper", "log_diagonal"), _matrix_and_logdet, 2)
    return lambda writer: writer.add(p.Linear(writer.order, place, logdet=place + 1))


def _matrix_and_logdet(layer: Invertible1x1Conv, inverse: bool, columns: int) -> tuple[Tensor, Tensor]:
    if inverse:
        return layer.inverse_weight(), -layer.log_diagonal.sum()
    return layer.weight(), layer.log_diagonal.sum()


@register(RULES, AdditiveCoupling)
def _additive(look: Look, path: Path, layer: Any) -> Write:
    return _coupling(look, path, layer, p.Additive)


@register(RULES, AffineCoupling)
def _affine(look: Look, path: Path, layer: Any) -> Write:
    options = dict(look.watch.option(path, layer, lambda m: m.options))
    shift_first, packing = bool(options.pop("shift_first")), PACKINGS.index(options.pop("packing"))
    try:
        scale_map, arg = scale_map_constant("AffineCoupling", dtype=torch.float32, **options)
    except ValueError:
        raise NoInstruction(path, layer, "its constants are out of the range of float32") from None

    def transform(columns: p.Columns, inverse: bool) -> p.Affine:
        return p.Affine(columns, scale_map, packing, arg, shift_first, inverse)

    return _coupling(look, path, layer, transform)


@register(RULES, SplineCoupling)
def _spline(look: Look, path: Path, layer: Any) -> Write:
    bins, tails, variant, count = look.options(path, layer, "bins", "tails", "variant", "count")
    bound = look.numbers(path, layer, "bound")
    if tails is None:
        raise NoInstruction(path, layer, "without tails an x outside of the domain is an error")
    if bins > MOST_BINS:
        raise NoInstruction(path, layer, f"its {bins} bins are more than {MOST_BINS}")
    each = tuple(TAILS.index(tail) for tail in ([tails] if isinstance(tails, str) else tails))

    def transform(columns: p.Columns, inverse: bool) -> p.Spline:
        form = SPLINE_VARIANTS.index(variant)
        return p.Spline(columns, bins, count - 2 * bins, each, form, bound, inverse=inverse)

    return _coupling(look, path, layer, transform)


def _coupling(look: Look, path: Path, layer: Any, transform: Callable[[p.Columns, bool], p.Instruction]) -> Write:
    split, swap = look.options(path, layer, "split", "swap")
    if split not in ("half", "interleave"):
        raise NoInstruction(path, layer, f"split {split!r} is for images")
    net = own_net(look, (*path, "net"), layer._modules.get("net", layer.net))

    def write(writer: Writer) -> None:
        if len(writer.order) < 2:
            raise DoesNotFit
        kept, changed = writer.split(split)[:: -1 if swap else 1]
        writer.net(kept, net)
        writer.add(transform(changed, writer.inverse))

    return write


def own_net(look: Look, path: Path, module: Any) -> Conditioner:
    """Return a network of pyflow's layers, which is called with a context if they get one."""
    return (look.conditional if type(module) is Conditional else look.conditioner)(path, module)


@register(NETS, Conditional)
def _conditional(look: Look, path: Path, module: Any) -> Conditioner:
    parts: list[p.Part] = []
    sequential(look, path, module, parts)
    return Conditioner(tuple(parts), None, joins=True)
