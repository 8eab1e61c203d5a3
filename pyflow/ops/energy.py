"""Metropolis-adjusted Langevin (MALA) steps, the gradient penalty and the losses of energy-based GANs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._operators import register
from .._torch import transform
from .._vmap import flattened
from ..reference import compute_dtype
from ..reference import energy as ref
from ..reference import sde as sde_ref
from .noise import sample_seeds
from .sde import Scalar, Stream, advance, coefficient, stream_of

KINDS = ("linear", "hinge", "ebgan")

EnergyFunction = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]


def energy_loss(u_real: Tensor, u_fake: Tensor, kind: str = "linear", margin: float = 1.0) -> Tensor:
    """Return the loss of an energy U that is to be low on data and high on samples.

    "linear": E U(real) - E U(fake); "hinge": E max(0, m + U(real)) + E max(0, m - U(fake));
    "ebgan": E U(real) + E max(0, m - U(fake)).

    Args:
        u_real, u_fake: energies of data and of samples, float32, float64, bfloat16 or float16, any shapes.
        kind: "linear", "hinge" or "ebgan".
        margin: m, positive; not used by "linear".

    Returns:
        Scalar, float32 (float64 if an energy is float64), differentiable any number of times.

    Raises:
        TypeError: not a tensor, a wrong dtype, a margin that is not a number.
        ValueError: an unknown kind, a margin that is not positive, different devices.

    Notes:
        For the gradient penalty of MEG, add weight * `grad_norm_penalty` of the energy's gradient at the data.

    Source:
        Kumar et al. 2019, Maximum Entropy Generators for Energy-Based Models, arXiv:1901.08508; Lim and Ye 2017,
        Geometric GAN, arXiv:1705.02894; Zhao et al. 2016, Energy-based GAN, arXiv:1609.03126.

    Example:
        >>> energy_loss(torch.tensor([-2.0, 0.0]), torch.tensor([0.5, 3.0]), "hinge")
        tensor(0.7500)
    """
    op = "energy_loss"
    check.float_tensor(op, "u_real", u_real)
    check.float_tensor(op, "u_fake", u_fake)
    if u_fake.device != u_real.device:
        raise ValueError(f"{op}: u_fake must be on the device of u_real, {u_real.device}, got {u_fake.device}")
    check.choice(op, "kind", kind, KINDS)
    return ref.energy_loss(u_real, u_fake, kind=kind, margin=check.positive(op, "margin", margin))


def grad_norm_penalty(grad: Tensor) -> Tensor:
    """Squared norm of each sample's gradient, over all dims but the first: the gradient penalty of a critic or energy.

    Args:
        grad: (B, ...) float32, float64, bfloat16 or float16, any strides. To train with the penalty, compute it by
            `torch.autograd.grad(u.sum(), x, create_graph=True)`.

    Returns:
        (B,) float32 (float64 for float64 grad).

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: grad without a batch dim.

    Notes:
        The sum runs over all dims of a sample; the published code of MEG sums over the channels of an image only.
        Up to 512 terms are summed in float32, more in float64: on a CPU the same bits for any thread count, instruction
        set and batch. Differentiable any number of times.

    Source:
        Kumar et al. 2019, arXiv:1901.08508, equation 3.

    Example:
        >>> grad_norm_penalty(torch.ones(2, 3, 4))
        tensor([12., 12.])
    """
    op = "grad_norm_penalty"
    check.float_tensor(op, "grad", grad)
    check.batch(op, "grad", grad)
    return _penalty.pick(op, grad)(grad)


def energy_and_grad(energy_fn: EnergyFunction, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the energies U(z) and their gradients, detached, for the first `mala_step` of a chain.

    Args:
        energy_fn: z -> (B,) energies, differentiable; or z -> ((B,) energies, gradients like z). It must not modify z.
        z: (B, ...) float tensor.

    Returns:
        (u, grad): (B,) and like z; new tensors that share no memory with other tensors.

    Raises:
        TypeError: energy_fn is not callable or returns something else.
        ValueError: energies that are not (B,); a gradient with another shape; energies without a graph to z (for
            example under `no_grad`) and without a gradient; an energy_fn that modifies z in place without autograd (for
            example under `no_grad`).
        RuntimeError: under vmap and other transforms of torch.func; torch's own for an energy_fn that modifies z in
            place with autograd.

    Notes:
        May be called in inference mode: it is left while the energy is differentiated. `torch.compile(fullgraph=True)`
        needs a newer torch than 2.11, and an energy_fn that returns gradients too.

    Example:
        >>> energy_and_grad(lambda z: z.square().sum(1) / 2, torch.tensor([[3.0, 4.0]]))
        (tensor([12.5000]), tensor([[3., 4.]]))
    """
    op = "energy_and_grad"
    check.float_tensor(op, "z", z)
    check.batch(op, "z", z)
    check.function(op, "energy_fn", energy_fn)
    return differentiated(op, energy_fn, z)


