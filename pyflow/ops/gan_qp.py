"""Losses of GAN-QP: the critic's quadratic loss, with the sample distances, in one pass over the samples."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._operators import register
from .._schemas import DISTANCES
from ..reference import gan_qp as ref

REDUCTIONS = ("mean", "sum", "none")


def gan_qp_loss(
    t_real: Tensor,
    t_fake: Tensor,
    x_real: Tensor,
    x_fake: Tensor,
    z_real: Tensor | None = None,
    z_fake: Tensor | None = None,
    *,
    lam: float = 10.0,
    distance: str = "l1",
    eps: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return the critic loss of GAN-QP: -Delta + Delta**2 / (2 lam (d + eps)), with Delta = t_real - t_fake.

    Sample i of x_real is paired with sample i of x_fake. d_i is the mean of |x_real - x_fake| over the elements of the
    sample ("l2": root mean square), plus the same distance of the latents if they are given. The quadratic term
    replaces a Lipschitz constraint: no gradient penalty and no weight normalisation in the critic.

    Args:
        t_real, t_fake: (B,) or (B, 1, ...) critic values of real and generated samples; float32, float64, bfloat16
            or float16.
        x_real, x_fake: (B, ...) samples of one shape, any strides; the dtypes may differ.
        z_real, z_fake: (B, ...) latents, both or none: E(x_real), and the z that generated x_fake.
        lam: positive. The loss has its minimum -lam (d + eps) / 2 at Delta = lam (d + eps).
        distance: "l1" or "l2".
        eps: added to the distance, at least 0.
        reduction: over the samples: "mean", "sum" or "none".

    Returns:
        A scalar, or (B,) for "none"; float32 (float64 if any input is float64).

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: shapes or devices that do not match, samples without elements, lam not positive, eps below 0, an
            unknown distance or reduction.

    Notes:
        Only t_real and t_fake get gradients: the distance is a constant of the critic's step. The backward reads one
        stored distance per sample instead of the samples. A sample with d + eps = 0 has loss and gradients 0.
        float32 arithmetic; on a CPU, sums of more than 512 terms continue in float64, and the loss of a sample has the
        same bits for any thread count, instruction set and batch. "l2" squares differences in float32: they should lie
        between about 1e-19 and 1e19. Double backward works. No host sync: safe in CUDA graphs. torch.compile
        recompiles for another lam or eps.

    Source:
        Su 2018, GAN-QP, arXiv:1811.07296, section 3.2.

    Example:
        >>> x_real, x_fake = torch.zeros(2, 3), torch.full((2, 3), 0.5)
        >>> gan_qp_loss(torch.full((2,), 5.0), torch.zeros(2), x_real, x_fake)
        tensor(-2.5000)
    """
    op = "gan_qp_loss"
    _samples(op, "x_real", x_real)
    check.like(op, "x_fake", x_fake, "x_real", x_real.shape, x_real.device)
    _pair(op, x_real, "x_real", z_real, z_fake, "z_real", "z_fake")
    t_real, t_fake = (_values(op, n, t, x_real, "x_real") for n, t in (("t_real", t_real), ("t_fake", t_fake)))
    lam = check.positive(op, "lam", lam)
    eps = check.not_negative(op, "eps", eps)
    index = check.choice(op, "distance", distance, DISTANCES)
    check.choice(op, "reduction", reduction, REDUCTIONS)
    tensors = (t_real, t_fake, x_real, x_fake, z_real, z_fake)
    if not 2.0**-100 <= lam <= 2.0**100:
        check.moderate(op, "lam", lam, ref.common_dtype(*tensors))
    loss, _ = _loss.pick(op, x_real)(*tensors, lam, eps, index)
    return _reduced(loss, reduction)


