"""Energies: Metropolis-adjusted Langevin steps, the gradient penalty and the losses of energy-based GANs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _checks as check
from .._backend import call, register, runs_reference
from ..reference import compute_dtype
from ..reference import energy as ref
from ..reference import sde as sde_ref
from ._transforms import one_by_one
from .sde import advance, coefficient, stream_of

KINDS = ("linear", "hinge", "ebgan")

EnergyFunction = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]


def energy_loss(u_real: Tensor, u_fake: Tensor, kind: str = "linear", margin: float = 1.0) -> Tensor:
    """What an energy U minimises: low on data, high on samples.

    "linear": E U(real) - E U(fake); "hinge": E max(0, m + U(real)) + E max(0, m - U(fake));
    "ebgan": E U(real) + E max(0, m - U(fake)).

    Args:
        u_real, u_fake: energies of data and of samples, float32, float64, bfloat16 or float16, any shapes.
        kind: "linear", "hinge" or "ebgan".
        margin: m, positive; of "linear" not used.

    Returns:
        Scalar, float32 (float64 where an energy is), differentiable any number of times.

    Raises:
        TypeError: not a tensor, a wrong dtype, a margin that is not a number.
        ValueError: an unknown kind, a margin that is not positive, other devices.

    Notes:
        The gradient penalty of MEG is `grad_norm_penalty` of the energy's gradient at the data, times its weight.

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
    """|grad|^2 of each sample, over all dims but the first: the penalty on an energy's or critic's slope.

    Args:
        grad: (B, ...) the gradient, of `torch.autograd.grad(u.sum(), x, create_graph=True)` where the penalty is to
            be trained; float32, float64, bfloat16 or float16, any strides.

    Returns:
        (B,) float32 (float64 for float64 grad).

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: grad without a batch dim.

    Notes:
        Over all dims of a sample: the published code of MEG takes the norm of an image over its channels alone. Sums
        of at most 512 terms in float32, beyond that in float64: on a CPU the same bits for any thread count,
        instruction set and batch. Differentiable any number of times.

    Source:
        Kumar et al. 2019, arXiv:1901.08508, equation 3.

    Example:
        >>> grad_norm_penalty(torch.ones(2, 3, 4))
        tensor([12., 12.])
    """
    op = "grad_norm_penalty"
    check.float_tensor(op, "grad", grad)
    _check_batch(op, "grad", grad)
    if runs_reference(op, grad):
        return ref.grad_norm_penalty(grad)
    return call(op, grad)


def energy_and_grad(energy_fn: EnergyFunction, z: Tensor) -> tuple[Tensor, Tensor]:
    """U(z) of each sample and its gradient, detached: what the first `mala_step` of a chain starts from.

    Args:
        energy_fn: z -> (B,) energies, differentiable; or z -> ((B,) energies, gradients like z). It must not change z.
        z: (B, ...) float tensor.

    Returns:
        (u, grad): (B,) and like z, of memory of their own.

    Raises:
        TypeError: energy_fn is not callable or returns something else.
        ValueError: energies that are not (B,), a gradient of another shape; energies without a graph to z, as under
            `no_grad`, and no gradient; an energy_fn that changes z in place.

    Notes:
        May be called in inference mode: the energy is differentiated all the same.

    Example:
        >>> energy_and_grad(lambda z: z.square().sum(1) / 2, torch.tensor([[3.0, 4.0]]))
        (tensor([12.5000]), tensor([[3., 4.]]))
    """
    op = "energy_and_grad"
    check.float_tensor(op, "z", z)
    _check_batch(op, "z", z)
    _check_function(op, energy_fn)
    return _energy_and_grad(op, energy_fn, z)


def _energy_and_grad(op: str, energy_fn: EnergyFunction, z: Tensor) -> tuple[Tensor, Tensor]:
    traced = torch.compiler.is_compiling()
    # out of inference mode, where no graph is recorded
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
            # a function may return the same memory every time
            grad = grad.detach().clone()
        return u.detach().clone(), grad


