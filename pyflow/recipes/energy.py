"""Train an energy and its sampler (a maximum-entropy generator) on a grid of Gaussians and on digits."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pyflow.energy import Chains, sample
from pyflow.ops import energy_loss, grad_norm_penalty
from pyflow.ops.energy import EnergyFunction, energy_and_grad

from . import _demo
from ._demo import threads

matplotlib.use("Agg")

from matplotlib import pyplot as plt

# the grid: coordinates of its modes on each axis, and their standard deviation
PLACES, SPREAD = (-4.0, -2.0, 0.0, 2.0, 4.0), 0.1
# largest pixel value
DIGITS_LEVELS = 16
# default of --held-out
HELD_OUT = (1, 4, 5, 7, 9)
# acceptance rate for which chains choose their step size
ACCEPTANCE = 0.75


@dataclass(frozen=True)
class Settings:
    """Training on one data set, and the chains that are run afterwards."""

    steps: int
    latent: int
    # first and last standard deviation of the noise on data and samples: annealing separates modes from coarse to fine
    noise: tuple[float, float]
    # weight of E |grad U|^2, times noise^2: it adds about 4 penalty noise^2 to the variance of a mode
    penalty: float
    # scale of the random Fourier features of x and z that the networks get as input; None: x and z themselves
    of_x: float | None = None
    of_z: float | None = None
    # updates of the energy per update of the generator
    critic: int = 1
    rate: float = 1e-3
    # learning rate of the generator
    generator_rate: float = 2e-3
    batch: int = 256
    width: int = 128
    # weight of E U^2: the loss fixes neither the offset of U nor its slope far from the data
    level: float = 1e-2
    # decay of the running average of the weights, from which samples and scores are computed
    average: float = 0.998
    samples: int = 2000
    chain_steps: int = 200


GRID = Settings(steps=2500, latent=2, noise=(1.0, 0.1), penalty=0.3, of_x=1.0, of_z=2.0)
DIGITS = Settings(steps=800, latent=16, noise=(0.5, 0.1), penalty=0.1, critic=2, generator_rate=4e-3, level=1e-3)
# CPU threads: layers this small gain nothing from two
THREADS = 1
QUICK: dict[str, Any] = {"steps": 200, "average": 0.98, "samples": 500, "chain_steps": 40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=_demo.positive,
        help=f"training steps of each generator (default {GRID.steps} on the grid, {DIGITS.steps} on digits)",
    )  # fmt: skip
    parser.add_argument(
        "--chain-steps", type=_demo.positive, help=f"MALA steps of each chain (default {GRID.chain_steps})"
    )
    parser.add_argument(
        "--held-out", type=_held_out, help="digits that serve as the anomaly, one model each: a list such as 1,5 or "
        f"all (default {','.join(map(str, HELD_OUT))}; {HELD_OUT[0]} with --quick)"
    )  # fmt: skip
    _demo.add_arguments(parser, out="outputs/energy.png", seed="weights, batches and chains")


def _held_out(text: str) -> tuple[int, ...]:
    chosen = tuple(range(10)) if text == "all" else tuple(int(part) for part in text.split(",") if part.isdecimal())
    if not chosen or max(chosen) > 9 or text not in ("all", ",".join(map(str, chosen))):
        raise argparse.ArgumentTypeError(f"must be digits as 1,5 or all, got {text!r}")
    return chosen


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    device = _demo.chosen_device(args)
    changes: dict[str, Any] = dict(QUICK) if args.quick else {}
    changes |= {name: getattr(args, name) for name in ("steps", "chain_steps") if getattr(args, name)}
    held_out = args.held_out or (HELD_OUT[:1] if args.quick else HELD_OUT)

    def work() -> dict[str, object]:
        with threads(THREADS):
            return demo(replace(GRID, **changes), replace(DIGITS, **changes), held_out, args, device)

    return _demo.run("energy", args, work)


def demo(
    of_grid: Settings, of_digits: Settings, held_out: tuple[int, ...], args: argparse.Namespace, device: torch.device
) -> dict[str, object]:
    """Train on both data sets, run chains, count modes, score anomalies, draw; returns the metrics."""
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    centres = torch.cartesian_prod(*(torch.tensor(PLACES),) * 2).to(device)

    def draw(count: int) -> Tensor:
        which = torch.randint(len(centres), (count,), device=device)
        return centres[which] + SPREAD * torch.randn(count, 2, device=device)

    grid = fit(MEG(2, of_grid).to(device), draw, of_grid, "25 Gaussians")
    before = grid.draw(of_grid.samples)
    # chains in data space; on digits they run in latent space
    chains = run_chains(grid.energy_of, before, of_grid.chain_steps, args.seed)
    on_grid = {
        name: modes(x, centres) for name, x in (("data", draw(of_grid.samples)), ("generator", before),
                                               ("after MALA", chains.z))
    }  # fmt: skip
    print(f"\n{'25 Gaussians':<16}{'modes':>7}{'near a mode':>13}")
    for name, (found, near) in on_grid.items():
        print(f"{name:<16}{found:>7}{near:>13.1%}")
    print(f"MALA accepted {chains.acceptance.mean().item():.1%} of the proposals\n")

    models, rows, scores = [], [], []
    for digit in held_out:
        train, test, anomalous = digits(digit, device)
        model = MEG(train.shape[1], of_digits, bounded=True).to(device)
        model = fit(model, lambda count: train[torch.randint(len(train), (count,), device=device)],  # noqa: B023
                    of_digits, f"without {digit}")  # fmt: skip
        u, slope = energy_and_grad(model.energy_of, test)
        by_score = {
            "energy": u, "score norm": grad_norm_penalty(slope).sqrt(), "nearest": torch.cdist(test, train).amin(1),
        }  # fmt: skip
        row = {name: average_precision_score(anomalous.cpu(), by.cpu()) for name, by in by_score.items()}
        rows.append({**row, "chance": anomalous.double().mean().item()})
        models.append((model, train))
        scores.append((u, anomalous))
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    print(f"\n{'AUPRC, held out':<16}" + "".join(f"{name:>12}" for name in mean))
    for label, row in (*zip(held_out, rows, strict=True), ("mean", mean)):
        print(f"{label!s:<16}" + "".join(f"{value:>12.3f}" for value in row.values()))

    model, train = models[0]
    z = torch.randn(64, of_digits.latent, device=device)
    latent = run_chains(model.latent_energy, z, of_digits.chain_steps, args.seed)
    with torch.no_grad():
        drawn = {"generator": model.generator(z), "after MALA": model.generator(latent.z)}
        energies = {name: model.energy_of(x).mean().item() for name, x in {**drawn, "data": train}.items()}
    print(
        f"\nmean energy, model trained without {held_out[0]}: "
        + ", ".join(f"{name} {u:.2f}" for name, u in energies.items())
    )
    print(f"MALA accepted {latent.acceptance.mean().item():.1%} of the proposals")
    picture(grid, before, chains.z, drawn, *scores[0], held_out[0], rows[0]["energy"], args)
    return {
        "seed": args.seed, "device": str(device), "backend": args.backend,
        "settings": {"grid": asdict(of_grid), "digits": asdict(of_digits)},
        "grid": {name: {"modes": found, "near": near} for name, (found, near) in on_grid.items()},
        "grid_acceptance": chains.acceptance.mean().item(),
        "held_out": held_out, "auprc": rows, "auprc_mean": mean,
        "digits_energy": energies, "digits_acceptance": latent.acceptance.mean().item(),
        "total_seconds": time.perf_counter() - began,
    }  # fmt: skip


class Waves(nn.Module):
    """Random Fourier features of x: with them a network can learn sharper minima than with x itself."""

    frequencies: Tensor

    def __init__(self, inputs: int, width: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(inputs, width // 2))

    def forward(self, x: Tensor) -> Tensor:
        angles = x @ self.frequencies
        return torch.cat((angles.sin(), angles.cos()), 1)


def mlp(inputs: int, outputs: int, width: int, waves: float | None) -> nn.Sequential:
    first = nn.Linear(inputs, width) if waves is None else nn.Sequential(Waves(inputs, width, waves),
                                                                         nn.Linear(width, width))  # fmt: skip
    return nn.Sequential(first, nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs))


class MEG(nn.Module):
    """Energy U(x), generator of x from z, and a classifier of pairs (x, z) that estimates their mutual information."""

    def __init__(self, dim: int, settings: Settings, bounded: bool = False) -> None:
        super().__init__()
        latent, width = settings.latent, settings.width
        self.latent = latent
        self.energy = mlp(dim, 1, width, settings.of_x)
        self.generator = nn.Sequential(
            mlp(latent, dim, width, settings.of_z), nn.Tanh() if bounded else nn.Identity()
        )  # fmt: skip
        self.pairing = mlp(dim + latent, 1, width, settings.of_x)

    def energy_of(self, x: Tensor) -> Tensor:
        return self.energy(x)[:, 0]

    def latent_energy(self, z: Tensor) -> Tensor:
        """Return U(G(z)) + |z|^2 / 2, the energy of a latent with a standard normal prior."""
        return self.energy_of(self.generator(z)) + z.square().sum(1) / 2

    def prior(self, count: int) -> Tensor:
        return torch.randn(count, self.latent, device=next(self.parameters()).device)

    def draw(self, count: int) -> Tensor:
        with torch.no_grad():
            return self.generator(self.prior(count))

    def energy_step(self, real: Tensor, fake: Tensor, penalty: float, level: float) -> Tensor:
        """E U(real) - E U(fake) + penalty E |grad U(real)|^2 + level (E U(real)^2 + E U(fake)^2)."""
        real = real.detach().requires_grad_()
        u, of_fake = self.energy_of(real), self.energy_of(fake)
        (slope,) = torch.autograd.grad(u.sum(), real, create_graph=True)
        squares = u.square().mean() + of_fake.square().mean()
        return energy_loss(u, of_fake) + penalty * grad_norm_penalty(slope).mean() + level * squares

    def pairing_step(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the cross entropy of matching against shuffled pairs; the optimal logit is log p(x, z) / p(x) p(z)."""
        paired, shuffled = (self.pairing(torch.cat((x, other), 1)) for other in (z, z.roll(1, 0)))
        return F.softplus(-paired).mean() + F.softplus(shuffled).mean()

    def generator_step(self, x: Tensor, z: Tensor) -> Tensor:
        """Return E U(x) - I(x, z) with the mean logit as I(x, z)."""
        # not the cross entropy: its gradient vanishes for pairs that are classified with certainty
        return self.energy_of(x).mean() - self.pairing(torch.cat((x, z), 1)).mean()


