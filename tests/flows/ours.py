"""What the tests of fused flows of this package share."""

from __future__ import annotations

import torch
from torch import nn

import pyflow
from pyflow.flows.nets import Conditional
from pyflow.nn import AffineCoupling

from .peers import programs


def net(inputs, outputs, kind=nn.Sequential, activation=nn.ReLU):
    return kind(nn.Linear(inputs, 7), activation(), nn.Linear(7, 6, bias=False), activation(), nn.Linear(6, outputs))


def perturbed(flow, *inputs):
    """The flow in float64, initialised by a batch, with parameters that are not 0."""
    flow = flow.double()
    flow(*inputs)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return flow


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def affine(size, context=0, activation=nn.ReLU, **options):
    """An affine coupling of `size` columns."""
    sizes = (size + 1) // 2, size // 2
    kept, changed = sizes[:: -1 if options.get("swap") else 1]
    kind = Conditional if context else nn.Sequential
    return AffineCoupling(net(kept + context, 2 * changed, kind, activation), **options)


def results(flow, x, given):
    z, logdet = flow(x, *given)
    back = flow.inverse(z.detach().requires_grad_(x.requires_grad), *given)
    kept = [v[:3] for v in given]
    drawn = flow.rsample_and_log_prob(2, *kept, seed=3) if hasattr(flow, "log_prob") else ()
    return flow.log_prob(x, *given) if drawn else logdet, z, logdet, *back, *drawn


def gradients(outputs, inputs):
    loss = sum(
        (each * torch.linspace(0.5, 1.5, each.numel(), dtype=each.dtype).view(each.shape)).sum() for each in outputs
    )
    return torch.autograd.grad(loss, inputs)


def assert_same_as_layers(flow, x, given, count):
    """Results and all gradients, with programs and without."""
    with programs(count):
        got = results(flow, x, given)
    inputs = [x, *given]
    plain = [each.detach() for each in got]
    with pyflow.backend("reference"), programs(0):
        want = results(flow, x, given)
    torch.testing.assert_close(plain, [each.detach() for each in want], rtol=1e-9, atol=1e-9)
    inputs = [each.requires_grad_() for each in (x, *given)] + list(flow.parameters())
    found = gradients(results(flow, x, given), inputs)
    with pyflow.backend("reference"):
        wanted = gradients(results(flow, x, given), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def linear_of(flow):
    return flow.stages[0].layers[3].net[2]
