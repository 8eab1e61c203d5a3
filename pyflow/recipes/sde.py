"""Train a score network on real digits, compute its likelihood, and sample it by every method."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torchdiffeq  # noqa: F401 (the likelihood needs it: fail before the training, not after)
from torch import Tensor, nn
from torch.nn import functional as F

import pyflow
from pyflow.flows import bits_per_dim, dequantize
from pyflow.ops import denoising_loss, perturb, sample_seeds, uniform
from pyflow.sde import VPSDE, log_likelihood, sample

from ..cli import Refused
from . import _data, _demo, _loops, _pictures
from ._data import Gaussian, noisy
from ._demo import synchronize, threads
from ._loops import cosine_rate, follow

METHODS = ("euler_maruyama", "reverse_diffusion", "ancestral", "pc", "probability_flow")
# smallest time of samplers, training and likelihood: std is 0.01 there, against 0.12 between two pixel levels
EPS = 1e-3
# sample WHICH of a batch of BATCH is also drawn alone
BATCH, WHICH, MICRO_BATCH = 64, 3, 8


@dataclass(frozen=True)
class Settings:
    """Network, training and samplers."""

    width: int = 256
    blocks: int = 3
    dropout: float = 0.1
    steps: int = 3000
    batch: int = 128
    rate: float = 2e-3
    warmup: int = 200
    decay: float = 0.01
    # decay of the running average of the weights, which is kept
    average: float = 0.999
    sampling_steps: int = 500
    samples: int = 256
    # number of held-out digits whose likelihood is computed
    scored: int = 360
    rounds: int = 7
    compile: bool = True
    # CPU threads: layers this small gain nothing from two
    threads: int | None = 1


QUICK = Settings(steps=60, warmup=10, sampling_steps=50, samples=64, scored=40, rounds=1, compile=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=_demo.positive, help=f"training steps (default {Settings.steps})")
    parser.add_argument(
        "--sampling-steps",
        type=_demo.positive,
        help=f"steps of every sampler, more than 20 (default {Settings.sampling_steps})",
    )
    _demo.add_arguments(
        parser,
        out="outputs/sde.png",
        seed="weights, batches, noise and samples",
        quick="a short run without torch.compile, to check that everything works",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    device = _demo.chosen_device(args)
    settings = QUICK if args.quick else Settings()
    for name in ("steps", "sampling_steps"):
        if getattr(args, name):
            settings = replace(settings, **{name: getattr(args, name)})

    def work() -> dict[str, object]:
        if settings.sampling_steps <= VPSDE().beta_max:
            raise Refused(f"--sampling-steps must be more than 20, got {settings.sampling_steps}")
        with threads(settings.threads):
            return demo(_data.load("digits", args.out.parent / "data"), settings, args, device)

    return _demo.run("sde", args, work)


def demo(images: _data.Images, settings: Settings, args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Train, compute likelihoods, sample, time, compare, draw; returns the metrics."""
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    sde = VPSDE()
    print(
        f"score network for {sde} on digits: {len(images.train):,} training images, {len(images.test):,} held out; "
        f"{images.dim} pixels with {images.levels} levels each"
    )
    net = ScoreNet(sde, images, settings).to(device)
    net, loss = fit(net, sde, images, settings, args.seed)
    fitted = time.perf_counter() - began

    likelihoods = score(sde, net, images, settings.scored, args.seed)
    drawn = [draw(sde, net, method, settings, args.seed) for method in METHODS]
    distances, among_digits = compare(drawn, images, settings.samples)
    paces = {
        case.name: _loops.pace(
            sde, net, case, eps=EPS, rounds=settings.rounds, compiled=settings.compile, device=device
        )
        for case in _loops.CASES
    }
    error = _loops.difference(sde, net, (BATCH, images.dim), settings.sampling_steps, EPS, device)
    with_network, without = (paces[case.name]["pyflow"] for case in _loops.CASES[:2])
    print(f"\n{_loops.table(paces)}")
    print(
        f"x: speed-up over eager torch. Whole loops, drawing the prior included, {torch.get_num_threads()} CPU "
        f"thread(s); the network, the same in\nall loops, takes {1 - with_network / without:.0%} of pyflow's step on "
        "64 digits. Given the same noise, samples of eager torch and of pyflow\n"
        f"{f'differ by {error:.1e}' if error else 'are equal bit for bit'}"
    )
    found = pairs(sde, net, settings, args.seed)
    print(f"\nsample {WHICH} of a batch of {BATCH}, and the same sample drawn alone with its seed (method ancestral):")
    for pair in found:
        print(f"  {pair.how + ':':<46}{pair.said}")
    ours, theirs = (f"{row['bits_per_dim']:.2f}" for row in likelihoods)
    held_out = f"{ours} bits/dim held out, full-covariance Gaussian {theirs}"
    picture(drawn, found, images, f"VP SDE, {settings.sampling_steps} steps; {held_out}; seed {args.seed}", args.out)
    return {
        "data": "digits", "sde": repr(sde), "seed": args.seed, "device": str(device), "backend": args.backend,
        "settings": asdict(settings), "loss": loss,
        "likelihoods": likelihoods,
        "methods": [
            {"method": d.method, "scores_per_step": d.scores_per_step, "steps_per_second": d.steps_per_second,
             "energy_distance": distance} for d, distance in zip(drawn, distances, strict=True)
        ],
        "energy_distances_among_digits": among_digits, "steps_per_second": paces, "loop_difference": error,
        "alone": [
            {"how": p.how, "equal": torch.equal(p.of_batch, p.alone), "difference": p.difference} for p in found
        ],
        "training_seconds": fitted, "total_seconds": time.perf_counter() - began,
    }  # fmt: skip


