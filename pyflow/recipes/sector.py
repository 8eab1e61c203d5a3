"""Compute the probability that n ducks on a round pond share a sector: the exact curve, checked by random trials."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import matplotlib
import numpy as np

from pyflow.ops import uniform
from pyflow.stats import sector_probability, sector_probability_mc

from . import _demo

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Wedge

TAU = 2 * math.pi
POINTS = (2, 3, 4, 8, 16, 64, 256)
# angles per curve at which trials are run
PLACES = 16
DUCKS, HALF = 4, math.pi
# points of the trials that are timed
TIMED = 32


@dataclass(frozen=True)
class Curve:
    """Exact probability and estimate from trials at some angles, for one n."""

    n: int
    theta: list[float]
    probability: list[float]
    estimate: list[float]
    standard_error: list[float]

    @property
    def deviations(self) -> np.ndarray:
        """Estimate minus probability, in standard errors."""
        return (np.array(self.estimate) - self.probability) / self.standard_error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--points", type=_demo.positive, nargs="+", default=POINTS, metavar="N",
        help=f"numbers of points, one curve each (default {' '.join(map(str, POINTS))})",
    )  # fmt: skip
    parser.add_argument("--trials", type=_demo.positive, help="trials per curve (default 4,000,000)")
    _demo.add_arguments(parser, out="outputs/sector.png", seed="the trials", quick="fewer trials", device="cpu")


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    trials = args.trials or (100_000 if args.quick else 4_000_000)
    return _demo.run("sector", args, lambda: demo(args, trials))


def demo(args: argparse.Namespace, trials: int) -> dict[str, object]:
    """Run trials, compare, time, draw; returns the metrics."""
    print(f"{trials:,} trials for each n, the same ones at every angle of a curve\n")
    bar = _demo.tracked(args.points, "", "curve")
    curves = []
    for n in bar:
        bar.set_description(f"n = {n}")
        curves.append(curve(n, trials, args.seed, args.device))
    print(table(curves))
    deviations = np.concatenate([c.deviations for c in curves])
    worst, within = np.abs(deviations).max(), (np.abs(deviations) <= 1).mean()
    print(
        f"\nof {len(deviations)} points {within:.0%} lie within one standard error of the formula (68 % expected), the "
        f"largest deviation is {worst:.1f}"
    )
    exact, ducks = sector_probability(DUCKS, HALF), sector_probability_mc(DUCKS, HALF, trials, args.seed, step=1)
    print(
        f"probability of four ducks, half a pond: 1/2 (formula {exact:.15f}, "
        f"trials {ducks.probability:.5f} ± {ducks.standard_error:.5f})"
    )
    log = sector_probability(10_000, HALF, log=True) / math.log(10)
    print(f"probability of ten thousand ducks, half a pond: 10^{log:.1f}")
    ours, numpys = paces(min(trials, 200_000), args.seed, rounds=3 if args.quick else 11)
    print(f"time per trial of {TIMED} points: {ours * 1e9:.1f} ns, in NumPy (draw, sort, gaps) {numpys * 1e9:.1f} ns, "
          f"{numpys / ours:.1f} x")  # fmt: skip
    picture(curves, trials, args)
    return {
        "trials": trials, "seed": args.seed, "device": args.device, "backend": args.backend,
        "four_ducks": {"formula": exact, "estimate": ducks.probability, "standard_error": ducks.standard_error},
        "within_one_standard_error": within, "worst_deviation": worst, "seconds_per_trial": ours,
        "numpy_seconds_per_trial": numpys, "curves": [asdict(c) for c in curves],
    }  # fmt: skip


def curve(n: int, trials: int, seed: int, device: str) -> Curve:
    theta = angles(n, np.linspace(0.02, 0.98, PLACES)) if n > 1 else np.linspace(0.5, 6, PLACES)
    estimate = sector_probability_mc(n, theta, trials, seed, device=device)
    columns = theta, sector_probability(n, theta), estimate.probability, estimate.standard_error
    return Curve(n, *(np.asarray(column).tolist() for column in columns))


def angles(n: int, probability: np.ndarray) -> np.ndarray:
    """Return the angles at which the curve of n points reaches each probability, by bisection."""
    low, high = np.zeros_like(probability), np.full_like(probability, TAU)
    for _ in range(50):
        middle = (low + high) / 2
        below = sector_probability(n, middle) < probability
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


def table(curves: Sequence[Curve]) -> str:
    """Return a table with the middle angle of each curve."""
    lines = [f"{'points':>7}{'theta':>9}{'probability':>13}{'trials':>10}{'± one s.e.':>12}{'deviation':>11}"]
    for c in curves:
        i = len(c.theta) // 2
        lines.append(
            f"{c.n:>7,}{math.degrees(c.theta[i]):>8.1f}°{c.probability[i]:>13.6f}{c.estimate[i]:>10.6f}"
            f"{c.standard_error[i]:>12.6f}{c.deviations[i]:>+8.1f} s.e."
        )
    return "\n".join(lines)


def paces(trials: int, seed: int, rounds: int) -> tuple[float, float]:
    """Return seconds per trial of TIMED points in pyflow and in NumPy, the shortest of several rounds."""
    theta, generator = 5.5, np.random.default_rng(seed)

    def numpys() -> int:
        at = np.sort(TAU * generator.random((trials, TIMED)), axis=1)
        gaps = np.concatenate((np.diff(at, axis=1), TAU + at[:, :1] - at[:, -1:]), axis=1)
        return int((gaps.max(axis=1) >= TAU - theta).sum())

    def ours() -> int:
        return int(sector_probability_mc(TIMED, theta, trials, seed).count)

    best = []
    for function in (ours, numpys):
        best.append(min(seconds(function) for _ in range(rounds)) / trials)
    return best[0], best[1]


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def plain_sum(n: int, theta: float) -> float:
    """Return Stevens' alternating sum in plain float64."""
    x = 1 - theta / TAU
    return sum((-1.0) ** (k - 1) * math.comb(n, k) * (1 - k * x) ** (n - 1) for k in range(1, n + 1) if k * x < 1)


