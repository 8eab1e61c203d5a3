"""Cases of the spline family: float32, 8 bins, linear tails at +-3, variant nflows unless the name says otherwise.

NSF: a whole flow of 8 couplings, whose networks with 64 hidden units, two residual blocks, are torch's on all sides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import pyflow
from pyflow.nn import SplineCoupling
from pyflow.reference import spline as ref

from .registry import Call, Case, Outputs, Problem, available, bind, compiled, normals, peer, wide

MAIN = (16384, 8)
LARGE = (65536, 64)
BINS, BOUND = 8, 3.0
LAYERS, HIDDEN = 8, 64
PEERS = {"nflows": ("nflows", "normflows"), "zuko": ("zuko",)}


def _options(variant: str, bins: int) -> dict[str, Any]:
    return {
        "bound": BOUND, "bins": bins, "tails": (0,), "form": variant, "param_scale": 1.0, "min_bin": 1e-3,
        "min_slope": 1e-3,
    }  # fmt: skip


def _reference(variant: str, inverse: bool, bins: int) -> Callable[..., Outputs]:
    options = {**_options(variant, bins), "bounds": None, "mask": None, "inverse": inverse, "event_dims": 1}
    return lambda x, params: ref.rq_spline(x, params, **options)


def _off_knots(x: Tensor, params: Tensor, variant: str, inverse: bool, bins: int) -> Tensor:
    """Move x away from knots, where gradients jump, and rounding decides for one side."""
    high = params.new_full((), BOUND)
    spline = ref.spline_of(params, -high, high, ref.Options(**_options(variant, bins)))
    gaps = x[..., None] - (spline.ys if inverse else spline.xs)
    return torch.where(gaps.abs().amin(-1) < 1e-4, x + 3e-4, x)


def _op(variant: str, inverse: bool, bins: int) -> Callable[..., Outputs]:
    return partial(pyflow.ops.rq_spline, bins=bins, bound=BOUND, variant=variant, inverse=inverse)


def _split(params: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    return params[..., :bins], params[..., bins : 2 * bins], params[..., 2 * bins :]


def _of_nflows(package: str, module: str, inverse: bool, bins: int) -> Callable[..., Outputs]:
    """A spline with the signature that nflows and normflows share."""
    spline = peer(package, module).unconstrained_rational_quadratic_spline

    def function(x: Tensor, params: Tensor) -> Outputs:
        y, logdet = spline(x, *_split(params, bins), inverse=inverse, tails="linear", tail_bound=BOUND)
        return y, logdet.sum(1)

    return function


def _of_zuko(inverse: bool, bins: int) -> Callable[..., Outputs]:
    transforms = peer("zuko", "zuko.transforms")

    def function(x: Tensor, params: Tensor) -> Outputs:
        transform = transforms.MonotonicRQSTransform(*_split(params, bins), bound=BOUND)
        y, logdet = (transform.inv if inverse else transform).call_and_ladj(x)
        return y, logdet.sum(1)

    return function


def _makers(inverse: bool, bins: int) -> dict[str, Callable[[], Callable[..., Outputs]]]:
    return {
        "nflows": partial(_of_nflows, "nflows", "nflows.transforms.splines.rational_quadratic", inverse, bins),
        "normflows": partial(_of_nflows, "normflows", "normflows.utils.splines", inverse, bins),
        "zuko": partial(_of_zuko, inverse, bins),
    }


def _problem(
    shape: tuple[int, ...],
    device: torch.device,
    *,
    variant: str = "nflows",
    inverse: bool = False,
    backward: bool = False,
    bins: int = BINS,
) -> Problem:
    (x,), (params,) = normals(shape, device, 1), normals((*shape, 3 * bins - 1), device, 1)
    x = _off_knots(x, params, variant, inverse, bins)
    eager = _reference(variant, inverse, bins)
    makers = _makers(inverse, bins)
    theirs, missing = available({name: makers[name] for name in PEERS[variant]})
    functions = {"eager": eager, "compile": compiled(eager), "pyflow": _op(variant, inverse, bins), **theirs}
    inputs, rows = (x, params), shape[0]
    cotangents = (*normals(shape, device, 1), *normals((rows,), device, 1)) if backward else None
    # forward: x, params -> y, logdet; backward: x, params, both gradients -> the gradients of x and params
    passes = 2 + 3 * backward + (1 + 2 * backward) * (3 * bins - 1)
    return Problem(
        {name: bind(function, inputs, cotangents) for name, function in functions.items()},
        lambda: bind(eager, wide(inputs), cotangents and wide(cotangents))(),
        passes * x.nbytes + 4 * rows * (2 if backward else 1),
        missing=missing,
        # errors are divided by slopes down to 1e-3, those of gradients twice
        tolerance=1e-2 if backward else 1e-3,
    )


def _case(name: str, shape: tuple[int, ...] = MAIN, variant: str = "nflows", **options: Any) -> Case:
    more = {key: options.pop(key) for key in ("quick", "gpu") if key in options}
    peers = PEERS[variant]
    return Case(
        f"spline/{name}",
        partial(_problem, variant=variant, **options),
        shape,
        (5, 6),
        contenders=("eager", "compile", *peers, "pyflow"),
        peer=peers[0],
        **more,
    )


class _Residual(nn.Module):
    """The residual network that nflows puts into its couplings: two blocks, relu before each layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, HIDDEN), nn.Linear(HIDDEN, outputs)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN)) for _ in range(2)
        )

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        return self.last(h)


