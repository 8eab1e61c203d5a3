"""Train a BiGAN-QP on real images: generator, encoder and critic, without Lipschitz constraint or gradient penalty.

With Delta = T(x, E(x)) - T(G(z), z), d = mean |x - G(z)| + mean |E(x) - z| and sg = detach,

- the critic T minimises mean(-Delta + Delta**2 / (2 lam d)),
- generator G and encoder E minimise mean(Delta) + betas[0] MSE(z, E(sg[G(z)] + n)) + betas[1] MSE(x, G(sg[E(x)])),
  where n is 0 or, for faces and folders, a little noise.

Source: Su 2018, GAN-QP, arXiv:1811.07296, and its BiGAN-QP code.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Sequence
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

    # units of a linear layer, or channels of the first convolution
    width: int = 256
    convolutional: bool = False
    latent: int = 16
    steps: int = 4000
    batch: int = 64
    rate: float = 5e-4
    # steps of the critic per step of generator and encoder
    critic_steps: int = 2
    lam: float = 10.0
    # weights of the reconstruction errors of z and of x
    betas: tuple[float, float] = (2.0, 3.0)
    # training images are reflected at random, and moved by affine maps this far from the identity; 0: neither
    jitter: float = 0.0
    # standard deviation of what is added to G(z) before E recovers z: E then ignores what G never draws
    noise: float = 0.0
    # decay of the running average of the weights, which is kept
    average: float = 0.998
    # number of times that the reconstruction error is measured
    looks: int = 8
    # CPU threads: layers this small gain nothing from two
    threads: int | None = 1


# faces and folders: the critic soon tells all pairs of so few images apart, so the reconstruction terms weigh more
FEW = Settings(
    width=32, convolutional=True, latent=24, steps=1200, batch=32, critic_steps=1, lam=1.0, betas=(150.0, 250.0),
    jitter=0.05, noise=0.1,
)  # fmt: skip
QUICK = {"width": 32, "steps": 150, "looks": 3}
# the linear components that every run is compared with, beside as many as the latent has dimensions
COMPONENTS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", default="digits", metavar="DATA",
        help=f"{', '.join(_data.NAMES)}, faces (from scikit-image) or a folder of images (default digits)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=_demo.positive,
        help=f"training steps of generator and encoder (default {Settings.steps}, for faces and folders {FEW.steps})",
    )  # fmt: skip
    parser.add_argument(
        "--latent", type=_demo.positive,
        help=f"dimensions of the latent (default {Settings.latent}, for faces and folders {FEW.latent})",
    )  # fmt: skip
    _demo.add_arguments(parser, out="outputs/bigan_qp_DATA.png", seed="weights, batches and latents")
    parser.set_defaults(out=None)


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    args.out = args.out or Path("outputs") / f"bigan_qp_{Path(args.data).name}.png"
    device = _demo.chosen_device(args)
    given = {name: getattr(args, name) for name in ("steps", "latent") if getattr(args, name)}
    settings = Settings() if args.data in _data.NAMES else FEW
    settings = replace(settings, **(QUICK if args.quick else {}) | given)

    def work() -> dict[str, object]:
        with threads(settings.threads):
            return demo(_data.gallery(args.data, args.out.parent / "data"), settings, args, device)

    return _demo.run("bigan-qp", args, work)


def demo(images: _data.Images, settings: Settings, args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Train, measure, draw; returns the metrics."""
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    train, test = (scaled(part, images.levels).to(device) for part in (images.train, images.test))
    model = BiGan(images.shape, settings).to(device)
    print(
        f"BiGAN-QP on {args.data}: {len(train):,} training images, {len(test):,} held out, {images.dim:,} values each; "
        f"latents of {settings.latent} dimensions\n{model.critic_facts(settings)}"
    )
    average, errors = fit(model, train, test, settings)
    fitted = time.perf_counter() - began
    # what is compared sees the reflections too
    known = torch.cat((train, reflected(train, images.shape))) if settings.jitter else train
    mean, linear = baselines(known, test, sorted({COMPONENTS, settings.latent}))
    compared = ", ".join(f"{count} principal components: {error:.4f}" for count, error in linear.items())
    print(f"\n{verdict(errors)}\n(for comparison, the mean image: {mean:.4f}, {compared})")
    samples = average.samples(max(2 * COLUMNS, min(len(test), 256)), args.seed)
    near = {name: nearest(part, known)[0].mean().item() for name, part in (("samples", samples), ("held out", test))}
    print(
        f"root mean square distance to the nearest training image: samples {near['samples']:.3f}, held-out images "
        f"{near['held out']:.3f}"
    )
    first, last = errors[0]["held_out"], errors[-1]["held_out"]
    subtitle = (
        f"{args.data}, seed {args.seed}: {settings.steps:,} steps, reconstruction error of held-out images from "
        f"{first:.4f} to {last:.4f}\n({compared})"
    )
    picture(average, known, test, samples, images, subtitle, args.out)
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


class Planes(nn.Module):
    """Unflatten images of a shape (H, W) or (H, W, C): (B, H W C) to (B, C, H, W), channels last in memory."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = (*shape, 1)[:3]

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, self.shape).movedim(-1, 1)


class Flat(nn.Module):
    """Inverse of Planes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1).flatten(1)


