"""Train NICE on real images, compare its likelihood with a Gaussian's, and draw samples and reconstructions."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import pyflow
from pyflow.flows import NICE, bits_per_dim, dequantize

from . import _data, _demo, _nice_peers, _pictures
from ._data import Gaussian, noisy
from ._demo import synchronize, threads
from ._loops import follow

TEMPERATURES = (0.5, 0.7, 0.85, 1.0)


@dataclass(frozen=True)
class Settings:
    """Network and training; the defaults are for digits."""

    hidden: tuple[int, ...] = (256,) * 3
    epochs: int = 250
    patience: int = 50
    batch: int = 128
    rate: float = 1e-3
    # AdamW's weight decay of the matrices: 1,257 images overfit without it
    decay: float = 2.0
    # decay of the running average of the weights, which is scored and kept
    average: float = 0.99
    # CPU threads: two gain nothing on layers this small and wait for each other on a busy machine
    threads: int | None = 1


SETTINGS = {
    "digits": Settings(),
    "mnist": Settings((1000,) * 5, 60, patience=8, batch=256, rate=5e-4, decay=0.1, average=0.999, threads=None),
    "cifar10": Settings((2000,) * 4, 60, patience=8, batch=256, rate=3e-4, decay=0.1, average=0.999, threads=None),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", choices=_data.NAMES, default="digits", help="default digits, which needs no download")
    parser.add_argument(
        "--prior", choices=("logistic", "gaussian"), default="logistic", help="density of z (default logistic)"
    )
    parser.add_argument("--epochs", type=_demo.positive, help="largest number of epochs; training may stop earlier")
    _demo.add_arguments(parser, out="outputs/nice_DATA.png", seed="weights, batches, noise and samples")
    # DATA is known when the arguments are parsed
    parser.set_defaults(out=None)


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    args.out = args.out or Path("outputs") / f"nice_{args.data}.png"
    device = _demo.chosen_device(args)
    settings = SETTINGS[args.data]
    if args.quick:
        settings = replace(settings, epochs=5)
    if args.epochs:
        settings = replace(settings, epochs=args.epochs)

    def work() -> dict[str, object]:
        with threads(settings.threads):
            return demo(_data.load(args.data, args.out.parent / "data"), settings, args, device, args.out)

    return _demo.run("nice", args, work)


def demo(
    images: _data.Images, settings: Settings, args: argparse.Namespace, device: torch.device, out: Path
) -> dict[str, object]:
    """Train, compare likelihoods, draw; returns the metrics."""
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    train = images.train.to(device)
    print(
        f"NICE on {args.data}: {len(train):,} training images, {len(images.validation):,} for early stopping, "
        f"{len(images.test):,} held out; {images.dim} pixels with {images.levels} levels each"
    )
    flow = NICE(images.dim, hidden=settings.hidden, prior=args.prior, data_init=True).to(device)
    flow.log_prob(dequantize(train[:2048], images.levels))
    validation = noisy(images.validation, images.levels, device, seed=1)
    flow, epochs = fit(flow, train, validation, images.levels, settings)
    fitted = time.perf_counter() - began

    test = noisy(images.test, images.levels, device, seed=2)
    nats = mean_log_prob(flow, test)
    with pyflow.backend("reference"):
        reference = mean_log_prob(flow, test)
    gaussian = Gaussian.fit(images.train, validation, images.levels).log_prob(test).mean().item()
    scores = {"NICE": nats, "NICE, reference ops": reference, "Gaussian, full covariance": gaussian}
    print(f"\n{'held out':<28}{'nats':>10}{'bits/dim':>10}")
    for name, value in scores.items():
        print(f"{name:<28}{value:>10.2f}{bits_per_dim(torch.tensor(value), images.dim, images.levels):>10.3f}")
    print(f"pyflow's operations and the reference differ by {abs(nats - reference):.1e} nats on the same weights")

    ours, theirs = epoch_seconds(flow, train, images.levels, settings, rounds=1 if args.quick else 11)
    why = ": nearly all of a NICE epoch is matrix products" if 0.8 < theirs / ours < 1.25 else ""
    print(f"time per epoch: {ours:.3f} s, reference {theirs:.3f} s, ratio {theirs / ours:.2f}{why}")

    steps = len(train) // settings.batch
    first = dequantize(train[: settings.batch], images.levels)
    libraries = compare(flow, first, steps, rounds=1 if args.quick else 11)
    error = picture(flow, images, device, args, nats, gaussian, libraries, out)
    print(f"reconstruction x -> z -> x of held-out images: largest error {error:.1e}")
    return {
        "data": args.data, "prior": args.prior, "seed": args.seed, "device": str(device), "backend": args.backend,
        "epochs": epochs, "settings": asdict(settings), "nats": nats,
        "bits_per_dim": bits_per_dim(torch.tensor(nats), images.dim, images.levels).item(),
        "reference_nats": reference, "gaussian_nats": gaussian,
        "gaussian_bits_per_dim": bits_per_dim(torch.tensor(gaussian), images.dim, images.levels).item(),
        "reconstruction_error": error, "epoch_seconds": ours, "reference_epoch_seconds": theirs,
        "library_seconds": libraries, "training_seconds": fitted, "total_seconds": time.perf_counter() - began,
    }  # fmt: skip


def fit(flow: NICE, train: Tensor, validation: Tensor, levels: int, settings: Settings) -> tuple[NICE, int]:
    """Return (the flow with the averaged weights that score best on the validation images, epochs run)."""
    step = stepper(flow, settings)
    average, best_nats, best_epoch = copy.deepcopy(flow), -math.inf, 0
    best: dict[str, Tensor] | None = None
    steps = len(train) // settings.batch
    taken, loss = 0, train.new_zeros((), dtype=torch.float32)
    with _demo.bar(settings.epochs * steps, "training") as bar:
        for epoch in range(1, settings.epochs + 1):
            for x in batches(train, levels, settings.batch):
                taken += 1
                # half a cosine that ends at 0
                new = step(x, settings.rate * 0.5 * (1 + math.cos(math.pi * taken / (settings.epochs * steps))))
                loss = new if taken == 1 else loss.lerp(new, 0.05)
                follow(average, flow, max(1 - settings.average, 9 / (10 + taken)))
                bar.update()
            nats = mean_log_prob(average, validation)
            if nats > best_nats:
                best, best_nats, best_epoch = copy.deepcopy(average.state_dict()), nats, epoch
            bits = bits_per_dim(-loss, train.shape[1], levels).item()
            bar.set_description(f"epoch {epoch}")
            running = f"loss {loss.item():.2f} nats, {bits:.3f} bits/dim"
            bar.set_postfix_str(f"{running}, validation {nats:.2f}, best {best_nats:.2f}")
            if epoch - best_epoch >= settings.patience:
                break
    assert best is not None, "the validation likelihood was never finite"
    average.load_state_dict(best)
    return average, epoch


def stepper(flow: NICE, settings: Settings) -> Callable[[Tensor, float], Tensor]:
    """Return a function (batch, learning rate) -> loss that takes one optimiser step."""
    matrices = [p for p in flow.parameters() if p.dim() == 2]
    vectors = [p for p in flow.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": settings.decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, fused=vectors[0].device.type in ("cpu", "cuda"))

    def step(x: Tensor, rate: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        # the first gradients after data-dependent initialisation are large
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 50.0)
        optimizer.step()
        return loss.detach()

    return step


def batches(images: Tensor, levels: int, size: int) -> Iterator[Tensor]:
    """Yield full batches in random order with fresh dequantisation noise."""
    order = torch.randperm(len(images), device=images.device)
    for rows in order[: len(order) // size * size].split(size):
        yield dequantize(images[rows], levels)


@torch.no_grad()
def mean_log_prob(flow: NICE, x: Tensor) -> float:
    return torch.cat([flow.log_prob(part) for part in x.split(4096)]).double().mean().item()


def epoch_seconds(flow: NICE, train: Tensor, levels: int, settings: Settings, rounds: int) -> tuple[float, float]:
    """Return the median seconds of a training epoch on the chosen backend and on the reference, timed in turn."""
    step = stepper(copy.deepcopy(flow), settings)
    subset = train[: 20 * settings.batch]

    def once() -> float:
        synchronize(train.device)
        began = time.perf_counter()
        for x in batches(subset, levels, settings.batch):
            step(x, 0.0)
        synchronize(train.device)
        return (time.perf_counter() - began) * (len(train) // settings.batch) / (len(subset) // settings.batch)

    once()
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(once())
        with pyflow.backend("reference"):
            theirs.append(once())
    return statistics.median(ours), statistics.median(theirs)


def compare(flow: NICE, x: Tensor, steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Print and return times in other libraries, with the same networks and a Gaussian prior; x is one batch."""
    found, missing = _nice_peers.times(flow, x, rounds)
    all_times = {name: {**seconds._asdict(), "epoch": steps * seconds.step} for name, seconds in found.items()}
    titles = {"log_prob": f"log_prob of {len(x)}", "epoch": f"epoch, {steps} steps", "samples": "1,000 samples"}
    print(f"\n{'Median times, this machine':<28}" + "".join(f"{title:>18}" for title in titles.values()))
    for name, seconds in all_times.items():
        print(f"{name:<28}" + "".join(f"{seconds[each] * 1e3:>15.2f} ms" for each in titles))
    for sentence in missing:
        print(sentence)
    return all_times


