"""Train a BiGAN-QP on real images: generator, encoder and a critic that no constraint and no penalty holds."""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import pyflow
from pyflow.ops import gan_qp_generator_loss, gan_qp_loss

from . import _data, _demo, _pictures
from .nice import follow, synchronize, threads

COLUMNS = 10


@dataclass(frozen=True)
class Settings:
    """The three networks and their training."""

    width: int = 256
    latent: int = 16
    steps: int = 4000
    # of a training image to the critic, at most, where nobody gives the steps: the samples of the 80 faces get sharper
    # until then, though the reconstruction error is least after a third of it
    showings: int = 1500
    batch: int = 64
    rate: float = 5e-4
    # of the critic, for one of generator and encoder
    critic_steps: int = 2
    lam: float = 10.0
    # weights of the errors of z and of x
    betas: tuple[float, float] = (2.0, 3.0)
    # of the running averages of generator and encoder that are kept
    average: float = 0.998
    # how often the reconstruction error is taken
    looks: int = 8
    # of the CPU; on layers this small two wait for each other
    threads: int | None = 1


QUICK = Settings(width=64, steps=150, looks=3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", default="digits", metavar="DATA",
        help=f"{', '.join(_data.NAMES)}, faces (of scikit-image) or a folder of images; default digits",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=_demo.positive, help=f"of generator and encoder, default at most {Settings.steps}"
    )
    parser.add_argument("--latent", type=_demo.positive, help=f"numbers in a latent, default {Settings.latent}")
    parser.add_argument("--seed", type=_demo.seed, default=0, help="of weights, batches and latents")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/bigan_qp.png"), help="the picture; metrics go beside it"
    )
    parser.add_argument("--device", type=_demo.device, help="default cuda where there is one, else cpu")
    parser.add_argument("--backend", default="auto", help="auto, cpu, triton, cuda or reference")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")


