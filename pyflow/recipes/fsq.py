"""Train an autoencoder on photographs with FSQ and with VQ at two codebook sizes; follow which codes they use."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize

from pyflow.nn import FSQ
from pyflow.ops import codebook_usage

from . import _data, _demo, _pictures
from ._demo import synchronize, threads
from ._loops import cosine_rate

# the paper's levels for 2**8 and 2**12 codes; VQ gets as many codes as the FSQ it is compared with
LEVELS = ((8, 6, 5), (7, 5, 5, 5, 5))
CROSSOVER = 1000
# the options that vector-quantize-pytorch's README recommends against unused codes
REVIVED = {"kmeans_init": True, "threshold_ema_dead_code": 2}
VQS = {"plain": ("VQ",), "revived": ("VQ revived",), "both": ("VQ", "VQ revived")}
# FSQ at the larger size also trains LONGER times as many steps: an unused code may be one that is not used yet
LONG, LONGER = "FSQ longer", 4
# every point of a curve counts the codes in the crops of this many steps: nearly as many tokens as all tiles have
COUNTED = 100
# usage from which the verdict says "nearly every code"
NEAR = 0.95
# difference in PSNR, in dB, up to which two models count as equal
EQUAL = 0.1
# one token per DOWN x DOWN pixels
DOWN = 4
# tiles in one evaluation: few, since VQ stores a distance for every pair of token and code
PART = 3


@dataclass(frozen=True)
class Settings:
    """Autoencoder and training, the same for all quantisers."""

    width: int = 64
    latent: int = 16
    blocks: int = 2
    steps: int = 700
    batch: int = 12
    crop: int = 32
    rate: float = 5e-3
    warmup: int = 50
    # CPU threads: layers this small gain nothing from two, and one gives the same numbers on every machine
    threads: int | None = 1


@dataclass(frozen=True)
class Training:
    """What a training took; usage maps every COUNTED-th step to the share of the codes in use since the last."""

    steps: int
    step_seconds: float
    usage: dict[int, float]


@dataclass(frozen=True)
class Score:
    """Scores of one trained autoencoder; usage and perplexity over all tiles, and over the held-out tiles."""

    quantizer: str
    codes: int
    mse: float
    psnr: float
    usage: float
    perplexity: float
    held_out_usage: float
    held_out_perplexity: float
    training: Training


@dataclass(frozen=True)
class FSQScore(Score):
    """Also the usage over the tiles at every offset, and the perplexity if the channels were independent."""

    offsets_usage: float
    independent_perplexity: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER",
        help="folder of images (default: photographs that come with scikit-image, scikit-learn)",
    )  # fmt: skip
    parser.add_argument("--steps", type=_demo.positive, help=f"training steps of each model (default {Settings.steps})")
    parser.add_argument(
        "--vq", choices=VQS, default="both",
        help="plain: VQ with its default options; revived: with k-means initialisation and replacement of dead codes; "
        "both (default)",
    )  # fmt: skip
    _demo.add_arguments(parser, out="outputs/fsq.png", seed="weights, batches and VQ's random choices")


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    device = _demo.chosen_device(args)
    settings = Settings(steps=20, warmup=5) if args.quick else Settings()
    if args.steps:
        settings = replace(settings, steps=args.steps)

    def work() -> dict[str, object]:
        with threads(settings.threads):
            return demo(_data.photographs(args.data), settings, args, device)

    return _demo.run("fsq", args, work)


def demo(
    photographs: _data.Photographs, settings: Settings, args: argparse.Namespace, device: torch.device
) -> dict[str, object]:
    """Train with every quantiser at every codebook size, score, draw; returns the metrics."""
    began = time.perf_counter()
    train, test = photographs.train, photographs.test
    tokens = (len(train) + len(test)) * (_data.TILE // DOWN) ** 2
    print(
        f"{len(train):,} training tiles of {_data.TILE} x {_data.TILE} pixels and {len(test):,} held-out tiles, "
        f"without overlap, from {len(photographs.names)} photographs: {shortened(photographs.names)}\n"
        f"all models: same initial weights and batches, {settings.steps:,} steps ({LONG}: {LONGER} times as many); "
        f"one token per {DOWN} x {DOWN} pixels"
    )
    for name in VQS[args.vq]:
        options = [f"{key}={value}" for key, value in REVIVED.items() if name == "VQ revived"]
        print(f"{name}: VectorQuantize({', '.join([str(settings.latent), 'codes', *options])}), defaults otherwise")
    models, scores = [], []
    plan = [(name, levels) for levels in LEVELS for name in ("FSQ", *VQS[args.vq])]
    for name, levels in (*plan, (LONG, LEVELS[-1])):
        model = build(name, levels, settings, args.seed).to(device)
        schedule = replace(settings, steps=settings.steps * (LONGER if name == LONG else 1))
        training = fit(model, train, schedule, args.seed, f"{name} {math.prod(levels):,}")
        models.append(model)
        scores.append(score(model, photographs, name, training))
    print(
        f"\n{table(scores)}\nusage and perplexity over the {tokens:,} tokens of all tiles, then over held-out tiles; "
        "MSE and PSNR over held-out tiles\n"
    )
    sentences = verdict(scores)
    print(*sentences, f"The paper's results are on ImageNet, these on {len(photographs.names)} photographs.", sep="\n")
    subtitle = f"{settings.steps:,} steps each, {LONG} {LONGER} times as many; seed {args.seed}"
    picture(models, scores, test, subtitle, args.out)
    return {
        "data": str(args.data or "scikit-image, scikit-learn"), "photographs": photographs.names, "seed": args.seed,
        "device": str(device), "backend": args.backend, "settings": asdict(settings), "tokens": tokens,
        "scores": [asdict(s) for s in scores], "verdict": sentences, "total_seconds": time.perf_counter() - began,
    }  # fmt: skip


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Autoencoder(nn.Module):
    """Encoder, quantiser and decoder with one token per DOWN x DOWN pixels."""

    quantizer: Any  # FSQ or VectorQuantize

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, pixels = settings.width, 3 * DOWN**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(DOWN), nn.Conv2d(pixels, width, 3, padding=1),
            *(Residual(width) for _ in range(settings.blocks)), nn.Conv2d(width, settings.latent, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(settings.latent, width, 1), *(Residual(width) for _ in range(settings.blocks)),
            nn.Conv2d(width, pixels, 3, padding=1), nn.PixelShuffle(DOWN),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | int]:
        """Map x (B, 3, H, W) in [-1, 1] to (reconstruction, tokens (B, H / DOWN, W / DOWN), the quantiser's loss)."""
        z, indices, *losses = self.quantizer(self.encoder(x))
        return self.decoder(z), indices, sum(losses)


def build(name: str, levels: Sequence[int], settings: Settings, seed: int) -> Autoencoder:
    """Return an autoencoder; the initial encoder and decoder do not depend on the quantiser."""
    torch.manual_seed(seed)
    model = Autoencoder(settings)
    if name in ("FSQ", LONG):
        model.quantizer = FSQ(levels, dim=settings.latent)
    else:
        options = REVIVED if name == "VQ revived" else {}
        model.quantizer = VectorQuantize(settings.latent, math.prod(levels), accept_image_fmap=True, **options)
    return model


def fit(model: Autoencoder, tiles: Tensor, settings: Settings, seed: int, name: str) -> Training:
    """Train on random crops."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model.quantizer, VectorQuantize):
        start_codebook(model, tiles, settings, device)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=device.type in ("cpu", "cuda"))
    model.train()
    tokens: list[Tensor] = []
    usage: dict[int, float] = {}
    running, began = None, time.perf_counter()
    with _demo.bar(settings.steps, name) as bar:
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = cosine_rate(step, settings.rate, settings.warmup, settings.steps)
            x = scaled(crops(tiles, settings.batch, settings.crop, generator).to(device))
            reconstruction, indices, penalty = model(x)
            error = F.mse_loss(reconstruction, x)
            optimizer.zero_grad()
            (error + penalty).backward()
            optimizer.step()
            tokens.append(indices)
            if len(tokens) == min(COUNTED, settings.steps):
                usage[step + 1] = codebook_usage(torch.cat(tokens), model.quantizer.codebook_size).fraction.item()
                tokens.clear()
            running = error.detach() if running is None else running.lerp(error.detach(), 0.05)
            bar.update()
            if step % 20 == 19 or step + 1 == settings.steps:
                bar.set_postfix_str(f"loss {running.item():.4f}, {decibels(running.item() / 4):.2f} dB")
        synchronize(device)
    return Training(settings.steps, (time.perf_counter() - began) / settings.steps, usage)


@torch.no_grad()
def start_codebook(model: Autoencoder, tiles: Tensor, settings: Settings, device: torch.device) -> None:
    """Run the k-means initialisation, if it is on, with two tokens per code: one batch has fewer tokens than codes."""
    if not model.quantizer._codebook.initted:
        n = -(-2 * model.quantizer.codebook_size * DOWN**2 // settings.crop**2)
        x = crops(tiles, n, settings.crop, torch.Generator().manual_seed(0))
        model.quantizer(model.encoder(scaled(x.to(device))))


def crops(tiles: Tensor, n: int, size: int, generator: torch.Generator) -> Tensor:
    """Return n random crops of the tiles, (n, 3, size, size)."""
    which = torch.randint(len(tiles), (n,), generator=generator).tolist()
    corners = torch.randint(_data.TILE - size + 1, (n, 2), generator=generator).tolist()
    return torch.stack([tiles[i, :, y : y + size, x : x + size] for i, (y, x) in zip(which, corners, strict=True)])


def scaled(pixels: Tensor) -> Tensor:
    """Scale uint8 pixels to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def decibels(mse: float) -> float:
    """Return the PSNR in dB of a mean squared error of pixels in [0, 1]."""
    return -10 * math.log10(mse)


@torch.no_grad()
def encode(model: Autoencoder, tiles: Tensor) -> Tensor:
    """Return the tokens of the tiles, on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    return torch.cat([model.quantizer(model.encoder(scaled(part.to(device))))[1].cpu() for part in tiles.split(PART)])


@torch.no_grad()
def reconstruct(model: Autoencoder, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return (reconstructions in [0, 1] of the tiles' shape, tokens), both on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    pixels, tokens = [], []
    for part in tiles.split(PART):
        reconstruction, indices, _ = model(scaled(part.to(device)))
        pixels.append((reconstruction.clamp(-1, 1) / 2 + 0.5).cpu())
        tokens.append(indices.cpu())
    return torch.cat(pixels), torch.cat(tokens)


def score(model: Autoencoder, photographs: _data.Photographs, name: str, training: Training) -> Score:
    quantizer, codes = model.quantizer, model.quantizer.codebook_size
    pixels, held_out = reconstruct(model, photographs.test)
    mse = F.mse_loss(pixels.double(), photographs.test.double() / 255).item()
    tokens = torch.cat((held_out, encode(model, photographs.train)))
    every, some = codebook_usage(tokens, codes), codebook_usage(held_out, codes)
    values = (
        name, codes, mse, decibels(mse), every.fraction.item(), every.perplexity.item(), some.fraction.item(),
        some.perplexity.item(), training,
    )  # fmt: skip
    if not isinstance(quantizer, FSQ):
        return Score(*values)
    # one token for every pixel: the tiles, less DOWN rows and columns, at every offset
    tiles, edge = torch.cat((photographs.test, photographs.train)), _data.TILE - DOWN
    offsets = [encode(model, tiles[..., y : y + edge, x : x + edge]) for y in range(DOWN) for x in range(DOWN)]
    digits = quantizer.indices_to_level_indices(tokens).flatten(0, -2).unbind(-1)
    alone = [codebook_usage(d, n).perplexity.item() for d, n in zip(digits, quantizer.levels, strict=True)]
    return FSQScore(*values, codebook_usage(torch.cat(offsets), codes).fraction.item(), math.prod(alone))


def table(scores: Sequence[Score]) -> str:
    words = ("codes", "steps", "MSE", "PSNR", "usage", "perplexity", "held out", "perplexity", "s/step")
    widths = (7, 8, 10, 10, 9, 12, 10, 12, 9)
    lines = [" " * 12 + "".join(f"{word:>{n}}" for word, n in zip(words, widths, strict=True))]
    lines += [
        f"{s.quantizer:<12}{s.codes:>7,}{s.training.steps:>8,}{s.mse:>10.5f}{s.psnr:>7.2f} dB{s.usage:>8.1%} "
        f"{s.perplexity:>11,.0f}{s.held_out_usage:>10.1%}{s.held_out_perplexity:>12,.0f}{s.training.step_seconds:>9.4f}"
        for s in scores
    ]
    return "\n".join(lines)


def verdict(scores: Sequence[Score]) -> list[str]:
    """Return sentences that say whether the paper's findings hold in these scores."""
    *fsq, long = [s for s in scores if isinstance(s, FSQScore)]
    names = dict.fromkeys(s.quantizer for s in scores if not isinstance(s, FSQScore))
    used = " and ".join(f"{s.usage:.1%} of {s.codes:,} codes ({held(s.usage >= NEAR)})" for s in fsq)
    return [
        f"Paper: FSQ uses nearly every code. Here it uses {used}.",
        *unused(fsq[-1], long),
        *(crossover(fsq, [s for s in scores if s.quantizer == name]) for name in names),
    ]


def held(holds: bool) -> str:
    return "this holds" if holds else "this does not hold"


def unused(short: FSQScore, long: FSQScore) -> list[str]:
    """Return sentences on what brings the unused codes into use, and on what keeps them unused."""
    more = (1 - DOWN / _data.TILE) ** 2 * DOWN**2
    return [
        f"After {short.training.steps:,} and {long.training.steps:,} steps FSQ uses {short.usage:.1%} and "
        f"{long.usage:.1%} of {long.codes:,} codes; over the tiles at every offset, {more:.0f} times as many tokens, "
        f"{short.offsets_usage:.1%} and {long.offsets_usage:.1%}: {held(long.offsets_usage >= NEAR)} in the end.",
        f"Its tokens have perplexities of {short.perplexity:,.0f} and {long.perplexity:,.0f}; if its channels were "
        f"independent these would be {short.independent_perplexity:,.0f} and {long.independent_perplexity:,.0f}.",
    ]


def crossover(fsq: Sequence[Score], vq: Sequence[Score]) -> str:
    """Return one sentence on which quantiser reconstructs better below and above CROSSOVER codes."""
    gains = [theirs.psnr - ours.psnr for ours, theirs in zip(fsq, vq, strict=True)]
    found = [f"at {s.codes:,} codes {winner(gain, vq[0].quantizer)}" for s, gain in zip(fsq, gains, strict=True)]
    holds = all(gain > EQUAL if s.codes < CROSSOVER else gain < -EQUAL for s, gain in zip(fsq, gains, strict=True))
    more = [f"{s[0].quantizer} {s[-1].psnr - s[0].psnr:+.2f} dB" for s in (fsq, vq)]
    return (
        f"Paper: VQ reconstructs better below about {CROSSOVER:,} codes, FSQ above. Here, {' and '.join(found)}: "
        f"{held(holds)}; the larger codebook brings {' and '.join(more)}, "
        f"and {vq[0].quantizer} uses {vq[-1].usage:.1%} of it."
    )


def winner(gain: float, name: str) -> str:
    if abs(gain) <= EQUAL:
        return f"the two are equal within {EQUAL} dB ({name} {gain:+.2f} dB)"
    return f"{name if gain > 0 else 'FSQ'} is better by {abs(gain):.2f} dB"


def picture(models: Sequence[Autoencoder], scores: Sequence[Score], test: Tensor, subtitle: str, out: Path) -> None:
    """Draw the usage over the steps, and held-out tiles with their reconstructions and tokens, at both sizes."""
    # ten tiles from the half with more contrast
    rich = test.float().std((1, 2, 3)).argsort(descending=True)[: max(1, len(test) // 2)].sort().values
    tiles = test[rich[:: -(-len(rich) // 10)]]
    drawn = [reconstruct(model, tiles) for model in models]

    def rows(title: str, codes: int, images: Sequence[Tensor]) -> _pictures.Panel:
        here = [(s, image) for s, image in zip(scores, images, strict=True) if s.codes == codes]
        labels = [f"{s.quantizer}\n{s.psnr:.1f} dB\n{s.usage:.0%} used" for s, _ in here]
        return _pictures.Panel(f"{codes:,} codes: {title}", labels, torch.stack([image for _, image in here]))

    reconstructions = [pixels.movedim(1, -1) for pixels, _ in drawn]
    maps = [_pictures.code_map(tokens, s.codes) for s, (_, tokens) in zip(scores, drawn, strict=True)]
    panels = [_pictures.Panel("Held-out photographs", ["original"], tiles.movedim(1, -1)[None] / 255)]
    sizes = list(dict.fromkeys(s.codes for s in scores))
    panels += [rows("reconstruction", codes, reconstructions) for codes in sizes]
    panels += [rows("code map, one colour per code", codes, maps) for codes in sizes]
    charts = [
        _pictures.Chart(
            f"{codes:,} codes: share used within {COUNTED} steps", "training step",
            {legend(s): s.training.usage for s in scores if s.codes == codes},
        )
        for codes in sizes
    ]  # fmt: skip
    _pictures.draw(out, "FSQ and VQ on photographs", subtitle, panels, cell=0.9, charts=charts)


def legend(score: Score) -> str:
    return score.quantizer + (f", {score.offsets_usage:.0%} over all offsets" if isinstance(score, FSQScore) else "")


def shortened(names: Sequence[str], most: int = 8) -> str:
    """Join the first `most` names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
