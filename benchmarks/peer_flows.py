"""Whole flows as nflows builds them, and the same flows fused: `pyflow.flows.fuse`, in float32.

Shapes are (columns, hidden, layers, batch). Neural spline flows and RealNVP have residual networks of two blocks, MAF
masked networks of two hidden layers. zuko's MAF has networks of the same size and its own parameters. A training step
is one of Adam, fused. Samples are the inverse of given numbers. No case has a shape for a GPU: programs run on a CPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyflow.flows import fuse

from .registry import Call, Case, Outputs, Problem, available, normals, peer

Shape = tuple[int, ...]

CONTEXT = 6  # columns of a context
BINS, BOUND = 8, 3.0
# log_prob and sampling without gradients, and a training step; in this order in tables
CALLS = ("log_prob", "sample", "train step")
# (kind, shape) -> the speed-ups aimed at over the slowest peer, in the order of CALLS; None: not measured
Aims = tuple[float | None, float | None, float | None]
AIMS: dict[tuple[str, Shape], Aims] = {
    ("NSF", (8, 64, 8, 256)): (8.0, None, 5.0),
    ("NSF", (8, 64, 8, 4096)): (5.0, None, 3.0),
    ("conditional NSF", (8, 64, 8, 256)): (8.0, None, 5.0),
    ("conditional NSF", (8, 64, 8, 4096)): (5.0, None, 3.0),
    ("RealNVP", (8, 64, 8, 256)): (4.0, None, 3.5),
    ("RealNVP", (8, 64, 8, 4096)): (2.5, None, 2.0),
    ("MAF", (8, 64, 5, 4096)): (2.0, 5.0, 2.0),
    ("MAF", (32, 128, 5, 4096)): (2.0, 10.0, 2.0),
}


def case_name(kind: str, what: str, shape: Shape) -> str:
    dim, hidden, layers, batch = shape
    return f"peer_flows/{kind} {what}, {dim}-{hidden}-{layers}, batch {batch}"


def contenders(kind: str) -> tuple[str, ...]:
    return ("nflows", *(["zuko"] if kind == "MAF" else []), "pyflow")


def nflows_flow(kind: str, shape: Shape) -> Any:
    """Return a flow of nflows, with parameters that hide nothing: fresh ones are close to the identity."""
    dim, hidden, layers, _ = shape
    transforms = peer("nflows", "nflows.transforms")
    flows, normal = peer("nflows", "nflows.flows"), peer("nflows", "nflows.distributions.normal")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts: list[nn.Module] = []
        for i in range(layers):
            if kind == "MAF":
                made = transforms.MaskedAffineAutoregressiveTransform(
                    dim, hidden, num_blocks=1, use_residual_blocks=False
                )  # fmt: skip
                parts += [transforms.ReversePermutation(dim), made]
            else:
                parts.append(_coupling(kind, (torch.arange(dim) + i) % 2, hidden))
        flow = flows.Flow(transforms.CompositeTransform(parts), normal.StandardNormal([dim]))
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return flow


def _coupling(kind: str, mask: Tensor, hidden: int) -> nn.Module:
    transforms, nets = peer("nflows", "nflows.transforms"), peer("nflows", "nflows.nn.nets")
    net = partial(nets.ResidualNet, hidden_features=hidden, context_features=_context(kind))
    if kind == "RealNVP":
        return transforms.AffineCouplingTransform(mask, net)
    return transforms.PiecewiseRationalQuadraticCouplingTransform(
        mask, net, num_bins=BINS, tails="linear", tail_bound=BOUND
    )  # fmt: skip


def _context(kind: str) -> int | None:
    return CONTEXT if kind.startswith("conditional") else None


def _zuko_flow(shape: Shape) -> Any:
    dim, hidden, layers, _ = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peer("zuko", "zuko.flows").MAF(dim, transforms=layers, hidden_features=(hidden, hidden))


def _of_x(name: str, flow: Any, what: str, context: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return what is called: log-densities of x, or samples from numbers of the prior."""
    if name == "zuko":
        return (lambda z: flow().transform.inv(z)) if what == "sample" else lambda x: flow().log_prob(x)
    if what == "sample":
        layers: Any = fuse(flow._transform) if name == "pyflow" else flow._transform
        return lambda z: layers.inverse(z, context)[0]
    fused: Any = fuse(flow) if name == "pyflow" else flow
    return lambda x: fused.log_prob(x, context)


def _call(name: str, make: Callable[[], Any], what: str, x: Tensor, context: Tensor | None) -> Call:
    flow = make().to(x)
    of_x = _of_x(name, flow, what, context)
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
    makers: dict[str, Callable[[], Any]] = {
        name: partial(_zuko_flow, shape) if name == "zuko" else partial(nflows_flow, kind, shape)
        for name in contenders(kind)
    }
    calls, missing = available({name: partial(_call, name, make, what, x, context) for name, make in makers.items()})

    def truth_of(name: str) -> Call:
        def truth() -> Outputs:
            wide = None if context is None else context.double()
            return _call(name, makers[name], what, x.double(), wide)()

        return truth

    truths: dict[str, Call] = defaultdict(lambda: truth_of("nflows"))
    truths["zuko"] = truth_of("zuko")
    # rounding puts some inputs of relu, whose slope jumps there, on the other side of 0
    return Problem(calls, truths, x.nbytes, missing=missing, tolerance=1e-2 if what == "train step" else 1e-3)


def _case(kind: str, what: str, shape: Shape) -> Case:
    tiny = (4, 8, 2, min(shape[-1], 5))
    return Case(
        case_name(kind, what, shape), partial(_problem, kind=kind, what=what), shape, tiny, contenders(kind), "nflows"
    )


CASES = [
    _case(kind, what, shape)
    for (kind, shape), aims in AIMS.items()
    for what, aim in zip(CALLS, aims, strict=True)
    if aim is not None
]
