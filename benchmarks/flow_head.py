"""Cases of the flow head: log-likelihoods of (16384, 784) latents with a learnt scale."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import pyflow
from pyflow.reference import flow_head as ref

from .registry import Call, Case, Outputs, Problem, available, bind, compiled, normals, peer, wide


def _normflows(h: Tensor, log_scale: Tensor, cotangents: Outputs | None) -> Call:
    base = peer("normflows", "normflows.distributions").DiagGaussian(h.shape[1]).to(h.device)
    # normflows divides by its scale
    base.log_scale.data.copy_(-log_scale)
    base.loc.requires_grad_(False)
    base.log_scale.requires_grad_(cotangents is not None)
    if cotangents is None:
        return lambda: (base.log_prob(h),)
    leaves = (h.detach().requires_grad_(), base.log_scale)

    def forward_backward() -> Outputs:
        outputs = (base.log_prob(leaves[0]),)
        return *outputs, *torch.autograd.grad(outputs, leaves, cotangents)

    return forward_backward


def _problem(shape: tuple[int, ...], device: torch.device, *, prior: str, backward: bool) -> Problem:
    (h,) = normals(shape, device, 1)
    log_scale = 0.1 * normals(shape[1:], device, 1)[0]
    inputs = (h, log_scale)
    cotangents = normals(shape[:1], device, 1) if backward else None

    def eager(h: Tensor, log_scale: Tensor) -> Outputs:
        return (ref.flow_log_prob(h, log_scale, prior=prior),)

    def op(h: Tensor, log_scale: Tensor) -> Outputs:
        return (pyflow.ops.flow_log_prob(h, log_scale, prior=prior),)

    functions = {"eager": eager, "compile": compiled(eager), "pyflow": op}
    calls = {name: bind(function, inputs, cotangents) for name, function in functions.items()}
    makers = {"normflows": partial(_normflows, h, log_scale, cotangents)} if prior == "gaussian" else {}
    theirs, missing = available(makers)
    forms = {"normflows": lambda result: (*result[:2], -result[2].flatten())} if theirs and backward else {}
    # forward reads h; backward reads h and writes its gradient
    moved = (3 if backward else 1) * h.nbytes + (2 if backward else 1) * (4 * shape[0] + log_scale.nbytes)
    truth = bind(eager, wide(inputs), cotangents and wide(cotangents))
    return Problem(calls | theirs, truth, moved, missing=missing, forms=forms)


def _case(prior: str, backward: bool, columns: int = 784) -> Case:
    with_peer, narrow = prior == "gaussian", columns < 784
    return Case(
        f"flow_head/{prior}{f', {columns} columns' * narrow} {'forward+backward' if backward else 'forward'}",
        partial(_problem, prior=prior, backward=backward),
        (65536 if narrow else 16384, columns),
        (5, 2 if narrow else 14),
        contenders=("eager", "compile", "normflows", "pyflow") if with_peer else ("eager", "compile", "pyflow"),
        peer="normflows" if with_peer else None,
        quick=backward and with_peer and not narrow,
        gpu=(65536, 1024) if backward and with_peer and not narrow else None,
    )


CASES = [_case(prior, backward) for prior in ("gaussian", "logistic") for backward in (False, True)]
CASES += [_case("gaussian", backward, 2) for backward in (False, True)]