class ScoreNet(nn.Module):
    """Score of x_t (flattened): the score of a normal with the pixels' means and variances, plus a network."""

    mean: Tensor
    variance: Tensor
    frequencies: Tensor

    def __init__(self, sde: VPSDE, images: _data.Images, settings: Settings) -> None:
        super().__init__()
        width, dim = settings.width, images.dim
        x = 2 * images.train.float().add(0.5).div(images.levels) - 1
        self.sde = sde
        self.register_buffer("mean", x.mean(0))
        # plus the variance of the dequantisation noise
        self.register_buffer("variance", x.var(0) + 1 / (3 * images.levels**2))
        self.register_buffer("frequencies", torch.linspace(0, 10, 32))
        self.time = nn.Sequential(nn.Linear(64, 64), nn.SiLU())
        self.first = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(Block(width, settings.dropout) for _ in range(settings.blocks))
        last = nn.Linear(width, dim)
        self.last = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the score (B, dim) of x (B, dim), about in [-1, 1], at times t (B,)."""
        alpha, std = (v[:, None] for v in self.sde.marginal(t))
        total = alpha.square() * self.variance + std.square()
        centred = x - alpha * self.mean
        phase = std.log() * self.frequencies
        time = self.time(torch.cat((phase.sin(), phase.cos()), 1))
        h = self.first(centred * total.rsqrt())
        for block in self.blocks:
            h = block(h, time)
        # scaled so that the network's target has unit variance at every t
        return -centred / total - alpha / std * (self.variance / total).sqrt() * self.last(h)


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.time = nn.LayerNorm(width), nn.Linear(64, width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        return h + self.down(self.dropout(F.silu(self.up(self.norm(h)) + self.time(time))))


def fit(net: ScoreNet, sde: VPSDE, images: _data.Images, settings: Settings, seed: int) -> tuple[ScoreNet, float]:
    """Return (the network with the averaged weights, the running loss at the end)."""
    device = net.mean.device
    train = images.train.to(device)
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        net.parameters(), betas=(0.9, 0.99), weight_decay=settings.decay, fused=device.type in ("cpu", "cuda")
    )
    places = torch.arange(settings.batch, device=device) / settings.batch
    running = torch.zeros((), device=device)
    with _demo.bar(settings.steps, "training") as bar:
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = cosine_rate(step, settings.rate, settings.warmup, settings.steps)
            x = 2 * dequantize(train[torch.randint(len(train), (settings.batch,), device=device)], images.levels) - 1
            # evenly spaced over (EPS, 1), shifted by one random number per step
            t = EPS + (1 - EPS) * ((uniform((1,), seed=seed, step=step, purpose="data", device=device) + places) % 1)
            alpha, std = sde.marginal(t)
            # the loss regenerates the noise that perturb added
            score = net(perturb(x, alpha, std, seed=seed, step=step), t)
            loss = denoising_loss(score, std, seed=seed, step=step).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 20.0)
            optimizer.step()
            follow(average, net, max(1 - settings.average, 9 / (10 + step)))
            loss = loss.detach()
            running = loss if step == 0 else running.lerp(loss, 0.02)
            bar.update()
            if step % 50 == 49 or step + 1 == settings.steps:
                share = 2 * running.item() / images.dim
                bar.set_postfix_str(f"loss {running.item():.3f}, {share:.1%} of the noise left")
    return average, running.item()


def score(sde: VPSDE, net: ScoreNet, images: _data.Images, count: int, seed: int) -> list[dict[str, str | int | float]]:
    """Return the likelihoods of the network and of a Gaussian on the same dequantised held-out digits."""
    x = noisy(images.test, images.levels, net.mean.device, seed=2)[: min(count, len(images.test))]
    validation = noisy(images.validation, images.levels, net.mean.device, seed=1)
    gaussian = Gaussian.fit(images.train, validation, images.levels)
    nats = {"score network": log_prob(sde, net, x, seed), "Gaussian, full covariance": gaussian.log_prob(x)}
    rows = [likelihood(model, values, images) for model, values in nats.items()]
    print(f"\n{'held out':<28}{'nats':>10}{'bits/dim':>10}{'± bits':>8}")
    for row in rows:
        print("{model:<28}{nats:>10.2f}{bits_per_dim:>10.3f}{standard_error:>8.3f}".format_map(row))
    print(
        f"{len(x)} held-out digits, dequantised as (x + u) / {images.levels} with the first u of `pyflow demo nice`, "
        f"so the numbers compare;\nprobability-flow ODE to t = {EPS:g}, divergence estimated with one probe per digit"
    )
    return rows


def likelihood(model: str, nats: Tensor, images: _data.Images) -> dict[str, str | int | float]:
    """Return means over the digits and the standard error of the bits per dimension."""
    bits = bits_per_dim(nats.double(), images.dim, images.levels)
    return {
        "model": model, "digits": len(nats), "nats": nats.double().mean().item(),
        "bits_per_dim": bits.mean().item(), "standard_error": (bits.std() / len(bits) ** 0.5).item(),
    }  # fmt: skip


def log_prob(sde: VPSDE, net: ScoreNet, x: Tensor, seed: int) -> Tensor:
    """Return log-likelihoods in nats of x (N, dim) in [0, 1]; the network's input is 2 x - 1."""
    parts = (log_likelihood(sde, net, 2 * part - 1, eps=EPS, seed=seed) for part in x.split(512))
    return torch.cat([*parts]) + x.shape[1] * math.log(2)


