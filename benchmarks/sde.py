"""Cases of SDE steps: x' = a x + b score + c z on (16, 3, 256, 256) images, float32 unless the name says otherwise.

Each contender draws its own noise. In the cases with "given noise" all get the same z and are compared value by value.
In the others torch's contenders are checked by the moments of (x' - mean) / c, as in `noise`, and pyflow against its
reference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pyflow
from pyflow.reference import sde as ref

from .noise import IMAGES, LARGE, MOMENTS, TOLERANCE, deviations
from .registry import FRESH, Call, Case, Outputs, Problem, available, bind, compiled, normals, peer, wide

SMALL = (4, 3, 32, 32)
SCALARS = (1.01, 0.05, 0.3)
SEED, STEP = 5, 7


def _columns(values: Outputs, x: Tensor) -> Outputs:
    return tuple(v.reshape(-1, *(1,) * (x.dim() - 1)) for v in values)


def _own(shape: tuple[int, ...], device: torch.device) -> Outputs:
    """Return coefficients a, b, c that differ between samples."""
    spread = torch.linspace(0.9, 1.1, shape[0], device=device)
    return tuple(v * spread for v in SCALARS)


def _diffusers() -> tuple[Callable[[Tensor, Tensor], Tensor], tuple[float, float, float]]:
    """Return the VE scheduler's step_pred, x + g**2 score + g z, at one time, and its coefficients (1, g**2, g)."""
    scheduler = peer("diffusers", "diffusers").ScoreSdeVeScheduler()
    scheduler.set_timesteps(10)
    scheduler.set_sigmas(10)
    time = scheduler.timesteps[5]
    index = (time * (len(scheduler.timesteps) - 1)).long()
    sigma, before = scheduler.discrete_sigmas[index], scheduler.discrete_sigmas[index - 1]
    gain = float((sigma**2 - before**2).sqrt())
    return lambda x, score: scheduler.step_pred(score, time, x).prev_sample, (1.0, gain**2, gain)


def _standardised(x: Tensor, score: Tensor, a: Any, b: Any, c: Any) -> Callable[[Outputs], Outputs]:
    """Return a function that computes the moments of the noise in a result, which must be standard normal."""
    mean = a * x.double() + b * score.double()
    return lambda result: deviations((result[0].double() - mean) / c, "normal")