def mala_propose(
    z: Tensor, grad: Tensor, alpha: float | Tensor, *, seed: int | Tensor | None, step: int | Tensor = 0
) -> Tensor:
    """z' = z - alpha grad + sqrt(2 alpha) n: the Langevin proposal of a Metropolis-adjusted step.

    Args:
        z: (B, ...) positions; float32, float64, bfloat16 or float16, any strides.
        grad: gradient of the energy at z, of its shape.
        alpha: step size, positive; number, 0-d or (B,) tensor.
        seed, step: say which n, as for `sde_step`; the stream is that of the purpose "noise". With None the accept
            step draws from another seed than this one.

    Returns:
        z', in z's dtype and strides.

    Raises:
        TypeError, ValueError: as for `sde_step`; an alpha that is not positive or, in the dtype of the arithmetic, no
            normal number.

    Notes:
        It is `sde_step(z, grad, 1, -alpha, sqrt(2 alpha))`: the same bits on every backend, one pass, differentiable.

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


def _propose(z: Tensor, grad: Tensor, alpha: Tensor, stream: tuple[Tensor | None, ...]) -> Tensor:
    # in float64, so that a root that is not exact leaves no trace in float32
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
    """Keep each sample's proposal with probability min(1, e^(U - U') q(z|z') / q(z'|z)), its energy and gradient too.

    log q(z|z') - log q(z'|z) = sum (g + g') ((z' - z) / 2 + alpha (g - g') / 4), with
    q(z'|z) ~ exp(-|z' - z + alpha g|^2 / (4 alpha)).

    Args:
        z, z_new: (B, ...) position and proposal; float32, float64, bfloat16 or float16, any strides.
        u, u_new: (B,) their energies.
        grad, grad_new: gradients there, of the shape of z.
        alpha: that of the proposal; number, 0-d or (B,) tensor.
        seed, step: those of the proposal: the uniforms are of another purpose, "accept", and share nothing with its
            noise; seed (B,) gives each sample its own.

    Returns:
        (z, u, grad, accepted): selected values in the dtypes and strides of z, u and grad; (B,) bool.

    Raises:
        TypeError, ValueError: as for `mala_propose`; energies that are not (B,).

    Notes:
        Float32 arithmetic (float64 where any tensor is float64). A selected value is a copy, bit for bit; a proposal
        with an energy that is not finite, or NaN or infinity in position or gradient, is rejected and leaves no
        trace. The log-ratio is taken from the stored proposal in multiplied-out form: nothing is drawn again or
        divided by alpha, and two norms that almost cancel are never subtracted. On a CPU the decisions are the same
        for any thread count, instruction set and batch; another backend sums in another order and may decide
        otherwise where the two sides of the comparison agree to rounding. Not differentiable: the results are
        detached. No host sync.

    Source:
        Roberts and Tweedie 1996, Exponential Convergence of Langevin Distributions. Three published versions of the
        ratio are biased: on N(0, 1) with alpha = 1/2 their variances are 4/3, 0.736 and 4/7; this one's is 1.

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


def _accept(op: str, tensors: tuple[Tensor, ...], seed: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = tuple(t.detach() for t in tensors)
    if runs_reference(op, tensors[0]):
        return ref.mala_accept(*tensors, seed, step)
    return call("mala_accept", *tensors, seed, step)


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
    """A Metropolis-adjusted Langevin step: `mala_propose`, one evaluation of the energy, `mala_accept`.

    Args:
        z: (B, ...) positions.
        u, grad: (B,) energies and gradients there: those of the step before, at first of `energy_and_grad`.
        energy_fn: as for `energy_and_grad`; called once.
        alpha: step size, positive; number, 0-d or (B,) tensor.
        seed, step: of the noise and the uniforms; every step of a chain takes another `step`.

    Returns:
        (z, u, grad, accepted), detached.

    Raises:
        TypeError, ValueError: as for the three functions it calls.

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
    _check_function(op, energy_fn)
    alpha = step_size(op, alpha, z)
    # one seed for both draws
    stream = stream_of(op, seed, step, z)
    with torch.no_grad():
        z_new = _propose(z, grad, alpha, stream)
    u_new, grad_new = _energy_and_grad(op, energy_fn, z_new)
    return _accept(op, (z, z_new, u, u_new, grad, grad_new, alpha), *stream[:2])


def _check_function(op: str, energy_fn: object) -> None:
    if not callable(energy_fn):
        raise TypeError(f"{op}: energy_fn must be callable, got {type(energy_fn).__name__}")


def _check_positions(op: str, z: Tensor, grad: Tensor) -> None:
    check.float_tensor(op, "z", z)
    _check_batch(op, "z", z)
    check.like(op, "grad", grad, "z", z.shape, z.device)


def _check_batch(op: str, name: str, value: Tensor) -> None:
    if value.dim() == 0:
        raise ValueError(f"{op}: {name} must have at least one dim, the batch, got a scalar")


def _check_rows(op: str, name: str, value: object, other_name: str, other: Tensor) -> None:
    """One value for each sample of `other`."""
    check.float_tensor(op, name, value)
    if value.shape != other.shape[:1]:
        want = tuple(other.shape[:1])
        raise ValueError(f"{op}: {name} must have the shape {want}, a value per sample, got {tuple(value.shape)}")
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on the device of {other_name}, {other.device}, got {value.device}")


def step_size(op: str, alpha: object, z: Tensor) -> Tensor:
    """Alpha as a coefficient, whose values are checked where they may be read."""
    result = coefficient(op, "alpha", alpha, z)
    if check.values_are_checked(result) and result.numel():
        least, most = (result.item(),) * 2 if result.dim() == 0 else (v.item() for v in result.aminmax())
        if not least > 0:
            raise ValueError(f"{op}: alpha must be positive, got {least}")
        # one that is rounded to 0 or infinity takes steps of another energy
        dtype = compute_dtype(z.dtype)
        finfo = torch.finfo(dtype)
        if least < finfo.tiny or most > finfo.max:
            got = least if least < finfo.tiny else most
            raise ValueError(f"{op}: alpha must be a normal number of {check.short(dtype)}, got {got}")
    return result


# what torch must know of each operator, arguments in the order of its schema


def _accept_reference(z, z_new, u, u_new, grad, grad_new, alpha, seed, step):
    outputs = ref.mala_accept(z, z_new, u, u_new, grad, grad_new, alpha, seed, step)
    return *(torch.empty_like(like).copy_(value) for like, value in zip((z, u, grad), outputs, strict=True)), outputs[3]


def _accept_fake(z, z_new, u, u_new, grad, grad_new, alpha, seed, step):
    return *(torch.empty_like(t) for t in (z, u, grad)), z.new_empty(z.shape[:1], dtype=torch.bool)


def _accept_vmap(info, in_dims, *tensors):
    return one_by_one(info, in_dims, torch.ops.pyflow.mala_accept, tensors), (0, 0, 0, 0)


def _penalty_fake(grad):
    return grad.new_empty(grad.shape[:1], dtype=compute_dtype(grad.dtype))


def _penalty_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _penalty_backward(ctx, weight):
    (grad,) = ctx.saved_tensors
    # plain torch: one product, and the gradients of gradients come with it
    return (sde_ref.column(2 * weight, grad) * grad).to(grad.dtype)


def _penalty_vmap(info, in_dims, grad):
    batched = grad.movedim(in_dims[0], 0)
    flat = batched.flatten(0, 1)
    return torch.ops.pyflow.grad_norm_penalty(flat).unflatten(0, batched.shape[:2]), 0


register("mala_accept", "energy", reference=_accept_reference, fake=_accept_fake, vmap=_accept_vmap)
register(
    "grad_norm_penalty", "energy", reference=lambda grad: ref.grad_norm_penalty(grad).contiguous(),
    fake=_penalty_fake, vmap=_penalty_vmap, setup_context=_penalty_setup, backward=_penalty_backward,
)  # fmt: skip