def differentiated(op: str, energy_fn: EnergyFunction, z: Tensor) -> tuple[Tensor, Tensor]:
    traced = torch.compiler.is_compiling()
    if not traced and transform() is not None:
        raise RuntimeError(f"{op}: the energy is not differentiated under vmap and other transforms of torch.func; "
                           "give all chains as rows of z")  # fmt: skip
    # inference mode records no graph
    with contextlib.nullcontext() if traced else torch.inference_mode(False), torch.enable_grad():
        leaf = (z.clone() if not traced and z.is_inference() else z.detach()).requires_grad_()
        version = 0 if traced else leaf._version
        out = energy_fn(leaf)
        if not traced and leaf._version != version:
            raise ValueError(f"{op}: energy_fn must not change z in place")
        u, grad = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
        _check_rows(op, "the energy", u, "z", z)
        if grad is None:
            if u.requires_grad:
                (grad,) = torch.autograd.grad(u.sum(), leaf, allow_unused=True)
            if grad is None:
                raise ValueError(f"{op}: energy_fn must keep the graph from z to the energy, or return a gradient too")
        else:
            check.like(op, "the gradient", grad, "z", z.shape, z.device)
            # the function may reuse its output buffer
            grad = grad.detach().clone()
        return u.detach().clone(), grad


def mala_propose(
    z: Tensor, grad: Tensor, alpha: float | Tensor, *, seed: int | Tensor | None, step: int | Tensor = 0
) -> Tensor:
    """Return the Langevin proposal of a MALA step, z' = z - alpha grad + sqrt(2 alpha) n.

    Args:
        z: (B, ...) positions; float32, float64, bfloat16 or float16, any strides.
        grad: gradient of the energy at z, with the shape of z.
        alpha: step size, positive; number, 0-d or (B,) tensor.
        seed, step: select the noise n as in `sde_step`, with the purpose "noise". With seed None the proposal and the
            accept step draw two different seeds.

    Returns:
        z', in z's dtype and strides.

    Raises:
        TypeError, ValueError: as for `sde_step`; an alpha that is not positive or not a normal number of the compute
            dtype.

    Notes:
        Equal to `sde_step(z, grad, 1, -alpha, sqrt(2 alpha))`: one pass, differentiable, the same bits on every
        backend.

    Source:
        Roberts and Tweedie 1996; Kumar et al. 2019, arXiv:1901.08508, algorithm 2.

    Example:
        >>> mala_propose(torch.zeros(2, 3), torch.ones(2, 3), 1e-12, seed=0).abs().max() < 1e-4
        tensor(True)
    """
    op = "mala_propose"
    _check_positions(op, z, grad)
    alpha = step_size(op, alpha, z)
    return _propose(z, grad, alpha, stream_of(op, seed, step, z))


def _propose(z: Tensor, grad: Tensor, alpha: Tensor, stream: Stream) -> Tensor:
    # in float64, because the float32 roots of two backends may differ by an ulp
    size, one = alpha.double(), torch.full((), 1.0, dtype=torch.float64, device="cpu")
    return advance(z, grad, one, -size, (2 * size).sqrt(), stream, "noise")[0]