def _problem(
    shape: tuple[int, ...], device: torch.device, *, own: bool = False, with_peer: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Problem:  # fmt: skip
    x, score = normals(shape, device, 2, dtype)
    theirs, missing = available({"diffusers": _diffusers} if with_peer else {})
    values: Any = _own(shape, device) if own else SCALARS
    if theirs:
        step, values = theirs["diffusers"]
    a, b, c = _columns(values, x) if own else values
    seed = pyflow.ops.sample_seeds(torch.tensor(SEED, device=device), shape[0]) if own else SEED

    def eager(x: Tensor, score: Tensor) -> Outputs:
        return ((a * x + b * score + c * torch.randn_like(x)).to(x.dtype),)

    def op(x: Tensor, score: Tensor, scalars: Any = values, seed: Any = seed) -> Outputs:
        return (pyflow.ops.sde_step(x, score, *scalars, seed=seed, step=STEP),)

    functions = {"eager": eager, "compile": compiled(eager), "pyflow": op}
    if theirs:
        functions["diffusers"] = lambda x, score: (step(x, score),)
    if own:
        functions["pyflow scalars"] = partial(op, scalars=SCALARS, seed=SEED)
    calls = {name: bind(function, (x, score)) for name, function in functions.items()}

    def truth(scalars: Any, seed: Any) -> Call:
        a, b, c = (torch.as_tensor(v, dtype=torch.float64, device=device) for v in scalars)
        z = pyflow.ops.normal(shape, seed=seed, step=STEP, dtype=torch.float64, device=device)
        return lambda: (ref.sde_step(x.double(), score.double(), a, b, c, z)[0],)

    truths = defaultdict(lambda: truth(values, seed), {"pyflow scalars": truth(SCALARS, SEED)})
    others = ("eager", "compile", "diffusers")
    for name in others:
        truths[name] = lambda: (torch.ones(len(MOMENTS["normal"]), dtype=torch.float64, device=device),)
    forms = dict.fromkeys(set(others) & set(calls), _standardised(x, score, a, b, c))
    tolerance = TOLERANCE if dtype == torch.float32 else 1e-2
    return Problem(calls, truths, 3 * x.nbytes, missing=missing, forms=forms, tolerance=tolerance)


def _given(shape: tuple[int, ...], device: torch.device, *, backward: bool = False) -> Problem:
    """All contenders get the same z; backward to x, score and the coefficients of each sample."""
    x, score, z = normals(shape, device, 3)
    inputs = (x, score, *_own(shape, device))
    cotangents = normals(shape, device, 1) if backward else None

    def eager(x: Tensor, score: Tensor, *scalars: Tensor, noise: Tensor = z) -> Outputs:
        a, b, c = _columns(scalars, x)
        return (a * x + b * score + c * noise,)

    def op(x: Tensor, score: Tensor, *scalars: Tensor) -> Outputs:
        return (pyflow.ops.sde_step(x, score, *scalars, noise=z),)

    functions = {"eager": eager, "compile": compiled(eager), "pyflow": op}
    calls = {name: bind(function, inputs, cotangents) for name, function in functions.items()}
    truth = bind(partial(eager, noise=z.double()), wide(inputs), cotangents and wide(cotangents))
    # forward: x, score, z -> y; backward reads them and the gradient of y and writes two gradients
    return Problem(calls, truth, (4 + 6 * backward) * x.nbytes)


def _loss(shape: tuple[int, ...], device: torch.device, *, backward: bool) -> Problem:
    """The loss regenerates the z of perturb; eager reads a stored z."""
    (pred,) = normals(shape, device, 1)
    std = torch.linspace(0.1, 1.0, shape[0], device=device)
    z = pyflow.ops.normal(shape, seed=SEED, step=STEP, device=device)
    cotangents = normals(shape[:1], device, 1) if backward else None

    def eager(pred: Tensor, noise: Tensor = z, std: Tensor = std) -> Outputs:
        return ((_columns((std,), pred)[0] * pred + noise).square().flatten(1).sum(1) / 2,)

    def op(pred: Tensor) -> Outputs:
        return (pyflow.ops.denoising_loss(pred, std, seed=SEED, step=STEP),)

    functions = {"eager": eager, "compile": compiled(eager), "pyflow": op}
    calls = {name: bind(function, (pred,), cotangents) for name, function in functions.items()}
    exact = partial(eager, noise=z.double(), std=std.double())
    truth = bind(exact, wide((pred,)), cotangents and wide(cotangents))
    return Problem(calls, truth, (1 + 2 * backward) * pred.nbytes)


def _langevin(shape: tuple[int, ...], device: torch.device) -> Problem:
    x, score = normals(shape, device, 2)
    snr = 0.16

    def eager(x: Tensor, score: Tensor) -> Outputs:
        return _corrected(x, score, torch.randn_like(x), snr)

    def op(x: Tensor, score: Tensor) -> Outputs:
        return (pyflow.ops.langevin_step(x, score, snr=snr, norm="sample", seed=SEED, step=STEP),)

    def exact() -> Outputs:
        z = pyflow.ops.normal(shape, seed=SEED, step=STEP, purpose="corrector", device=device)
        return _corrected(x.double(), score.double(), z.double(), snr)

    # the noise differs, so only the norms are compared
    def size_of(result: Outputs) -> Outputs:
        return (result[0].double().flatten(1).norm(dim=1),)

    calls = {n: bind(f, (x, score)) for n, f in (("eager", eager), ("compile", compiled(eager)), ("pyflow", op))}
    truths: dict[str, Call] = defaultdict(lambda: exact)
    for name in ("eager", "compile"):
        truths[name] = lambda: size_of(exact())
    return Problem(calls, truths, 4 * x.nbytes, forms=dict.fromkeys(("eager", "compile"), size_of), tolerance=0.05)


def _corrected(x: Tensor, score: Tensor, z: Tensor, snr: float) -> Outputs:
    norms = [v.flatten(1).norm(dim=1) for v in (z, score)]
    (size,) = _columns((2 * (snr * norms[0] / norms[1]) ** 2,), x)
    return (x + size * score + (2 * size).sqrt() * z,)


def _case(name: str, build: Callable[..., Problem], shape: tuple[int, ...] = IMAGES, **more: Any) -> Case:
    return Case(f"sde/{name}", build, shape, (4, 3, 64, 64), **more)


_with_peer = ("eager", "compile", "diffusers", "pyflow")
CASES = [
    _case("step", partial(_problem, with_peer=True), contenders=_with_peer, peer="diffusers", quick=True, gpu=LARGE),
    _case(
        "step" + FRESH, partial(_problem, with_peer=True), contenders=_with_peer, peer="diffusers", pages="fresh"
    ),
    _case(
        "step per sample", partial(_problem, own=True), contenders=("eager", "compile", "pyflow scalars", "pyflow"),
        compare=(("pyflow", "pyflow scalars"),), quick=True,
    ),
    _case("step, small", _problem, SMALL, quick=True),
    _case("step, bf16", partial(_problem, dtype=torch.bfloat16)),
    _case("step, given noise", _given),
    _case("step, given noise forward+backward", partial(_given, backward=True)),
    _case("denoising loss", partial(_loss, backward=False)),
    _case("denoising loss forward+backward", partial(_loss, backward=True), quick=True, gpu=LARGE),
    _case("langevin step", _langevin),
]  # fmt: skip
