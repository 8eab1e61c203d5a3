"""NICE in normflows, nflows and zuko, and the times of all.

All have the same networks, a scale per element and a Gaussian prior.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyflow.flows import NICE

from ._demo import synchronize
from ._peers import Unconditional, installed

PEERS = ("normflows", "nflows", "zuko")
# calls that are timed at once
CALLS = 5
SAMPLES = 1000
Density = Callable[[Tensor], Tensor]


Sampler = Callable[[int], Tensor]


class Built(NamedTuple):
    """A flow of some library, its log-density and its sampler."""

    module: nn.Module
    log_prob: Density
    sample: Sampler


class Seconds(NamedTuple):
    """Of a batch: its log-densities without gradients, and a training step; and of SAMPLES samples."""

    log_prob: float
    step: float
    samples: float


def times(flow: NICE, x: Tensor, rounds: int) -> tuple[dict[str, Seconds], list[str]]:
    """Return the median times of each library, taken in turn, and one sentence for each that is left out."""
    names, missing = installed(PEERS)
    works = {name: _works(build(name, flow), x) for name in names}
    taken: dict[str, list[Seconds]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name, work in works.items():
            taken[name].append(Seconds(*(_seconds(each, x.device) for each in work)))
    # the first round warms up
    medians = {name: Seconds(*map(statistics.median, zip(*each[1:], strict=True))) for name, each in taken.items()}
    return medians, missing


def build(library: str, flow: NICE) -> Built:
    """Return a flow of this library on copies of NICE's networks."""
    makers = {"pyflow": _pyflow, "normflows": _normflows, "nflows": _nflows, "zuko": _zuko}
    made = makers[library](flow.dim, copy.deepcopy(list(flow.nets)))
    made.module.to(flow.scale.log_scale)
    return made


def _pyflow(dim: int, nets: list[nn.Module]) -> Built:
    flow = NICE(dim, couplings=len(nets), hidden=(1,), prior="gaussian")
    flow.nets = nn.ModuleList(nets)
    return Built(flow, flow.log_prob, flow.sample)


def _normflows(dim: int, nets: list[nn.Module]) -> Built:
    from normflows import NormalizingFlow, distributions, flows

    parts: list[nn.Module] = [flows.AffineConstFlow((dim,), shift=False)]
    # a density runs them from the last to the first
    for net in reversed(nets):
        parts += [flows.Permute(dim, mode="swap"), flows.AffineCouplingBlock(net, scale=False)]
    flow = NormalizingFlow(distributions.DiagGaussian(dim, trainable=False), parts)
    return Built(flow, flow.log_prob, lambda n: flow.sample(n)[0])


def _nflows(dim: int, nets: list[nn.Module]) -> Built:
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms import base, coupling, normalization

    layers: list[nn.Module] = [
        coupling.AdditiveCouplingTransform(_changed(dim, i).int(), lambda *_, net=net: Unconditional(net))
        for i, net in enumerate(nets)
    ]
    flow = Flow(base.CompositeTransform([*layers, normalization.ActNorm(dim)]), StandardNormal([dim]))
    return Built(flow, flow.log_prob, flow.sample)


def _zuko(dim: int, nets: list[nn.Module]) -> Built:
    from zuko.distributions import DiagNormal
    from zuko.flows import ElementWiseTransform, GeneralCouplingTransform
    from zuko.lazy import Flow, UnconditionalDistribution
    from zuko.transforms import AdditiveTransform

    layers: list[Any] = []
    for i, net in enumerate(nets):
        layer = GeneralCouplingTransform(
            dim, mask=~_changed(dim, i), univariate=AdditiveTransform, shapes=[()], hidden_features=(1,)
        )
        layer.hyper = net
        layers.append(layer)
    base = UnconditionalDistribution(DiagNormal, torch.zeros(dim), torch.ones(dim), buffer=True)
    flow = Flow([*layers, ElementWiseTransform(dim)], base)
    return Built(flow, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)))


def _changed(dim: int, number: int) -> Tensor:
    return torch.arange(dim) % 2 == 1 - number % 2


def _works(flow: Built, x: Tensor) -> tuple[Callable[[], None], ...]:
    fused = x.device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(flow.module.parameters(), lr=0.0, fused=fused)

    @torch.no_grad()
    def density() -> None:
        flow.log_prob(x)

    def step() -> None:
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()

    @torch.no_grad()
    def samples() -> None:
        flow.sample(SAMPLES)

    return density, step, samples


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    # threads and caches are those of the work that ran before
    work()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(CALLS):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / CALLS