def fit(model: MEG, draw: Callable[[int], Tensor], settings: Settings, name: str) -> MEG:
    """Train the three networks; returns the running average of them."""
    parts = (model.energy, model.generator, model.pairing)
    rates = (settings.rate, settings.generator_rate, settings.rate)
    optimizers = [
        torch.optim.Adam(part.parameters(), rate, betas=(0.5, 0.9), fused=True)
        for part, rate in zip(parts, rates, strict=True)
    ]
    # constant rate for the first half, then linear to 0
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 * (1 - step / settings.steps)))
        for optimizer in optimizers
    ]
    of_energy, of_generator, of_pairing = optimizers
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.average))
    first, last = settings.noise
    with _demo.bar(settings.steps, name) as bar:
        for step in range(settings.steps):
            # the noise reaches its last level after two thirds of the steps
            level = first * (last / first) ** min(1, 1.5 * step / settings.steps)
            for _ in range(settings.critic):
                real, fake = (noisy(x, level) for x in (draw(settings.batch), model.draw(settings.batch)))
                loss = model.energy_step(real, fake, settings.penalty * level**2, settings.level)
                _step(of_energy, loss)
            z = model.prior(settings.batch)
            x = noisy(model.generator(z), level)
            _step(of_pairing, model.pairing_step(x.detach(), z))
            information = model.generator_step(x, z)
            _step(of_generator, information)
            for schedule in schedules:
                schedule.step()
            average.update_parameters(model)
            bar.update()
            if step % 50 == 49 or step + 1 == settings.steps:
                bar.set_postfix_str(f"energy {loss.item():.3f}, generator {information.item():.3f}")
    return cast(MEG, average.module)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