def run(args: argparse.Namespace) -> int:
    """The demo; 0, or 1 after one sentence about what is missing."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = QUICK if args.quick else Settings()
    given = {name: getattr(args, name) for name in ("steps", "latent") if getattr(args, name)}
    settings = replace(settings, **given)

    def work() -> dict[str, object]:
        with threads(settings.threads):
            return demo(_data.gallery(args.data, args.out.parent / "data"), settings, args, device)

    return _demo.run("bigan-qp", args, work)


def demo(images: _data.Images, settings: Settings, args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Train, score, draw; returns the metrics."""
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    if not args.steps:
        shown = settings.critic_steps * settings.batch
        settings = replace(settings, steps=max(1, min(settings.steps, settings.showings * len(images.train) // shown)))
    train, test = (scaled(part, images.levels).to(device) for part in (images.train, images.test))
    model = BiGan(images.dim, settings).to(device)
    print(
        f"BiGAN-QP on {args.data}: {len(train):,} images to train on, {len(test):,} held out, {images.dim:,} values "
        f"each; latents of {settings.latent}\n{model.critic_facts(settings)}"
    )
    average, errors = fit(model, train, test, settings)
    fitted = time.perf_counter() - began
    mean, linear = baselines(train, test, settings.latent)
    linearly = f"the best {settings.latent} linear components: {linear:.4f}"
    print(f"\n{verdict(errors)}\n(the mean image: {mean:.4f}; {linearly})")
    samples = average.samples(max(2 * COLUMNS, min(len(test), 256)), args.seed)
    near = {name: nearest(part, train)[0].mean().item() for name, part in (("samples", samples), ("held out", test))}
    print(
        f"distance to the nearest training image, root mean square: samples {near['samples']:.3f}, held-out images "
        f"{near['held out']:.3f}"
    )
    first, last = errors[0]["held_out"], errors[-1]["held_out"]
    subtitle = f"{settings.steps:,} steps, reconstruction error {first:.4f} to {last:.4f}, seed {args.seed}"
    picture(average, train, test, samples, images, f"{args.data}: {subtitle}", args.out)
    return {
        "data": args.data, "seed": args.seed, "device": str(device), "backend": args.backend,
        "settings": asdict(settings), "errors": errors, "error_of_the_mean": mean, "error_of_linear_components": linear,
        "nearest": near, "training_seconds": fitted, "total_seconds": time.perf_counter() - began,
    }  # fmt: skip


def layers(*sizes: int) -> nn.Sequential:
    """Linear layers with a leaky ReLU between them."""
    parts: list[nn.Module] = []
    for size, following in itertools.pairwise(sizes):
        parts += [nn.Linear(size, following), nn.LeakyReLU(0.2)]
    return nn.Sequential(*parts[:-1])


class BiGan(nn.Module):
    """G(z) in [-1, 1], E(x), and the critic T(x, z)."""

    def __init__(self, dim: int, settings: Settings) -> None:
        super().__init__()
        width, self.latent = settings.width, settings.latent
        self.generator = nn.Sequential(*layers(self.latent, width, width, dim), nn.Tanh())
        self.encoder = layers(dim, width, width, self.latent)
        self.critic = layers(dim + self.latent, width, width, 1)

    def values(self, x: Tensor, z: Tensor) -> Tensor:
        return self.critic(torch.cat((x, z), 1))

    def critic_facts(self, settings: Settings) -> str:
        kinds = sorted({type(module).__name__ for module in self.critic})
        return (
            f"critic: {' and '.join(kinds)} layers, {settings.critic_steps} steps for one of generator and encoder; no "
            f"Lipschitz constraint and no gradient penalty is used: what bounds it is D^2 / (2 {settings.lam:g} d)"
        )

    @torch.no_grad()
    def samples(self, count: int, seed: int) -> Tensor:
        device = next(self.parameters()).device
        return self.generator(pyflow.ops.normal((count, self.latent), seed=seed, purpose="prior", device=device))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.generator(self.encoder(x))


def critic_loss(model: BiGan, x: Tensor, z: Tensor, lam: float) -> Tensor:
    with torch.no_grad():
        x_fake, z_real = model.generator(z), model.encoder(x)
    return gan_qp_loss(model.values(x, z_real), model.values(x_fake, z), x, x_fake, z_real, z, lam=lam)


def generator_loss(model: BiGan, x: Tensor, z: Tensor, betas: tuple[float, float]) -> Tensor:
    """What generator and encoder minimise: neither is taught by the reconstruction that is the other's."""
    x_fake, z_real = model.generator(z), model.encoder(x)
    x_rec, z_rec = model.generator(z_real.detach()), model.encoder(x_fake.detach())
    return gan_qp_generator_loss(model.values(x, z_real), model.values(x_fake, z), x, x_rec, z, z_rec, betas)


def fit(model: BiGan, train: Tensor, test: Tensor, settings: Settings) -> tuple[BiGan, list[dict[str, float]]]:
    """(the model with the averaged weights, its reconstruction errors on the way)."""
    device = train.device
    average = copy.deepcopy(model).eval().requires_grad_(False)
    parts = (model.critic.parameters(), [*model.generator.parameters(), *model.encoder.parameters()])
    critic, others = (
        torch.optim.Adam(part, lr=settings.rate, betas=(0.5, 0.999), fused=device.type in ("cpu", "cuda"))
        for part in parts
    )

    def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def batch() -> tuple[Tensor, Tensor]:
        x = train[torch.randint(len(train), (settings.batch,), device=device)]
        return x, torch.randn(settings.batch, settings.latent, device=device)

    looks = {round(i * settings.steps / settings.looks) for i in range(1, settings.looks + 1)}
    errors = [look(average, train, test, 0)]
    with tqdm(total=settings.steps, desc="training", unit="step", dynamic_ncols=True, mininterval=0.2) as bar:
        for taken in range(1, settings.steps + 1):
            for _ in range(settings.critic_steps):
                of_critic = step(critic, critic_loss(model, *batch(), settings.lam))
            for parameter in model.critic.parameters():
                parameter.requires_grad_(False)
            of_others = step(others, generator_loss(model, *batch(), settings.betas))
            for parameter in model.critic.parameters():
                parameter.requires_grad_(True)
            follow(average, model, max(1 - settings.average, 9 / (10 + taken)))
            if taken in looks:
                errors.append(look(average, train, test, taken))
            bar.update()
            if taken % 20 == 0 or taken == settings.steps:
                bar.set_postfix_str(
                    f"critic {of_critic.item():.3f}, generator {of_others.item():.3f}, "
                    f"reconstruction {errors[-1]['held_out']:.4f}"
                )
        synchronize(device)
    return average, errors


def look(model: BiGan, train: Tensor, test: Tensor, step: int) -> dict[str, float]:
    """Mean squared errors of the reconstructions, of pixels in [0, 1]."""
    parts = {"training": train[: len(test)], "held_out": test}
    return {"step": step} | {name: F.mse_loss(model.reconstruct(x), x).item() / 4 for name, x in parts.items()}


def verdict(errors: list[dict[str, float]]) -> str:
    """The errors as a table, and whether they fell."""
    first, last = errors[0]["held_out"], errors[-1]["held_out"]
    lines = [f"{'step':>8}{'reconstruction error, held out':>34}{'training images':>20}"]
    lines += [f"{e['step']:>8,}{e['held_out']:>34.4f}{e['training']:>20.4f}" for e in errors]
    fell = f"fell to {last / first:.1%} of what it was" if last < first else "did not fall"
    return "\n".join([*lines, f"the reconstruction error of held-out images {fell}"])


def baselines(train: Tensor, test: Tensor, components: int) -> tuple[float, float]:
    """Errors of the mean training image, and of so many principal components, in the units of `look`."""
    mean = train.mean(0)
    directions = torch.linalg.svd(train - mean, full_matrices=False).Vh[:components]
    centred = test - mean
    rest = centred - centred @ directions.T @ directions
    return centred.square().mean().item() / 4, rest.square().mean().item() / 4


def nearest(x: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square distance of each x to the nearest training image, pixels in [0, 1], and which that is."""
    distance, which = torch.cdist(x, train).min(1)
    return distance / (2 * x.shape[1] ** 0.5), which


def scaled(pixels: Tensor, levels: int) -> Tensor:
    """Integers to [-1, 1]."""
    return pixels.float() * (2 / (levels - 1)) - 1


def picture(
    model: BiGan, train: Tensor, test: Tensor, samples: Tensor, images: _data.Images, subtitle: str, out: Path
) -> None:
    """Samples, reconstructions, ways between latents, and the samples' nearest neighbours."""
    across = min(len(test), COLUMNS // 2)
    shown = test[: min(3, len(test) // across) * across]
    pairs = torch.stack((shown, model.reconstruct(shown)), 1).unflatten(0, (-1, across)).flatten(1, 2)
    weights = torch.linspace(0, 1, COLUMNS, device=test.device)[:, None]
    with torch.no_grad():
        starts, ends = model.encoder(test[: min(6, len(test) // 2 * 2)]).chunk(2)
        ways = torch.stack([model.generator(torch.lerp(a, b, weights)) for a, b in zip(starts, ends, strict=True)])
    grid = samples[: 2 * COLUMNS].unflatten(0, (-1, COLUMNS))

    def panel(title: str, labels: list[str], values: Tensor) -> _pictures.Panel:
        return _pictures.Panel(title, labels, ((values + 1) / 2).unflatten(-1, images.shape))

    _pictures.draw(
        out, "BiGAN-QP: no Lipschitz constraint, no gradient penalty", subtitle,
        [
            panel("Samples G(z)", ["samples"] + [""] * (len(grid) - 1), grid),
            panel(
                "Held-out images, left the original, right its reconstruction G(E(x))",
                ["pairs"] + [""] * (len(pairs) - 1), pairs,
            ),
            panel("From the latent of one held-out image to another's", ["ways"] + [""] * (len(ways) - 1), ways),
            panel(
                "Samples, and below each its nearest training image", ["sample", "nearest"],
                torch.stack((grid[0], train[nearest(grid[0], train)[1]])),
            ),
        ],
    )  # fmt: skip