def mala_accept(
    z: Tensor,
    z_new: Tensor,
    u: Tensor,
    u_new: Tensor,
    grad: Tensor,
    grad_new: Tensor,
    alpha: float | Tensor,
    *,
    seed: int | Tensor | None,
    step: int | Tensor = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Accept each sample's proposal with probability min(1, e^(U - U') q(z|z') / q(z'|z)).

    Position, energy and gradient are selected together.
    log q(z|z') - log q(z'|z) = sum (g + g') ((z' - z) / 2 + alpha (g - g') / 4), with
    q(z'|z) ~ exp(-|z' - z + alpha g|^2 / (4 alpha)).

    Args:
        z, z_new: (B, ...) positions and proposals; float32, float64, bfloat16 or float16, any strides.
        u, u_new: (B,) energies at z and z_new.
        grad, grad_new: gradients at z and z_new, with the shape of z.
        alpha: step size of the proposal; number, 0-d or (B,) tensor.
        seed, step: may be the same as for the proposal: the uniforms have the purpose "accept" and are independent of
            its noise. seed (B,) gives each sample its own stream.

    Returns:
        (z, u, grad, accepted): selected values in the dtypes and strides of z, u and grad; (B,) bool.

    Raises:
        TypeError, ValueError: as for `mala_propose`; energies that are not (B,).

    Notes:
        float32 arithmetic (float64 if any tensor is float64). Selected values are exact copies. A proposal with NaN or
        infinity in energy, position or gradient is rejected and does not affect the result. The expanded log-ratio
        needs neither the noise nor a division by alpha, and avoids subtracting two almost equal norms. On a CPU the
        decisions are the same for any thread count, instruction set and batch. Backends sum in different orders and
        may decide differently where both sides of the comparison agree to rounding. Not differentiable: the results
        are detached. No host sync.

    Source:
        Roberts and Tweedie 1996, Exponential Convergence of Langevin Distributions. Three published forms of the
        ratio are wrong: on N(0, 1) with alpha = 1/2 they give variances of 4/3, 0.736 and 4/7 instead of 1.

    Example:
        >>> z, new = torch.zeros(2, 1), torch.ones(2, 1)
        >>> u_new = torch.tensor([0.0, torch.nan])
        >>> mala_accept(z, new, torch.zeros(2), u_new, z, z, 0.5, seed=0)[0].flatten()
        tensor([1., 0.])
    """
    op = "mala_accept"
    _check_positions(op, z, grad)
    check.like(op, "z_new", z_new, "z", z.shape, z.device)
    _check_rows(op, "u", u, "z", z)
    _check_rows(op, "u_new", u_new, "z", z)
    check.like(op, "grad_new", grad_new, "z", z.shape, z.device)
    alpha = step_size(op, alpha, z)
    return _accept(op, (z, z_new, u, u_new, grad, grad_new, alpha), *stream_of(op, seed, step, z)[:2])


def _accept(
    op: str, tensors: tuple[Tensor, ...], seed: Tensor | None, step: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments: list[Any] = [*(t.detach() for t in tensors), seed, step]
    return _mala_accept.pick(op, arguments[0])(*arguments)


def mala_step(
    z: Tensor,
    u: Tensor,
    grad: Tensor,
    energy_fn: EnergyFunction,
    alpha: float | Tensor,
    *,
    seed: int | Tensor | None,
    step: int | Tensor = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one Metropolis-adjusted Langevin step: `mala_propose`, one evaluation of the energy, `mala_accept`.

    Args:
        z: (B, ...) positions.
        u, grad: (B,) energies and gradients at z, from the previous step or, at the start, from `energy_and_grad`.
        energy_fn: as for `energy_and_grad`; called once.
        alpha: step size, positive; number, 0-d or (B,) tensor.
        seed, step: of the noise and the uniforms; every step of a chain needs another `step`.

    Returns:
        (z, u, grad, accepted), detached.

    Raises:
        TypeError, ValueError: as for the three functions it calls.

    Notes:
        `torch.compile(fullgraph=True)` needs what it needs for `energy_and_grad`.

    Source:
        Roberts and Tweedie 1996; Kumar et al. 2019, arXiv:1901.08508.

    Example:
        >>> energy = lambda z: z.square().sum(1) / 2
        >>> z = torch.zeros(1000, 2)
        >>> u, grad = energy_and_grad(energy, z)
        >>> for i in range(20):
        ...     z, u, grad, accepted = mala_step(z, u, grad, energy, 0.5, seed=0, step=i)
        >>> abs(float(z.var()) - 1) < 0.1
        True
    """
    op = "mala_step"
    _check_positions(op, z, grad)
    _check_rows(op, "u", u, "z", z)
    check.function(op, "energy_fn", energy_fn)
    alpha = step_size(op, alpha, z)
    # with seed None, draw one seed for proposal and accept step
    stream = stream_of(op, seed, step, z)
    with torch.no_grad():
        z_new = _propose(z, grad, alpha, stream)
    u_new, grad_new = differentiated(op, energy_fn, z_new)
    return _accept(op, (z, z_new, u, u_new, grad, grad_new, alpha), *stream[:2])


def _check_positions(op: str, z: Tensor, grad: Tensor) -> None:
    check.float_tensor(op, "z", z)
    check.batch(op, "z", z)
    check.like(op, "grad", grad, "z", z.shape, z.device)


def _check_rows(op: str, name: str, value: Any, other_name: str, other: Tensor) -> None:
    """Require one value per sample of `other`."""
    check.float_tensor(op, name, value)
    if value.shape != other.shape[:1]:
        want, got = tuple(other.shape[:1]), tuple(value.shape)
        hint = ": squeeze its last dim" if got == (*want, 1) else ""
        raise ValueError(f"{op}: {name} must have the shape {want}, a value per sample, got {got}{hint}")
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on the device of {other_name}, {other.device}, got {value.device}")


def step_size(op: str, alpha: Scalar, z: Tensor) -> Tensor:
    """Return alpha as a 0-d or (B,) coefficient; check its values if they may be read."""
    result = coefficient(op, "alpha", alpha, z)
    if check.values_are_checked(result) and result.numel():
        least, most = (result.item(),) * 2 if result.dim() == 0 else (v.item() for v in result.aminmax())
        if not least > 0:
            raise ValueError(f"{op}: alpha must be positive, got {least}")
        # an alpha that rounds to 0 or infinity in the compute dtype would sample another distribution
        dtype = compute_dtype(z.dtype)
        finfo = torch.finfo(dtype)
        if least < finfo.tiny or most > finfo.max:
            got = least if least < finfo.tiny else most
            raise ValueError(f"{op}: alpha must be a normal number of {check.short(dtype)}, got {got}")
    return result


# registration with torch


def _accept_fake(z, z_new, u, u_new, grad, grad_new, alpha, seed, step):
    return *(torch.empty_like(t) for t in (z, u, grad)), z.new_empty(z.shape[:1], dtype=torch.bool)


def _penalty_backward(grad_squares, grad):
    # plain torch: a single product, differentiable again
    return {"grad": (sde_ref.column(2 * grad_squares, grad) * grad).to(grad.dtype)}


_mala_accept = register("mala_accept", "energy", reference=ref.mala_accept, fake=_accept_fake)
_penalty = register(
    "grad_norm_penalty", "energy", reference=ref.grad_norm_penalty, vmap=flattened, backward=_penalty_backward,
    fake=lambda grad: grad.new_empty(grad.shape[:1], dtype=compute_dtype(grad.dtype)),
)  # fmt: skip


def warmup(x: Tensor, **other: Any) -> list[Tensor]:
    scale = torch.ones(len(x), device=x.device, requires_grad=True)
    for seed in (0, sample_seeds(torch.tensor(0, device=x.device), len(x))):
        for alpha in (1.0, scale):
            mala_accept(x, x, scale, scale, x, x, alpha, seed=seed)
    return [grad_norm_penalty(x)]
