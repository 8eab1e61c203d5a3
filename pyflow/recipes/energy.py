"""Train energies and their samplers (maximum-entropy generators, MEG) on a grid of Gaussians and on digits."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

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
from ._energy_picture import picture
from ._sample_scores import SURE, digit_classifier, scores

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
    # hidden layers of the generator
    depth: int = 2
    # width of the code if U(x) is the error of an autoencoder, as in EBGAN; None: a network with one output
    code: int | None = None
    # updates of the energy per update of the generator
    critic: int = 1
    rate: float = 1e-3
    generator_rate: float = 2e-3
    # Adam's first coefficient
    momentum: float = 0.5
    batch: int = 256
    width: int = 128
    # weight of E U^2: the loss fixes neither the offset of U nor its slope far from the data
    level: float = 1e-2
    # decay of the running average of the weights, from which samples and scores are computed
    average: float = 0.998
    samples: int = 2000
    chain_steps: int = 200


GRID = Settings(steps=2500, latent=2, noise=(1.0, 0.1), penalty=0.3, of_x=1.0, of_z=2.0)
DIGITS = Settings(
    steps=2500, latent=16, noise=(0.5, 0.1), penalty=1.0, depth=3, code=32, critic=2, rate=2e-3, generator_rate=1e-3,
    momentum=0.0, batch=128, width=256, level=1e-3, average=0.995, samples=2000, chain_steps=15,
)  # fmt: skip
# of each model that never sees one digit; with a generator of three hidden layers its energy tells anomalies less well
WITHOUT = replace(DIGITS, steps=1000, depth=2)
# CPU threads: layers this small gain nothing from two
THREADS = 1
QUICK: dict[str, Any] = {"steps": 200, "average": 0.98, "samples": 500, "chain_steps": 30}
# training steps of the classifier that scores drawn digits
CLASSIFIER_STEPS = 1500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=_demo.positive,
        help=f"training steps of each generator (default {GRID.steps} on the grid, {DIGITS.steps} on digits, "
        f"{WITHOUT.steps} without one digit)",
    )  # fmt: skip
    parser.add_argument(
        "--chain-steps",
        type=_demo.positive,
        help=f"MALA steps of each chain (default {GRID.chain_steps} on the grid, {DIGITS.chain_steps} on digits)",
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
            grid, digits, without = (replace(each, **changes) for each in (GRID, DIGITS, WITHOUT))
            return demo(grid, digits, without, held_out, args, device)

    return _demo.run("energy", args, work)


def demo(
    of_grid: Settings, of_digits: Settings, without: Settings, held_out: tuple[int, ...], args: argparse.Namespace,
    device: torch.device,
) -> dict[str, object]:  # fmt: skip
    """Train on both data sets, run chains, score samples and anomalies, draw; returns the metrics."""
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

    train, labels, held, held_labels = digits(device)
    classifier = digit_classifier(train, labels, min(of_digits.steps, CLASSIFIER_STEPS))
    with torch.no_grad():
        accuracy = (classifier(held).argmax(1) == held_labels).double().mean().item()
    model = fit(MEG(train.shape[1], of_digits, bounded=True).to(device), picked(train), of_digits, "digits")
    z = model.prior(of_digits.samples)
    latent = run_chains(model.latent_energy, z, of_digits.chain_steps, args.seed)
    with torch.no_grad():
        drawn = {"generator": model.generator(z), "after MALA": model.generator(latent.z)}
        energies = {name: model.energy_of(x).mean().item() for name, x in {**drawn, "held-out": held}.items()}
    quality = {name: scores(x, classifier, train, held) for name, x in drawn.items()}
    # training digits take the place of held-out ones
    quality["held-out"] = scores(held, classifier, train, train[: len(held)])
    print(f"\n{'Digits':<16}{'sure':>9}{'classes':>9}{'precision':>11}{'recall':>9}{'nearest':>9}{'energy':>9}")
    for name, q in quality.items():
        print(f"{name:<16}{q.sure:>9.1%}{q.classes:>9}{q.precision:>11.3f}{q.recall:>9.3f}{q.nearest:>9.2f}"
              f"{energies[name]:>9.2f}")  # fmt: skip
    print(
        f"sure: a classifier that is right on {accuracy:.1%} of held-out digits gives a digit at least {SURE:.0%}\n"
        "precision, recall: against held-out digits; those of held-out digits against training digits\n"
        "nearest: median distance to the nearest training digit\n"
        f"MALA accepted {latent.acceptance.mean().item():.1%} of the proposals\n"
    )

    rows, by_energy = [], []
    for digit in held_out:
        known, anomalous = train[labels != digit], held_labels == digit
        detector = fit(MEG(train.shape[1], without, bounded=True).to(device), picked(known), without,
                       f"without {digit}")  # fmt: skip
        u, slope = energy_and_grad(detector.energy_of, held)
        anomaly = {
            "energy": u, "score norm": grad_norm_penalty(slope).sqrt(), "nearest": torch.cdist(held, known).amin(1),
        }  # fmt: skip
        row = {name: average_precision_score(anomalous.cpu(), by.cpu()) for name, by in anomaly.items()}
        rows.append({**row, "chance": anomalous.double().mean().item()})
        by_energy.append((u, anomalous))
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    print(f"\n{'AUPRC, held out':<16}" + "".join(f"{name:>12}" for name in mean))
    for label, row in (*zip(held_out, rows, strict=True), ("mean", mean)):
        print(f"{label!s:<16}" + "".join(f"{value:>12.3f}" for value in row.values()))
    with_held_out = {"held-out": held, **drawn}
    auprc = dict(zip(held_out, rows, strict=True))
    picture(grid.energy_of, 1.25 * PLACES[-1], before, chains.z, with_held_out, quality, by_energy, auprc, args)
    return {
        "seed": args.seed, "device": str(device), "backend": args.backend,
        "settings": {"grid": asdict(of_grid), "digits": asdict(of_digits), "without": asdict(without)},
        "grid": {name: {"modes": found, "near": near} for name, (found, near) in on_grid.items()},
        "grid_acceptance": chains.acceptance.mean().item(),
        "classifier_accuracy": accuracy, "digits": {name: asdict(q) for name, q in quality.items()},
        "digits_energy": energies, "digits_acceptance": latent.acceptance.mean().item(),
        "held_out": held_out, "auprc": rows, "auprc_mean": mean, "total_seconds": time.perf_counter() - began,
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


def mlp(inputs: int, outputs: int, width: int, waves: float | None, depth: int = 2) -> nn.Sequential:
    """Return a network with `depth` hidden layers; `waves` is the scale of the Fourier features it gets as input."""
    first = nn.Linear(inputs, width) if waves is None else nn.Sequential(Waves(inputs, width, waves),
                                                                         nn.Linear(width, width))  # fmt: skip
    hidden = (layer for _ in range(depth - 1) for layer in (nn.SiLU(), nn.Linear(width, width)))
    return nn.Sequential(first, *hidden, nn.SiLU(), nn.Linear(width, outputs))


class Error(nn.Module):
    """Squared error of an autoencoder, times a learned scale: an energy that is high far from the data."""

    def __init__(self, inputs: int, width: int, code: int) -> None:
        super().__init__()
        self.reconstruction = nn.Sequential(
            nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, code), nn.Linear(code, width), nn.SiLU(),
            nn.Linear(width, inputs),
        )  # fmt: skip
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.log_scale.exp() * (x - self.reconstruction(x)).square().sum(1, keepdim=True)


class MEG(nn.Module):
    """Energy U(x), generator of x from z, and a classifier of pairs (x, z) that estimates their mutual information."""

    def __init__(self, dim: int, settings: Settings, bounded: bool = False) -> None:
        super().__init__()
        latent, width = settings.latent, settings.width
        self.latent = latent
        self.energy: nn.Module = (
            mlp(dim, 1, width, settings.of_x) if settings.code is None else Error(dim, width, settings.code)
        )
        self.generator = nn.Sequential(
            mlp(latent, dim, width, settings.of_z, settings.depth), nn.Tanh() if bounded else nn.Identity()
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
        torch.optim.Adam(part.parameters(), rate, betas=(settings.momentum, 0.9), fused=True)
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


def digits(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (training digits, their labels, held-out digits, their labels); a fifth is held out."""
    data = load_digits()
    pixels = torch.from_numpy(2 * data.data / DIGITS_LEVELS - 1).float().to(device)
    labels = torch.from_numpy(data.target).to(device)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0)).to(device)
    held_out, train = order.split([len(order) // 5, len(order) - len(order) // 5])
    return pixels[train], labels[train], pixels[held_out], labels[held_out]


def picked(rows: Tensor) -> Callable[[int], Tensor]:
    """Return a function that draws rows at random."""
    return lambda count: rows[torch.randint(len(rows), (count,), device=rows.device)]