def picture(curves: Sequence[Curve], trials: int, args: argparse.Namespace) -> None:
    """Draw the curves with their trials, the deviations, four ducks, and the error of the plain sum."""
    figure, ((pond, main), (lost, beside)) = plt.subplots(
        2, 2, figsize=(12, 8.4), width_ratios=(1, 1.7), height_ratios=(1.45, 1), layout="constrained"
    )
    figure.suptitle("n random points of a disc inside one sector", fontsize=13, fontweight="bold", x=0.01, ha="left")
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(curves)))
    for c, color in zip(curves, colors, strict=True):
        theta = np.linspace(1e-3, TAU, 400)
        degrees = np.degrees(c.theta)
        main.plot(np.degrees(theta), sector_probability(c.n, theta), color=color, lw=1.3, label=f"n = {c.n:,}")
        main.errorbar(degrees, c.estimate, 2 * np.array(c.standard_error), fmt=".", color=color, ms=4, lw=1, capsize=2)
        beside.errorbar(degrees, c.deviations, 1, fmt=".", color=color, ms=4, lw=0.8)
    main.plot(math.degrees(HALF), 0.5, "o", ms=9, mfc="none", mec="crimson", label="four ducks, half a pond: 1/2")
    main.set(title=f"Formula (lines), {trials:,} trials ± 2 standard errors (points)", ylabel="probability")
    main.legend(fontsize=8, frameon=False)
    beside.axhline(0, color="0.3", lw=0.8)
    beside.set(title="Trials minus formula, in standard errors, ± 1", xlabel="angle of the sector", ylim=(-4.5, 4.5))
    for axes in (main, beside):
        axes.set_xticks(range(0, 361, 60), [f"{a}°" for a in range(0, 361, 60)])
        axes.grid(alpha=0.2)
    draw_pond(pond, args.seed)
    draw_losses(lost)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=130)
    plt.close(figure)


def draw_pond(axes: Axes, seed: int) -> None:
    """Draw the seed's first four ducks that share half of the pond, and that half."""
    for step in range(1000):
        turn, radius = uniform((2, DUCKS), seed=seed, step=step).double().numpy()
        at = np.sort(turn)
        gaps = np.append(np.diff(at), 1 + at[0] - at[-1])
        if gaps.max() >= 0.5:
            break
    # the sector begins at the end of the largest gap, less 4 degrees
    begin = 360 * at[(gaps.argmax() + 1) % DUCKS] - 4
    axes.add_patch(Circle((0, 0), 1, color="#cfe4f2"))
    axes.add_patch(Wedge((0, 0), 1, begin, begin + math.degrees(HALF), color="#8cbfdd"))
    axes.plot(np.sqrt(radius) * np.cos(TAU * turn), np.sqrt(radius) * np.sin(TAU * turn), "o", ms=11, mfc="#f2c037",
              mec="0.25")  # fmt: skip
    axes.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal", title="Four ducks, half a pond: 1/2")
    axes.axis("off")


def draw_losses(axes: Axes) -> None:
    """Draw the relative error of 1 - P computed by the plain sum, at angles where 1 - P is small."""
    share = np.linspace(1.2, 8, 200)
    sizes = (32, 64, 128, 256)
    for n, color in zip(sizes, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(sizes))), strict=True):
        theta = TAU * (1 - share / n)
        exact = np.asarray(sector_probability(n, theta, complement=True))
        error = [abs((1 - plain_sum(n, t)) / e - 1) for t, e in zip(theta.tolist(), exact, strict=True)]
        axes.semilogy(share, np.clip(error, 1e-17, 1e3), color=color, lw=1, label=f"n = {n}")
    axes.axhline(1e-12, color="crimson", lw=0.8, ls="--", label="pyflow's bound")
    axes.set(
        title="Error of 1 − P from the plain float64 sum", xlabel="n (1 − θ / 2π)", ylabel="relative error",
        ylim=(1e-17, 1e3),
    )  # fmt: skip
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.2)