@dataclass(frozen=True)
class Drawn:
    """Samples of one method, (N, dim) about in [0, 1]; `states` is the first sample at `times`; and the cost."""

    method: str
    samples: Tensor
    times: tuple[float, ...]
    states: Tensor
    scores_per_step: int
    steps_per_second: float


def draw(sde: VPSDE, net: ScoreNet, method: str, settings: Settings, seed: int, columns: int = 10) -> Drawn:
    n, calls = settings.sampling_steps, 0
    times: list[float] = []
    states: list[Tensor] = []
    kept = {round(i * (n - 1) / (columns - 1)) for i in range(columns)}

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return net(x, t)

    def keep(i: int, t: float, x: Tensor) -> None:
        bar.update()
        if i in kept:
            times.append(t)
            states.append(x[0].clone())

    began = time.perf_counter()
    with _demo.bar(n, method) as bar:
        x = sample(
            sde, counted, (settings.samples, len(net.mean)), steps=n, method=method, eps=EPS, seed=seed,
            device=net.mean.device, progress=False, callback=keep,
        )  # fmt: skip
        synchronize(x.device)
    speed = n / (time.perf_counter() - began)
    return Drawn(method, unscaled(x), tuple(times), unscaled(torch.stack(states)), calls // n, speed)


def unscaled(x: Tensor) -> Tensor:
    return (x.cpu() + 1) / 2


def compare(drawn: Sequence[Drawn], images: _data.Images, size: int) -> tuple[list[float], list[float]]:
    """Return energy distances to the held-out digits: of each method's samples, and of equally large training sets."""
    test = noisy(images.test, images.levels, torch.device("cpu"), seed=2)[: len(images.test)]
    digits = dequantize(images.train, images.levels, torch.Generator().manual_seed(3))
    among = [energy_distance(part, test) for part in digits.split(size)[: max(1, len(digits) // size)]]
    distances = [energy_distance(d.samples, test) for d in drawn]
    print(f"\n{'samples':<20}{'scores/step':>13}{'steps/s':>10}{'energy distance':>18}")
    for d, distance in zip(drawn, distances, strict=True):
        print(f"{d.method:<20}{d.scores_per_step:>13}{d.steps_per_second:>10,.0f}{distance:>18.4f}")
    print(
        f"energy distance of {size} samples to the {len(test)} held-out digits; for {len(among)} sets of {size} "
        f"training digits it is {min(among):.4f} to {max(among):.4f}"
    )
    return distances, among


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return the unbiased estimate of 2 E|x - y| - E|x - x'| - E|y - y'|; its mean is 0 for equal distributions."""
    x, y = x.double(), y.double()
    return 2 * torch.cdist(x, y).mean().item() - sum(torch.pdist(part).mean().item() for part in (x, y))


@dataclass(frozen=True)
class Pair:
    """Sample WHICH of a batch of BATCH, the same sample drawn alone, and the way in which both were drawn."""

    how: str
    of_batch: Tensor
    alone: Tensor

    @property
    def difference(self) -> float:
        return (self.of_batch - self.alone).abs().max().item()

    @property
    def said(self) -> str:
        equal = torch.equal(self.of_batch, self.alone)
        return "equal bit for bit" if equal else f"largest difference {self.difference:.1e}"


def pairs(sde: VPSDE, net: ScoreNet, settings: Settings, seed: int) -> list[Pair]:
    """Draw the pairs without micro-batches, with them, and with the lone sample on the reference backend."""
    many, lone = (sample_seeds(seed, n, start).to(net.mean.device) for n, start in ((BATCH, 0), (1, WHICH)))

    def drawn(seeds: Tensor, micro_batch: int | None = None) -> Tensor:
        x = sample(
            sde, net, (len(seeds), len(net.mean)), steps=settings.sampling_steps, method="ancestral", eps=EPS,
            seed=seeds, micro_batch=micro_batch, progress=False,
        )  # fmt: skip
        return unscaled(x[WHICH if len(seeds) > 1 else 0])

    found = [Pair("the batch at once", drawn(many), drawn(lone))]
    # one sample at a time is always equal; in larger micro-batches that depends on the GEMM treating all rows alike
    for size in (MICRO_BATCH, 1):
        found.append(Pair(f"micro_batch={size}", drawn(many, size), drawn(lone, size)))
        if torch.equal(found[-1].of_batch, found[-1].alone):
            break
    with pyflow.backend("reference"):
        found.append(Pair(f"{found[-1].how}, alone by backend reference", found[-1].of_batch, drawn(lone, size)))
    return found


def picture(
    drawn: Sequence[Drawn], found: Sequence[Pair], images: _data.Images, subtitle: str, out: Path, finals: int = 6
) -> None:
    """Draw for each method one sample over time and final samples, and the batch's sample beside the lone one."""
    gap = torch.ones(1, images.dim)
    rows = torch.stack([torch.cat((d.states, gap, d.samples[1 : finals + 1])) for d in drawn])
    real = images.test[: rows.shape[1]].float().add(0.5).div(images.levels)[None]
    lone = torch.stack([torch.stack((pair.of_batch, pair.alone)) for pair in found[:-1]])
    times = ", ".join(f"{t:.2g}" for t in drawn[0].times)

    def panel(title: str, labels: Sequence[str], values: Tensor) -> _pictures.Panel:
        return _pictures.Panel(title, labels, values.unflatten(-1, images.shape))

    said = "; ".join(f"{p.how}, {p.said}" for p in found[:-1])
    _pictures.draw(
        out, "Reverse SDEs on digits: one network, every method", subtitle,
        [
            panel(
                f"One sample at t = {times}; then {finals} other final samples",
                [d.method.replace("_", "\n") for d in drawn], rows,
            ),
            panel("Held-out digits", ["real"], real),
            panel(
                f"Sample {WHICH} of a batch of {BATCH}, and the same sample drawn alone: {said}",
                [p.how.replace(" at", "\nat").replace("=", "\n= ") for p in found[:-1]], lone,
            ),
        ],
    )  # fmt: skip
