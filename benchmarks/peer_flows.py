"""Whole flows as nflows, normflows and zuko build them, and the same flows after `pyflow.accelerate`, in float32.

Shapes are (columns, hidden, layers, batch). Networks have two hidden layers, or two residual blocks where the package's
own examples have those. A training step is one of Adam, fused. Samples are the inverse of given numbers. No case has a
shape for a GPU: there kernels of programs have not been measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyflow import accelerate

from .registry import Call, Case, Outputs, Problem, available, normals, peer

Shape = tuple[int, ...]

CONTEXT = 6  # columns of a context
BINS, BOUND = 8, 3.0
# log_prob and sampling without gradients, and a training step; in this order in tables
CALLS = ("log_prob", "sample", "train step")
# (kind, shape) -> the speed-ups aimed at, in the order of CALLS; 0: none is, None: not measured. The first word of a
# kind is the package
Aims = tuple[float | None, float | None, float | None]
AIMS: dict[tuple[str, Shape], Aims] = {
    ("nflows RealNVP", (8, 64, 8, 256)): (4.0, None, 3.5),
    ("nflows RealNVP", (8, 64, 8, 4096)): (2.5, None, 2.0),
    ("nflows RealNVP", (32, 128, 8, 1024)): (0, None, 0),
    ("nflows NSF", (8, 64, 8, 256)): (8.0, None, 5.0),
    ("nflows NSF", (8, 64, 8, 4096)): (5.0, None, 3.0),
    ("nflows NSF", (32, 128, 8, 1024)): (0, None, 0),
    ("nflows conditional NSF", (8, 64, 8, 256)): (8.0, None, 5.0),
    ("nflows conditional NSF", (8, 64, 8, 4096)): (5.0, None, 3.0),
    ("nflows MAF", (8, 64, 5, 256)): (0, 0, 0),
    ("nflows MAF", (8, 64, 5, 4096)): (2.0, 5.0, 2.0),
    ("nflows MAF", (32, 128, 5, 4096)): (2.0, 10.0, 2.0),
    ("normflows RealNVP", (8, 64, 8, 256)): (0, None, 0),
    ("normflows RealNVP", (8, 64, 8, 4096)): (3.0, None, 3.0),
    ("normflows RealNVP", (32, 128, 8, 1024)): (0, None, 0),
    ("normflows NSF", (8, 64, 8, 256)): (0, None, 0),
    ("normflows NSF", (8, 64, 8, 4096)): (5.0, None, 3.0),
    ("normflows NSF", (32, 128, 8, 1024)): (0, None, 0),
    ("zuko NSF", (8, 64, 3, 256)): (0, 0, 0),
    ("zuko NSF", (8, 64, 3, 4096)): (3.0, 0, 2.0),
    ("zuko NSF", (32, 128, 3, 1024)): (0, 0, 0),
    ("zuko NCSF", (8, 64, 3, 256)): (0, 0, 0),
    ("zuko NCSF", (8, 64, 3, 4096)): (0, 0, 0),
    ("zuko MAF", (8, 64, 5, 256)): (0, 0, 0),
    ("zuko MAF", (8, 64, 5, 4096)): (2.0, 5.0, 2.0),
    ("zuko MAF", (32, 128, 5, 4096)): (2.0, 10.0, 2.0),
}


def case_name(kind: str, what: str, shape: Shape) -> str:
    dim, hidden, layers, batch = shape
    return f"peer_flows/{kind} {what}, {dim}-{hidden}-{layers}, batch {batch}"


def package(kind: str) -> str:
    return kind.partition(" ")[0]


def made(kind: str, shape: Shape) -> Any:
    """Return a flow with parameters that hide nothing: fresh ones are close to the identity."""
    makers = {"nflows": _nflows, "normflows": _normflows, "zuko": _zuko}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = makers[package(kind)](kind, shape)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return flow


def _nflows(kind: str, shape: Shape) -> Any:
    dim, hidden, layers, _ = shape
    transforms = peer("nflows", "nflows.transforms")
    flows, normal = peer("nflows", "nflows.flows"), peer("nflows", "nflows.distributions.normal")
    parts: list[nn.Module] = []
    for i in range(layers):
        if kind == "nflows MAF":
            masked = transforms.MaskedAffineAutoregressiveTransform
            parts += [
                transforms.ReversePermutation(dim), masked(dim, hidden, num_blocks=1, use_residual_blocks=False)
            ]  # fmt: skip
        else:
            parts.append(_coupling(kind, (torch.arange(dim) + i) % 2, hidden))
    return flows.Flow(transforms.CompositeTransform(parts), normal.StandardNormal([dim]))


def _coupling(kind: str, mask: Tensor, hidden: int) -> nn.Module:
    transforms, nets = peer("nflows", "nflows.transforms"), peer("nflows", "nflows.nn.nets")
    net = partial(nets.ResidualNet, hidden_features=hidden, context_features=_context(kind))
    if kind == "nflows RealNVP":
        return transforms.AffineCouplingTransform(mask, net)
    return transforms.PiecewiseRationalQuadraticCouplingTransform(
        mask, net, num_bins=BINS, tails="linear", tail_bound=BOUND
    )  # fmt: skip


def _normflows(kind: str, shape: Shape) -> Any:
    dim, hidden, layers, _ = shape
    normflows = peer("normflows", "normflows")
    parts: list[nn.Module] = []
    for _ in range(layers):
        if kind == "normflows NSF":
            spline = normflows.flows.CoupledRationalQuadraticSpline
            parts += [
                spline(dim, 2, hidden, num_bins=BINS, tail_bound=BOUND), normflows.flows.LULinearPermute(dim)
            ]  # fmt: skip
        else:
            net = normflows.nets.MLP([dim // 2, hidden, hidden, dim])
            parts += [normflows.flows.AffineCouplingBlock(net), normflows.flows.Permute(dim, mode="swap")]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(dim, trainable=False), parts)


def _zuko(kind: str, shape: Shape) -> Any:
    dim, hidden, layers, _ = shape
    flows = peer("zuko", "zuko.flows")
    return getattr(flows, kind.partition(" ")[2])(dim, transforms=layers, hidden_features=(hidden, hidden))


def _context(kind: str) -> int | None:
    return CONTEXT if "conditional" in kind else None


def _of_x(kind: str, flow: Any, what: str, context: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return what is called: log-densities of x, or samples from numbers of the prior."""
    if package(kind) == "zuko":
        return (lambda z: flow().transform.inv(z)) if what == "sample" else lambda x: flow().log_prob(x)
    if package(kind) == "normflows":
        return flow.forward if what == "sample" else flow.log_prob
    if what == "sample":
        return lambda z: flow._transform.inverse(z, context)[0]
    return lambda x: flow.log_prob(x, context)


