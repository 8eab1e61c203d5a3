"""Rules for zuko, whose layers are lazy: called with a context, they return their transform."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ... import program as p
from ..._classes import named
from ..._schemas import SPLINE_VARIANTS, TAILS
from ...ops.spline import MOST_BINS
from .._run import Conditioner, DoesNotFit, Write, Writer
from .._watch import Path
from .autoregressive import solved
from .couplings import Transform, affine
from .look import BASES, PARTS, RULES, STACKS, Layers, Look, NoInstruction, children, register
from .nets import Parts, dense, sequential
from .nflows import box, gaussian, inverse_of_product

FLOWS = (
    "zuko.lazy.Flow", "zuko.flows.coupling.NICE", "zuko.flows.coupling.RealNVP", "zuko.flows.autoregressive.MAF",
    "zuko.flows.spline.NSF", "zuko.flows.spline.NCSF", "zuko.flows.polynomial.SOSPF", "zuko.flows.polynomial.BPF",
    "zuko.flows.neural.NAF", "zuko.flows.neural.UNAF", "zuko.flows.gaussianization.GF", "zuko.flows.continuous.CNF",
)  # fmt: skip

# stacks and flows


@register(STACKS, *FLOWS)
def _flow(look: Look, path: Path, flow: Any) -> Layers:
    look.base = (*path, "base"), flow.base, False
    yield (*path, "transform"), flow.transform


@register(STACKS, "zuko.lazy.LazyComposedTransform")
def _composed(look: Look, path: Path, layer: Any) -> Layers:
    return children(look, (*path, "transforms"), layer.transforms)


@register(RULES, "zuko.lazy.LazyInverse")
def _inverse(look: Look, path: Path, layer: Any) -> Write:
    return look.inverted((*path, "transform"), layer.transform)


@register(BASES, "zuko.lazy.UnconditionalDistribution")
def _base(look: Look, path: Path, base: Any) -> Write:
    name, names = _unconditional(look, path, base)
    if name not in _HEADS or len(names) != 2:
        raise NoInstruction(path, base, f"its {name} has no instruction")
    if not {*names} <= {*base._buffers} or any(getattr(base, each).dim() != 1 for each in names):
        raise NoInstruction(path, base, f"its {_HEADS[name]} are not vectors that are buffers")
    # those without a keyword first, and these in the order of the alphabet
    first, second = sorted(names)
    if name == "zuko.distributions.BoxUniform":
        return box(look, path, base, (first, second), max(len(getattr(base, each)) for each in names))
    loc, scale = (look.values(path, base, each) for each in (first, second))
    if {*loc} != {0.0} or {*scale} != {1.0}:
        raise NoInstruction(path, base, "its loc and scale are not 0 and 1")

    def write(writer: Writer) -> None:
        writer.fit(len(loc))
        gaussian(writer)

    return write


_HEADS = {"zuko.distributions.DiagNormal": "loc and scale", "zuko.distributions.BoxUniform": "lower and upper"}


def _unconditional(look: Look, path: Path, module: Any) -> tuple[str, list[str]]:
    """Return what a module makes, and the names of its arguments, the positional ones first."""
    made, count, keys = look.options(path, module, "f", "_nargs", "_keys")
    return _name(made), [*[f"_{i}" for i in range(count)], *keys]


def _name(made: Any) -> str:
    return named(made if hasattr(made, "__qualname__") else type(made))


# layers without a network


@register(RULES, "zuko.lazy.UnconditionalTransform")
def _unconditional_transform(look: Look, path: Path, layer: Any) -> Write:
    name, names = _unconditional(look, path, layer)
    if len(names) == 1 and name == "zuko.transforms.PermutationTransform" and names[0] in layer._buffers:
        order = look.values(path, layer, names[0])
        back = sorted(range(len(order)), key=order.__getitem__)
        look.run.columns = len(order)
        return lambda writer: writer.permute(back if writer.inverse else order)
    if len(names) != 1 or name not in _MATRICES or getattr(layer, names[0]).dim() != 2:
        raise NoInstruction(path, layer, f"its {name} has no instruction")
    argument, compute = names[0], _MATRICES[name]
    look.run.columns = len(getattr(layer, argument))

    def matrix(layer: Any, inverse: bool, columns: int) -> tuple[Tensor, Tensor]:
        return compute(getattr(layer, argument), inverse)

    place = look.computed(path, layer, (argument,), matrix, 2)
    return lambda writer: writer.add(p.Linear(writer.order, place, logdet=place + 1))


def _rotation(a: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    matrix = torch.linalg.matrix_exp(a - a.mT)
    return matrix.mT if inverse else matrix, a.new_zeros(())


def _lower_upper(lu: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    eye = torch.eye(len(lu), dtype=lu.dtype, device=lu.device)
    lower, upper, logdet = lu.tril(), lu.triu(1) + eye, lu.diagonal().abs().log().sum()
    if not inverse:
        return lower @ upper, logdet
    return inverse_of_product(lower, upper), -logdet


_MATRICES = {
    "zuko.transforms.RotationTransform": _rotation,
    "zuko.transforms.LULinearTransform": _lower_upper,
}

# layers with a network, which gets the context after the columns


@register(RULES, "zuko.flows.coupling.GeneralCouplingTransform")
def _coupling(look: Look, path: Path, layer: Any) -> Write:
    mask = look.values(path, layer, "mask")
    kept, changed = ([i for i, each in enumerate(mask) if each == constant] for constant in (True, False))
    transform = _univariate(look, path, layer)
    net, inputs, _ = _hyper(look, path, layer)
    columns, context = look.run.columns, look.run.context = len(mask), inputs - len(kept)

    def write(writer: Writer) -> None:
        _fit(writer, columns, context)
        writer.net(writer.at(kept), net)
        writer.add(transform(writer.at(changed), writer.inverse))

    return write


@register(RULES, "zuko.flows.autoregressive.MaskedAutoregressiveTransform")
def _autoregressive(look: Look, path: Path, layer: Any) -> Write:
    passes, numbers = look.options(path, layer, "passes", "total")
    transform = _univariate(look, path, layer)
    net, inputs, outputs = _hyper(look, path, layer)
    columns, context = look.run.columns, look.run.context = outputs // numbers, inputs - outputs // numbers
    solve = solved(look, net, transform)

    def write(writer: Writer) -> None:
        _fit(writer, columns, context)
        solve(writer)
        last = writer.instructions[-1]
        # fewer passes than generations are no inverse
        if isinstance(last, p.Autoregressive) and max(last.generations) > passes:
            raise DoesNotFit

    return write


@register(RULES, "zuko.flows.gaussianization.ElementWiseTransform")
def _elementwise(look: Look, path: Path, layer: Any) -> Write:
    if "hyper" not in layer._modules:
        raise NoInstruction(path, layer, "it has no network")
    transform, numbers = _univariate(look, path, layer), look.option(path, layer, "total")
    net, inputs, outputs = _hyper(look, path, layer)
    net = net._replace(alone=None, blind=True)
    columns, context = look.run.columns, look.run.context = outputs // numbers, inputs

    def write(writer: Writer) -> None:
        _fit(writer, columns, context)
        writer.net(writer.order, net)
        writer.add(transform(writer.order, writer.inverse))

    return write


def _hyper(look: Look, path: Path, layer: Any) -> tuple[Conditioner, int, int]:
    """Return the network of a layer and its numbers of inputs and outputs."""
    at, module = (*path, "hyper"), layer.hyper
    net = look.conditioner(at, module)
    inputs, outputs = look.watch.option(at, module, lambda m: [getattr(m, f"{s}_features", 0) for s in ("in", "out")])
    return net._replace(given=net.alone, joins=True), inputs, outputs


def _fit(writer: Writer, columns: int, context: int) -> None:
    writer.fit(columns)
    if writer.context != context:
        raise DoesNotFit


def _univariate(look: Look, path: Path, layer: Any) -> Transform:
    made, plain, options, shapes = look.watch.option(path, layer, _made_by)
    name = _name(made).removeprefix("zuko.transforms.")
    known, wanted = _UNIVARIATE.get(name, ((), []))
    if not plain or not {*options} <= {*known}:
        raise NoInstruction(path, layer, f"its univariate {name} has no instruction")
    circular = name == _CIRCULAR
    if circular or name == "MonotonicRQSTransform":
        bins = shapes[0][0] if shapes and shapes[0] else 0
        wanted = [(bins,), (bins,), (bins - 1,)]
        if not 2 <= bins <= MOST_BINS:
            raise NoInstruction(path, layer, f"its {bins} bins are not between 2 and {MOST_BINS}")
    if shapes != wanted:
        raise NoInstruction(path, layer, f"its shapes are {shapes}")
    if name == "AdditiveTransform":
        return p.Additive
    slope = float(options.get("slope", 1e-3))
    if not 0 < slope < 1:
        raise NoInstruction(path, layer, f"its slope is {slope}")
    if name == "MonotonicAffineTransform":
        return affine("softsign", -math.log(slope), "interleaved")
    tails, variant = (TAILS.index("linear"),), SPLINE_VARIANTS.index("zuko")
    bound = (math.pi if circular else float(options.get("bound", 5.0)),)
    return lambda columns, inverse: p.Spline(
        columns, bins, bins - 1, tails, variant, bound, min_slope=slope, inverse=inverse, turned=circular
    )


_CIRCULAR = "zuko.flows.spline.CircularRQSTransform"
# options that are known, and the shapes of a column's numbers
_UNIVARIATE: dict[str, tuple[tuple[str, ...], list[tuple[int, ...]]]] = {
    "AdditiveTransform": ((), [()]),
    "MonotonicAffineTransform": (("slope",), [(), ()]),
    "MonotonicRQSTransform": (("bound", "slope"), []),
    _CIRCULAR: (("slope",), []),
}


def _made_by(layer: Any) -> list[Any]:
    """Return what makes the transform of each column, whether by its options alone, these and its shapes."""
    made, shapes = layer.univariate, [tuple(shape) for shape in layer.shapes]
    if type(made) is functools.partial:
        return [made.func, not made.args, {**made.keywords}, shapes]
    return [made, _name(made).removeprefix("zuko.transforms.") in _UNIVARIATE, {}, shapes]


# parts of networks


@register(PARTS, "zuko.nn.MLP", "zuko.nn.MaskedMLP")
def _mlp(look: Look, path: Path, module: Any, parts: Parts) -> None:
    sequential(look, path, module, parts)


@register(PARTS, "zuko.nn.Residual")
def _residual(look: Look, path: Path, module: Any, parts: Parts) -> None:
    inner: Parts = []
    sequential(look, path, module, inner)
    parts.append(p.Residual(tuple(inner)))


@register(PARTS, "zuko.nn.Linear")
def _linear(look: Look, path: Path, module: Any, parts: Parts) -> None:
    if module.weight.dim() != 2:
        raise NoInstruction(path, module, "it is a stack of linear layers")
    parts.append(dense(look, path, module))


@register(PARTS, "zuko.nn.MaskedLinear")
def _masked_linear(look: Look, path: Path, module: Any, parts: Parts) -> None:
    linear = dense(look, path, module)
    place = look.computed(path, module, (), _Mask(), 1)
    look.run.masks[place] = look.buffer(path, module, "mask")
    parts.append(linear._replace(mask=place))


class _Mask:
    """The mask of a layer in its weight's dtype, made once: a structure holds while the values of masks stay."""

    def __init__(self) -> None:
        self.made: Tensor | None = None

    def __call__(self, module: Any, inverse: bool, columns: int) -> tuple[Tensor]:
        weight, made = module.weight, self.made
        if torch.compiler.is_compiling():
            return (module.mask.to(weight),)
        if made is None or made.dtype != weight.dtype or made.device != weight.device:
            # a tensor that is made in inference mode cannot be saved for a backward
            with torch.inference_mode(False):
                made = self.made = module.mask.to(weight)
        return (made,)


@register(PARTS, "zuko.nn.LayerNorm")
def _layer_norm(look: Look, path: Path, module: Any, parts: Parts) -> None:
    dim, eps = look.options(path, module, "dim", "eps")
    if dim not in (-1, (-1,)):
        raise NoInstruction(path, module, f"its dim is {dim}")
    parts.append(p.Norm(-1, -1, float(eps), unbiased=True))