def noisy(x: Tensor, level: float) -> Tensor:
    return x + level * torch.randn_like(x)


def run_chains(energy_fn: EnergyFunction, z: Tensor, steps: int, seed: int) -> Chains:
    """Run MALA chains with a step size that short chains have tuned to the acceptance rate ACCEPTANCE."""
    alpha, tried, rounds, short = 1e-2, z, 40, 5
    for done in range(rounds):
        chains = sample(energy_fn, tried, alpha, steps=short, seed=seed, start=short * done, progress=False)
        tried = chains.z
        alpha *= math.exp(chains.acceptance.mean().item() - ACCEPTANCE)
    return sample(energy_fn, z, alpha, steps=steps, seed=seed, start=short * rounds)


def modes(x: Tensor, centres: Tensor) -> tuple[int, float]:
    """Return the number of modes found and the fraction of samples within four standard deviations of a mode.

    A mode is found if at least a fifth of its expected number of samples is near it.
    """
    distance, nearest = torch.cdist(x, centres).min(1)
    near = distance < 4 * SPREAD
    counts = torch.bincount(nearest[near], minlength=len(centres))
    return int((counts >= 0.2 * len(x) / len(centres)).sum()), near.double().mean().item()


def digits(held_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return (training digits without one class, test digits of all classes, mask of that class in the test set)."""
    data = load_digits()
    pixels, labels = torch.from_numpy(data.images).flatten(1), torch.from_numpy(data.target)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    test, train = order.split([len(order) // 5, len(order) - len(order) // 5])
    train = train[labels[train] != held_out]
    scaled = (2 * pixels / DIGITS_LEVELS - 1).float().to(device)
    return scaled[train.to(device)], scaled[test.to(device)], (labels[test] == held_out).to(device)


def picture(
    grid: MEG, before: Tensor, after: Tensor, drawn: dict[str, Tensor], scores: Tensor, anomalous: Tensor,
    digit: int, auprc: float, args: argparse.Namespace,
) -> None:  # fmt: skip
    figure, axes = plt.subplots(2, 3, figsize=(12, 8), facecolor="white")
    limit = 1.25 * PLACES[-1]
    line = torch.linspace(-limit, limit, 200, device=before.device)
    with torch.no_grad():
        landscape = grid.energy_of(torch.cartesian_prod(line, line)).reshape(200, 200).T.cpu().numpy()
    extent = (-limit, limit, -limit, limit)
    axes[0, 0].imshow(landscape, origin="lower", extent=extent, cmap="viridis")
    axes[0, 0].set_title("energy: low near the data")
    for axis, x, title in ((axes[0, 1], before, "generator"), (axes[0, 2], after, "after MALA")):
        axis.plot(*x.cpu().numpy().T, ".", markersize=1.5, color="0.2")
        axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    for axis, (name, x) in zip(axes[1], drawn.items(), strict=False):
        tiles = x.reshape(8, 8, 8, 8).permute(0, 2, 1, 3).reshape(64, 64).cpu().numpy()
        axis.imshow(tiles, cmap="gray", vmin=-1, vmax=1)
        axis.set_title(f"digits, {name}")
        axis.axis("off")
    for mask, label in ((~anomalous, "other digits"), (anomalous, f"digit {digit}, held out")):
        axes[1, 2].hist(scores[mask].cpu().numpy(), bins=30, density=True, alpha=0.6, label=label)
    axes[1, 2].set_title(f"energy of test digits, AUPRC {auprc:.3f}")
    axes[1, 2].legend()
    figure.suptitle(f"Maximum-entropy generators, seed {args.seed}")
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    plt.close(figure)