def _call(name: str, kind: str, what: str, shape: Shape, x: Tensor, context: Tensor | None) -> Call:
    flow = made(kind, shape).to(x)
    if name == "pyflow":
        accelerate(flow)
    of_x = _of_x(kind, flow, what, context)
    if what != "train step":

        def forward() -> Outputs:
            with torch.no_grad():
                return (of_x(x),)

        return forward
    parameters = list(flow.parameters())
    # at rate 0 all steps are alike
    optimizer = torch.optim.Adam(parameters, lr=0.0, fused=True)

    def step() -> Outputs:
        optimizer.zero_grad(set_to_none=True)
        loss = -of_x(x).mean()
        loss.backward()
        optimizer.step()
        return loss.detach(), *(p.grad for p in parameters if p.grad is not None)

    return step


def _problem(shape: Shape, device: torch.device, *, kind: str, what: str) -> Problem:
    dim, batch = shape[0], shape[-1]
    x = normals((batch, dim), device, 1)[0]
    context = None if _context(kind) is None else normals((batch, CONTEXT), device, 1)[0]
    calls, missing = available(
        {name: partial(_call, name, kind, what, shape, x, context) for name in (package(kind), "pyflow")}
    )

    def truth() -> Outputs:
        wide = None if context is None else context.double()
        return _call(package(kind), kind, what, shape, x.double(), wide)()

    # rounding puts some inputs of relu, whose slope jumps there, on the other side of 0: packages are off by up to 4 %
    return Problem(calls, truth, x.nbytes, missing=missing, tolerance=1e-1 if what == "train step" else 1e-3)


def _case(kind: str, what: str, shape: Shape) -> Case:
    tiny, names = (4, 8, 2, min(shape[-1], 5)), (package(kind), "pyflow")
    return Case(
        case_name(kind, what, shape), partial(_problem, kind=kind, what=what), shape, tiny, names, package(kind)
    )


CASES = [
    _case(kind, what, shape)
    for (kind, shape), aims in AIMS.items()
    for what, aim in zip(CALLS, aims, strict=True)
    if aim is not None
]
