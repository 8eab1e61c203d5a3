"""Train a VAE that returns nothing by the losses it adds in its forward, with spectral norm 1 in every layer."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

from pyflow.nn import apply_spectral_norm
from pyflow.train import LossOnlyModule, add_loss, add_metric, collect

from . import _data, _demo, _pictures
from ._demo import threads

# suffix of the folder for Lightning's log, beside the picture
LOG = "_log"
EPOCHS = 60


class VAE(nn.Module):
    """VAE with Bernoulli pixels; its forward adds the two terms of the bound as losses and returns None."""

    def __init__(self, dim: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.inward, self.inner_norm = nn.Linear(dim, hidden), nn.LayerNorm(hidden)
        self.moments = nn.Linear(hidden, 2 * latent)
        self.outward, self.outer_norm = nn.Linear(latent, hidden), nn.LayerNorm(hidden)
        self.pixels = nn.Linear(hidden, dim)
        # layers of spectral norm 1 cannot increase the scale: three learnt factors do
        self.stretch = nn.Parameter(torch.full((3,), 3.0))

    def forward(self, x: Tensor) -> None:
        mean, log_std = self.encode(x)
        z = mean + log_std.exp() * torch.randn_like(mean)
        logits = self.decode(z)
        add_loss(F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x), "reconstruction")
        divergence = 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std
        add_loss(divergence.sum() / len(x), "divergence")

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # the normalised LayerNorm gain has norm 1, so undo its factor 1 / sqrt(width)
        hidden = F.silu(self.stretch[0] * self.inner_norm(self.inward(x)) * self.inward.out_features**0.5)
        add_metric(hidden.norm(dim=1).mean(), "row_norm")
        mean, log_std = (self.stretch[1] * self.moments(hidden)).chunk(2, 1)
        return mean, log_std.clamp(-7, 7)

    def decode(self, z: Tensor) -> Tensor:
        hidden = F.silu(self.outer_norm(self.outward(z)) * self.outward.out_features**0.5)
        return self.stretch[2] * self.pixels(hidden)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=_demo.positive, help=f"training epochs (default {EPOCHS})")
    parser.add_argument("--hidden", type=_demo.positive, default=256, help="width of both hidden layers (default 256)")
    parser.add_argument("--latent", type=_demo.positive, default=8, help="dimensions of z (default 8)")
    _demo.add_arguments(
        parser, out="outputs/loss_only_digits.png", seed="weights, batches and samples", beside="metrics and the log"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    args.epochs = args.epochs or (3 if args.quick else EPOCHS)
    device = _demo.chosen_device(args)

    def work() -> dict[str, object]:
        with threads(1 if device.type == "cpu" else None):
            return demo(_data.load("digits", args.out.parent / "data"), args, device)

    return _demo.run("loss-only", args, work, folders=[LOG])


def demo(images: _data.Images, args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Train, compare singular values, draw; returns the metrics."""
    torch.manual_seed(args.seed)
    model = VAE(images.dim, args.hidden, args.latent)
    before = singular_values(model)
    apply_spectral_norm(model)
    scale = images.levels - 1
    train, test = (TensorDataset(part.float() / scale) for part in (images.train, images.test))
    print(
        f"a VAE that returns nothing and is trained by the losses added in its forward; {len(train):,} training digits "
        f"and {len(test)} held-out digits"
    )

    args.out.parent.mkdir(parents=True, exist_ok=True)
    module = LossOnlyModule(model, partial(torch.optim.Adam, lr=2e-3))
    logger = CSVLogger(args.out.parent, name=args.out.stem + LOG)
    began = time.perf_counter()
    # silence Lightning's advice on data loader workers: this takes seconds
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=args.epochs, accelerator="gpu" if device.type == "cuda" else device.type,
            devices=[device.index] if device.index and device.type != "cpu" else 1,
            logger=logger, callbacks=[TQDMProgressBar(leave=False)],
            enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(module, DataLoader(train, 64, shuffle=True), DataLoader(test, 360))
    seconds = time.perf_counter() - began

    model.to(device).eval()
    after, raw = singular_values(model), singular_values(model, raw=True)
    print(f"\n{'largest singular value':<24}{'initial':>14}{'trained, raw':>14}{'normalised':>15}")
    for name in before:
        print(f"{name:<24}{before[name]:>14.4f}{raw[name]:>14.4f}{after[name]:>15.6f}")
    x = test.tensors[0].to(device)
    with torch.no_grad(), collect() as collected:
        torch.manual_seed(args.seed)
        model(x)
    held_out = {name: value.item() for name, value in {**collected.losses, **collected.metrics}.items()}
    print("\nheld out: " + ", ".join(f"{name} {value:.3f}" for name, value in held_out.items()))
    picture(model, x, images, args, collected.total().item())
    return {
        "epochs": args.epochs, "seed": args.seed, "device": str(device), "backend": args.backend, "held_out": held_out,
        "before": before, "raw": raw, "after": after, "log": logger.log_dir, "training_seconds": seconds,
    }  # fmt: skip


def singular_values(model: nn.Module, raw: bool = False) -> dict[str, float]:
    """Return the largest singular value of each layer's weight, as used, or before normalisation with `raw`."""
    values = {}
    for name, child in model.named_children():
        layer: Any = child
        of_layer: Tensor = layer.parametrizations.weight.original if raw else layer.weight
        matrix = of_layer.detach().double()
        values[name] = torch.linalg.svdvals(matrix[None] if matrix.dim() == 1 else matrix.flatten(1))[0].item()
    return values


@torch.no_grad()
def picture(model: VAE, x: Tensor, images: _data.Images, args: argparse.Namespace, bound: float) -> None:
    """Draw held-out digits, their reconstructions, and samples."""
    across = 12
    generator = torch.Generator().manual_seed(args.seed)
    z = torch.randn(4, across, model.latent, generator=generator).to(x.device)
    # compute each normalised weight once
    with parametrize.cached():
        back = model.decode(model.encode(x[:across])[0]).sigmoid()
        samples = model.decode(z).sigmoid()
    shape = images.shape
    _pictures.draw(
        args.out,
        "A model that returns nothing, trained by the losses added in its forward",
        f"VAE on digits, spectral norm 1 in every layer; held-out bound {bound:.2f} nats, seed {args.seed}",
        [
            _pictures.Panel("Held-out digits and their reconstructions", ["x", "x → z → x"],
                            torch.stack((x[:across], back)).unflatten(-1, shape)),
            _pictures.Panel("Samples", ["z ~ N(0, 1)"] * len(z), samples.unflatten(-1, shape)),
        ],
    )  # fmt: skip
