"""Cases of spectral normalisation: all layers of a ResNet-50 in one call, against torch's layer by layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pyflow
from pyflow.reference import spectral as ref

from .registry import Call, Case, Outputs, Problem, bind, compiled

SLOW = "compiling 54 layers takes minutes, as much as all other cases for a GPU"
# (inner width, number of blocks); a block has convolutions 1x1 down, 3x3, 1x1 up
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))


def resnet50(width: float) -> list[tuple[int, ...]]:
    """Return the shapes of ResNet-50's 53 convolutions and its classifier, with channels scaled by `width`."""
    channels = lambda n: max(1, int(n * width))
    shapes: list[tuple[int, ...]] = [(channels(64), 3, 7, 7)]
    before = channels(64)
    for base, blocks in STAGES:
        inner, outer = channels(base), channels(4 * base)
        for block in range(blocks):
            shapes += [(inner, before, 1, 1), (inner, inner, 3, 3), (outer, inner, 1, 1)]
            if block == 0:
                shapes.append((outer, before, 1, 1))
            before = outer
    return [*shapes, (1000, before)]


class Layer(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


def _torchs(weights: Outputs, u: Outputs, v: Outputs, cotangents: Outputs | None) -> Call:
    """Each access of a weight runs one power iteration and one division; u and v are reset, as in other contenders."""
    layers: list[Any] = [parametrizations.spectral_norm(Layer(w)) for w in weights]
    norms = [layer.parametrizations.weight[0] for layer in layers]
    leaves: list[Tensor] = [layer.parametrizations.weight.original for layer in layers]

    def forward() -> Outputs:
        for norm, a, b in zip(norms, u, v, strict=True):
            norm._u.copy_(a)
            norm._v.copy_(b)
        with torch.set_grad_enabled(cotangents is not None):
            return tuple(layer.weight for layer in layers)

    def forward_backward() -> Outputs:
        outputs = forward()
        return *outputs, *torch.autograd.grad(outputs, leaves, cotangents)

    return forward if cotangents is None else forward_backward


def _problem(shape: tuple[int, ...], device: torch.device, *, backward: bool) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    # shape[0] is the width in percent
    shapes = resnet50(shape[0] / 100)
    weights = tuple(normal(*size) for size in shapes)
    u = tuple(nn.functional.normalize(normal(w.shape[0]), dim=0) for w in weights)
    v = tuple(nn.functional.normalize(normal(w[0].numel()), dim=0) for w in weights)
    # near the singular vectors, as during training
    _, us, vs, _ = ref.spectral_normalize(weights, u, v, n_iter=15)
    u, v = tuple(us), tuple(vs)
    cotangents = tuple(normal(*size) for size in shapes) if backward else None

    def eager(*weights: Tensor) -> Outputs:
        return tuple(ref.spectral_normalize(weights, u, v, n_iter=1)[0])

    def op(*weights: Tensor) -> Outputs:
        return tuple(pyflow.ops.spectral_normalize(weights, u, v)[0])

    def exact(*weights: Tensor) -> Outputs:
        return tuple(ref.spectral_normalize(weights, [x.double() for x in u], [x.double() for x in v], n_iter=1)[0])

    functions, missing = {"eager": eager, "compile": compiled(eager), "pyflow": op}, {}
    if device.type == "cuda":
        del functions["compile"]
        missing["compile"] = SLOW
    calls = {name: bind(function, weights, cotangents) for name, function in functions.items()}
    calls["torch"] = _torchs(weights, u, v, cotangents)
    size = sum(w.nbytes for w in weights)
    wide = tuple(w.double() for w in weights)
    truth = bind(exact, wide, cotangents and tuple(c.double() for c in cotangents))
    # forward reads W and writes the result; backward reads the gradient and W and writes a gradient
    return Problem(calls, truth, (5 if backward else 2) * size, missing=missing, tolerance=1e-4)


def _case(backward: bool) -> Case:
    return Case(
        f"spectral/ResNet-50 {'forward+backward' if backward else 'forward'}",
        partial(_problem, backward=backward),
        (100,),
        (5,),
        contenders=("eager", "compile", "torch", "pyflow"),
        peer="torch",
        quick=backward,
        gpu=(100,) if backward else None,
    )


CASES = [_case(backward) for backward in (False, True)]
