"""Train a VAE by the losses it adds inside: no output, no loss outside, every layer of singular value 1."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from functools import partial
from pathlib import Path

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
from .nice import threads

# ending of the folder of Lightning's log, beside the picture
LOG = "_log"


class VAE(nn.Module):
    """Digits as 64 probabilities; its forward adds the two terms of the bound and returns nothing."""

    def __init__(self, dim: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.inward, self.inner_norm = nn.Linear(dim, hidden), nn.LayerNorm(hidden)
        self.moments = nn.Linear(hidden, 2 * latent)
        self.outward, self.outer_norm = nn.Linear(latent, hidden), nn.LayerNorm(hidden)
        self.pixels = nn.Linear(hidden, dim)
        # normalised layers cannot stretch: three numbers that are no layer's do, of what comes in and goes out
        self.stretch = nn.Parameter(torch.full((3,), 3.0))

    def forward(self, x: Tensor) -> None:
        mean, log_std = self.encode(x)
        z = mean + log_std.exp() * torch.randn_like(mean)
        logits = self.decode(z)
        add_loss(F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x), "reconstruction")
        divergence = 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std
        add_loss(divergence.sum() / len(x), "divergence")

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # the gain's norm is 1, so a unit of the hidden layer is 1 / sqrt(width) of a usual one
        hidden = F.silu(self.stretch[0] * self.inner_norm(self.inward(x)) * self.inward.out_features**0.5)
        add_metric(hidden.norm(dim=1).mean(), "row_norm")
        mean, log_std = (self.stretch[1] * self.moments(hidden)).chunk(2, 1)
        return mean, log_std.clamp(-7, 7)

    def decode(self, z: Tensor) -> Tensor:
        hidden = F.silu(self.outer_norm(self.outward(z)) * self.outward.out_features**0.5)
        return self.stretch[2] * self.pixels(hidden)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=_demo.positive, default=60)
    parser.add_argument("--hidden", type=_demo.positive, default=256, help="width of both hidden layers")
    parser.add_argument("--latent", type=_demo.positive, default=8, help="dims of z")
    parser.add_argument("--seed", type=_demo.seed, default=0, help="of weights, batches and samples")
    parser.add_argument("--out", type=Path, default=Path("outputs/loss_only_digits.png"), help="the picture; "
                        "metrics and the log go beside it")  # fmt: skip
    parser.add_argument("--device", type=_demo.device, help="default cuda where there is one, else cpu")
    parser.add_argument("--backend", default="auto", help="auto, cpu, triton, cuda or reference")
    parser.add_argument("--quick", action="store_true", help="a few epochs, to see that it runs")


def run(args: argparse.Namespace) -> int:
    """The demo; 0, or 1 after one sentence about what is missing."""
    if args.quick:
        args.epochs = min(args.epochs, 3)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))

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
    print(f"A VAE without output and without outer loss, on {len(train):,} digits; {len(test)} held out")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    module = LossOnlyModule(model, partial(torch.optim.Adam, lr=2e-3))
    began = time.perf_counter()
    # whatever Lightning advises, a demo of seconds needs no workers
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=args.epochs, accelerator="gpu" if device.type == "cuda" else device.type, devices=1,
            logger=CSVLogger(args.out.parent, name=args.out.stem + LOG), callbacks=[TQDMProgressBar(leave=False)],
            enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(module, DataLoader(train, 64, shuffle=True), DataLoader(test, 360))
    seconds = time.perf_counter() - began

    model.to(device).eval()
    after, raw = singular_values(model), singular_values(model, raw=True)
    print(f"\n{'largest singular value':<24}{'at the start':>14}{'trained, raw':>14}{'trained, used':>15}")
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
        "before": before, "raw": raw, "after": after, "log": trainer.logger.log_dir, "training_seconds": seconds,
    }  # fmt: skip


def singular_values(model: nn.Module, raw: bool = False) -> dict[str, float]:
    """The largest one of every layer's weight, as the layer uses it or before its normalisation."""
    values = {}
    for name, layer in model.named_children():
        of_layer = layer.parametrizations.weight.original if raw else layer.weight
        matrix = of_layer.detach().double()
        values[name] = torch.linalg.svdvals(matrix[None] if matrix.dim() == 1 else matrix.flatten(1))[0].item()
    return values


@torch.no_grad()
def picture(model: VAE, x: Tensor, images: _data.Images, args: argparse.Namespace, bound: float) -> None:
    """Held-out digits, their reconstructions, samples."""
    across = 12
    generator = torch.Generator().manual_seed(args.seed)
    z = torch.randn(4, across, model.latent, generator=generator).to(x.device)
    # outside the forward every use of a weight would normalise it again
    with parametrize.cached():
        back = model.decode(model.encode(x[:across])[0]).sigmoid()
        samples = model.decode(z).sigmoid()
    shape = images.shape
    _pictures.draw(
        args.out,
        "A model without output, trained by the losses inside it",
        f"VAE on digits, every layer of singular value 1; held-out bound {bound:.2f} nats, seed {args.seed}",
        [
            _pictures.Panel("Held-out digits and their reconstructions", ["x", "x → z → x"],
                            torch.stack((x[:across], back)).unflatten(-1, shape)),
            _pictures.Panel("Samples", ["z ~ N(0, 1)"] * len(z), samples.unflatten(-1, shape)),
        ],
    )  # fmt: skip