def shrinking(shape: tuple[int, ...], width: int, out: int) -> nn.Sequential:
    """Return convolutions that halve the sides three times, and a linear layer."""
    planes = Planes(shape)
    parts: list[nn.Module] = [planes]
    for inputs, outputs in itertools.pairwise((planes.shape[2], width, 2 * width, 4 * width)):
        parts += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
    area = math.prod(math.ceil(side / 8) for side in shape[:2])
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(4 * width * area, out))


def growing(latent: int, width: int, shape: tuple[int, ...]) -> nn.Sequential:
    """Return a linear layer and convolutions after bilinear resizing: transposed ones would leave a grain."""
    planes = Planes(shape)
    quarter, half, whole = (tuple(math.ceil(side / part) for side in shape[:2]) for part in (4, 2, 1))
    parts: list[nn.Module] = [
        nn.Linear(latent, 2 * width * math.prod(quarter)), nn.LeakyReLU(0.2), nn.Unflatten(1, (2 * width, *quarter)),
    ]  # fmt: skip
    for size, inputs, outputs in ((half, 2 * width, width), (whole, width, width // 2)):
        parts += [nn.Upsample(size, mode="bilinear"), nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*parts, nn.Conv2d(width // 2, planes.shape[2], 3, padding=1), Flat())


class Critic(nn.Module):
    """T(x, z): a network of the features of x, joined to z."""

    def __init__(self, features: nn.Module, joint: nn.Module) -> None:
        super().__init__()
        self.features, self.joint = features, joint

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.joint(torch.cat((self.features(x), z), 1))


class BiGan(nn.Module):
    """Generator G(z) with values in [-1, 1], encoder E(x) and critic T(x, z) of flattened images."""

    def __init__(self, shape: tuple[int, ...], settings: Settings) -> None:
        super().__init__()
        self.shape, self.latent = shape, settings.latent
        width, latent, dim = settings.width, settings.latent, math.prod(shape)
        if settings.convolutional:
            generator, self.encoder = growing(latent, width, shape), shrinking(shape, width, latent)
            features = nn.Sequential(*shrinking(shape, width, 4 * width), nn.LeakyReLU(0.2))
            self.critic = Critic(features, layers(4 * width + latent, 4 * width, 1))
        else:
            generator, self.encoder = layers(latent, width, width, dim), layers(dim, width, width, latent)
            self.critic = Critic(nn.Identity(), layers(dim + latent, width, width, 1))
        self.generator = nn.Sequential(*generator, nn.Tanh())

    def critic_facts(self, settings: Settings) -> str:
        kinds = sorted({type(part).__name__ for part in self.critic.modules() if [*part.parameters(recurse=False)]})
        return (
            f"critic: {' and '.join(kinds)} layers, steps per step of generator and encoder: {settings.critic_steps}; "
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
    return gan_qp_loss(model.critic(x, z_real), model.critic(x_fake, z), x, x_fake, z_real, z, lam=lam)


def generator_loss(model: BiGan, x: Tensor, z: Tensor, betas: tuple[float, float], noise: float = 0.0) -> Tensor:
    """Return the loss of generator and encoder; each reconstruction term has a gradient to only one of them."""
    x_fake, z_real = model.generator(z), model.encoder(x)
    seen = x_fake.detach()
    if noise:
        seen = seen + noise * torch.randn_like(seen)
    x_rec, z_rec = model.generator(z_real.detach()), model.encoder(seen)
    return gan_qp_generator_loss(model.critic(x, z_real), model.critic(x_fake, z), x, x_rec, z, z_rec, betas)


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
        x = moved(x, model.shape, settings.jitter) if settings.jitter else x
        return x, torch.randn(settings.batch, settings.latent, device=device)

    looks = {round(i * settings.steps / settings.looks) for i in range(1, settings.looks + 1)}
    errors = [look(average, train, test, 0)]
    with _demo.bar(settings.steps, "training") as bar:
        for taken in range(1, settings.steps + 1):
            for _ in range(settings.critic_steps):
                of_critic = step(critic, critic_loss(model, *batch(), settings.lam))
            for parameter in model.critic.parameters():
                parameter.requires_grad_(False)
            of_others = step(others, generator_loss(model, *batch(), settings.betas, settings.noise))
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


def reflected(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return flattened images with left and right exchanged."""
    return x.unflatten(1, shape).flip(2).flatten(1)


def moved(x: Tensor, shape: tuple[int, ...], jitter: float) -> Tensor:
    """Return flattened images, reflected at random and moved by affine maps whose entries spread by `jitter`."""
    maps = torch.eye(2, 3, device=x.device) + jitter * torch.randn(len(x), 2, 3, device=x.device)
    maps[:, :, 0] *= torch.randint(2, (len(x), 1), device=x.device) * 2 - 1
    planes = Planes(shape)(x)
    grid = F.affine_grid(maps, list(planes.shape), align_corners=False)
    return Flat()(F.grid_sample(planes, grid, padding_mode="reflection", align_corners=False))


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


def baselines(train: Tensor, test: Tensor, counts: Sequence[int]) -> tuple[float, dict[int, float]]:
    """Return the errors of the mean training image and of each number of principal components, as `look` does."""
    mean = train.mean(0)
    directions = torch.linalg.svd(train - mean, full_matrices=False).Vh
    centred = test - mean
    rest = {n: centred - centred @ directions[:n].T @ directions[:n] for n in counts}
    return centred.square().mean().item() / 4, {n: r.square().mean().item() / 4 for n, r in rest.items()}


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
