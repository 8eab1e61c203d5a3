"""Train a BiGAN-QP on real images: generator, encoder and critic, without Lipschitz constraint or gradient penalty."""

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

import pyflow
from pyflow.ops import gan_qp_generator_loss, gan_qp_loss

from . import _data, _demo, _pictures
from ._demo import synchronize, threads
from ._loops import follow

# images in a row of the picture
COLUMNS = 10


@dataclass(frozen=True)
class Settings:
    """Networks and training."""

    width: int = 256
    latent: int = 16
    steps: int = 4000
    # without --steps, training stops when the critic has seen each image this often: samples of the 80 faces get
    # sharper until then, although the reconstruction error is lowest after a third of it
    showings: int = 1500
    batch: int = 64
    rate: float = 5e-4
    # steps of the critic per step of generator and encoder
    critic_steps: int = 2
    lam: float = 10.0
    # weights of the reconstruction errors of z and of x
    betas: tuple[float, float] = (2.0, 3.0)
    # decay of the running average of the weights, which is kept
    average: float = 0.998
    # number of times that the reconstruction error is measured
    looks: int = 8
    # CPU threads: layers this small gain nothing from two
    threads: int | None = 1


QUICK = Settings(width=64, steps=150, looks=3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", default="digits", metavar="DATA",
        help=f"{', '.join(_data.NAMES)}, faces (from scikit-image) or a folder of images (default digits)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=_demo.positive,
        help=f"training steps of generator and encoder (default {Settings.steps}, fewer for small data sets)",
    )  # fmt: skip
    parser.add_argument("--latent", type=_demo.positive, help=f"dimensions of the latent (default {Settings.latent})")
    _demo.add_arguments(parser, out="outputs/bigan_qp.png", seed="weights, batches and latents")


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    device = _demo.chosen_device(args)
    settings = QUICK if args.quick else Settings()
    given = {name: getattr(args, name) for name in ("steps", "latent") if getattr(args, name)}
    settings = replace(settings, **given)

    def work() -> dict[str, object]:
        with threads(settings.threads):
            return demo(_data.gallery(args.data, args.out.parent / "data"), settings, args, device)

    return _demo.run("bigan-qp", args, work)


def demo(images: _data.Images, settings: Settings, args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Train, measure, draw; returns the metrics."""
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    if not args.steps:
        per_step = settings.critic_steps * settings.batch
        most = settings.showings * len(images.train) // per_step
        settings = replace(settings, steps=max(1, min(settings.steps, most)))
    train, test = (scaled(part, images.levels).to(device) for part in (images.train, images.test))
    model = BiGan(images.dim, settings).to(device)
    print(
        f"BiGAN-QP on {args.data}: {len(train):,} training images, {len(test):,} held out, {images.dim:,} values each; "
        f"latents of {settings.latent} dimensions\n{model.critic_facts(settings)}"
    )
    average, errors = fit(model, train, test, settings)
    fitted = time.perf_counter() - began
    mean, linear = baselines(train, test, settings.latent)
    print(
        f"\n{verdict(errors)}\n(for comparison, the mean image: {mean:.4f}; the first {settings.latent} principal "
        f"components: {linear:.4f})"
    )
    samples = average.samples(max(2 * COLUMNS, min(len(test), 256)), args.seed)
    near = {name: nearest(part, train)[0].mean().item() for name, part in (("samples", samples), ("held out", test))}
    print(
        f"root mean square distance to the nearest training image: samples {near['samples']:.3f}, held-out images "
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
    """Return linear layers with a leaky ReLU after each but the last."""
    parts: list[nn.Module] = []
    for size, following in itertools.pairwise(sizes):
        parts += [nn.Linear(size, following), nn.LeakyReLU(0.2)]
    return nn.Sequential(*parts[:-1])


class BiGan(nn.Module):
    """Generator G(z) with values in [-1, 1], encoder E(x) and critic T(x, z)."""

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
            f"critic: {' and '.join(kinds)} layers, {settings.critic_steps} steps per step of generator and encoder; "
            f"no Lipschitz constraint and no gradient penalty is used: the term D^2 / (2 {settings.lam:g} d) bounds it"
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
    """Return the loss of generator and encoder; each reconstruction term has a gradient to only one of them."""
    x_fake, z_real = model.generator(z), model.encoder(x)
    x_rec, z_rec = model.generator(z_real.detach()), model.encoder(x_fake.detach())
    return gan_qp_generator_loss(model.values(x, z_real), model.values(x_fake, z), x, x_rec, z, z_rec, betas)


def fit(model: BiGan, train: Tensor, test: Tensor, settings: Settings) -> tuple[BiGan, list[dict[str, float]]]:
    """Return (the model with the averaged weights, its reconstruction errors during training)."""
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
    with _demo.bar(settings.steps, "training") as bar:
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
    """Return the mean squared reconstruction errors of pixels in [0, 1]."""
    parts = {"training": train[: len(test)], "held_out": test}
    return {"step": step} | {name: F.mse_loss(model.reconstruct(x), x).item() / 4 for name, x in parts.items()}


def verdict(errors: list[dict[str, float]]) -> str:
    """Return a table of the errors and a sentence on whether they fell."""
    first, last = errors[0]["held_out"], errors[-1]["held_out"]
    lines = [f"{'step':>8}{'reconstruction error, held out':>34}{'training images':>20}"]
    lines += [f"{e['step']:>8,}{e['held_out']:>34.4f}{e['training']:>20.4f}" for e in errors]
    fell = f"fell to {last / first:.1%} of its initial value" if last < first else "did not fall"
    return "\n".join([*lines, f"the reconstruction error of held-out images {fell}"])


def baselines(train: Tensor, test: Tensor, components: int) -> tuple[float, float]:
    """Return the errors of the mean training image and of principal components, in the units of `look`."""
    mean = train.mean(0)
    directions = torch.linalg.svd(train - mean, full_matrices=False).Vh[:components]
    centred = test - mean
    rest = centred - centred @ directions.T @ directions
    return centred.square().mean().item() / 4, rest.square().mean().item() / 4


def nearest(x: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Return each x's root mean square distance to the nearest training image, pixels in [0, 1], and its index."""
    distance, which = torch.cdist(x, train).min(1)
    return distance / (2 * x.shape[1] ** 0.5), which


def scaled(pixels: Tensor, levels: int) -> Tensor:
    """Scale integer pixels to [-1, 1]."""
    return pixels.float() * (2 / (levels - 1)) - 1


def picture(
    model: BiGan, train: Tensor, test: Tensor, samples: Tensor, images: _data.Images, subtitle: str, out: Path
) -> None:
    """Draw samples, reconstructions, interpolations in latent space, and nearest neighbours of the samples."""
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
                "Held-out images (left) and their reconstructions G(E(x)) (right)",
                ["pairs"] + [""] * (len(pairs) - 1), pairs,
            ),
            panel(
                "Interpolations between the latents of two held-out images", ["z → z′"] + [""] * (len(ways) - 1), ways
            ),
            panel(
                "Samples and the nearest training images", ["sample", "nearest"],
                torch.stack((grid[0], train[nearest(grid[0], train)[1]])),
            ),
        ],
    )  # fmt: skip
