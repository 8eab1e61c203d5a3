"""The same flows built by pyflow, nflows and zuko, behind one interface.

All start as the identity. Those of pyflow and nflows have an ActNorm before every layer, zuko has no such layer. The
conditioners of pyflow and nflows have as many weights; zuko's couplings are masked autoregressive layers in two passes.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pyflow import flows
from pyflow.flows.nets import mlp

KINDS = ("NSF", "MAF")
PEERS = ("nflows", "zuko")
BINS = 5
BOUND = 5.0


class Density(nn.Module):
    """A flow x <-> z of any library, given a context (B, C) or None."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow: Any = flow

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.flow.log_prob(x, context)

    def latent(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return z (B, D), standard normal if x is distributed as the flow says."""
        raise NotImplementedError

    def sample(self, n: int, context: Tensor | None) -> Tensor:
        """Return n samples (n, D), given one context (C,) or None."""
        raise NotImplementedError


class Pyflow(Density):
    def latent(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.flow(x, context)[0]

    def sample(self, n: int, context: Tensor | None) -> Tensor:
        return self.flow.sample(n, context)


class Nflows(Density):
    def latent(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.flow.transform_to_noise(x, context)

    def sample(self, n: int, context: Tensor | None) -> Tensor:
        return self.flow.sample(n) if context is None else self.flow.sample(n, context[None])[0]


class Unconditional(nn.Module):
    """A net that is handed a context and has no use for it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x)


class Zuko(Density):
    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.flow(context).log_prob(x)

    def latent(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.flow(context).transform(x)

    def sample(self, n: int, context: Tensor | None) -> Tensor:
        return self.flow(context).sample((n,))


def build(library: str, kind: str, dim: int, context: int, layers: int, hidden: tuple[int, ...]) -> Density:
    """Return a flow "NSF" or "MAF"; splines couple two halves, in one dimension they depend on the context alone."""
    makers: dict[str, Callable[..., Density]] = {"pyflow": _pyflow, "nflows": _nflows, "zuko": _zuko}
    return makers[library](kind, dim, context, layers, hidden)


def installed(peers: Iterable[str] = PEERS) -> tuple[list[str], list[str]]:
    """Return the libraries that import, pyflow first, and one sentence for each that does not."""
    found, missing = ["pyflow"], []
    for name in peers:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name} is left out, it does not import here ({error}): pip install {name}")
        else:
            found.append(name)
    return found, missing


def _pyflow(kind: str, dim: int, context: int, layers: int, hidden: tuple[int, ...]) -> Density:
    if kind == "MAF":
        return Pyflow(flows.MAF(dim, layers=layers, hidden=hidden, context_features=context))
    return Pyflow(
        flows.NSF(
            dim, layers=layers, hidden=hidden, bins=BINS, bound=BOUND, context_features=context,
            autoregressive=dim == 1,
        )
    )  # fmt: skip


def _nflows(kind: str, dim: int, context: int, layers: int, hidden: tuple[int, ...]) -> Density:
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms import autoregressive, base, coupling, normalization, permutations

    # nflows warns of splines whose numbers are not scaled down, which start at 0 here
    warnings.filterwarnings("ignore", "Inputs to the softmax are not scaled down", module="nflows")
    # the number whose softplus, plus the least slope or scale, is 1
    unit = math.log(math.expm1(1 - 1e-3))
    made = {
        "features": dim, "hidden_features": hidden[0], "context_features": context or None,
        "num_blocks": len(hidden) - 1, "use_residual_blocks": False,
    }  # fmt: skip
    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    parts: list[nn.Module] = []
    for number in range(layers):
        if kind == "MAF":
            layer = autoregressive.MaskedAffineAutoregressiveTransform(**made)
            _identity(layer.autoregressive_net.final_layer, 2, slice(0, 1), unit)
        elif dim == 1:
            layer = autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(**made, **spline)
            _identity(layer.autoregressive_net.final_layer, 3 * BINS - 1, slice(2 * BINS, None), unit)
        else:
            # as pyflow.flows.NSF does: first or second half, then even or odd columns
            place = torch.arange(dim)
            second = place % 2 == 1 if number % 4 > 1 else place >= (dim + 1) // 2
            changed = second ^ (number % 2 == 1)
            layer = coupling.PiecewiseRationalQuadraticCouplingTransform(
                changed.int(), lambda kept, numbers: Unconditional(mlp(kept, hidden, numbers)), **spline
            )
            _identity(layer.transform_net.net[-1], 3 * BINS - 1, slice(2 * BINS, None), unit)
        parts += [normalization.ActNorm(dim), layer]
        if kind == "MAF":
            parts.append(permutations.ReversePermutation(dim))
    return Nflows(Flow(base.CompositeTransform(parts), StandardNormal([dim])))


def _zuko(kind: str, dim: int, context: int, layers: int, hidden: tuple[int, ...]) -> Density:
    import zuko

    passes = 2 if kind == "NSF" and dim > 1 else None
    extra: dict[str, Any] = {"bins": BINS} if kind == "NSF" else {}
    flow = getattr(zuko.flows, kind)(dim, context, transforms=layers, hidden_features=hidden, passes=passes, **extra)
    for layer in flow.transform.transforms:
        _identity(layer.hyper[-1], 1, slice(0, 0), 0.0)
    return Zuko(flow)


@torch.no_grad()
def _identity(layer: Any, numbers: int, chosen: slice, value: float) -> None:
    """Make the last layer's output constant: `value` for the chosen of the numbers of each feature, 0 for the rest."""
    layer.weight.zero_()
    layer.bias.zero_()
    layer.bias.view(-1, numbers)[:, chosen] = value