class _Flow(nn.Module):
    """Spline couplings that change the two halves of x in turn, and a normal distribution."""

    def __init__(self, features: int) -> None:
        super().__init__()
        half = features // 2
        self.layers = nn.ModuleList(
            SplineCoupling(_Residual(half, half * (3 * BINS - 1)), bins=BINS, bound=BOUND, swap=i % 2 == 1)
            for i in range(LAYERS)
        )

    def log_prob(self, x: Tensor) -> Tensor:
        total: Any = 0.0
        for layer in self.layers:
            x, logdet = layer(x)
            total = total + logdet
        return pyflow.ops.flow_log_prob(x) + total


def _same_in_nflows(flow: _Flow, features: int) -> nn.Module:
    """The same flow of nflows' layers, on the same networks."""
    transforms = peer("nflows", "nflows.transforms")
    flows, normal = peer("nflows", "nflows.flows"), peer("nflows", "nflows.distributions.normal")
    second = (torch.arange(features) >= features // 2).long()
    layers = [
        transforms.PiecewiseRationalQuadraticCouplingTransform(
            1 - second if layer.swap else second, lambda inputs, outputs, net=layer.net: net, num_bins=BINS,
            tails="linear", tail_bound=BOUND,
        )
        for layer in flow.layers
    ]  # fmt: skip
    return flows.Flow(transforms.CompositeTransform(layers), normal.StandardNormal([features]))


def _model(flow: Any, x: Tensor, train: bool, backend: str = "auto") -> Call:
    """Log-densities of x, or a training step that returns the loss; at rate 0 all steps are alike."""
    flow = copy.deepcopy(flow)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.0, fused=True)

    def density() -> Outputs:
        with torch.no_grad(), pyflow.backend(backend):
            return (flow.log_prob(x),)

    def step() -> Outputs:
        with pyflow.backend(backend):
            optimizer.zero_grad()
            loss = -flow.log_prob(x).mean()
            loss.backward()
            optimizer.step()
        return (loss.detach(),)

    return step if train else density


def _models(shape: tuple[int, ...], device: torch.device, train: bool = False) -> Problem:
    (x,) = normals(shape, device, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = _Flow(shape[1]).to(device)
    theirs, missing = available({"nflows": lambda: _same_in_nflows(flow, shape[1]).to(device)})
    calls = {"eager": _model(flow, x, train, "reference"), "pyflow": _model(flow, x, train)}
    calls |= {name: _model(other, x, train) for name, other in theirs.items()}
    truth = copy.deepcopy(flow).double()
    size = sum(p.nbytes for p in flow.parameters())
    # at least x, the weights, and of a step their gradients and the two moments of each
    moved = x.nbytes + (5 * size if train else size)
    return Problem(calls, _model(truth, x.double(), train, "reference"), moved, missing=missing, tolerance=1e-4)


def _whole(name: str, **options: Any) -> Case:
    contenders = ("eager", "nflows", "pyflow")
    return Case(
        f"spline/NSF {name}", partial(_models, **options), (4096, 8), (5, 4), contenders=contenders, peer="nflows"
    )


CASES = [
    _case("forward", quick=True, gpu=LARGE),
    _case("inverse", inverse=True, quick=True),
    _case("forward+backward", backward=True, quick=True, gpu=LARGE),
    _case("inverse+backward", inverse=True, backward=True),
    _case("16 bins forward", bins=16),
    _case("16 bins forward+backward", bins=16, backward=True),
    _case("small forward", (64, 8), quick=True),
    _case("zuko forward", variant="zuko"),
    _case("zuko inverse", variant="zuko", inverse=True),
    _case("zuko forward+backward", variant="zuko", backward=True),
    _whole("log_prob"),
    _whole("train step", train=True),
]
