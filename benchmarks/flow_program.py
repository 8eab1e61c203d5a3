"""Cases of the flow_program family: whole flows of affine couplings, as RealNVP's, in float32.

Shapes are (columns, hidden, couplings, batch). A coupling changes half of the columns by a scale and a shift; its
network has two hidden ReLU layers. All contenders have the same networks; normflows and pyflow compute the same
numbers, nflows and zuko have other scale maps. A training step is one of Adam, fused. "eager" and "compile" are the
layers of pyflow on the reference.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pyflow
from pyflow._kept import INPUTS
from pyflow.flows import RealNVP, fuse
from pyflow.flows.nets import mlp
from pyflow.nn import AffineCoupling, ReversibleSequential

from .registry import Call, Case, Outputs, Problem, available, compiled, normals, peer

Shape = tuple[int, ...]
Nets = list[nn.Sequential]

SHAPES: tuple[Shape, ...] = (
    (8, 64, 8, 256), (8, 64, 8, 4096), (32, 128, 8, 512), (32, 128, 8, 8192), (64, 256, 12, 2048),
)  # fmt: skip
ONE_ROW: Shape = (8, 64, 8, 1)
ON_GPU: Shape = (8, 64, 8, 4096)
FORWARD, TRAINING = ("log_prob", "sample"), ("log_prob+backward", "train step")
FROZEN, COMPILED = "pyflow frozen", "normflows compiled"
# numbers of a network in its parameters, and where those of its last layer begin
PARAMETERS, LAST = 6, 4


class Model(NamedTuple):
    """A flow of any package: x -> log-densities (B,), and z -> x."""

    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[Tensor], Tensor]


def multiply_adds(shape: Shape) -> int:
    """Return how many multiply-adds the networks have forward; the gradients have twice as many."""
    dim, hidden, couplings, batch = shape
    return batch * couplings * (dim // 2 * hidden + hidden * hidden + hidden * dim)


def multiply_adds_again(shape: Shape) -> int:
    """Return how many of these the backward does again: those of layers with few inputs, others are kept."""
    dim, hidden, couplings, batch = shape
    layers = (dim // 2, hidden), (hidden, hidden), (hidden, dim)
    return batch * couplings * sum(inputs * size for inputs, size in layers if inputs < INPUTS)


def case_name(what: str, shape: Shape) -> str:
    dim, hidden, couplings, batch = shape
    return f"flow_program/{what}, {dim}-{hidden}-{couplings}, batch {batch}"


def _couplings(nets: Nets) -> ReversibleSequential:
    # (x + shift) exp(scale) is normflows' (x - shift) exp(-scale) of negated numbers
    layers = (
        AffineCoupling(net, swap=i % 2 == 1, packing="interleaved", scale_map="exp", shift_first=True)
        for i, net in enumerate(nets)
    )
    return ReversibleSequential(*layers, recompute=False)


def _layers(nets: Nets) -> Model:
    stack = _couplings(nets)

    def log_prob(x: Tensor) -> Tensor:
        z, logdet = stack(x)
        return pyflow.ops.flow_log_prob(z) + logdet

    return Model(log_prob, lambda z: stack.inverse(z)[0])


def _fused(nets: Nets, frozen: bool = False) -> Model:
    flow: Any = RealNVP(_columns(nets))
    flow.stages[0] = _couplings(nets)
    if frozen:
        flow = fuse(flow, frozen=True)
    return Model(flow.log_prob, lambda z: flow.inverse(z)[0])


def _normflows(nets: Nets) -> Model:
    flows, core = peer("normflows", "normflows.flows"), peer("normflows", "normflows.core")
    base = peer("normflows", "normflows.distributions").DiagGaussian(_columns(nets), trainable=False)
    with torch.no_grad():
        for parameter in (p for net in nets for p in list(net.parameters())[LAST:]):
            parameter.neg_()
    parts: list[nn.Module] = []
    # a density runs them from the last to the first
    for net in reversed(nets):
        parts += [flows.Permute(_columns(nets), mode="swap"), flows.AffineCouplingBlock(net, scale_map="exp")]
    flow = core.NormalizingFlow(base, parts)
    return Model(flow.log_prob, flow)


def _nflows(nets: Nets) -> Model:
    transforms = peer("nflows", "nflows.transforms")
    flows, normal = peer("nflows", "nflows.flows"), peer("nflows", "nflows.distributions.normal")
    second = (torch.arange(_columns(nets)) >= _columns(nets) // 2).long()
    composite = transforms.CompositeTransform(
        transforms.AffineCouplingTransform(1 - second if i % 2 else second, lambda *_, net=net: _WithoutContext(net))
        for i, net in enumerate(nets)
    )
    flow = flows.Flow(composite, normal.StandardNormal([_columns(nets)]))
    return Model(flow.log_prob, lambda z: composite.inverse(z)[0])


class _WithoutContext(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return self.net(x)


def _zuko(nets: Nets) -> Model:
    flow = peer("zuko", "zuko.flows").RealNVP(_columns(nets), transforms=len(nets), hidden_features=(1,))
    for layer, net in zip(flow.transform.transforms, nets, strict=True):
        layer.hyper = net
    flow.to(nets[0][0].weight)
    return Model(lambda x: flow().log_prob(x), lambda z: flow().transform.inv(z))


def _columns(nets: Nets) -> int:
    first: Any = nets[0][0]
    return 2 * int(first.in_features)


MAKERS: dict[str, Callable[[Nets], Model]] = {
    "normflows": _normflows, COMPILED: _normflows, "nflows": _nflows, "zuko": _zuko, "pyflow layers": _layers,
    "pyflow": _fused, FROZEN: partial(_fused, frozen=True),
}  # fmt: skip
# with a shape for a GPU
MORE: dict[str, Callable[[Nets], Model]] = {"eager": _layers, "compile": _layers}


def _on_reference(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def run(x: Tensor) -> Any:
        with pyflow.backend("reference"):
            return call(x)

    return run


def _call(name: str, nets: Nets, x: Tensor, what: str) -> Call:
    """Return samples or log-densities without gradients, or the loss and the gradients of the networks."""
    nets = copy.deepcopy(nets)
    model, parameters = (MAKERS | MORE)[name](nets), [p for net in nets for p in net.parameters()]
    of_x: Callable[[Tensor], Any] = model.sample if what == "sample" else model.log_prob
    if what in TRAINING:

        def of_x(x: Tensor) -> Tensor:
            return -model.log_prob(x).mean()

    if name in (COMPILED, "compile"):
        of_x = compiled(of_x)
    if name in MORE:
        of_x = _on_reference(of_x)
    # at rate 0 all steps are alike
    optimizer = torch.optim.Adam(parameters, lr=0.0, fused=True)

    def forward() -> Outputs:
        with torch.no_grad():
            return (of_x(x),)

    def backward() -> Outputs:
        loss = of_x(x)
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    def step() -> Outputs:
        optimizer.zero_grad(set_to_none=True)
        loss = of_x(x)
        loss.backward()
        optimizer.step()
        return loss.detach(), *(p.grad for p in parameters if p.grad is not None)

    return forward if what in FORWARD else backward if what == "log_prob+backward" else step


def _negated(outputs: Outputs) -> Outputs:
    """Return the loss and the gradients of normflows' networks as those of pyflow's."""
    loss, *grads = outputs
    return loss, *(-grad if i % PARAMETERS >= LAST else grad for i, grad in enumerate(grads))


def _problem(shape: Shape, device: torch.device, *, what: str, contenders: tuple[str, ...]) -> Problem:
    dim, hidden, couplings, batch = shape
    (x,) = normals((batch, dim), device, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = [mlp(dim // 2, (hidden, hidden), dim).to(device) for _ in range(couplings)]
    calls, missing = available({name: partial(_call, name, nets, x, what) for name in contenders})

    def truth_of(name: str) -> Call:
        def truth() -> Outputs:
            with pyflow.backend("reference"):
                return _call(name, [net.double() for net in copy.deepcopy(nets)], x.double(), what)()

        return truth

    truths: dict[str, Call] = defaultdict(lambda: truth_of("pyflow layers"))
    truths |= {name: truth_of(name) for name in ("nflows", "zuko")}
    weights = sum(p.nbytes for net in nets for p in net.parameters())
    return Problem(
        calls,
        truths,
        # at least x, the weights, and of a step their gradients and the two moments of each
        x.nbytes + weights * (5 if what == "train step" else 2 if what in TRAINING else 1),
        2 * multiply_adds(shape) * (3 if what in TRAINING else 1),
        missing,
        {name: _negated for name in ("normflows", COMPILED) if name in calls and what in TRAINING},
        # rounding puts some of the millions of inputs of relu, whose slope jumps there, on the other side of 0
        tolerance=1e-2 if what in TRAINING else 1e-5,
    )


def _case(what: str, shape: Shape) -> Case:
    on_gpu = shape == ON_GPU and what in ("log_prob", "log_prob+backward")
    contenders = tuple(name for name in MAKERS if name != FROZEN or shape == ONE_ROW) + tuple(MORE) * on_gpu
    tiny = (4, 8, 2, min(shape[-1], 5))
    build = partial(_problem, what=what, contenders=contenders)
    gpu = shape if on_gpu else None
    return Case(case_name(what, shape), build, shape, tiny, contenders, "normflows", gpu=gpu)


CASES = [
    *(_case(what, shape) for shape in SHAPES for what in (*FORWARD, *TRAINING)),
    *(_case(what, ONE_ROW) for what in FORWARD),
]
