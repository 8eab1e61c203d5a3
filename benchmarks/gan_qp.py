"""Cases of GAN-QP: the critic's loss on 64 pairs of 128 x 128 colour images, and its gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import pyflow

from .registry import Case, Outputs, Problem, bind, compiled, normals, wide

LAM = 10.0


def _distance(real: Tensor, fake: Tensor, distance: str) -> Tensor:
    if distance == "l1":
        return (real - fake).abs().flatten(1).mean(1)
    return (real - fake).square().flatten(1).mean(1).sqrt()


def _problem(
    shape: tuple[int, ...], device: torch.device, *, distance: str, latent: int | None, backward: bool
) -> Problem:
    samples = normals(shape, device, 2)
    if latent is not None:
        samples += normals((shape[0], latent), device, 2)
    values = normals(shape[:1], device, 2)
    cotangents = (torch.ones((), device=device),) if backward else None

    # the usual code; the reference also handles samples at distance 0
    def eager(samples: Outputs, t_real: Tensor, t_fake: Tensor) -> Outputs:
        d = sum(_distance(real, fake, distance) for real, fake in zip(samples[::2], samples[1::2], strict=True))
        delta = t_real - t_fake
        return ((-delta + delta.square() / (2 * LAM * d)).mean(),)

    def op(samples: Outputs, t_real: Tensor, t_fake: Tensor) -> Outputs:
        return (pyflow.ops.gan_qp_loss(t_real, t_fake, *samples, lam=LAM, distance=distance),)

    functions = {"eager": eager, "compile": compiled(eager), "pyflow": op}
    calls = {name: bind(partial(function, samples), values, cotangents) for name, function in functions.items()}
    truth = bind(partial(eager, wide(samples)), wide(values), cotangents and wide(cotangents))
    # forward reads the samples, backward does not; plus distances, the critic's values and their gradients
    moved = sum(t.nbytes for t in samples) + (6 if backward else 3) * values[0].nbytes
    return Problem(calls, truth, moved)


def _case(
    name: str,
    shape: tuple[int, ...],
    *,
    distance: str = "l1",
    latent: int | None = None,
    backward: bool = True,
    quick: bool = False,
    gpu: tuple[int, ...] | None = None,
) -> Case:
    build = partial(_problem, distance=distance, latent=latent, backward=backward)
    return Case(f"gan_qp/{name}", build, shape, (5, 3, 4, 4), quick=quick, gpu=gpu)


IMAGES = (64, 3, 128, 128)
CASES = [
    _case("l1 forward", IMAGES, backward=False),
    _case("l1 forward+backward", IMAGES, quick=True, gpu=(512, 3, 256, 256)),
    _case("l2 forward+backward", IMAGES, distance="l2"),
    _case("l1 latents forward+backward", IMAGES, latent=128),
    _case("small forward+backward", (64, 1, 8, 8), latent=16),
]
