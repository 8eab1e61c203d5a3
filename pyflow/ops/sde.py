"""Steps of stochastic differential equations: one pass, with noise drawn in the kernel and never stored."""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import _checks as check
from .._operators import register
from .._schemas import PURPOSES
from ..reference import compute_dtype
from ..reference import sde as ref
from .noise import CPU, sample_seeds, seed_tensor, step_tensor

PARAMETERIZATIONS = ("score", "epsilon")
REDUCTIONS = ("sum", "mean")
NORMS = ("marginal", "sample", "batch")

Scalar = float | Tensor
Stream = tuple[Tensor | None, Tensor | None, Tensor | None]  # seed, step, noise


@overload
def sde_step(
    x: Tensor,
    score: Tensor,
    a: Scalar,
    b: Scalar,
    c: Scalar,
    *,
    seed: int | Tensor | None = ...,
    step: int | Tensor = ...,
    noise: Tensor | None = ...,
    return_mean: Literal[False] = ...,
) -> Tensor: ...
@overload
def sde_step(
    x: Tensor,
    score: Tensor,
    a: Scalar,
    b: Scalar,
    c: Scalar,
    *,
    seed: int | Tensor | None = ...,
    step: int | Tensor = ...,
    noise: Tensor | None = ...,
    return_mean: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def sde_step(
    x: Tensor,
    score: Tensor,
    a: Scalar,
    b: Scalar,
    c: Scalar,
    *,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    noise: Tensor | None = None,
    return_mean: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sampler step x' = a x + b score + c z with standard normal z; a, b and c define the sampler of a reverse SDE.

    Args:
        x: float32, float64, bfloat16 or float16, any rank and strides; the first dim is the batch.
        score: like x; its dtype may differ.
        a, b, c: numbers, 0-d tensors, or (B,) tensors with a value per sample; c at least 0.
        seed, step: z is `normal(x.shape, seed=seed, step=step)`; a seed (B,) gives each sample a separate stream.
            None draws a seed from torch's default generator.
        noise: z itself, like x; seed and step are then ignored.
        return_mean: whether to return a x + b score too.

    Returns:
        x', in x's dtype and strides; with return_mean (x', mean).

    Raises:
        TypeError: not a tensor, an unsupported dtype, a coefficient that is neither a number nor a tensor.
        ValueError: a shape or device that does not match x; c below 0 (tensors on a GPU: with PYFLOW_CHECK=1 only).

    Notes:
        float32 arithmetic (float64 for float64 x) without fma: the same bits on every backend, eager and compiled,
        and in any batch with a seed per sample. New values of a, b, c, seed or step do not recompile; numbers recompile
        once, when they first change. Twice differentiable in x, score, a, b, c and noise; z is drawn again, not
        stored. The host reads nothing: safe in CUDA graphs.

    Source:
        Song et al. 2021, Score-Based Generative Modeling through SDEs, arXiv:2011.13456, appendices D to F.

    Example:
        >>> x, score = torch.zeros(2, 3), torch.ones(2, 3)
        >>> sde_step(x, score, 1.0, 0.5, 0.0, seed=0)
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """
    op = "sde_step"
    check.float_tensor(op, "x", x)
    check.like(op, "score", score, "x", x.shape, x.device)
    return_mean = check.flag(op, "return_mean", return_mean)
    a, b, c = coefficient(op, "a", a, x), coefficient(op, "b", b, x), at_least_zero(op, "c", c, x)
    y, mean = advance(x, score, a, b, c, stream_of(op, seed, step, x, noise), "noise", return_mean)
    return (y, mean) if return_mean else y


def perturb(x0: Tensor, alpha: Scalar, std: Scalar, *, seed: int | Tensor | None, step: int | Tensor = 0) -> Tensor:
    """Return x_t = alpha x0 + std z, the data at a time t of the forward SDE.

    Args:
        x0: like x of `sde_step`.
        alpha, std: numbers, 0-d or (B,) tensors; std at least 0.
        seed, step: as for `sde_step`; `denoising_loss` with the same seed and step draws the same z.

    Returns:
        x_t, in x0's dtype and strides.

    Raises:
        TypeError, ValueError: as for `sde_step`.

    Example:
        >>> from pyflow.ops import normal
        >>> torch.equal(perturb(torch.zeros(2, 3), 1.0, 2.0, seed=7), 2 * normal((2, 3), seed=7))
        True
    """
    op = "perturb"
    check.float_tensor(op, "x0", x0)
    alpha, std = coefficient(op, "alpha", alpha, x0), at_least_zero(op, "std", std, x0)
    return advance(x0, None, alpha, None, std, stream_of(op, seed, step, x0), "noise")[0]


def denoising_loss(
    pred: Tensor,
    std: Scalar | None = None,
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    weight: Scalar | None = None,
    parameterization: str = "score",
    reduction: str = "sum",
) -> Tensor:
    """Denoising score matching loss of each sample against the z that `perturb` added, drawn again, not stored.

    "score": sum (std pred + z)**2 / 2; "epsilon": sum (pred - z)**2 / 2.

    Args:
        pred: (B, ...) output of the network, like x of `sde_step`.
        std: the std given to `perturb`; ignored for "epsilon".
        seed, step: the seed and step given to `perturb`.
        weight: number, 0-d or (B,) tensor that multiplies the loss.
        parameterization: pred estimates the score of x_t ("score") or z ("epsilon").
        reduction: over the elements of a sample, "sum" or "mean".

    Returns:
        (B,) float32 (float64 for float64 pred).

    Raises:
        TypeError, ValueError: as for `sde_step`; an unknown parameterization or reduction; "score" without std.

    Notes:
        Up to 512 terms are summed in float32, more in float64. On a CPU the bits do not depend on thread count,
        instruction set or batch. Twice differentiable in pred, std and weight.

    Source:
        Vincent 2011, A Connection Between Score Matching and Denoising Autoencoders; arXiv:2011.13456, equation 7.

    Example:
        >>> from pyflow.ops import normal
        >>> z = normal((2, 3), seed=7)
        >>> denoising_loss(-z / 0.5, 0.5, seed=7)
        tensor([0., 0.])
    """
    op = "denoising_loss"
    check.float_tensor(op, "pred", pred)
    check.batch(op, "pred", pred)
    of_score = check.choice(op, "parameterization", parameterization, PARAMETERIZATIONS) == 0
    average = check.choice(op, "reduction", reduction, REDUCTIONS) == 1
    if of_score and std is None:
        raise ValueError(f"{op}: std must be given for the parameterization score, got None")
    if seed is None:
        raise ValueError(f"{op}: seed must be given, the seed of perturb, got None")
    std = None if std is None or not of_score else at_least_zero(op, "std", std, pred)
    weight = None if weight is None else coefficient(op, "weight", weight, pred)
    seeds, steps, _ = stream_of(op, seed, step, pred)
    loss = _loss.pick(op, pred)(pred, std, seeds, steps)
    if average:
        loss = loss / max(1, math.prod(pred.shape[1:]))
    return loss if weight is None else loss * weight.to(loss.dtype)


@overload
def langevin_step(
    x: Tensor,
    score: Tensor,
    *,
    step_size: Scalar | None = ...,
    snr: Scalar | None = ...,
    alpha: Scalar = ...,
    std: Scalar | None = ...,
    norm: str = ...,
    seed: int | Tensor | None = ...,
    step: int | Tensor = ...,
    noise: Tensor | None = ...,
    return_mean: Literal[False] = ...,
) -> Tensor: ...
@overload
def langevin_step(
    x: Tensor,
    score: Tensor,
    *,
    step_size: Scalar | None = ...,
    snr: Scalar | None = ...,
    alpha: Scalar = ...,
    std: Scalar | None = ...,
    norm: str = ...,
    seed: int | Tensor | None = ...,
    step: int | Tensor = ...,
    noise: Tensor | None = ...,
    return_mean: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def langevin_step(
    x: Tensor,
    score: Tensor,
    *,
    step_size: Scalar | None = None,
    snr: Scalar | None = None,
    alpha: Scalar = 1.0,
    std: Scalar | None = None,
    norm: str = "marginal",
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    noise: Tensor | None = None,
    return_mean: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Langevin step x' = x + e score + sqrt(2 e) z, also the corrector of a predictor-corrector sampler.

    With snr, e = 2 alpha (snr std)**2 for the norm "marginal", else e = 2 alpha (snr |z| / |score|)**2.

    Args:
        x, score: as for `sde_step`.
        step_size: e; number, 0-d or (B,) tensor, at least 0.
        snr: signal-to-noise ratio; number, 0-d or (B,) tensor, at least 0. Give either step_size or snr.
        alpha: alpha of the corrector's schedule; number, 0-d or (B,) tensor; only used with snr.
        std: standard deviation of x given the data; number, 0-d or (B,) tensor, at least 0; only used with snr and
            the norm "marginal".
        norm: "marginal" uses std in place of the ratio of norms; "sample" uses the norms of each sample, which in few
            dimensions gives huge steps where a score is near 0; "batch" uses their means over the batch, as published.
        seed, step, noise: as for `sde_step`, with the purpose "corrector": a predictor with the same seed and step
            draws different noise.
        return_mean: whether to return x + e score too.

    Returns:
        x', in x's dtype and strides; with return_mean (x', mean).

    Raises:
        TypeError, ValueError: as for `sde_step`; both or none of step_size and snr; the norm "marginal" without std.

    Notes:
        With "sample" and "batch" a score of norm 0 leaves x unchanged. NaN propagates. No host sync. The norms are
        float32 sums of squares, valid for float32 scores between about 1e-19 and 1e19. On a CPU their bits do not
        depend on thread count, instruction set or (with "sample") batch.

    Source:
        Song et al. 2021, arXiv:2011.13456, algorithms 4 and 5; "marginal" is the step of annealed Langevin dynamics,
        Song and Ermon 2019, arXiv:1907.05600, algorithm 1.

    Example:
        >>> x, score = torch.ones(2, 3), -torch.ones(2, 3)
        >>> _, mean = langevin_step(x, score, snr=0.5, std=1.0, seed=0, return_mean=True)
        >>> mean[0]
        tensor([0.5000, 0.5000, 0.5000])
    """
    op = "langevin_step"
    check.float_tensor(op, "x", x)
    check.like(op, "score", score, "x", x.shape, x.device)
    check.choice(op, "norm", norm, NORMS)
    return_mean = check.flag(op, "return_mean", return_mean)
    if (step_size is None) == (snr is None):
        given = "none" if snr is None else "both"
        raise ValueError(f"{op}: exactly one of step_size and snr must be given, got {given}")
    if step_size is not None:
        size = at_least_zero(op, "step_size", step_size, x).double()
    elif snr is not None:
        snr64, alpha_t = at_least_zero(op, "snr", snr, x).double(), at_least_zero(op, "alpha", alpha, x)
        if norm == "marginal":
            if std is None:
                raise ValueError(f"{op}: std must be given for the norm marginal, got None")
            size = 2 * alpha_t.double() * (snr64 * at_least_zero(op, "std", std, x).double()) ** 2
    # both passes use one seed
    stream = stream_of(op, seed, step, x, noise)
    if step_size is None and norm != "marginal":
        size = _snr_rule(_squares(score, stream), snr64, alpha_t, norm == "batch")
    one = torch.full((), 1.0, dtype=torch.float64, device=CPU)
    # float64, so that the rounding of the root does not show in float32
    y, mean = advance(x, score, one, size, _root(2 * size), stream, "corrector", return_mean)
    return (y, mean) if return_mean else y


def _squares(score: Tensor, stream: Stream) -> Tensor:
    return _langevin_squares.pick("langevin_step", score)(score, *stream, PURPOSES.index("corrector"))


def _root(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0."""
    if not torch.is_grad_enabled():
        return x.sqrt()
    zero = x == 0
    return torch.where(zero, 0, torch.where(zero, 1, x).sqrt())


def _snr_rule(squares: Tensor, snr: Tensor, alpha: Tensor, over_batch: bool) -> Tensor:
    """Return 2 alpha (snr |z| / |score|)**2 of the (2, B) squared norms; every operator here is a launch on a GPU."""
    squares = squares.double()
    if over_batch:
        squares = _root(squares).mean(1).square()
    of_score, of_noise = squares.unbind(0)
    # a 0-d alpha leaves the product float64
    factor = (alpha.double() if alpha.dim() else alpha) * (2 * snr**2)
    # a score of norm 0 counts as infinite, for a step of size 0 whose gradient is 0
    return of_noise / torch.threshold(of_score, 0, math.inf) * factor


def coefficient(op: str, name: str, value: Scalar, x: Tensor) -> Tensor:
    """Return a coefficient as a 0-d or (B,) tensor; a number goes to the CPU."""
    if isinstance(value, Tensor):
        check.float_tensor(op, name, value)
        if value.dim() and (x.dim() == 0 or value.shape != x.shape[:1]):
            samples = f"() or ({x.shape[0]},)" if x.dim() else "()"
            raise ValueError(f"{op}: {name} must have the shape {samples}, got {tuple(value.shape)}")
        if value.device != x.device:
            raise ValueError(f"{op}: {name} must be on the device of x, {x.device}, got {value.device}")
        return value
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be a number or a tensor, got {type(value).__name__}")
        if not isinstance(value, (torch.SymFloat, torch.SymInt)):
            value = check.number(op, name, value)
    return torch.full((), value, dtype=torch.float64, device=CPU)


def at_least_zero(op: str, name: str, value: Scalar, x: Tensor) -> Tensor:
    """Return `coefficient`, after a check for negative values where values may be read."""
    result = coefficient(op, name, value, x)
    if check.values_are_checked(result) and result.numel():
        least = result.item() if result.dim() == 0 else result.min().item()
        if least < 0:
            raise ValueError(f"{op}: {name} must be at least 0, got {least}")
    return result


def stream_of(op: str, seed: int | Tensor | None, step: int | Tensor, x: Tensor, noise: Tensor | None = None) -> Stream:
    """Return (seed, step, None), or (None, None, noise) where the noise is given."""
    if noise is not None:
        check.like(op, "noise", noise, "x", x.shape, x.device)
        return None, None, noise
    # the seed last: a call that raises must not draw one
    step = step_tensor(op, step, x.device)
    return seed_tensor(op, seed, x.shape, x.device, CPU), step, None


def advance(
    x: Tensor,
    score: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    c: Tensor,
    stream: Stream,
    purpose: str,
    return_mean: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (a x + b score + c z, a x + b score) of arguments that are already checked."""
    return _step.pick("sde_step", x)(x, score, a, b, c, *stream, PURPOSES.index(purpose), return_mean)


# registration with torch


def _step_reference(x, score, a, b, c, seed, step, noise, purpose, return_mean):
    y, mean = ref.sde_step(x, score, a, b, c, ref.noise_like(x, seed, step, noise, purpose))
    return y.to(x.dtype), mean.to(x.dtype) if return_mean else None


def _step_fake(x, score, a, b, c, seed, step, noise, purpose, return_mean):
    return torch.empty_like(x), torch.empty_like(x) if return_mean else x.new_empty(0)


def _step_kept(inputs, output):
    x, score, a, b, c, seed, step, noise, purpose, return_mean = inputs
    dtypes = [t.dtype if t is not None and t.requires_grad else None for t in (x, score, noise)]
    tensors = x, score, a, b, c, seed, step, noise
    if not any(t is not None and t.requires_grad for t in (a, b, c)):
        # the gradients of x and score are multiples of grad_y: no input is needed
        tensors = None, None, a, b, c, None, None, None
    return *tensors, purpose, *dtypes, x.dtype == torch.float64, return_mean


def _step_gradients(
    grad, grad_mean, x, score, a, b, c, seed, step, noise, purpose, x_dtype, score_dtype, noise_dtype, f64, return_mean
):
    if not return_mean:
        # the mean is empty, and so is a gradient that someone gives it
        grad_mean = None
        if grad is None:
            return {}
    *grads, sums = _step_backward(
        grad, grad_mean, x, score, a, b, c, seed, step, noise, purpose, x_dtype, score_dtype, noise_dtype, f64
    )
    found = dict(zip(("x", "score", "noise"), grads, strict=True))
    for i, (name, value) in enumerate((("a", a), ("b", b), ("c", c))):
        if value is not None and value.requires_grad:
            found[name] = _of_coefficient(sums[i], value)
    return found


def _of_coefficient(sums: Tensor, value: Tensor) -> Tensor:
    return (sums if value.dim() else sums.sum()).to(value.dtype)


def _step_backward_reference(
    grad, grad_mean, x, score, a, b, c, seed, step, noise, purpose, x_dtype, score_dtype, noise_dtype, f64
):
    lead = grad if grad is not None else grad_mean
    dtype = torch.float64 if f64 else torch.float32
    absent = torch.zeros_like(lead, dtype=dtype)
    grad, grad_mean = (absent if g is None else g.to(dtype) for g in (grad, grad_mean))
    z = None if x is None else ref.noise_like(absent, seed, step, noise, purpose)
    *grads, sums = ref.sde_step_backward(grad, grad_mean, x, score, a, b, c, z)
    asked = zip(grads, (x_dtype, score_dtype, noise_dtype), strict=True)
    return *(None if dtype is None else value for value, dtype in asked), sums


def _step_backward_fake(grad, grad_mean, x, *rest):
    *_, x_dtype, score_dtype, noise_dtype, f64 = rest
    lead = grad if grad is not None else grad_mean
    count = lead.shape[0] if lead.dim() else 1
    sums = lead.new_empty(0 if x is None else (3, count), dtype=torch.float64 if f64 else torch.float32)
    return *(_like(lead, dtype) for dtype in (x_dtype, score_dtype, noise_dtype)), sums


def _like(like: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Allocate an output: laid out as `like`, contiguous for another dtype, without elements for None."""
    if dtype is None:
        return like.new_empty(0)
    return torch.empty_like(like) if dtype == like.dtype else like.new_empty(like.shape, dtype=dtype)


_step_backward = register(
    "sde_step_backward", "sde", reference=_step_backward_reference, fake=_step_backward_fake
)  # fmt: skip
_step = register(
    "sde_step", "sde", reference=_step_reference, fake=_step_fake, backward=_step_gradients, keep=_step_kept
)  # fmt: skip


def _loss_reference(pred, std, seed, step):
    return ref.denoising_loss(pred, std, ref.noise_like(pred, seed, step, None, "noise"))


def _loss_backward_reference(grad, pred, std, seed, step):
    return ref.denoising_loss_backward(grad, pred, std, ref.noise_like(pred, seed, step, None, "noise"))


def _loss_gradients(grad, pred, std, seed, step):
    grad_pred, grad_std = _loss_backward(grad, pred, std, seed, step)
    needed = std is not None and std.requires_grad
    return {"pred": grad_pred, "std": _of_coefficient(grad_std, std) if needed else None}


def _sums_like(pred: Tensor) -> Tensor:
    return pred.new_empty(pred.shape[:1], dtype=compute_dtype(pred.dtype))


_loss_backward = register(
    "denoising_loss_backward", "sde", reference=_loss_backward_reference,
    fake=lambda grad, pred, std, seed, step: (torch.empty_like(pred), _sums_like(pred)),
)  # fmt: skip
_loss = register(
    "denoising_loss", "sde", reference=_loss_reference, backward=_loss_gradients,
    fake=lambda pred, std, seed, step: _sums_like(pred),
)  # fmt: skip


def _squares_reference(score, seed, step, noise, purpose):
    return ref.langevin_squares(score, ref.noise_like(score, seed, step, noise, purpose))


def _squares_fake(score, seed, step, noise, purpose):
    return score.new_empty((2, score.shape[0] if score.dim() else 1), dtype=compute_dtype(score.dtype))


def _squares_gradients(grad, score, noise):
    given = zip(("score", "noise"), grad, (score, noise), strict=True)
    asked = [(name, g, t) for name, g, t in given if t is not None and t.requires_grad]
    return {name: (2 * ref.column(g, t) * t).to(t.dtype) for name, g, t in asked}


_langevin_squares = register(
    "langevin_squares", "sde", reference=_squares_reference, fake=_squares_fake, backward=_squares_gradients
)  # fmt: skip


def warmup(x: Tensor, **other: Any) -> list[Tensor]:
    outputs: list[Any] = []
    scale = torch.ones(len(x), device=x.device, requires_grad=True)
    for seed in (0, sample_seeds(torch.tensor(0, device=x.device), len(x))):
        outputs += [sde_step(x, x, *values, seed=seed) for values in ((1.0, 1.0, 1.0), (scale,) * 3)]
        outputs += [perturb(x, 1.0, 1.0, seed=seed), langevin_step(x, x, snr=0.1, norm="sample", seed=seed)]
        outputs.append(denoising_loss(x, 1.0, seed=seed))
        outputs.append(denoising_loss(x, seed=seed, parameterization="epsilon"))
    return outputs