def gan_qp_generator_loss(
    t_real: Tensor,
    t_fake: Tensor,
    x: Tensor | None = None,
    x_rec: Tensor | None = None,
    z: Tensor | None = None,
    z_rec: Tensor | None = None,
    betas: tuple[float, float] = (2.0, 3.0),
    *,
    reduction: str = "mean",
) -> Tensor:
    """Return the loss of generator and encoder of (Bi)GAN-QP: Delta + betas[0] MSE(z, z_rec) + betas[1] MSE(x, x_rec).

    Delta = t_real - t_fake, without the critic's quadratic term. BiGAN-QP passes x_rec = G(sg[E(x)]) and
    z_rec = E(sg[G(z)]), where sg is `detach`: each reconstruction error trains one network only.

    Args:
        t_real, t_fake: as for `gan_qp_loss`.
        x, x_rec: (B, ...) real samples and their reconstructions, both or none.
        z, z_rec: (B, ...) latents and their reconstructions, both or none.
        betas: weights of the errors of z and x, at least 0; published are (2, 3) at 128 pixels and (4, 6) at 256.
        reduction: over the samples: "mean", "sum" or "none".

    Returns:
        A scalar, or (B,) for "none"; float32 (float64 if any input is float64).

    Raises:
        TypeError, ValueError: as for `gan_qp_loss`; a beta below 0.

    Notes:
        t_real, t_fake, x_rec and z_rec get gradients; x and z are constants. float32 arithmetic in plain torch,
        fused by torch.compile; twice differentiable.

    Source:
        Su 2018, GAN-QP, arXiv:1811.07296; its BiGAN-QP code, models of 128 and 256 pixels.

    Example:
        >>> t, x, z = torch.zeros(2), torch.zeros(2, 3), torch.zeros(2, 5)
        >>> gan_qp_generator_loss(t, t, x, x + 1, z, z + 2)
        tensor(11.)
    """
    op = "gan_qp_generator_loss"
    _samples(op, "t_real", t_real)
    t_real, t_fake = (_values(op, n, t, t_real, "t_real") for n, t in (("t_real", t_real), ("t_fake", t_fake)))
    for names, pair in ((("x", "x_rec"), (x, x_rec)), (("z", "z_rec"), (z, z_rec))):
        _pair(op, t_real, "t_real", *pair, *names)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{op}: betas must be two numbers, got {check.shown(betas)}")
    weights = check.not_negative(op, "betas[0]", betas[0]), check.not_negative(op, "betas[1]", betas[1])
    for name, weight in zip(("betas[0]", "betas[1]"), weights, strict=True):
        check.moderate(op, name, weight, ref.common_dtype(t_real, t_fake, x, x_rec, z, z_rec), 0.0)
    check.choice(op, "reduction", reduction, REDUCTIONS)
    return _reduced(ref.gan_qp_generator_loss(t_real, t_fake, x, x_rec, z, z_rec, weights), reduction)


def _samples(op: str, name: str, x: Any) -> None:
    """Require a float tensor with a batch dim and at least one element per sample."""
    check.float_tensor(op, name, x)
    check.batch(op, name, x)
    if math.prod(x.shape[1:]) == 0:
        raise ValueError(f"{op}: {name} must have at least one element per sample, got {tuple(x.shape)}")


def _values(op: str, name: str, t: Any, like: Tensor, like_name: str) -> Tensor:
    """Require one value per sample of `like` and return them as (B,)."""
    check.float_tensor(op, name, t)
    batch = like.shape[0]
    if t.dim() == 0 or t.shape[0] != batch or any(n != 1 for n in t.shape[1:]):
        raise ValueError(
            f"{op}: {name} must have one value for each sample of {like_name}, ({batch},) or ({batch}, 1), "
            f"got {tuple(t.shape)}"
        )
    if t.device != like.device:
        raise ValueError(f"{op}: {name} must be on the device of {like_name}, {like.device}, got {t.device}")
    return t if t.dim() == 1 else t.reshape(batch)


def _pair(op: str, like: Tensor, like_name: str, one: Any, other: Any, *names: str) -> None:
    """Require that both are None, or that both have one shape and as many samples as `like`."""
    if (one is None) != (other is None):
        given, lacking = names if other is None else names[::-1]
        raise ValueError(f"{op}: {given} must come with {lacking}, got None for {lacking}")
    if one is None:
        return
    _samples(op, names[0], one)
    if one.shape[0] != like.shape[0]:
        raise ValueError(
            f"{op}: {names[0]} must have the {like.shape[0]} samples of {like_name}, got {tuple(one.shape)}"
        )
    if one.device != like.device:
        raise ValueError(f"{op}: {names[0]} must be on the device of {like_name}, {like.device}, got {one.device}")
    check.like(op, names[1], other, names[0], one.shape, one.device)


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


# registration with torch


def _fake(t_real, t_fake, x_real, x_fake, z_real, z_fake, lam, eps, distance):
    dtype = ref.common_dtype(t_real, t_fake, x_real, x_fake, z_real, z_fake)
    return tuple(x_real.new_empty(x_real.shape[:1], dtype=dtype) for _ in range(2))


_loss_backward = register(
    "gan_qp_loss_backward", "gan_qp", reference=ref.gan_qp_loss_backward,
    fake=lambda grad, t_real, t_fake, d, lam, eps: (torch.empty_like(t_real), torch.empty_like(t_fake)),
)  # fmt: skip
_loss = register("gan_qp_loss", "gan_qp", reference=ref.gan_qp_loss, fake=_fake, backward=_loss_backward)


def warmup(x: Tensor, **other: Any) -> list[Tensor]:
    latents: tuple[tuple, ...] = ((), (x, x))
    return [gan_qp_loss(x[:, 0], x[:, 0], x, x, *z, distance=distance) for distance in DISTANCES for z in latents]