@torch.no_grad()
def picture(
    flow: NICE,
    images: _data.Images,
    device: torch.device,
    args: argparse.Namespace,
    nats: float,
    gaussian: float,
    libraries: dict[str, dict[str, float]],
    out: Path,
) -> float:
    """Draw times, samples, reconstructions and interpolations; returns the largest reconstruction error."""
    across = 12
    samples = torch.stack([flow.sample(across, temperature=t, seed=args.seed + 1) for t in TEMPERATURES])
    x = noisy(images.test, images.levels, device, seed=2)[: len(images.test)]
    z, _ = flow(x)
    back, _ = flow.inverse(z)
    error = (back - x).abs().max().item()
    weight = torch.linspace(0, 1, across, device=device)[:, None]
    ends = [(z[i], z[i + across // 2]) for i in range(4)]
    between = torch.stack([flow.inverse(torch.lerp(a, b, weight))[0] for a, b in ends])

    def panel(title: str, labels: list[str], values: Tensor) -> _pictures.Panel:
        return _pictures.Panel(title, labels, values.unflatten(-1, images.shape))

    _pictures.draw(
        out,
        f"NICE on {args.data}",
        f"held out: {nats:.1f} nats ({bits_per_dim(torch.tensor(nats), images.dim, images.levels):.2f} bits/dim), "
        f"full-covariance Gaussian {gaussian:.1f}; {args.prior} prior, seed {args.seed}",
        [
            panel("Samples from the same noise at four temperatures", [f"T = {t:g}" for t in TEMPERATURES], samples),
            panel(
                f"Held-out images and their reconstructions, largest error {error:.0e}",
                ["x", "x → z → x"],
                torch.stack((x[:across], back[:across])),
            ),
            panel("Linear interpolation in z between two held-out images", ["z → z′"] * len(ends), between),
        ],
        charts=[
            _pictures.Bars(f"{title}, milliseconds", {name: 1e3 * times[key] for name, times in libraries.items()})
            for title, key in (("A training epoch", "epoch"), ("1,000 samples", "samples"))
        ],
    )
    return error
