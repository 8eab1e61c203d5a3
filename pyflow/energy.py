"""Chains that sample an energy: Langevin dynamics, Metropolis-adjusted or not, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _checks as check
from . import _progress
from .ops.energy import EnergyFunction, energy_and_grad, mala_propose, mala_step, step_size
from .ops.noise import STEPS, seed_tensor

Callback = Callable[[int, Tensor], None]


# tensors do not compare to one truth value: results are equal to themselves alone
@dataclass(frozen=True, eq=False)
class Chains:
    """Where chains ended: positions, energies and gradients there, and of each the share of proposals it accepted."""

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
    """Run a chain of each sample for some steps of z' = z - alpha grad U + sqrt(2 alpha) n.

    Args:
        energy_fn: z -> (B,) energies, or z -> (energies, gradients); called once a step.
        z: (B, ...) where the chains start.
        alpha: step size, positive; number, 0-d or (B,) tensor.
        steps: number of steps, at least 1.
        metropolis: whether proposals are accepted or rejected, so that the chains have the density e^-U exactly; False
            takes them all.
        seed: as for `pyflow.ops.mala_propose`; None draws one from torch's default generator.
        start: number of the first step: a chain goes on where another ended with its z, seed and start + steps.
        progress: whether to show a bar with the acceptance, where tqdm is installed.
        callback: called as callback(step, z) after every step; z is a copy.

    Returns:
        `Chains`.

    Raises:
        TypeError, ValueError: as for `pyflow.ops.mala_step`; fewer than one step.

    Notes:
        May be called in inference mode: the energy is differentiated all the same.

    Example:
        >>> energy = lambda z: z.square().sum(1) / 2
        >>> chains = sample(energy, torch.zeros(1000, 2), 0.5, steps=20, seed=0, progress=False)
        >>> abs(float(chains.z.var()) - 1) < 0.1
        True
    """
    op = "sample"
    check.float_tensor(op, "z", z)
    steps, start = check.at_least(op, "steps", steps, 1), check.at_least(op, "start", start, 0)
    if start + steps > STEPS:
        raise ValueError(f"{op}: start + steps must be at most 2**56, got {start + steps}")
    if callback is not None and not callable(callback):
        raise TypeError(f"{op}: callback must be callable, got {type(callback).__name__}")
    step_size(op, alpha, z)
    u, grad = energy_and_grad(energy_fn, z)
    if seed is None:
        # drawn when nothing is refused any more
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
                u, grad = energy_and_grad(energy_fn, z)
                moved += 1
            if bar is not None and (done % 50 == 0 or done == steps):
                bar.set_postfix_str(f"{moved.mean().item() / done:.1%} accepted")
            if callback is not None:
                callback(step, z.clone())
            if bar is not None:
                bar.update()
    return Chains(z, u, grad, moved / steps)
