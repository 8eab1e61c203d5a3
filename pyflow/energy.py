"""Langevin chains that sample the density e^-U of an energy U, with or without Metropolis adjustment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _checks as check
from . import _progress
from .ops.energy import (
    EnergyFunction,
    differentiated,
    mala_propose,
    mala_step,
    step_size,
)
from .ops.noise import STEPS, seed_tensor

Callback = Callable[[int, Tensor], None]


# eq=False: == of tensors gives a tensor, so results compare by identity
@dataclass(frozen=True, eq=False)
class Chains:
    """Last state of the chains.

    Attributes:
        z: (B, ...) positions.
        u: (B,) energies at z.
        grad: (B, ...) gradients of the energy at z.
        acceptance: (B,) share of the proposals that each chain accepted.
    """

    z: Tensor
    u: Tensor
    grad: Tensor
    acceptance: Tensor


def sample(
    energy_fn: EnergyFunction,
    z: Tensor,
    alpha: float | Tensor,
    *,
    steps: int,
    metropolis: bool = True,
    seed: int | Tensor | None = None,
    start: int = 0,
    progress: bool = True,
    callback: Callback | None = None,
) -> Chains:
    """Run one chain per sample for `steps` steps of z' = z - alpha grad U + sqrt(2 alpha) n.

    Args:
        energy_fn: z -> (B,) energies, or z -> (energies, gradients); called once a step.
        z: (B, ...) start of the chains.
        alpha: step size, positive; number, 0-d or (B,) tensor.
        steps: number of steps, at least 1.
        metropolis: accept or reject each proposal, so that the chains have the density e^-U exactly; False accepts
            all proposals.
        seed: as for `pyflow.ops.mala_propose`; None draws one from torch's default generator.
        start: number of the first step; to continue a run, pass its last z, its seed and its start + steps.
        progress: show a bar with the acceptance, if tqdm is installed.
        callback: called as callback(step, z) after every step, with a copy of z.

    Returns:
        `Chains`.

    Raises:
        TypeError, ValueError: as for `pyflow.ops.mala_step`, for steps < 1, and on a CPU where the energy of a chain is
            NaN, or its gradient not finite, at the start.

    Notes:
        Works in inference mode too: the energy is differentiated with autograd enabled.

    Example:
        >>> energy = lambda z: z.square().sum(1) / 2
        >>> chains = sample(energy, torch.zeros(1000, 2), 0.5, steps=20, seed=0, progress=False)
        >>> abs(float(chains.z.var()) - 1) < 0.1
        True
    """
    op = "sample"
    check.float_tensor(op, "z", z)
    check.batch(op, "z", z)
    check.function(op, "energy_fn", energy_fn)
    metropolis = check.flag(op, "metropolis", metropolis)
    steps, start = check.at_least(op, "steps", steps, 1), check.at_least(op, "start", start, 0)
    if start + steps > STEPS:
        raise ValueError(f"{op}: start + steps must be at most 2**56, got {start + steps}")
    if callback is not None:
        check.function(op, "callback", callback)
    step_size(op, alpha, z)
    if seed is not None:
        seed_tensor(op, seed, z.shape, z.device, "cpu")
    u, grad = differentiated(op, energy_fn, z)
    if check.values_are_checked(grad):
        # an infinite energy is a wall, from which chains may walk away
        wrong = (u.isnan() | ~grad.unsqueeze(-1).flatten(1).isfinite().all(1)).nonzero()
        if len(wrong):
            chain = int(wrong[0, 0])
            raise ValueError(f"{op}: the energy must be a number and its gradient finite at z, not so in chain {chain}")
    if seed is None:
        # drawn after all checks, so that a refused call leaves torch's generator unchanged
        seed = seed_tensor(op, None, None, z.device)
    z = z.detach()
    moved = torch.zeros(z.shape[0], device=z.device, dtype=torch.float32)
    with torch.no_grad(), _progress.bar(steps, "step", progress, desc="chains", mininterval=0.2) as bar:
        for done in range(1, steps + 1):
            step = start + done - 1
            if metropolis:
                z, u, grad, accepted = mala_step(z, u, grad, energy_fn, alpha, seed=seed, step=step)
                moved += accepted
            else:
                z = mala_propose(z, grad, alpha, seed=seed, step=step)
                u, grad = differentiated(op, energy_fn, z)
                moved += 1
            if bar is not None and (done % 50 == 0 or done == steps):
                bar.set_postfix_str(f"{moved.mean().item() / done:.1%} accepted")
            if callback is not None:
                callback(step, z.clone())
            if bar is not None:
                bar.update()
    return Chains(z, u, grad, moved / steps)
