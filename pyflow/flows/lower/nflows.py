"""Rules for nflows and its copy in glasflow, and for what normflows has taken from it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import program as p
from ..._classes import named, own_class
from ..._schemas import PRIORS, SCALE_MAPS
from ..._torch import evaluated_while_traced
from ...ops.flow_program import is_side
from .._run import DoesNotFit, Write, Writer, together
from .._watch import Path
from .look import BASES, PARTS, RULES, STACKS, Layers, Look, NoInstruction, children, register
from .nets import activation

# stacks and flows


@register(
    STACKS, "nflows.flows.base.Flow", "nflows.flows.realnvp.SimpleRealNVP",
    "nflows.flows.autoregressive.MaskedAutoregressiveFlow", "glasflow.flows.realnvp.RealNVP",
    "glasflow.flows.nsf.CouplingNSF",
)  # fmt: skip
def _flow(look: Look, path: Path, flow: Any) -> Layers:
    look.base = (*path, "_distribution"), flow._distribution, False
    look.base_alone = named(type(flow)).startswith("glasflow.")
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


def gaussian(writer: Writer) -> None:
    writer.add(p.Prior(writer.order, PRIORS.index("gaussian")))


@register(BASES, "nflows.distributions.normal.StandardNormal")
def _standard_normal(look: Look, path: Path, base: Any) -> Write:
    shape = standard(look, path, base, "_shape")
    if not math.isclose(look.values(path, base, "_log_z")[0], 0.5 * shape[0] * math.log(2 * math.pi), rel_tol=1e-6):
        raise NoInstruction(path, base, "its _log_z is not that of its shape")

    def write(writer: Writer) -> None:
        writer.fit(*shape)
        gaussian(writer)

    return write


@register(BASES, "nflows.distributions.normal.ConditionalDiagonalNormal")
def _conditional_normal(look: Look, path: Path, base: Any) -> Write:
    shape = standard(look, path, base, "_shape")
    if look.base_alone:
        raise NoInstruction(path, base, "its flow gives it no context")
    encoder = look.conditioner((*path, "_context_encoder"), base._context_encoder)
    encoder = encoder._replace(given=encoder.alone, alone=None, joins=True, blind=True)

    def write(writer: Writer) -> None:
        writer.fit(*shape)
        writer.net((), encoder)
        # means first, then the logarithms of deviations
        writer.add(p.Affine(writer.order, SCALE_MAPS.index("exp"), p.PACKINGS.index("shift_scale"), 0.0, inverse=True))
        gaussian(writer)

    return write


@register(BASES, "nflows.distributions.normal.DiagonalNormal")
def _diagonal_normal(look: Look, path: Path, base: Any) -> Write:
    (size,) = standard(look, path, base, "_shape")
    return scaled_gaussian(look, path, base, ("mean_", "log_std_"), size)


def scaled_gaussian(look: Look, path: Path, base: Any, names: tuple[str, str], size: int) -> Write:
    """Return what writes a Gaussian with a mean and a logarithm of the deviation for each column."""
    mean, log_std = names
    compute = lambda m, *_: (getattr(m, mean).reshape(-1), getattr(m, log_std).reshape(-1))
    place = look.computed(path, base, names, compute, 2)

    def write(writer: Writer) -> None:
        writer.fit(size)
        writer.add(p.Scale(writer.order, place, place + 1, inverse=True))
        gaussian(writer)

    return write


@register(BASES, "glasflow.distributions.uniform.MultivariateUniform")
def _multivariate_uniform(look: Look, path: Path, base: Any) -> Write:
    (size,), alone = standard(look, path, base, "_shape"), look.base_alone
    write = box(look, path, base, ("low", "high"), size, "_log_prob_value")

    def without_context(writer: Writer) -> None:
        # glasflow raises for a context here
        if writer.context and not alone:
            raise DoesNotFit
        write(writer)

    return without_context


def box(
    look: Look, path: Path, base: Any, names: tuple[str, str], size: int, kept: str | None = None, closed: bool = False
) -> Write:  # fmt: skip
    """Return what writes a uniform distribution of vectors.

    Args:
        names: of its ends, tensors of one number or of one per column.
        kept: of the log-density that it keeps, if it does.
    """
    held = [{**vars(base), **base._buffers}.get(name) for name in (*names, *([kept] if kept else []))]
    if not all(isinstance(each, Tensor) and not each.requires_grad for each in held):
        raise NoInstruction(path, base, f"its {' and '.join(names)} are not constant tensors")
    low, high = (tuple(map(float, look.values(path, base, name))) for name in names)
    uniform = p.Uniform(tuple(range(size)), low, high, closed)
    if not {len(low), len(high)} <= {1, size} or not all(itertools.starmap(is_side, uniform.sides)):
        raise NoInstruction(path, base, f"its {' and '.join(names)} are no ends of {size} sides of a box")
    if kept is not None and not math.isclose(
        look.values(path, base, kept)[0], uniform.log_density, rel_tol=1e-5, abs_tol=1e-5 * size
    ):
        raise NoInstruction(path, base, f"its {kept} is not that of its {' and '.join(names)}")

    def write(writer: Writer) -> None:
        writer.fit(size)
        writer.add(uniform._replace(columns=writer.order))

    return write


# layers without a network


@register(RULES, "nflows.transforms.standard.IdentityTransform")
def _identity(look: Look, path: Path, layer: Any) -> Write:
    return lambda writer: None


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
    return lambda writer: writer.permute(back if writer.inverse else order)


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
    return lambda writer: writer.add(p.Scale(writer.order, place, place + 1, shift_first, writer.inverse))


@register(RULES, "nflows.transforms.normalization.BatchNorm")
def _batch_norm(look: Look, path: Path, layer: Any) -> Write:
    if look.option(path, layer, "training"):
        raise NoInstruction(path, layer, "it normalises by the batch")
    return scaled(
        look, path, layer, ("unconstrained_weight", "bias", "running_mean", "running_var"), _batch_norm_numbers
    )


def _batch_norm_numbers(layer: Any, inverse: bool, columns: int) -> tuple[Tensor, Tensor]:
    weight, variance = layer.weight, layer.running_var + layer.eps
    shift = layer.bias * torch.sqrt(variance) / weight - layer.running_mean
    return shift, torch.log(weight) - 0.5 * torch.log(variance)


@register(RULES, "nflows.transforms.normalization.ActNorm")
def _act_norm(look: Look, path: Path, layer: Any) -> Write:
    shift, log_scale = look.tensor(path, layer, "shift"), look.tensor(path, layer, "log_scale")
    look.starts(path, layer, lambda m, inverse: not inverse and m.training and not m._buffers["initialized"])
    return lambda writer: writer.add(p.Scale(writer.order, shift, log_scale, inverse=writer.inverse))


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
    numbers = _numbers_of_triangles if "lower_entries" in names else _linear_numbers
    place = look.computed(path, layer, ("bias", *names), numbers, 3)
    look.run.columns = features
    return lambda writer: writer.add(p.Linear(writer.order, place, place + 1, place + 2))


def _linear_numbers(layer: Any, inverse: bool, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    logdet = layer.logabsdet()
    if not inverse:
        return layer.weight(), layer.bias, logdet
    weight = _inverse_weight(layer)
    return weight, -(weight @ layer.bias), -logdet


def _inverse_weight(layer: Any) -> Tensor:
    """Return the inverse of the weight, whose triangle keeps digits that the product with others would lose."""
    kind = own_class(type(layer)).__name__
    if kind == "SVDLinear":
        inverse: Tensor = layer.weight_inverse()
    elif kind == "NaiveLinear":
        inverse = torch.linalg.inv(layer.weight())
    else:
        upper = layer._create_upper()
        eye = torch.eye(layer.features, dtype=upper.dtype, device=upper.device)
        inverse = layer.orthogonal(torch.linalg.solve_triangular(upper, eye, upper=True))[0]
    return inverse


def _numbers_of_triangles(layer: Any, inverse: bool, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    return _numbers_of_many([layer], inverse, columns)[0]


@together(_numbers_of_triangles, lambda layer: (layer.features, layer.eps))
def _numbers_of_many(layers: Sequence[Any], inverse: bool, columns: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return what `weight`, `bias` and `logabsdet` of some LULinear are, or those of their inverses."""
    raw = torch.stack([layer.unconstrained_upper_diag for layer in layers])
    diagonal = F.softplus(raw) + layers[0].eps
    lower = torch.stack([layer.lower_entries for layer in layers])
    upper = torch.stack([layer.upper_entries for layer in layers])
    # behind them a 0 and a 1
    entries = F.pad(F.pad(torch.cat((lower, upper, diagonal), 1), (0, 1)), (0, 1), value=1.0)
    lowers, uppers = entries[:, _triangles(layers[0].features, raw.device)].unbind(1)
    logdets = torch.log(diagonal).sum(1)
    if not inverse:
        return [*zip((lowers @ uppers).unbind(), [layer.bias for layer in layers], logdets.unbind(), strict=True)]
    weights = inverse_of_product(lowers, uppers)
    biases = -(weights @ torch.stack([layer.bias for layer in layers]).unsqueeze(2)).squeeze(2)
    return [*zip(weights.unbind(), biases.unbind(), (-logdets).unbind(), strict=True)]


def inverse_of_product(lower: Tensor, upper: Tensor) -> Tensor:
    """Return the inverse of a lower times an upper triangle, from both: their product has lost digits of it."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    half = torch.linalg.solve_triangular(lower, eye, upper=False)
    return torch.linalg.solve_triangular(upper, half, upper=True)


@evaluated_while_traced
def _triangles(n: int, device: torch.device) -> Tensor:
    # a tensor that is made in inference mode cannot be saved for a backward
    with torch.inference_mode(False):
        return _cached_triangles(n, device)


@functools.lru_cache(maxsize=64)
def _cached_triangles(n: int, device: torch.device) -> Tensor:
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
