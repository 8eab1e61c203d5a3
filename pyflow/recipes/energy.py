"""Maximum-entropy generators: an energy and its sampler on a grid of Gaussians and on digits, with anomaly scores."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import pyflow
from pyflow.energy import sample
from pyflow.ops import energy_loss, grad_norm_penalty

from .nice import _positive, threads

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

# of the grid: places of its modes on each axis, and their standard deviation
PLACES, SPREAD = (-2.0, -1.0, 0.0, 1.0, 2.0), 0.05
DIGITS_LEVELS = 16


@dataclass(frozen=True)
class Settings:
    """Training of both models, and the chains that follow."""

    steps: int = 6000
    batch: int = 256
    width: int = 128
    rate: float = 5e-4
    latent: int = 8
    # updates of the energy to one of the generator
    critic: int = 2
    penalty: float = 0.1
    samples: int = 2000
    chain_steps: int = 200
    alpha_grid: float = 2e-4
    alpha_digits: float = 5e-3
    # of the CPU; on layers this small two wait for each other
    threads: int | None = 1


QUICK = Settings(steps=300, samples=500, chain_steps=40)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=_positive, help=f"of the generators, default {Settings.steps}")
    parser.add_argument("--chain-steps", type=_positive, help=f"of the chains, default {Settings.chain_steps}")
    parser.add_argument("--held-out", type=int, choices=range(10), default=1, help="digit that is the anomaly")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and chains")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/energy.png"), help="the picture; metrics go beside it"
    )
    parser.add_argument("--device", help="default cuda where there is one, else cpu")
    parser.add_argument("--backend", default="auto", help="auto, cpu, triton, cuda or reference")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")


def run(args: argparse.Namespace) -> int:
    """The demo; 0, or 1 after one sentence about what is missing."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = QUICK if args.quick else Settings()
    for name in ("steps", "chain_steps"):
        if getattr(args, name):
            settings = replace(settings, **{name: getattr(args, name)})
    try:
        with pyflow.backend(args.backend), threads(settings.threads):
            metrics = demo(settings, args, device)
    except (RuntimeError, ValueError) as error:
        if not str(error).startswith("backend:"):
            raise
        print(f"demo energy: {error}", file=sys.stderr)
        return 1
    args.out.with_suffix(".json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"\nwrote {args.out} and {args.out.with_suffix('.json').name}")
    return 0


def demo(settings: Settings, args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Train on both, run the chains, count, score, draw; returns the metrics."""
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    centres = torch.cartesian_prod(*(torch.tensor(PLACES),) * 2).to(device)

    def of_grid(count: int) -> Tensor:
        which = torch.randint(len(centres), (count,), device=device)
        return centres[which] + SPREAD * torch.randn(count, 2, device=device)

    grid = MEG(2, 2, settings.width).to(device)
    fit(grid, of_grid, settings, "25 Gaussians")
    before = grid.draw(settings.samples)
    # in the plane itself: the energy is all there is
    chains = sample(grid.energy_of, before, settings.alpha_grid, steps=settings.chain_steps, seed=args.seed)
    on_grid = {
        name: modes(x, centres) for name, x in (("data", of_grid(settings.samples)), ("generator", before),
                                               ("after MALA", chains.z))
    }  # fmt: skip
    print(f"\n{'25 Gaussians':<16}{'modes':>7}{'near one':>10}")
    for name, (found, near) in on_grid.items():
        print(f"{name:<16}{found:>7}{near:>10.1%}")
    print(f"{chains.acceptance.mean().item():.1%} of the proposals accepted")

    train, test, anomalous = digits(args.held_out, device)
    images = MEG(train.shape[1], settings.latent, settings.width, bounded=True).to(device)
    fit(images, lambda count: noisy(train[torch.randint(len(train), (count,), device=device)]), settings, "digits")
    with torch.no_grad():
        scores = images.energy_of(test)
    auprc = average_precision_score(anomalous.cpu(), scores.cpu())
    share = anomalous.double().mean().item()
    print(f"\ndigit {args.held_out} held out: AUPRC {auprc:.3f} of the energy as anomaly score, {share:.3f} by chance")
    z = torch.randn(64, settings.latent, device=device)
    latent = sample(images.latent_energy, z, settings.alpha_digits, steps=settings.chain_steps, seed=args.seed)
    with torch.no_grad():
        drawn = {"generator": images.generator(z), "after MALA": images.generator(latent.z)}
        energies = {name: images.energy_of(x).mean().item() for name, x in {**drawn, "data": train}.items()}
    print("mean energy: " + ", ".join(f"{name} {value:.2f}" for name, value in energies.items()))
    print(f"{latent.acceptance.mean().item():.1%} of the proposals accepted")
    picture(grid, before, chains.z, drawn, scores, anomalous, auprc, args)
    return {
        "seed": args.seed, "device": str(device), "backend": args.backend, "settings": asdict(settings),
        "grid": {name: {"modes": found, "near": near} for name, (found, near) in on_grid.items()},
        "grid_acceptance": chains.acceptance.mean().item(),
        "held_out": args.held_out, "auprc": auprc, "auprc_by_chance": share,
        "digits_energy": energies, "digits_acceptance": latent.acceptance.mean().item(),
        "total_seconds": time.perf_counter() - began,
    }  # fmt: skip


def mlp(inputs: int, outputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
    )


class MEG(nn.Module):
    """An energy of x, a generator of x from z, and what tells pairs (x, z) from strangers: I(x, z) is read off it."""

    def __init__(self, dim: int, latent: int, width: int, bounded: bool = False) -> None:
        super().__init__()
        self.latent = latent
        self.energy = mlp(dim, 1, width)
        self.generator = nn.Sequential(mlp(latent, dim, width), nn.Sigmoid() if bounded else nn.Identity())
        self.pairing = mlp(dim + latent, 1, width)

    def energy_of(self, x: Tensor) -> Tensor:
        return self.energy(x)[:, 0]

    def latent_energy(self, z: Tensor) -> Tensor:
        """That of a latent whose prior is a standard normal."""
        return self.energy_of(self.generator(z)) + z.square().sum(1) / 2

    def draw(self, count: int) -> Tensor:
        with torch.no_grad():
            return self.generator(torch.randn(count, self.latent, device=self.energy[0].weight.device))

    def energy_step(self, real: Tensor, fake: Tensor, penalty: float) -> Tensor:
        """E U(real) - E U(fake) + penalty E |grad U(real)|^2."""
        real = real.detach().requires_grad_()
        u = self.energy_of(real)
        (slope,) = torch.autograd.grad(u.sum(), real, create_graph=True)
        return energy_loss(u, self.energy_of(fake)) + penalty * grad_norm_penalty(slope).mean()

    def generator_step(self, z: Tensor) -> Tensor:
        """E U(G(z)) - I(G(z), z), the information estimated by telling pairs from shuffled ones."""
        x = self.generator(z)
        paired = self.pairing(torch.cat((x, z), 1))
        strangers = self.pairing(torch.cat((x, z[torch.randperm(len(z), device=z.device)]), 1))
        return self.energy_of(x).mean() + F.softplus(-paired).mean() + F.softplus(strangers).mean()


def fit(model: MEG, draw: Callable[[int], Tensor], settings: Settings, name: str) -> None:
    device = model.energy[0].weight.device
    others = [*model.generator.parameters(), *model.pairing.parameters()]
    of_energy = torch.optim.Adam(model.energy.parameters(), lr=settings.rate, betas=(0.5, 0.9))
    of_generator = torch.optim.Adam(others, lr=settings.rate, betas=(0.5, 0.9))
    with tqdm(total=settings.steps, desc=name, unit="step", dynamic_ncols=True, mininterval=0.2) as bar:
        for step in range(settings.steps):
            for _ in range(settings.critic):
                loss = model.energy_step(draw(settings.batch), model.draw(settings.batch), settings.penalty)
                of_energy.zero_grad()
                loss.backward()
                of_energy.step()
            information = model.generator_step(torch.randn(settings.batch, model.latent, device=device))
            of_generator.zero_grad()
            information.backward()
            of_generator.step()
            bar.update()
            if step % 50 == 49 or step + 1 == settings.steps:
                bar.set_postfix_str(f"energy {loss.item():.3f}, generator {information.item():.3f}")


def modes(x: Tensor, centres: Tensor) -> tuple[int, float]:
    """Modes with a fifth of their share of the samples within four standard deviations, and the share near any."""
    distance, nearest = torch.cdist(x, centres).min(1)
    near = distance < 4 * SPREAD
    counts = torch.bincount(nearest[near], minlength=len(centres))
    return int((counts >= 0.2 * len(x) / len(centres)).sum()), near.double().mean().item()


def digits(held_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Training digits without one class; held-out digits of all classes, and which of them are of that class."""
    data = load_digits()
    pixels, labels = torch.from_numpy(data.images).flatten(1), torch.from_numpy(data.target)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    test, train = order.split([len(order) // 5, len(order) - len(order) // 5])
    train = train[labels[train] != held_out]
    scaled = (pixels / DIGITS_LEVELS).float().to(device)
    return scaled[train.to(device)], scaled[test.to(device)], (labels[test] == held_out).to(device)


def noisy(x: Tensor) -> Tensor:
    """With a level of noise: pixels of exactly 0 would be told from a sigmoid's."""
    return (x + torch.randn_like(x) / DIGITS_LEVELS).clamp(0, 1)


def picture(
    grid: MEG, before: Tensor, after: Tensor, drawn: dict[str, Tensor], scores: Tensor, anomalous: Tensor,
    auprc: float, args: argparse.Namespace,
) -> None:  # fmt: skip
    figure, axes = plt.subplots(2, 3, figsize=(12, 8), facecolor="white")
    limit = 1.5 * PLACES[-1]
    line = torch.linspace(-limit, limit, 200, device=before.device)
    with torch.no_grad():
        landscape = grid.energy_of(torch.cartesian_prod(line, line)).reshape(200, 200).T.cpu().numpy()
    extent = (-limit, limit, -limit, limit)
    axes[0, 0].imshow(landscape, origin="lower", extent=extent, cmap="viridis")
    axes[0, 0].set_title("energy: low where data are")
    for axis, x, title in ((axes[0, 1], before, "generator"), (axes[0, 2], after, "after MALA")):
        axis.plot(*x.cpu().numpy().T, ".", markersize=1.5, color="0.2")
        axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    for axis, (name, x) in zip(axes[1], drawn.items()):
        tiles = x.reshape(8, 8, 8, 8).permute(0, 2, 1, 3).reshape(64, 64).cpu().numpy()
        axis.imshow(tiles, cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"digits, {name}")
        axis.axis("off")
    for mask, label in ((~anomalous, "other digits"), (anomalous, f"digit {args.held_out}, held out")):
        axes[1, 2].hist(scores[mask].cpu().numpy(), bins=30, density=True, alpha=0.6, label=label)
    axes[1, 2].set_title(f"energy of held-out digits, AUPRC {auprc:.3f}")
    axes[1, 2].legend()
    figure.suptitle(f"Maximum-entropy generators, seed {args.seed}")
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    plt.close(figure)
